"""Build the book: run the chapters, write the notebooks, make the HTML; each has --help.

A chapter is edited in its text twin, book/py/NAME.py; book/NAME.ipynb is its student edition.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import jupytext
import nbformat
import tyro
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tyro.conf import Positional

from covidmask.files import write_text  # its __init__.py sets what the kernels inherit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.editions import ANSWERS, SETUP, counts, edition, tags

ROOT = Path(__file__).resolve().parents[1]
# Nothing ends by the clock, since a busy machine may take ten times as long: a kernel may take a
# day to start and to hand over a cell's output, and a cell as long as it likes.
DAY = 24 * 60 * 60  # seconds
REPORT_EVERY = 20  # seconds
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def twins() -> list[Path]:
    return sorted((ROOT / "book" / "py").glob("*.py"))


def read_twin(path: Path) -> nbformat.NotebookNode:
    """Read a twin as a notebook without outputs."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    notebook.nbformat, notebook.nbformat_minor = 4, 5  # the first version with cell ids
    return notebook


class Client(NotebookClient):
    """Runs cells; leaves widgets alone.

    nbclient plays the browser's part for ipywidgets and answers on the channel on which it also
    waits for the kernel. Now and then a request is lost there, and both sides wait for ever.
    """

    def handle_comm_msg(self, outs, msg, cell_index) -> None:
        pass


def execute(notebook: nbformat.NotebookNode, folder: Path, name: str) -> None:
    """Run every cell in `folder`, in place, and drop what depends on the machine."""
    code = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    start, at, ended = time.monotonic(), "the kernel starts", threading.Event()

    def hook(cell: nbformat.NotebookNode, cell_index: int) -> None:
        nonlocal at
        at = f"cell {code.index(cell_index) + 1} of {len(code)}"

    def report() -> None:
        while not ended.wait(REPORT_EVERY):
            minutes, seconds = divmod(int(time.monotonic() - start), 60)
            print(f"  {name}: {at}, {minutes} min {seconds:02d} s", flush=True)

    threading.Thread(target=report, daemon=True).start()
    try:
        Client(
            notebook,
            timeout=None,
            startup_timeout=DAY,
            iopub_timeout=DAY,  # by default what comes after 4 s is lost without a word
            on_cell_execute=hook,
            resources={"metadata": {"path": str(folder)}},
            extra_arguments=["--log-level=ERROR"],  # start-up notes are no reader's concern
        ).execute()
    finally:
        ended.set()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})  # drops the Python version
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # wall-clock times
        if cell.cell_type == "code":  # a live widget is dead in a file
            live = "remove-output" in cell.metadata.get("tags", [])
            cell.outputs = [] if live else tidy(cell.outputs)


