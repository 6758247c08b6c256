"""The tables and the figure of book/fast.md, and the places of chapter 6 and README.md with times.

All from results/benchmarks.json and results/benchmarks-cuda.json. The text of the page is written
by hand; `python benchmarks/speed.py --page` fills what stands between its marks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

from common import RESULTS, ROOT, fill, origin, read, replace_between, table

from covidmask.files import atomic_path
from covidmask.plotting import BLUE, ORANGE

PAGE, README = ROOT / "book" / "fast.md", ROOT / "README.md"
FIGURE = ROOT / "book" / "_static" / "speed_ratios.svg"
TWIN = ROOT / "book" / "py" / "06_three_regimes.py"
CODE_MARKS = ("# speed, from results/benchmarks.json\n", "# end of speed\n")
MODELS = LIGHT, LARGE = "ResNet-18 cut 1", "ResNet-50"
EXACT, ROUGH = "32-true", "bf16-mixed"
PRECISIONS = {EXACT: "float32", ROUGH: "bfloat16"}
REGIMES = {"heads_bn": "heads + BN", "full": "full"}
ASKED = {  # of the CPU, before it was measured: at least and aim, of both models
    "heads": ((150, 200), (150, 200)),
    "heads + BN": ((2.8, 3.5), (1.7, 2.3)),
    "full": ((2, 2.5), (1.3, 1.6)),
    "inference": ((1.2, 1.5), (1.2, 1.5)),
    "inference, bf16": ((None, 1.6), (1.8, 2.5)),
    "AP": ((8, 12), (8, 12)),
}


class Row(NamedTuple):
    """One work, timed both ways."""

    short: str
    work: str
    model: str
    values: dict  # baseline, ours (seconds), ratio
    least: float | None
    aim: float | None


def rows(result: dict) -> list[Row]:
    """One for each work that was timed and each model."""
    heads, ap = (result[EXACT][LIGHT][key] for key in ("heads_only", "ap"))
    schedule = f"heads, {heads['slices']:,} slices x {heads['epochs']} epochs"
    judging = f"AP, {ap['thresholds']} thresholds, {ap['slices']} slices"
    works = [
        ("heads", schedule, EXACT, "heads_only"),
        ("heads + BN", "heads + BN, step of 8", EXACT, "step/heads_bn"),
        ("full", "full, step of 8", EXACT, "step/full"),
        ("inference", "inference of a slice", EXACT, "inference"),
        ("inference, bf16", "inference of a slice, bfloat16", ROUGH, "inference"),
        ("AP", judging, EXACT, "ap"),
    ]
    asked = ASKED
    if "step" in result[ROUGH][LIGHT]:  # a GPU, where one number was asked for
        asked = {"heads + BN, bf16": ((None, None), (8, None))}
        for regime, name in REGIMES.items():
            work = f"{name}, step of 8, bfloat16"
            works.append((f"{name}, bf16", work, ROUGH, f"step/{regime}"))
    return [
        Row(short, work, model, values, *limits)
        for short, work, precision, path in works
        for model, limits in zip(MODELS, asked.get(short, ((None, None),) * 2), strict=True)
        for values in [find(result[precision][model], path)]
    ]


def number(value: float) -> str:
    """Two or three digits, without an exponent."""
    digits = max(0, 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 6)}f}"


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= 1.5 * size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s" if seconds >= 0.1 else f"{number(1000 * seconds)} ms"


def factor(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}x" if value < 1000 else f"{number(value)}x"


def show(value: object) -> str:
    """A cell: text and counts as they are, other numbers with two or three digits."""
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.1e}"


def made(result: dict, file: str) -> str:
    """The line below a table that says how it came about."""
    threads = f"{result['threads']} thread{'s' * (result['threads'] != 1)}"
    machine = f"{result['hardware']}, {result['processor']}, {threads}"
    minutes = f"` (about {result['minutes']:.0f} minutes);"
    return origin(result, file, machine).replace("`;", minutes, 1)


def each(result: dict) -> list[tuple[str, str, dict]]:
    """Model, precision and what was measured with them."""
    return [(m, PRECISIONS[p], result[p][m]) for m in MODELS for p in PRECISIONS]


def exact(result: dict, part: str) -> list[tuple[str, dict]]:
    """Model, and a part of what was measured in float32."""
    return [(name, result[EXACT][name][part]) for name in MODELS]


def find(values: dict, path: str) -> object:
    return reduce(dict.__getitem__, path.split("/"), values)


def grid(heads: str, rows: Iterable[tuple], columns: dict[str, str]) -> list[str]:
    """A table: what a row holds before its last element, then paths (of slashes) into that."""
    body = [[*cells, *(show(find(v, path)) for path in columns.values())] for *cells, v in rows]
    return table([*heads.split(", "), *columns], body)


def ratio_table(result: dict) -> list[str]:
    head = ["work", "model", "baseline", "ours", "ratio", "lowest, highest", "repeats"]
    body = []
    for row in rows(result):
        values, spread = row.values, row.values.get("ratio_lowest_highest")
        times = [duration(values[key]) for key in ("baseline", "ours")]
        cells = [row.work, row.model, *times, f"**{factor(values['ratio'])}**"]
        cells += [", ".join(f"{v:.3g}" for v in spread) if spread else "extrapolated"]
        cells += [str(values["repeats"] if spread else values["measured"]["repeats"])]
        body.append([*cells, factor(row.least), factor(row.aim)])
    return table([*head, "at least", "aim"], body)


def stage_table(result: dict) -> list[str]:
    stages = {"backbone and FPN": "backbone", "RPN": "RPN", "box head": "RoIAlign and box head"}
    columns = {"all, s": "inference/ours"}
    for name, key in stages.items():
        columns[f"{name}, s"] = f"stages/{key}/seconds"
        columns[f"roofline, {name}"] = f"stages/{key}/share_of_roofline"
    columns |= {"product, FLOP/s": "stages/peak_flops", "copy, B/s": "stages/peak_bytes"}
    return grid("model, precision", each(result), columns)


def memory_table(result: dict) -> list[str]:
    peaks = exact(result, "peak_megabytes")
    body = [(label, name, peak[key]) for name, peak in peaks for key, label in REGIMES.items()]
    return grid("regime, model", body, {"baseline, MB": "baseline", "ours, MB": "ours"})


def tried_table(result: dict) -> list[str]:
    columns = []
    for name in MODELS:
        tried, inference = (result[EXACT][name][key] for key in ("tried", "inference"))
        seconds = {
            "torch.compile itself, once": tried["compile_seconds"],
            "inference, eight slices at once": inference["ours"],
            "inference, one by one": inference["one by one"],
        }
        more = {key: value and 1000 * value for key, value in seconds.items()}
        columns.append({**tried["milliseconds"], **more})
    body = [[key, *(show(column.get(key)) for column in columns)] for key in columns[1]]
    return table(["what, in ms", *MODELS], body)


def page_tables(cpu: dict, cuda: dict) -> dict[str, list[str]]:
    """What stands between the marks of book/fast.md, by their names."""
    judged = [(name, cpu["trained"][precision]) for precision, name in PRECISIONS.items()]
    growth = {
        "inference of one slice, its side": "side",
        "heads + BN step of 8, N": "n_boxes",
        "ranking a set, its slices": "slices",
    }
    fair = []
    for name, released in cpu["released_code_seconds"].items():
        for path, then in zip(("inference", "step/heads_bn"), released, strict=True):
            fair.append((name, path, {"then": then, **find(cpu[EXACT][name], path)}))
    change = {
        "probability, mean": "probability_change/mean",
        "largest": "probability_change/max",
    }
    return {
        "ratios": [*ratio_table(cpu), "", made(cpu, "`results/benchmarks.json`")],
        "fair": grid("model, work", fair, {"released code, s": "then", "baseline, s": "baseline"}),
        "gradients": grid(
            "model",
            exact(cpu, "gradients"),
            {"gradient": "same_layout", "gradient, channels last": "as_trained"},
        ),
        "predictions": grid(
            "model, precision",
            [(*cells, values["inference"]) for *cells, values in each(cpu)],
            {
                "logits, same order": "logits_difference_same_order",
                "slices with another order, of 8": "order_changed_slices",
                "boxes changed": "boxes_changed",
                "of": "boxes",
                **change,
            },
        ),
        "trained": grid(
            "precision",
            judged,
            {"accuracy": "accuracy", "predictions changed": "predictions_changed", **change},
        ),
        "stages": stage_table(cpu),
        "reading": grid(
            "machine",
            [(result["hardware"], result["reading"]) for result in (cpu, cuda)],
            {
                "from file, s": "file",
                "share of a step": "share_of_a_step_from_file",
                "of inference": "share_of_inference_from_file",
                "from memory, s": "memory",
                "share of inference": "share_of_inference_from_memory",
            },
        ),
        "tried": tried_table(cpu),
        "memory": memory_table(cpu),
        "growth": grid(
            "what is measured",
            [(what, point) for what, key in growth.items() for point in cpu["growth"][key]],
            {"at": "x", "s": "seconds", "MB": "megabytes"},
        ),
        "gpu ratios": [*ratio_table(cuda), "", made(cuda, "`results/benchmarks-cuda.json`")],
        "gpu stages": stage_table(cuda),
        "gpu memory": memory_table(cuda),
        "gpu batches": grid(  # a run may have been stopped before
            "model, precision",
            [(*cells, one) for *cells, values in each(cuda) for one in values.get("batches", ())],
            {"batch": "batch", "s a slice": "seconds_a_slice", "MB": "megabytes"},
        ),
        "gpu waiting": grid(
            "model, precision",
            [(*cells, v["waiting"]) for *cells, v in each(cuda) if "waiting" in v],
            {
                f"{source}, {count} workers": f"{source}, {count} workers"
                for source in ("file", "memory")
                for count in (0, 4)
            },
        ),
    }


def chapter_table(result: dict) -> str:
    """What chapter 6 says about times."""
    body = []
    for row in rows(result)[:6]:
        times = [duration(row.values[key]) for key in ("baseline", "ours")]
        body.append([row.work, row.model, *times, factor(row.values["ratio"])])
    lines = table(["regime and work", "model", "baseline", "ours", "ratio"], body)
    return "\n".join([*lines, "", made(result, "`results/benchmarks.json`")])


def chapter_code(result: dict) -> str:
    """The same ratios, as the dictionary that the chapter's figure draws."""
    lines = [f'    ("{r.short}", "{r.model}"): {r.values["ratio"]:.3g},' for r in rows(result)[:6]]
    head = "speed = {  # (regime, model): times faster than the baseline"
    return "\n".join([head, *lines, "}\n"])


