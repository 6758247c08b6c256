"""Build the book: run the chapters, write the notebooks, make the HTML; each has --help.

A chapter is edited in its text twin, book/py/NAME.py; book/NAME.ipynb is made from it.
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

ROOT = Path(__file__).resolve().parents[1]
# Nothing ends by the clock, since a busy machine may take ten times as long: a kernel may take a
# day to start and to hand over a cell's output, and a cell as long as it likes.
DAY = 24 * 60 * 60  # seconds
REPORT_EVERY = 20  # seconds
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def twins() -> list[Path]:
    return sorted((ROOT / "book" / "py").glob("*.py"))


def read_twin(path: Path) -> nbformat.NotebookNode:
    """Read a twin as a notebook without outputs. Cell ids depend on the position alone."""
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"  # random ids would change the file at each run
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
    for file in [*sorted(files), Path(__file__), *sorted(filter(Path.is_file, package))]:
        total.update(f"{os.path.relpath(file, ROOT)}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


def run_chapter(twin: Path, target: Path) -> bool:
    """Execute one chapter into `target`. On an error print it, write nothing, return False."""
    notebook = read_twin(twin)
    try:
        execute(notebook, ROOT / "book", twin.stem)
    except (CellExecutionError, TimeoutError, RuntimeError) as error:
        print(f"  {twin.stem} FAILED\n{error}", flush=True)
        return False
    write_text(target, nbformat.writes(notebook) + "\n")
    return True


def keep(twin: Path, stored: Path, renamed: bool = False) -> bool:
    """Write `stored` from its twin with the outputs that it has; False if its code has changed.

    With `renamed`, changed code is taken on trust where there are as many code cells as before.
    """
    notebook, old = read_twin(twin), nbformat.read(stored, as_version=4)
    pairs = [[c for c in n.cells if c.cell_type == "code"] for n in (notebook, old)]
    same = [cell.source for cell in pairs[0]] == [cell.source for cell in pairs[1]]
    if not same and not (renamed and len(pairs[0]) == len(pairs[1])):
        print(f"  {twin.stem}: its code has changed, so run it", flush=True)
        return False
    for cell, before in zip(*pairs, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    write_text(stored, nbformat.writes(notebook) + "\n")
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
        only: these chapters alone, such as 04_ranked_boxes.
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
    """Twins -> _build/executed, only what has changed."""
    folder = ROOT / "_build" / "executed"
    run_chapters(folder, cache=folder)


def html(out: Positional[Path] = ROOT, stored: bool = False, strict: bool = False) -> None:
    """OUT/_build/html from a clean copy of the book; skipped when nothing has changed.

    Args:
        out: folder to fill.
        stored: from book/*.ipynb as they are, instead of _build/executed.
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
        chapter = ROOT / ("book" if stored else "_build/executed") / f"{twin.stem}.ipynb"
        if not chapter.exists():
            sys.exit(f"{chapter} is missing: run `python tools/book.py execute` first.")
        shutil.copy(chapter, source / "book")
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
    commands = {"notebooks": notebooks, "execute": execute_all, "html": html}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    main()
