"""Fills tables of book/fast.md, chapter 6 and README.md from results/benchmarks*.json."""

from __future__ import annotations

import math
from functools import reduce

from common import RESULTS, ROOT, fill, origin, read, replace_between, table

PAGE, README = ROOT / "book" / "fast.md", ROOT / "README.md"
TWIN = ROOT / "book" / "py" / "06_three_regimes.py"
CODE_MARKS = ("# speed, from results/benchmarks.json\n", "# end of speed\n")
MODELS = "ResNet-18 cut 1", "ResNet-50"
PRECISIONS = {"32-true": "float32", "bf16-mixed": "bfloat16"}
WORKS = {  # path in the results: what it is; the last two are timed on a GPU alone
    "32-true/{}/heads_only": "heads, 3,000 slices x 50 epochs",
    "32-true/{}/step/heads_bn": "heads + BN, step of 8",
    "32-true/{}/step/full": "full, step of 8",
    "32-true/{}/inference": "inference of a slice",
    "bf16-mixed/{}/inference": "inference of a slice, bfloat16",
    "32-true/{}/ap": "AP, 10 thresholds, 10 slices",
    "bf16-mixed/{}/step/heads_bn": "heads + BN, step of 8, bfloat16",
    "bf16-mixed/{}/step/full": "full, step of 8, bfloat16",
}
CHANGE = {"probability, mean": "probability_change/mean", "largest": "probability_change/max"}
TRAINED = {"accuracy": "accuracy", "predictions changed": "predictions_changed", **CHANGE}
SAME = {
    "gradient": "gradients/same_layout",
    "gradient, channels last": "gradients/as_trained",
    "logits, same order": "inference/logits_difference_same_order",
    "slices with another order, of 8": "inference/order_changed_slices",
    "boxes changed": "inference/boxes_changed",
    "of": "inference/boxes",
    **{head: f"inference/{path}" for head, path in CHANGE.items()},
}
MEMORY = {
    f"{regime}, {who}": f"peak_megabytes/{key}/{who}"
    for regime, key in {"heads + BN": "heads_bn", "full": "full"}.items()
    for who in ("baseline", "ours")
}


def find(result: dict, path: str):
    """What lies at a path with slashes; None where nothing does."""
    return reduce(lambda part, key: (part or {}).get(key), path.split("/"), result)


def number(value: float | None) -> str:
    """Counts as they are, other numbers with two or more digits."""
    if not value or isinstance(value, int):
        return "-" if value is None else f"{value:,.0f}"
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f}" if value >= 1e-3 else f"{value:.1e}"


def duration(seconds: float) -> str:
    for least, size, unit in ((129600, 86400, "days"), (5400, 3600, "h"), (90, 60, "min")):
        if seconds >= least:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s" if seconds >= 0.1 else f"{number(1000 * seconds)} ms"


def timed(result: dict) -> list[tuple[str, str, dict]]:
    """Work, model and times, of all that was timed both ways."""
    rows = [(work, m, find(result, path.format(m))) for path, work in WORKS.items() for m in MODELS]
    return [row for row in rows if row[2]]


def ratios(result: dict) -> list[str]:
    body = []
    for work, model, v in timed(result):
        spread = ", ".join(f"{x:.3g}" for x in v.get("ratio_lowest_highest", [])) or "extrapolated"
        repeats = str(v.get("repeats") or v["measured"]["repeats"])
        times = duration(v["baseline"]), duration(v["ours"]), f"{v['ratio']:.3g}x"
        body.append([work, model, *times, spread, repeats])
    head = ["regime and work", "model", "baseline", "ours", "ratio", "lowest, highest", "repeats"]
    return table(head, body)


def grid(result: dict, columns: dict[str, str]) -> list[str]:
    """A row for each model and precision of which something was measured."""
    rows = [
        [m, name, *(number(find(result, f"{p}/{m}/{path}")) for path in columns.values())]
        for m in MODELS
        for p, name in PRECISIONS.items()
    ]
    return table(["model", "precision", *columns], [row for row in rows if {*row[2:]} != {"-"}])


def made(result: dict, file: str) -> str:
    """The line below a table that says how it came about."""
    machine = f"{result['hardware']}, {result['processor']}, {result['threads']} threads"
    minutes = f"` (about {result['minutes']:.0f} minutes);"
    return origin(result, file, machine).replace("`;", minutes, 1)


def write() -> None:
    """Fill the tables of the page, of chapter 6, with its code, and of README.md."""
    cpu, cuda = (read(RESULTS / f"benchmarks{name}.json") for name in ("", "-cuda"))
    judged = [
        [name, *(number(find(cpu, f"trained/{p}/{path}")) for path in TRAINED.values())]
        for p, name in PRECISIONS.items()
    ]
    for name, lines in {
        "ratios": [*ratios(cpu), "", made(cpu, "`results/benchmarks.json`")],
        "same": grid(cpu, SAME),
        "trained": table(["precision", *TRAINED], judged),
        "memory": grid(cpu, MEMORY),
        "gpu ratios": [*ratios(cuda), "", made(cuda, "`results/benchmarks-cuda.json`")],
        "gpu memory": grid(cuda, MEMORY),
    }.items():
        fill(PAGE, name, "\n".join(["", *lines, "\n"]))
    file, short = "results/benchmarks.json", ["|".join(r.split("|")[:6]) + "|" for r in ratios(cpu)]
    fill(README, "speed", "\n".join([*short, "", made(cpu, f"[{file}]({file})")]))
    fill(TWIN, "speed", "\n".join([*short[:8], "", made(cpu, f"`{file}`")]))
    code = [f'    ("{w.split(",")[0]}", "{m}"): {v["ratio"]:.3g},\n' for w, m, v in timed(cpu)[:6]]
    head = "speed = {  # (regime, model): times faster than the baseline\n"
    replace_between(TWIN, CODE_MARKS, "".join([head, *code, "}\n"]))
    print("written: tables of book/fast.md, chapter 6 and README.md")
