"""What the page on speed shows: one row for each work that was timed, and how numbers are written.

The page (speed_page.py) and its figures (speed_figures.py) are both made of these.
"""

from __future__ import annotations

import math
from typing import NamedTuple

LIGHT, LARGE = "ResNet-18 cut 1", "ResNet-50"
EXACT, ROUGH = "32-true", "bf16-mixed"
PRECISIONS = {EXACT: "float32", ROUGH: "bfloat16"}
REGIMES = {"heads_bn": "heads + BN", "full": "full"}
GROWTH = {  # key: (what grows, what is timed, unit of x)
    "side": ("side of the slice", "inference of one slice", "pixels"),
    "n_boxes": ("N", "heads + BN step of 8", "boxes"),
    "slices": ("slices", "ranking a set of slices", "slices"),
}


class Row(NamedTuple):
    """One work, timed both ways."""

    work: str
    model: str
    values: dict  # baseline, ours (seconds), ratio
    least: float | None  # what was asked for before it was measured
    aim: float | None
    short: str


def rows(result: dict, device: str = "cpu") -> list[Row]:
    """The table of ratios."""
    exact, rough = result[EXACT], result[ROUGH]
    targets = device == "cpu"
    heads = exact[LIGHT]["heads_only"]
    schedule = f"heads, {heads['slices']:,} slices x {heads['epochs']} epochs"
    found = [
        Row(schedule, name, exact[name]["heads_only"], 150, 200, "heads") for name in (LIGHT, LARGE)
    ]
    asked = {
        ("heads_bn", LIGHT): (2.8, 3.5),
        ("heads_bn", LARGE): (1.7, 2.3),
        ("full", LIGHT): (2, 2.5),
        ("full", LARGE): (1.3, 1.6),
    }
    for (regime, name), (least, aim) in asked.items():
        step, short = exact[name]["step"][regime], REGIMES[regime]
        found.append(Row(f"{short}, step of 8", name, step, least, aim, short))
    for name in (LIGHT, LARGE):
        inference = exact[name]["inference"]
        found.append(Row("inference of a slice", name, inference, 1.2, 1.5, "inference"))
    for name, least, aim in ((LIGHT, None, 1.6), (LARGE, 1.8, 2.5)):
        inference = rough[name]["inference"]
        work = "inference of a slice, bfloat16"
        found.append(Row(work, name, inference, least, aim, "inference, bf16"))
    for name in (LIGHT, LARGE):
        ap = exact[name]["ap"]
        work = f"AP, {ap['thresholds']} thresholds, {ap['slices']} slices"
        found.append(Row(work, name, ap, 8, 12, "AP"))
    if not targets:  # the one number asked of a GPU, and the same works in bfloat16
        found = [row._replace(least=None, aim=None) for row in found]
        for regime in REGIMES:
            for name in (LIGHT, LARGE):
                least = 8 if (regime, name) == ("heads_bn", LARGE) else None
                work = f"{REGIMES[regime]}, step of 8, bfloat16"
                step = rough[name]["step"][regime]
                found.append(Row(work, name, step, least, None, f"{REGIMES[regime]}, bf16"))
    return found


def duration(seconds: float) -> str:
    """Two or three digits and a unit."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 1.5 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s" if seconds >= 0.1 else f"{number(1000 * seconds)} ms"


def number(value: float) -> str:
    """Three digits at most, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def factor(value: float) -> str:
    return f"{value:.3g}x" if value < 1000 else f"{number(value)}x"


def small(value: float) -> str:
    """A difference, as a power of ten."""
    return f"{value:.1e}"