def readme_text(cpu: dict, cuda: dict) -> str:
    """The paragraph of README.md."""

    def both(short: str, result: dict) -> str:
        first, second = (factor(r.values["ratio"]) for r in rows(result) if r.short == short)
        return f"{first} (ResNet-18) and {second} (ResNet-50)"

    heads, file = cpu[EXACT][LIGHT]["heads_only"], "results/benchmarks.json"
    return (
        f"Against a loop that works as the released code does, at 512 x 512: training in *heads* "
        f"({heads['slices']:,} slices, {heads['epochs']} epochs, extrapolated) is "
        f"{both('heads', cpu)} as fast, a step of *heads + BN* {both('heads + BN', cpu)}, a step "
        f"of *full* {both('full', cpu)}, inference {both('inference', cpu)}, and the AP over ten "
        f"thresholds {both('AP', cpu)}. That is on a CPU. On a GPU "
        f"({cuda['hardware'].split(',')[0]}) *heads* is {both('heads', cuda)} as fast, a step of "
        f"*heads + BN* {both('heads + BN', cuda)}, and inference {both('inference', cuda)}. What "
        "makes it so, with accuracy, memory and what did not pay: [book/fast.md](book/fast.md)."
        f"\n\n{made(cpu, f'[{file}]({file})')}"
    )


