"""The page book/fast.md, and the places of chapter 6 and README.md that show times.

All from results/benchmarks.json and, where there is one, results/benchmarks-cuda.json; the same
files give the same text. `python benchmarks/speed.py --page` calls it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from marks import commented, fill
from speed_figures import describe_growth, describe_ratios, growth_figure, ratio_figure
from speed_rows import (
    EXACT,
    GROWTH,
    LARGE,
    LIGHT,
    PRECISIONS,
    REGIMES,
    ROUGH,
    Row,
    duration,
    factor,
    number,
    rows,
    small,
)

from covidmask.files import atomic_path

COMMANDS = {
    "cpu": "python benchmarks/speed.py",
    "cuda": "python benchmarks/speed.py --device cuda",
}
TOLERANCE = 0.25  # between the baseline's times and those of the released code
# Of the released code's seconds a slice: backbone and FPN, which are torchvision's in both.
RELEASED_BACKBONE = {LARGE: 0.33, LIGHT: 0.089}


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in body]


def ratio_table(found: Sequence[Row]) -> list[str]:
    asked = any(row.least or row.aim for row in found)
    head = ["work", "model", "baseline", "ours", "ratio", "lowest, highest", "repeats"]
    body = []
    for row in found:
        values = row.values
        spread = values.get("ratio_lowest_highest")
        cells = [
            row.work,
            row.model,
            duration(values["baseline"]),
            duration(values["ours"]),
            f"**{factor(values['ratio'])}**",
            ", ".join(f"{v:.3g}" for v in spread) if spread else "extrapolated",
            str(values["repeats"] if spread else values["measured"]["repeats"]),
        ]
        if asked:
            cells += [factor(v) if v else "-" for v in (row.least, row.aim)]
        body.append(cells)
    return table([*head, "at least", "aim"] if asked else head, body)


def origin(result: dict, name: str) -> str:
    threads = f"{result['threads']} thread{'s' * (result['threads'] != 1)}"
    return (
        f"Command: `{result['command']}` (about {result['minutes']:.0f} minutes); "
        f"{result['hardware']}, {result['processor']}, {threads}; torch {result['torch']}; "
        f"{result['date']}; commit {result['commit']}; all numbers in `results/{name}`."
    )


# ---- the page ----------------------------------------------------------------------------------

HEAD = """# What makes it fast

The released code is clear, and slow in a few known places. This page says where, what the
package does instead, and how much that gives on the same machine, the same weights and the same
slices. `python benchmarks/speed.py` measures everything below and writes this page.

## The baseline

`benchmarks/released_loop.py` does what the released loops do, on our own modules:

- slices go through the network one at a time;
- every parameter requires a gradient, whatever trains;
- all proposals are differentiated, and the graphs of a batch are held until its end;
- evaluation builds graphs, too;
- the detector runs again in each epoch, and again for each IoU threshold;
- RoIAlign is that of torchvision.

## What we do instead

- **Heads: rank once.** The detector is constant, so the ranked boxes of a slice are constants.
  They are computed once and kept, in memory or in a file whose name is a hash of weights,
  configuration and data. $S$ trains on them.
- **Heads + BN and full: rank first, then differentiate.** The $N$ boxes are chosen without a
  gradient. Box head and RoIAlign then run again, with a gradient, for these $N$ alone. The
  gradient is the same, because the other boxes have none.
- **No graph where nothing learns.** The proposals, the ranking and all evaluation build none.
- **RoIAlign as matrix products** on a CPU. The bins of a box are one matrix times a patch of the
  map. The rows go to the box head in parts that stay in the processor's cache.
