"""The two figures of book/fast.md, as SVG in the style of the book's diagrams, and their alt texts.

Drawn by hand, so that the same results give the same bytes whatever the version of a plotting
library; a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from speed_rows import GROWTH, LIGHT, Row, duration, factor, number
from svg import INK, LINE, SMALL, WIDTH, line, svg, words

from covidmask.plotting import BLUE, ORANGE


def describe_ratios(found: Sequence[Row]) -> str:
    parts = [f"{row.work} with {row.model} {factor(row.values['ratio'])}" for row in found]
    return "Bars of how many times faster than the baseline we are: " + "; ".join(parts) + "."


def ratio_figure(found: Sequence[Row]) -> str:
    """One bar a row, on a logarithmic axis; a mark at the aim."""
    left, right, top, step = 232, WIDTH - 62, 52, 34
    values = [row.values["ratio"] for row in found] + [row.aim or 1 for row in found]
    low, high = math.log10(min(0.9, *values)), math.log10(max(values) * 1.05)

    def x(value: float) -> float:
        return left + (math.log10(value) - low) / (high - low) * (right - left)

    bottom = top + step * len(found)
    parts = [words(WIDTH / 2, 28, ["Times faster than the baseline"])]
    for tick in [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= math.log10(t) <= high]:
        parts.append(thin(x(tick), top - 4, x(tick), bottom))
        if tick in (1, 10, 100):
            parts.append(text(x(tick), bottom + 20, f"{tick}x"))
    for i, row in enumerate(found):
        y, end = top + step * i, x(row.values["ratio"])
        short = row.model.replace(" cut 1", "").replace("ResNet-", "R")
        colour = BLUE if row.model == LIGHT else ORANGE
        start = min(x(1), end)
        parts.append(text(left - 8, y + 21, f"{row.short}, {short}", "end"))
        parts.append(
            f'<rect x="{start:.1f}" y="{y + 5}" width="{abs(end - x(1)):.1f}" height="{step - 10}" '
            f'fill="{colour}"/>'
        )
        if row.aim:
            parts.append(line([(x(row.aim), y + 1), (x(row.aim), y + step - 1)], INK))
        beyond = max(end, x(row.aim) if row.aim else end)
        parts.append(text(beyond + 5, y + 21, factor(row.values["ratio"]), "start"))
    legend = bottom + 44
    for place, colour, label in ((60, BLUE, "ResNet-18 cut 1"), (245, ORANGE, "ResNet-50")):
        parts.append(
            f'<rect x="{place}" y="{legend - 13}" width="16" height="16" fill="{colour}"/>'
        )
        parts.append(text(place + 24, legend, label, "start"))
    parts.append(line([(392, legend - 16), (392, legend + 4)], INK))
    parts.append(text(402, legend, "aim", "start"))
    return svg(legend + 20, "Times faster than the baseline", describe_ratios(found), parts)


def describe_growth(result: dict) -> str:
    parts = []
    for key, (what, timed, _) in GROWTH.items():
        first, last = result["growth"][key][0], result["growth"][key][-1]
        times = [duration(point["seconds"]) for point in (first, last)]
        sizes = [f"{number(point['megabytes'])} MB" for point in (first, last)]
        parts.append(
            f"{timed}: from {first['x']} to {last['x']} ({what}) its time goes from {times[0]} to "
            f"{times[1]}, its memory from {sizes[0]} to {sizes[1]}"
        )
    return "Six curves. " + "; ".join(part[:1].upper() + part[1:] for part in parts) + "."


def growth_figure(result: dict) -> str:
    """Three rows, what grows; two columns, seconds and megabytes."""
    parts, high, width = [], 104, 154
    for row, (key, (what, timed, unit)) in enumerate(GROWTH.items()):
        y = 30 + row * 230
        points = result["growth"][key]
        parts.append(words(WIDTH / 2, y, [timed[:1].upper() + timed[1:]]))
        for column, (value, label) in enumerate(
            (("seconds", "Time (s)"), ("megabytes", "Memory (MB)"))
        ):
            left, top = 74 + column * 258, y + 40
            parts.append(text(left, top - 12, label, "start"))
            curve = [(point["x"], point[value]) for point in points]
            parts += small_plot(left, top, width, high, curve)
            name = what if what == unit else f"{what} ({unit})"
            parts.append(text(left + width / 2, top + high + 46, name[:1].upper() + name[1:]))
    return svg(3 * 230, "How cost grows", describe_growth(result), parts)


def small_plot(
    left: float, top: float, width: float, high: float, curve: Sequence[tuple[float, float]]
) -> list[str]:
    """Axes, a curve with points, and a dashed line of proportional growth from the first point."""
    xs, ys = [math.log10(x) for x, _ in curve], [math.log10(max(y, 1e-6)) for _, y in curve]
    low, top_value = min(ys), max(ys)
    margin = max(0.15, 0.6 - (top_value - low)) / 2 + 0.08  # never less than a few ticks
    low, top_value = low - margin, top_value + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0] or 1)
        up = (y - low) / (top_value - low)
        return round(left + across * width, 1), round(top + high - up * high, 1)

    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{high}" fill="#ffffff" '
        f'stroke="{LINE}"/>'
    ]
    ticks = [d * 10.0**e for e in range(-4, 6) for d in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= top_value]
    for tick in inside[:: max(1, math.ceil(len(inside) / 4))]:
        y = place(xs[0], math.log10(tick))[1]
        parts += [thin(left, y, left + width, y), text(left - 6, y + 6, number_tick(tick), "end")]
    for i, (x, _) in enumerate(curve):
        spot = place(xs[i], low)[0]
        parts += [thin(spot, top, spot, top + high), text(spot, top + high + 22, f"{x:g}")]
    end = min(ys[0] + xs[-1] - xs[0], top_value)  # cut where it leaves the plot
    reference = [place(xs[0], ys[0]), place(xs[0] + end - ys[0], end)]
    parts.append(line(reference, LINE, dashed=True))
    spots = [place(x, y) for x, y in zip(xs, ys, strict=True)]
    parts.append(line(spots, BLUE))
    return parts + [f'<circle cx="{x}" cy="{y}" r="5" fill="{BLUE}"/>' for x, y in spots]


def number_tick(value: float) -> str:
    return f"{value:g}" if value < 10_000 else f"{value / 1000:g}k"


def text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{SMALL}">{content}</text>'


def thin(x1: float, y1: float, x2: float, y2: float) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{LINE}" stroke-opacity="0.3"/>'
