"""The tables and the figure of book/fast.md, and the places of chapter 6 and README.md with times.

All from results/benchmarks.json and results/benchmarks-cuda.json. The text of the page is written
by hand; `python benchmarks/speed.py --page` fills what stands between its marks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial, reduce
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
STAGES = ("backbone", "RPN", "RoIAlign and box head")
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
        for values in [reduce(dict.__getitem__, path.split("/"), result[precision][model])]
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


def small(value: float | None) -> str:
    """A difference, as a power of ten."""
    return "-" if value is None else f"{value:.1e}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


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


def grid(rows: Iterable[tuple], columns: dict[str, Callable | None]) -> list[str]:
    """A table. What a row holds goes into the columns without a function, its last through them."""
    shows = [show for show in columns.values() if show]
    return table(list(columns), [[*cells, *(s(last) for s in shows)] for *cells, last in rows])


def ratio_table(result: dict) -> list[str]:
    body = [(row.work, row.model, row) for row in rows(result)]
    return grid(
        body,
        {
            "work": None,
            "model": None,
            "baseline": lambda row: duration(row.values["baseline"]),
            "ours": lambda row: duration(row.values["ours"]),
            "ratio": lambda row: f"**{factor(row.values['ratio'])}**",
            "lowest, highest": lambda row: (
                ", ".join(f"{value:.3g}" for value in row.values.get("ratio_lowest_highest", ()))
                or "extrapolated"
            ),
            "repeats": lambda row: str({**row.values.get("measured", {}), **row.values}["repeats"]),
            "at least": lambda row: factor(row.least),
            "aim": lambda row: factor(row.aim),
        },
    )


def fair_table(result: dict) -> list[str]:
    """The released code itself, timed earlier, and our baseline."""
    body = []
    for name, (inference, step) in result["released_code_seconds"].items():
        found = result[EXACT][name]
        body.append((name, "inference of a slice", (inference, found["inference"]["baseline"])))
        body.append((name, "step of 8", (step, found["step"]["heads_bn"]["baseline"])))
    columns = {"released code": lambda pair: duration(pair[0])}
    columns["baseline"] = lambda pair: duration(pair[1])
    columns["difference"] = lambda pair: f"{100 * (pair[1] / pair[0] - 1):+.0f} %"
    return grid(body, {"model": None, "work": None, **columns})


def prediction_table(result: dict) -> list[str]:
    return grid(
        [(*cells, values["inference"]) for *cells, values in each(result)],
        {
            "model": None,
            "precision": None,
            "logits, same order": lambda v: small(v["logits_difference_same_order"]),
            "slices with another order": lambda v: f"{v['order_changed_slices']} of {v['slices']}",
            "boxes changed": lambda v: f"{number(v['boxes_changed'])} of {v['boxes']}",
            "probability, mean": lambda v: small(v["probability_change"]["mean"]),
            "probability, largest": lambda v: small(v["probability_change"]["max"]),
        },
    )


def stage_table(result: dict) -> list[str]:
    """Time of each stage, in brackets the share of the roofline; and the machine's best speeds."""

    def stage(name: str, values: dict) -> str:
        part = values["stages"][name]
        return f"{duration(part['seconds'])} ({100 * part['share_of_roofline']:.0f} %)"

    def rest(values: dict) -> str:
        spent = sum(values["stages"][name]["seconds"] for name in STAGES)
        return duration(max(values["inference"]["ours"] - spent, 0))

    columns = {name: partial(stage, name) for name in STAGES} | {"rest": rest}
    columns["product, GFLOP/s"] = lambda v: number(v["stages"]["peak_flops"] / 1e9)
    columns["copy, GB/s"] = lambda v: number(v["stages"]["peak_bytes"] / 1e9)
    return grid(each(result), {"model": None, "precision": None, **columns})


def memory_table(result: dict) -> list[str]:
    body = [
        (label, name, peaks[key])
        for name, peaks in exact(result, "peak_megabytes")
        for key, label in REGIMES.items()
    ]
    columns = {who: lambda v, who=who: number(v[who]) for who in ("baseline", "ours")}
    columns["share"] = lambda v: f"{100 * v['ours'] / v['baseline']:.0f} %"
    return grid(body, {"regime": None, "model": None, **columns})