- **Batch norm folded** into the convolutions for prediction, and channels last in memory.
- **One pass for all thresholds.** The detections of a slice serve all ten.
- **Slices decoded once**, and kept as 8-bit numbers within a stated budget.
"""


def page(cpu: dict | None, cuda: dict | None) -> str:
    """The whole of book/fast.md."""
    parts = [HEAD]
    if cpu is None:
        parts.append(
            f"## On a CPU\n\nNot measured. One command does it:\n\n    {COMMANDS['cpu']}\n"
        )
    else:
        sections = (ratios, same_numbers, stages, tried, memory, growth)
        parts += ["\n".join(section(cpu)) + "\n" for section in sections]
    parts.append("\n".join(on_gpu(cuda)))
    return "\n".join(parts) + "\n"


def ratios(result: dict) -> list[str]:
    found = rows(result)
    missed = [row for row in found if row.least and row.values["ratio"] < row.least]
    heads = [result[EXACT][name]["heads_only"] for name in (LIGHT, LARGE)]
    measured = heads[0]["measured"]
    uncached = " and ".join(factor(values["ratio_to_uncached_no_grad"]) for values in heads)
    what = "All of them meet" if not missed else f"{len(found) - len(missed)} of them meet"
    lines = [
        "## How much faster",
        "",
        "```{figure} _static/speed_ratios.svg",
        f":alt: {describe_ratios(found)}",
        ":width: 100%",
        ":name: fig-speed-ratios",
        "",
        "Time of the baseline over ours, on a logarithmic scale. A mark shows the aim that was set "
        "before.",
        "```",
        "",
        f'Medians of runs in turn, after a warm-up. "At least" and "aim" were set before. {what} '
        "the least"
        + (f"; not: {'; '.join(f'{r.work}, {r.model}' for r in missed)}." if missed else "."),
        "",
        *ratio_table(found),
        "",
        origin(result, "benchmarks.json"),
        "",
        "Slices are synthetic phantoms of 512 x 512, weights are random. ResNet-50 has four FPN "
        f"levels and N = {result[EXACT][LARGE]['inference']['boxes']}, ResNet-18 is cut by one "
        f"block and has N = {result[EXACT][LIGHT]['inference']['boxes']}.",
        "",
        f"The row of *heads* is extrapolated, linearly in slices and epochs: the baseline from its "
        f"step of 8, the ranking from {measured['ranked_slices']} slices, $S$ from "
        f"{measured['epochs']} epochs on {measured['rows']:,} rows. A loop without gradients that "
        f"runs our detector in each epoch, too, is the harder rival: keeping the boxes is "
        f"{uncached} as fast as it.",
        "",
        "### Is the baseline fair?",
        "",
        "The released code itself, timed earlier on two cores of this kind, and our baseline:",
        "",
    ]
    body, far = [], []
    for name, (slice_, step) in result["released_code_seconds"].items():
        values = result[EXACT][name]
        for what, theirs, ours in (
            ("inference of a slice", slice_, values["inference"]["baseline"]),
            ("step of 8", step, values["step"]["heads_bn"]["baseline"]),
        ):
            difference = ours / theirs - 1
            far += [f"{what}, {name}"] if abs(difference) > TOLERANCE else []
            body.append(
                [name, what, duration(theirs), duration(ours), f"{100 * difference:+.0f} %"]
            )
    lines += table(["model", "work", "released code", "baseline", "difference"], body)
    verdict = f"All lie within {TOLERANCE:.0%}."
    if far:
        layers = "; ".join(
            f"{name}: {duration(then)} then, {duration(now)} here"
            for name, then in RELEASED_BACKBONE.items()
            for now in [backbone_seconds(result, name)]
        )
        verdict = (
            f"{len(far)} of {len(body)} differ by more than {TOLERANCE:.0%} ({'; '.join(far)}). "
            "Machine and build of torch differ, too: backbone and FPN of one slice, which are "
            f"torchvision's layers in both loops: {layers}."
        )
    return [*lines, "", verdict]


def backbone_seconds(result: dict, name: str) -> float:
    """Of the baseline, as `tried` in speed.py timed it."""
    return result[EXACT][name]["tried"]["milliseconds"]["backbone, as torchvision has it"] / 1000


def same_numbers(result: dict) -> list[str]:
    body = []
    for name in (LIGHT, LARGE):
        values = result[EXACT][name]["gradients"]
        loss = abs(values["loss_same_layout"] / values["loss"] - 1)
        body.append([name, small(loss), small(values["same_layout"]), small(values["as_trained"])])
    lines = [
        "## The same numbers",
        "",
        'One step of "full", from the same weights, in float32: relative differences of the loss '
        "and of the whole gradient.",
        "",
        *table(["model", "loss", "gradient", "gradient, channels last"], body),
        "",
        "The third column is the claim: to rank first and to differentiate the N kept boxes alone "
        "changes nothing. The last column adds channels-last convolutions, as we train. They sum "
        "in another order. Where two boxes score the same but for rounding, that can swap them, "
        "and S reads another vector. With random weights many scores are nearly equal.",
        "",
        "Predictions, against the baseline in float32. A box is changed when none of ours, of the "
        "same class, overlaps it with an IoU above 0.9.",
        "",
    ]
    body = []
    for precision in (EXACT, ROUGH):
        for name in (LIGHT, LARGE):
            values = result[precision][name]["inference"]
            same = values["logits_difference_same_order"]
            body.append(
                [
                    name,
                    PRECISIONS[precision],
                    "-" if same is None else small(same),
                    f"{values['order_changed_slices']} of {values['slices']}",
                    f"{number(values['boxes_changed'])} of {values['boxes']}",
                    small(values["probability_change"]["mean"]),
                    small(values["probability_change"]["max"]),
                ]
            )
    head = ["model", "precision", "logits, same order", "slices with another order"]
    head += ["boxes changed", "probability, mean", "probability, largest"]
    trained = result["trained"]
    lines += [
        *table(head, body),
        "",
        "Random weights are the hardest case for rounding. The shipped classifier, on "
        f"{trained['slices']} test phantoms of the preset quick, where the baseline reaches an "
        f"accuracy of {trained['accuracy_baseline']:.3f}:",
        "",
        *table(
            ["precision", "accuracy", "predictions changed", "probability, mean", "largest"],
            [
                [
                    PRECISIONS[precision],
                    f"{trained[precision]['accuracy']:.3f}",
                    str(trained[precision]["predictions_changed"]),
                    small(trained[precision]["probability_change"]["mean"]),
                    small(trained[precision]["probability_change"]["max"]),
                ]
                for precision in (EXACT, ROUGH)
            ],
        ),
        "",
        "Here the change of a slice is that of its most changed class. bfloat16 is therefore never "
        "the default: ask for it with `precision`, and judge the model with it.",
    ]
    return lines


def stages(result: dict) -> list[str]:
    body = []
    for name in (LIGHT, LARGE):
        for precision in (EXACT, ROUGH):
            values, total = result[precision][name]["stages"], result[precision][name]["inference"]
            parts = {key: part for key, part in values.items() if isinstance(part, dict)}
            spent = sum(part["seconds"] for part in parts.values())
            cells = [
                f"{duration(part['seconds'])} ({100 * part['share_of_roofline']:.0f} %)"
                for part in parts.values()
            ]
            rest = duration(max(total["ours"] - spent, 0))
            body.append([name, PRECISIONS[precision], *cells, rest])
    values = result[EXACT][LIGHT]["stages"]
    head = ["model", "precision", "backbone and FPN", "RPN", "RoIAlign and box head", "rest"]
    reading = result.get("reading")
    lines = [
        "## Where the time goes",
        "",
        "Our inference of one slice by stage. In brackets the share of the roofline: the least "
        "time that the stage's multiplications and bytes need, at the best speed of a matrix "
        f"product ({number(values['peak_flops'] / 1e9)} GFLOP/s in float32) and of a copy "
        f"({number(values['peak_bytes'] / 1e9)} GB/s) on this machine, over the time that it took. "
        "Small matrices, NMS and copies between layouts take the rest. More than 100 % says that "
        "convolutions of this stage multiply faster than that one product.",
        "",
        *table(head, body),
    ]
    if reading:
        lines += [
            "",
            f"Reading a slice takes {duration(reading['file'])} from its file and "
            f"{duration(reading['memory'])} from memory, where it takes "
            f"{number(reading['kilobytes_a_slice'])} kB. Decoding from files would be "
            f"{100 * reading['share_of_a_step_from_file']:.1f} % of a heads + BN step of ResNet-18 "
            f"and {100 * reading['share_of_inference_from_file']:.1f} % of its inference; from "
            f"memory it is {100 * reading['share_of_inference_from_memory']:.1f} %.",
        ]
    return lines


def tried(result: dict) -> list[str]:
    found = {name: result[EXACT][name]["tried"]["milliseconds"] for name in (LIGHT, LARGE)}
    body = []
    for key in found[LARGE]:
        cells = [number(found[name][key]) if key in found[name] else "-" for name in found]
        body.append([key.replace("(in use)", "(**in use**)"), *cells])
    compiling = [
        f"{number(seconds)} s ({name})"
        for name in found
        if (seconds := result[EXACT][name]["tried"]["compile_seconds"]) is not None
    ]
    one = result[EXACT][LARGE]["inference"]
    lines = [
        "## What was tried",
        "",
        "Milliseconds for one slice, in turn:",
        "",
        *table(["what", *found], body),
        "",
        "What did not pay, or not enough:",
        "",
    ]
    if compiling:
        lines.append(
            f"- `torch.compile` of the backbone. Compiling takes {' and '.join(compiling)}, anew "
            "for each size of image, and what it gains afterwards is in the table."
        )
    lines += [
        f"- Batching alone. Eight slices at once take {duration(one['ours'])} a slice with "
        f"ResNet-50, one by one {duration(one['one by one'])}. A CPU step therefore takes its "
        "slices one by one, which needs the memory of one.",
        "- RoIAlign as a sum of embeddings (`embedding_bag`): exact, and faster than torchvision's "
        "in a first look. The matrix products took its place; it is not timed here.",
        "- bfloat16 in training on a CPU. It changes probabilities (above), so it is left to those "
        "who ask for it.",
    ]
    return lines


def memory(result: dict) -> list[str]:
    verdict, lines = memory_table(result)
    return [
        "## Memory of a step",
        "",
        "Most memory at a time during the first step of 8, above what model and slices take, in "
        f"MB; gradients and Adam's averages are included. Each in a process of its own. {verdict}",
        "",
        *lines,
    ]


def memory_table(result: dict) -> tuple[str, list[str]]:
    """Where ours is above the baseline, in words, and the table."""
    body, above = [], []
    for name in (LIGHT, LARGE):
        for regime, label in REGIMES.items():
            values = result[EXACT][name]["peak_megabytes"][regime]
            above += [f"{label}, {name}"] if values["ours"] > values["baseline"] else []
            share = f"{100 * values['ours'] / values['baseline']:.0f} %"
            cells = [number(values[key]) for key in ("baseline", "ours")]
            body.append([label, name, *cells, share])
    verdict = (
        f"Ours is above the baseline in: {'; '.join(above)}." if above else "Ours is below in all."
    )
    return verdict, table(["regime", "model", "baseline", "ours", "share"], body)


def growth(result: dict) -> list[str]:
    body = []
    for key, (what, timed, _) in GROWTH.items():
        first, last = result["growth"][key][0], result["growth"][key][-1]
        more = last["x"] / first["x"]
        body.append(
            [
                f"{what}, {first['x']} to {last['x']}",
                timed,
                factor(more),
                factor(last["seconds"] / first["seconds"]),
                factor(last["megabytes"] / first["megabytes"]),
            ]
        )
    worse = [
        GROWTH[key][0]
        for key in ("n_boxes", "slices")
        if (points := result["growth"][key])
        and points[-1]["seconds"] / points[0]["seconds"] > 1.1 * points[-1]["x"] / points[0]["x"]
    ]
    verdict = (
        f"Worse than linear: {', '.join(worse)}."
        if worse
        else "In N and in the number of slices nothing grows worse than linearly."
    )
    return [
        "## How cost grows",
        "",
        "```{figure} _static/speed_growth.svg",
        f":alt: {describe_growth(result)}",
        ":width: 100%",
        ":name: fig-speed-growth",
        "",
        f"Seconds and memory of {result['growth']['model']} against the side of a slice, N and the "
        "number of slices; both axes are logarithmic. Dashed: growth in proportion.",
        "```",
        "",
        f"{verdict} The pixels of a slice grow with the square of its side.",
        "",
        *table(["what grows", "what is measured", "it grows", "time", "memory"], body),
    ]


def on_gpu(result: dict | None) -> list[str]:
    if result is None:
        return [
            "## On a GPU",
            "",
            "Not measured: no GPU was at hand. One command measures the same table in float32 and "
            "bfloat16 against the baseline on the same GPU, the share of the roofline, the batch "
            "size that the memory allows, and how long the GPU waits for slices:",
            "",
            f"    {COMMANDS['cuda']}",
        ]
    body, waiting = [], []
    for name in (LIGHT, LARGE):
        for precision in (EXACT, ROUGH):
            values = result[precision][name]
            start = [name, PRECISIONS[precision]]
            for entry in values.get("batches", ()):  # a run may have been stopped before
                cells = [str(entry["batch"]), duration(entry["seconds_a_slice"])]
                body.append([*start, *cells, number(entry["megabytes"])])
            for source, share in values.get("waiting", {}).items():
                waiting.append([*start, source, f"{100 * share:.0f} %"])
    found = rows(result, "cuda")
    asked = [row for row in found if row.least]
    missed = "; ".join(
        f"{row.work}, {row.model}, is {factor(row.values['ratio'])} and not {factor(row.least)}"
        for row in asked
        if row.values["ratio"] < row.least
    )
    rpn = result[EXACT][LARGE]["stages"]["RPN"]
    share = rpn["seconds"] / result[EXACT][LARGE]["inference"]["ours"]
    verdict, peaks = memory_table(result)
    lines = [
        "## On a GPU",
        "",
        "The baseline runs in float32, as the released code does; convolutions in float32 are "
        "those of PyTorch's default (TF32) in both. "
        + (f"What was asked for is missed: {missed}." if missed else "What was asked for is met."),
        "",
        *ratio_table([row._replace(least=None) for row in found]),
        "",
        origin(result, "benchmarks-cuda.json"),
        "",
        "A GPU multiplies so fast that the steps between the multiplications decide, and those are "
        "much the same in both loops. The RPN takes "
        f"{100 * share:.0f} % of our inference with ResNet-50, at "
        f"{100 * rpn['share_of_roofline']:.0f} % of its roofline. The likely reason is NMS, which "
        "goes through the boxes of a slice one after the other; it was not profiled.",
        "",
        *stages(result)[2:],
        "",
        f"Most memory at a time during the first step of 8, in MB. {verdict} Here a step takes its "
        "eight slices at once.",
        "",
        *peaks,
        "",
        "A heads + BN step with more slices at once, until the memory is full or 128 are reached:",
        "",
        *table(["model", "precision", "batch", "time of a slice", "MB"], body),
        "",
        "Share of an epoch in which the GPU waits for slices:",
        "",
        *table(["model", "precision", "slices from", "share"], waiting),
    ]
    if "not_measured" in result:
        lines += ["", f"Not measured: {result['not_measured']}."]
    return lines


# ---- chapter 6 and README.md -------------------------------------------------------------------


def chapter_table(result: dict) -> str:
    """What chapter 6 says about times, as Markdown."""
    found = [row for row in rows(result) if row.short in ("heads", *REGIMES.values())]
    body = [
        [
            row.work,
            row.model,
            duration(row.values["baseline"]),
            duration(row.values["ours"]),
            factor(row.values["ratio"]),
        ]
        for row in found
    ]
    lines = table(["regime and work", "model", "baseline", "ours", "ratio"], body)
    return "\n".join([*lines, "", origin(result, "benchmarks.json")])


def chapter_code(result: dict) -> str:
    """The same ratios, as the dictionary that the chapter's figure draws."""
    found = [row for row in rows(result) if row.short in ("heads", *REGIMES.values())]
    lines = ["speed = {  # (regime, model): times faster than the baseline"]
    for row in found:
        lines.append(f'    ("{row.short}", "{row.model}"): {row.values["ratio"]:.3g},')
    return "\n".join([*lines, "}"])