def draw(result: dict, path: Path) -> None:
    """One bar a row, on a logarithmic axis; a mark at the aim."""
    import matplotlib.pyplot as plt

    found = rows(result)
    names = [f"{r.short}, {r.model.replace(' cut 1', '').replace('ResNet-', 'R')}" for r in found]
    ratios = [row.values["ratio"] for row in found]
    colours = [BLUE if row.model == LIGHT else ORANGE for row in found]
    settings = {"svg.fonttype": "none", "svg.hashsalt": "speed", "font.size": 13}
    with plt.rc_context(settings), atomic_path(path) as temporary:
        figure, ax = plt.subplots(figsize=(5.4, 5.4), layout="constrained")
        ax.barh(names, [ratio - 1 for ratio in ratios], left=1, color=colours)
        for row, name in zip(found, names, strict=True):  # the number stands right of bar and aim
            right = max(row.values["ratio"], row.aim or 1)
            ax.text(1.2 * right, name, factor(row.values["ratio"]), va="center")
        ax.plot([row.aim for row in found], names, "k|", ms=16, mew=3, label="aim")
        ax.set(xscale="log", xlim=(0.9, 4 * max(ratios)), xlabel="Times faster than the baseline")
        ax.invert_yaxis()
        ax.legend()
        figure.savefig(temporary, metadata={"Date": None})
        plt.close(figure)


def write() -> None:
    """Fill the page, chapter 6 and README.md, and draw the figure."""
    cpu, cuda = (read(RESULTS / f"benchmarks{name}.json") for name in ("", "-cuda"))
    for name, lines in page_tables(cpu, cuda).items():
        fill(PAGE, name, "\n".join(["", *lines, "\n"]))
    fill(TWIN, "speed", chapter_table(cpu))
    replace_between(TWIN, CODE_MARKS, chapter_code(cpu))
    fill(README, "speed", readme_text(cpu, cuda))
    draw(cpu, FIGURE)
    print("written: book/fast.md, its figure, chapter 6 and README.md")