def tried_table(result: dict) -> list[str]:
    keys = exact(result, "tried")[1][1]["milliseconds"]
    body = [
        (key.replace("(in use)", "(**in use**)"), [f["milliseconds"].get(key) for _, f in found])
        for found in [exact(result, "tried")]
        for key in keys
    ]
    compiling = [found["compile_seconds"] for _, found in exact(result, "tried")]
    body.append(("torch.compile itself, once", [s and 1000 * s for s in compiling]))
    for key, what in (("ours", "eight slices at once"), ("one by one", "one by one")):
        seconds = [found[key] for _, found in exact(result, "inference")]
        body.append((f"inference of a slice, {what}", [1000 * value for value in seconds]))
    show = {name: lambda v, i=i: number(v[i]) if v[i] else "-" for i, name in enumerate(MODELS)}
    return grid(body, {"what, in ms": None, **show})


def page_tables(cpu: dict, cuda: dict) -> dict[str, list[str]]:
    """What stands between the marks of book/fast.md, by their names."""
    model = {"model": None, "precision": None}
    judged = [(PRECISIONS[p], cpu["trained"][p]) for p in PRECISIONS]
    growth = {
        "inference of one slice, its side": "side",
        "heads + BN step of 8, N": "n_boxes",
        "ranking a set, its slices": "slices",
    }
    return {
        "ratios": [*ratio_table(cpu), "", made(cpu, "`results/benchmarks.json`")],
        "fair": fair_table(cpu),
        "gradients": grid(
            exact(cpu, "gradients"),
            {
                "model": None,
                "loss": lambda v: small(abs(v["loss_same_layout"] / v["loss"] - 1)),
                "gradient": lambda v: small(v["same_layout"]),
                "gradient, channels last": lambda v: small(v["as_trained"]),
            },
        ),
        "predictions": prediction_table(cpu),
        "trained": grid(
            judged,
            {
                "precision": None,
                "accuracy": lambda v: f"{v['accuracy']:.3f}",
                "predictions changed": lambda v: str(v["predictions_changed"]),
                "probability, mean": lambda v: small(v["probability_change"]["mean"]),
                "largest": lambda v: small(v["probability_change"]["max"]),
            },
        ),
        "stages": stage_table(cpu),
        "reading": grid(
            [(result["hardware"], result["reading"]) for result in (cpu, cuda)],
            {
                "machine": None,
                "from file": lambda v: duration(v["file"]),
                "from memory": lambda v: duration(v["memory"]),
                "of a step, from file": lambda v: percent(v["share_of_a_step_from_file"]),
                "of inference, from file": lambda v: percent(v["share_of_inference_from_file"]),
                "from memory ": lambda v: percent(v["share_of_inference_from_memory"]),
            },
        ),
        "tried": tried_table(cpu),
        "memory": memory_table(cpu),
        "growth": grid(
            [(what, str(v["x"]), v) for what, key in growth.items() for v in cpu["growth"][key]],
            {
                "what is measured, and what grows": None,
                "to": None,
                "time": lambda v: duration(v["seconds"]),
                "MB": lambda v: number(v["megabytes"]),
            },
        ),
        "gpu ratios": [*ratio_table(cuda), "", made(cuda, "`results/benchmarks-cuda.json`")],
        "gpu stages": stage_table(cuda),
        "gpu memory": memory_table(cuda),
        "gpu batches": grid(  # a run may have been stopped before
            [(*cells, one) for *cells, v in each(cuda) for one in v.get("batches", ())],
            {
                **model,
                "batch": lambda v: str(v["batch"]),
                "time of a slice": lambda v: duration(v["seconds_a_slice"]),
                "MB": lambda v: number(v["megabytes"]),
            },
        ),
        "gpu waiting": grid(
            [(*cells, *pair) for *cells, v in each(cuda) for pair in v.get("waiting", {}).items()],
            {**model, "slices from": None, "share": percent},
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
        bars = ax.barh(names, [ratio - 1 for ratio in ratios], left=1, color=colours)
        ax.bar_label(bars, [factor(ratio) for ratio in ratios], padding=6)
        ax.plot([row.aim for row in found], names, "k|", ms=16, mew=3, label="aim")
        ax.set(xscale="log", xlim=(0.9, 3 * max(ratios)), xlabel="Times faster than the baseline")
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