def readme_text(result: dict, cuda: dict | None) -> str:
    """The paragraph of README.md."""

    def both(short: str, found: Sequence[Row]) -> str:
        ratio = {row.model: factor(row.values["ratio"]) for row in found if row.short == short}
        return f"{ratio[LIGHT]} (ResNet-18) and {ratio[LARGE]} (ResNet-50)"

    cpu = rows(result)
    gpu = ""
    if cuda is not None:
        found = rows(cuda, "cuda")
        gpu = (
            f"That is on a CPU. On a GPU ({cuda['hardware'].split(',')[0]}) *heads* is "
            f"{both('heads', found)} as fast, a step of *heads + BN* {both('heads + BN', found)}, "
            f"and inference {both('inference', found)}. "
        )
    heads = result[EXACT][LIGHT]["heads_only"]
    lines = [
        f"Against a loop that works as the released code does, at 512 x 512: training in *heads* "
        f"({heads['slices']:,} slices, {heads['epochs']} epochs, extrapolated) is "
        f"{both('heads', cpu)} as fast, a step of *heads + BN* {both('heads + BN', cpu)}, a step "
        f"of *full* {both('full', cpu)}, inference {both('inference', cpu)}, and the AP over ten "
        f"thresholds {both('AP', cpu)}. "
        + gpu
        + "What makes it so, with accuracy, memory and what did not pay: "
        "[book/fast.md](book/fast.md).",
        "",
        origin(result, "benchmarks.json").replace(
            "`results/benchmarks.json`", "[results/benchmarks.json](results/benchmarks.json)"
        ),
    ]
    return "\n".join(lines)


