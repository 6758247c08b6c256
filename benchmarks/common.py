"""What the benchmarks share: where results come from, how they are kept and how pages show them."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torchvision
import tyro

from covidmask import datasets, metrics, training
from covidmask.config import PRESETS, PhantomConfig
from covidmask.datasets.phantom_sets import GENERATOR, start_worker
from covidmask.files import SPLITS, phantoms_folder, write_text
from covidmask.training.compare import part_of  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
RESULTS, TWINS = ROOT / "results", ROOT / "book" / "py"
QUICK, QUICK_DATA = PRESETS["quick"], phantoms_folder("quick")
SOURCE = "command", "commit", "date", "torch"  # of each run that a file of results comes from


def environment() -> dict:
    """Where and from what the figures came; it stops where the code that runs is in no commit.

    Results, chapters and README may differ from it, and so may the shipped weights with the sums
    that stand in the package: `make results` fills them before, and results name the sums.
    """

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    commit = git("describe", "--always", "--exclude", "*")
    sums = "covidmask/models/weights.py"
    others = "benchmarks", "covidmask", ":!covidmask/models/shipped", f":!{sums}"
    line = r'^ *"[0-9a-f]{64}",$'
    if git("status", "--porcelain", "--", *others) or git("diff", "HEAD", f"-I{line}", "--", sums):
        if not os.environ.get("ALLOW_DIRTY"):
            sys.exit(
                "benchmarks/ or covidmask/ holds changes that are in no commit: commit them, so "
                "that the results can name the code (or set ALLOW_DIRTY=1 for a trial)"
            )
        commit += "-dirty"
    script = Path(sys.argv[0]).resolve()
    return {
        "command": " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]]),
        "commit": commit,
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
    }


def command(measure: Callable, own: Path, *pages, indent: int | None = 1) -> None:
    """Run a benchmark with its options from the command line; with --page only fill the pages.

    `measure` yields a path and what there is so far; see `save`. Results in the benchmark's `own`
    file fill pages: a path, the name of its marks, and what makes text of the results.
    """
    out = own
    if "--page" not in sys.argv:
        about = f"{sys.modules['__main__'].__doc__}\n--page only fills the pages."
        work = tyro.cli(measure, description=about)
        # rounding must depend neither on the machine's cores nor on a GPU
        torch.set_num_threads(1)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the processes that this one starts, too
        source = environment()  # first, so that the commit is that of the code which runs
        for out, result in work:
            save(out, source | result, indent)
    for page, name, text in pages:
        result = read(out)
        print(text(result))
        if out == own:
            fill(page, name, text(result))


def save(out: Path, result: dict, indent: int | None = 1) -> None:
    """Write a file of results; `parts` come beside those that it has of the same settings.

    Several processes may do so at a time.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        old = read(out)
        if "parts" in result and "parts" in old and same(old, result):
            both = {key: dict.fromkeys((*old[key].split(" and "), result[key])) for key in SOURCE}
            result |= {key: " and ".join(values) for key, values in both.items()}
            result |= {"parts": old["parts"] | result["parts"]}
        write_text(out, json.dumps(result, indent=indent) + "\n")
    finally:
        os.close(folder)  # and it is free for others


def same(old: dict, result: dict) -> bool:
    """Whether a file has results of the same settings; where and when they ran is none."""
    where = {*SOURCE, "hardware", "torchvision", "threads", "parts"}
    now = json.loads(json.dumps(result)).items()
    return all(old.get(k) == value for k, value in now if k not in where)


def complete(out: Path, settings: dict) -> bool:
    """Whether `out` has results of these settings, the phantoms' generator among them; says so."""
    if found := same(read(out), settings):
        print(f"{out.name}: is there, of these phantoms and settings")
    return found


def _one_thread() -> None:
    torch.set_num_threads(1)
    start_worker()  # a killed benchmark leaves no process behind that works on for nothing


