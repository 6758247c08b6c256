"""What the benchmarks share: where results come from, how they are kept and how pages show them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torchvision

from covidmask.files import atomic_path
from covidmask.metrics.classification import patient_bootstrap

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"


def environment() -> dict:
    """Where and from what the figures came.

    Raises:
        SystemExit: the code that runs is in no commit. Results, chapters and README may differ:
            an earlier benchmark fills them.
    """

    def git(*words: str) -> str:
        command = ["git", *words]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    commit = git("describe", "--always", "--exclude", "*")
    if git("status", "--porcelain", "--", "benchmarks", "covidmask"):
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


def origin(result: dict, file: str, machine: str | None = None) -> str:
    """The line below a table that says how it came about."""
    machine = machine or f"{result['hardware']}, {result['threads']} thread(s)"
    return (
        f"Command: `{result['command']}`; {machine}; torch {result['torch']}; {result['date']}; "
        f"commit {result['commit']}; all numbers in {file}."
    )


def read(path: Path) -> dict:
    """A file of results; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def save(path: Path, result: dict, indent: int | None = 1) -> None:
    write_text(path, json.dumps(result, indent=indent) + "\n")


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    rows = [head, *body]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


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


def interval(value: Callable, patients: Sequence[str], **options) -> tuple[float, float]:
    """95 % over patients of `value`, which reads the indices of the slices that were drawn.

    For a few hundred slices: each is a class of its own, and the counts say how often it was drawn.
    """
    slices = np.arange(len(patients))

    def of_counts(counts: np.ndarray) -> float:
        return value(np.repeat(slices, counts.diagonal()))

    return patient_bootstrap(slices, slices, patients, of_counts, classes=len(slices), **options)


def gain(
    right: np.ndarray, base: np.ndarray, patients: Sequence[str], seeds: int = 1, **options
) -> tuple[float, float, float]:
    """What one accuracy has above another on the same slices, and its 95 % interval over patients.

    `right` and `base` [M]: the share of at most `seeds` runs that have a slice right.
    """
    steps = np.rint((right - base) * seeds).astype(int) + seeds  # 0..2 * seeds, as if classes
    worth = np.arange(-seeds, seeds + 1) / seeds

    def mean(counts: np.ndarray) -> float:
        return counts.diagonal() @ worth / counts.sum()

    low, high = patient_bootstrap(steps, steps, patients, mean, classes=len(worth), **options)
    return float((right - base).mean()), low, high