TABLE_MARKS = ("# <!-- speed -->", "# <!-- /speed -->")
CODE_MARKS = ("# speed, from results/benchmarks.json", "# end of speed")
README_MARKS = ("<!-- speed -->", "<!-- /speed -->")


def load(root: Path, device: str = "cpu") -> dict | None:
    """The results of a device; None where it was not measured."""
    suffix = "" if device == "cpu" else f"-{device}"
    path = root / "results" / f"benchmarks{suffix}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def files(cpu: dict | None, cuda: dict | None) -> dict[str, str]:
    """Path below the root -> text, of every file that is written as a whole."""
    result = {"book/fast.md": page(cpu, cuda)}
    if cpu is not None:
        result["book/_static/speed_ratios.svg"] = ratio_figure(rows(cpu))
        result["book/_static/speed_growth.svg"] = growth_figure(cpu)
    return result


def write(root: Path) -> None:
    """Write the page and its figures, fill chapter 6 and README.md."""
    cpu, cuda = load(root), load(root, "cuda")
    for name, content in files(cpu, cuda).items():
        with atomic_path(root / name) as temporary:
            temporary.write_text(content, encoding="utf-8", newline="\n")
    if cpu is not None:
        twin = root / "book" / "py" / "06_three_regimes.py"
        fill(twin, TABLE_MARKS, commented(chapter_table(cpu)))
        fill(twin, CODE_MARKS, chapter_code(cpu))
        fill(root / "README.md", README_MARKS, readme_text(cpu, cuda))
    print("written: book/fast.md, its figures, chapter 6 and README.md")