def tidy(outputs: Iterable[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without tqdm's bars; neighbouring prints become one (the kernel cuts by chance)."""
    result: list[nbformat.NotebookNode] = []
    for output in outputs:
        name = output.get("name") if output.output_type == "stream" else None
        if name == "stderr" and not re.sub(r"[^\r\n]*\d+%\|[^\r\n]*", "", output.text).strip():
            continue
        if name and result and result[-1].get("name") == name:
            result[-1].text += output.text
        else:
            result.append(output)
    return result


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of `files`, and of what a chapter imports or loads: the package."""
    package = [f for f in (ROOT / "covidmask").rglob("*") if "__pycache__" not in f.parts]
    total = hashlib.sha256()
    here = sorted(Path(__file__).parent.glob("*.py"))
    for file in [*sorted(files), *here, *sorted(filter(Path.is_file, package))]:
        total.update(f"{os.path.relpath(file, ROOT)}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def run_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The code cells of a twin, or of its instructor edition, that come from the twin and run."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [c for c in code if c.source != SETUP and not tags(c) & {"starter", "wrong"}]


def with_outputs(
    twin: nbformat.NotebookNode, other: nbformat.NotebookNode, hidden: bool
) -> nbformat.NotebookNode:
    """Put the outputs of `other` into a twin; without `hidden`, `other` is a student edition.

    Raises:
        ValueError: their code differs.
    """
    pairs = [
        [c for c in run_cells(n) if hidden or not tags(c) & {*ANSWERS, "check"}]
        for n in (twin, other)
    ]
    if [cell.source for cell in pairs[0]] != [cell.source for cell in pairs[1]]:
        raise ValueError("its code has changed, so run it")
    for number, (cell, made) in enumerate(zip(*pairs, strict=True), 1):
        cell.outputs, cell.execution_count = made.outputs, number
    return twin


def run_chapter(twin: Path, target: Path, which: str = "student") -> bool:
    """Execute one chapter, solutions included, and write an edition of it with its outputs.

    On an error print it, write nothing, return False.
    """
    notebook = read_twin(twin)
    try:
        whole = edition(notebook, twin.stem, "instructor")
        execute(whole, ROOT / "book", twin.stem)
        notebook = with_outputs(notebook, whole, hidden=True)
    except (CellExecutionError, TimeoutError, RuntimeError, ValueError) as error:
        print(f"  {twin.stem} FAILED\n{error}", flush=True)
        return False
    write_text(target, nbformat.writes(edition(notebook, twin.stem, which)) + "\n")
    return True


def keep(twin: Path, stored: Path, renamed: bool = False) -> bool:
    """Write `stored` from its twin with the outputs that it has; False if its code has changed.

    With `renamed`, changed code is taken on trust where there are as many code cells as before.
    """
    notebook, old = read_twin(twin), nbformat.read(stored, as_version=4)
    if renamed:
        code = [[c for c in run_cells(n) if not tags(c) & {*ANSWERS, "check"}]
                for n in (notebook, old)]  # fmt: skip
        if len(code[0]) == len(code[1]):
            for cell, before in zip(*code, strict=True):
                before.source = cell.source
    try:
        notebook = with_outputs(notebook, old, hidden=False)
    except ValueError as error:
        print(f"  {twin.stem}: {error}", flush=True)
        return False
    write_text(stored, nbformat.writes(edition(notebook, twin.stem, "student")) + "\n")
    return True


def run_chapters(
    target: Path,
    only: Sequence[str] = (),
    *,
    cache: Path | None = None,
    run: Callable = run_chapter,
) -> None:
    """Make every chapter, or those named in `only`, in the folder `target`, by `run(twin, file)`.

    With `cache`, a folder, only where a chapter, its twin or anything in the package has changed
    since the last good run. A chapter that fails keeps no other from running.
    """
    chapters, failed = {twin.stem: twin for twin in twins()}, []
    if unknown := set(only) - chapters.keys():
        sys.exit(f"No such chapter: {', '.join(sorted(unknown))}.")
    for name in sorted(only) or chapters:
        print(name, flush=True)
        files, stamp = (chapters[name], target / f"{name}.ipynb"), (cache or target) / f"{name}.key"
        if cache and holds(stamp, digest(filter(Path.is_file, files))):
            print("  unchanged, not run again", flush=True)
        elif not run(*files):
            failed.append(name)
        elif cache:
            write_text(stamp, digest(files))
    if failed:
        again = "execute" if cache == target else f"notebooks --only {' '.join(failed)}"
        sys.exit(
            f"Chapters that failed: {', '.join(failed)}. Their errors stand above. To go on (no "
            f"other chapter runs again):\n\n    {sys.executable} tools/book.py {again}\n"
        )


def notebooks(
    only: tuple[str, ...] = (),
    stored: bool = False,
    keep_outputs: bool = False,
    changed: bool = False,
) -> None:
    """Twins -> book/*.ipynb, executed in place.

    Args:
        only: these chapters alone, such as 06_ranked_boxes.
        stored: run nothing, since only text has changed: the stored outputs stay.
        keep_outputs: with --stored: also where code was only renamed.
        changed: only where something has changed since such a run.
    """
    os.environ["COVIDMASK_SEMISEG"] = ""  # what is committed shows phantoms, never a patient
    run = partial(keep, renamed=keep_outputs) if stored else run_chapter
    run_chapters(
        ROOT / "book", only, cache=ROOT / "_build" / "notebooks" if changed else None, run=run
    )


def execute_all() -> None:
    """Twins -> pages in _build/executed, only what has changed."""
    folder = ROOT / "_build" / "executed"
    run_chapters(folder, cache=folder, run=partial(run_chapter, which="page"))


def editions(
    out: Path = ROOT / "_build" / "course",
    which: tuple[str, ...] = ("student", "instructor"),
    only: tuple[str, ...] = (),
) -> None:
    """Twins, with the outputs stored in book/, -> OUT/EDITION/NAME.ipynb.

    Args:
        out: folder to fill.
        which: of student, instructor and test, which plants wrong answers before each check.
        only: these chapters alone.
    """
    for name in which:
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(ROOT / "book" / "real", out / name / "real")  # read beside a notebook
        for twin in twins():
            if not only or twin.stem in only:
                made = edition(stored_twin(twin), twin.stem, name)
                write_text(out / name / f"{twin.stem}.ipynb", nbformat.writes(made) + "\n")
    print(f"{out}: {', '.join(which)}")


def course(out: Path = ROOT / "_build" / "course") -> None:
    """What a teacher needs of each chapter: both editions, slides, an archive for otter-grader."""
    from tools import grading, slides

    editions(out)
    for folder in ("slides", "grading"):
        shutil.rmtree(out / folder, ignore_errors=True)
    slides.copy_parts(out / "slides")
    for twin in twins():
        notebook = stored_twin(twin)
        write_text(out / "slides" / f"{twin.stem}.html", slides.slides(notebook))
        grading.autograder(notebook, out / "grading" / f"{twin.stem}.zip")
    print(f"{out}: slides, grading")


def count() -> None:
    """Print what each chapter asks of its reader: code in view, words, exercises, questions."""
    rows = {twin.stem: counts(read_twin(twin)) for twin in twins()}
    titles = list(next(iter(rows.values())))
    print(f"{'':20}" + "".join(f"{title:>15}" for title in titles))
    for name, row in rows.items():
        print(f"{name:20}" + "".join(f"{row[title]:15,}" for title in titles))


def stored_twin(twin: Path) -> nbformat.NotebookNode:
    """A twin with the outputs of book/NAME.ipynb; of solutions none are stored."""
    stored = nbformat.read(ROOT / "book" / f"{twin.stem}.ipynb", as_version=4)
    try:
        return with_outputs(read_twin(twin), stored, hidden=False)
    except ValueError as error:
        sys.exit(f"{twin.stem}: {error}: `python tools/book.py notebooks --only {twin.stem}`")


def html(out: Positional[Path] = ROOT, stored: bool = False, strict: bool = False) -> None:
    """OUT/_build/html from a clean copy of the book; skipped when nothing has changed.

    Args:
        out: folder to fill.
        stored: with the outputs of book/*.ipynb, instead of _build/executed.
        strict: warnings are errors.
    """
    build = out.resolve() / "_build"
    source, pages, stamp = build / "book-source", build / "html", build / "html.key"
    shutil.rmtree(source, ignore_errors=True)
    skip = shutil.ignore_patterns("py", ".ipynb_checkpoints", "*.ipynb")
    shutil.copytree(ROOT / "book", source / "book", ignore=skip)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, source)
    for twin in twins():
        target = source / "book" / f"{twin.stem}.ipynb"
        if stored:
            page = edition(stored_twin(twin), twin.stem, "page")
            write_text(target, nbformat.writes(page) + "\n")
            continue
        chapter = ROOT / "_build" / "executed" / target.name
        if not chapter.exists():
            sys.exit(f"{chapter} is missing: run `python tools/book.py execute` first.")
        shutil.copy(chapter, target)
    key = digest(f for f in source.rglob("*") if f.is_file())
    if not strict and holds(stamp, key):
        print(f"{pages}: unchanged, not built again")
        return
    # A build after a failed one in the same folder forgets the warnings, so nothing is reused.
    stamp.unlink(missing_ok=True)
    for name in ("html", ".doctrees", ".jupyter_cache"):
        shutil.rmtree(build / name, ignore_errors=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", str(source), "--path-output", str(build.parent)]
    command += ["--all", "--keep-going", "-n"] + ["-W"] * strict
    code = subprocess.run(command, check=False).returncode
    if code or not (pages / "index.html").exists():
        sys.exit(f"The book was not built (Jupyter Book's exit status {code}); see above.")
    write_text(stamp, key)


def main() -> None:
    """Read the command line."""
    commands = {f.__name__: f for f in (notebooks, html, editions, course, count)}
    commands["execute"] = execute_all
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    main()