def lacking(
    out: Path, settings: dict, parts: dict[str, tuple], jobs: int = 1
) -> Iterator[tuple[Path, dict]]:
    """Do what `out` lacks of the parts, each a function and its arguments; yield for `save`.

    `settings` decide the results, the phantoms' generator among them: a file with others is begun
    anew. `jobs`: processes of one thread each; 1 is this one.
    """
    old = read(out)
    done = old.get("parts", {}) if same(old, settings) else {}
    todo = {name: case for name, case in parts.items() if name not in done}
    print(f"{out.name}: {len(parts) - len(todo)} of {len(parts)} parts are there", flush=True)
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _one_thread)
    try:
        if jobs == 1:
            found = ((name, work(*case)) for name, (work, *case) in todo.items())
        else:
            begun = {pool.submit(*case): name for name, case in todo.items()}
            found = ((begun[each], each.result()) for each in as_completed(begun))
        for count, (name, value) in enumerate(found, 1):
            yield out, settings | {"parts": {name: value}}
            print(f"{out.name}: {name} is done, {count} of {len(todo)}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # one part failed: leave the others


def read(path: Path) -> dict:
    """A file of results; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def origin(result: dict, file: str, machine: str | None = None) -> str:
    """The line below a table that says how it came about."""
    machine = machine or f"{result['hardware']}, {result['threads']} thread(s)"
    line = (
        f"Command: `{result['command']}`; {machine}; torch {result['torch']}; {result['date']}; "
        f"commit {result['commit']}; all numbers in {file}."
    )
    if result.get("generator", GENERATOR) != GENERATOR:
        line += (
            " **The phantoms behind these figures are of an earlier and simpler generation** than "
            "those of this book; `make results` measures anew."
        )
    return f"{line} {result.get('note', '')}".rstrip()


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    first, *rows = [f"| {' | '.join(cells)} |" for cells in (head, *body)]
    return [first, "|" + "---|" * len(head), *rows]


def formatted(columns: dict[str, str], rows: Iterable[dict]) -> list[str]:
    """A `table` of results: a format string for each title, filled from the keys of a row."""
    return table(list(columns), [[f.format(**row) for f in columns.values()] for row in rows])


def fill(path: Path, name: str, text: str) -> None:
    """Put `text` between the lines <!-- name --> and <!-- /name -->; in a twin, as comments."""
    start = "# " if path.suffix == ".py" else ""
    marks = f"{start}<!-- {name} -->\n", f"{start}<!-- /{name} -->\n"
    replace_between(path, marks, "".join(f"{start}{s}".rstrip() + "\n" for s in text.splitlines()))


def replace_between(path: Path, marks: tuple[str, str], lines: str) -> None:
    """Replace what stands between two marks, each of them once in the file."""
    before, rest = path.read_text(encoding="utf-8").split(marks[0])
    after = rest.split(marks[1])[1]
    write_text(path, f"{before}{marks[0]}{lines}{marks[1]}{after}")


def unseen(phantoms: PhantomConfig) -> PhantomConfig:
    """Test patients alone. From another data seed they are those on whom nothing was tuned."""
    lesions, classes = phantoms.lesion_patients[2], phantoms.class_patients[2]
    return replace(phantoms, lesion_patients=(0, 0, lesions), class_patients=(0, 0, classes))


def quick_data(folder: Path, seed: int = 0) -> tuple[dict, dict]:
    """{split: slices with a class} and {split: slices with masks} of the preset quick."""
    root = datasets.write_phantoms(folder, QUICK.phantoms, seed)
    slices = {split: datasets.SliceImages(root / "slices", split) for split in SPLITS}
    options = {"root": root / "lesions", "min_area": QUICK.min_area}
    return slices, {split: datasets.LesionSlices(split=split, **options) for split in SPLITS}


def interval(value: Callable, patients: Sequence[str], **options) -> list:
    """95 % by `bootstrap` over patients of `value`, which reads the indices of the drawn slices."""
    owner = np.unique(patients, return_inverse=True)[1]
    slices = [np.flatnonzero(owner == patient) for patient in range(owner.max() + 1)]

    def of_drawn(drawn: np.ndarray) -> float:
        return value(np.sort(np.concatenate([slices[patient] for patient in drawn])))

    return metrics.bootstrap(len(slices), of_drawn, **options).tolist()


def gain(right: np.ndarray, base: np.ndarray, patients: Sequence[str], **options) -> list[float]:
    """What one accuracy has above another on the same slices, and its 95 % over patients.

    `right` and `base` [M]: the share of the runs that have a slice right.
    """
    more = np.asarray(right, dtype=float) - base
    return [float(more.mean()), *interval(lambda drawn: more[drawn].mean(), patients, **options)]


def judge(model, test: datasets.SliceImages, **options) -> dict:
    """`judged` of a classifier."""
    predicted = training.evaluate_classifier(model, test, progress=False)["predictions"]
    return judged(predicted, test, **options)


def judged(predicted: torch.Tensor, test: datasets.SliceImages, **options) -> dict:
    """Accuracy, sensitivities and PPV, with intervals by patients and by slices; int64 [M]."""
    labels = torch.tensor(test.labels)
    counts, right = metrics.confusion(labels, predicted), (labels == predicted).numpy()
    result = metrics.report(counts)
    by_patient = interval(lambda drawn: right[drawn].mean(), test.patients, **options)
    return {
        "accuracy": result["accuracy"],
        "accuracy_wilson": metrics.wilson(int(counts.trace()), len(test)),
        "accuracy_by_patient": by_patient,
        "sensitivity": result["sensitivity"],
        "sensitivity_wilson": [
            metrics.wilson(int(row[k]), int(row.sum())) for k, row in enumerate(counts)
        ],
        "ppv": result["ppv"],
        "confusion": counts.tolist(),
        "predictions": "".join(map(str, predicted.tolist())),  # one digit a slice
    }
