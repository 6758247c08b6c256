"""How much faster than the released code's loops: both timed in turn, in one run, on one machine.

The baseline is `released_loop.py`; weights are random, slices phantoms of 512 x 512. Writes the
results of the device and fills book/fast.md, chapter 9 and README.md; --page only fills these.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

import common
import released_loop
import torch
import tyro
from common import RESULTS, fill
from torch import Tensor, nn
from torch.utils.benchmark import timer
from torch.utils.data import Subset

from covidmask import training
from covidmask.config import PRESETS, PhantomConfig, TrainingConfig
from covidmask.datasets import LesionSlices, SliceImages, make_slice, write_phantoms
from covidmask.metrics.detection import IOU_THRESHOLDS
from covidmask.models import covid_ct_mask_net, lesion_mask_rcnn, set_regime
from covidmask.models.detector import for_inference
from covidmask.training.loop import make_fabric

PAGE, README = common.ROOT / "book" / "fast.md", common.ROOT / "README.md"
TWIN = common.TWINS / "09_speed.py"
CODE_MARKS = ("# speed, from results/benchmarks.json\n", "# end of speed\n")
PAPER = PRESETS["paper"]
MODELS = {
    "ResNet-18 cut 1": (
        replace(PAPER.detector, backbone="resnet18", cut=1, light_mask_head=True),
        replace(PAPER.classifier, n_boxes=128, hidden=512),
    ),
    "ResNet-50": (PAPER.detector, PAPER.classifier),
}
BATCH = 8
SLICES, EPOCHS = 3000, 50  # the paper's
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


@dataclass(frozen=True)
class Bench:
    """Where, how precisely and at which sizes."""

    device: str
    precision: str
    smoke: bool

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision != "32-true")

    def runs(self, works: dict[str, Callable], repeats: int = 5) -> dict[str, list[float]]:
        """Seconds of every run of each; all are run once unmeasured, then in turn."""
        for work in works.values():
            work()
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(1 if self.smoke else repeats):
            for name, work in works.items():
                start = timer()  # waits for the GPU
                work()
                times[name].append(timer() - start)
        return times

    def compare(self, baseline: Callable, ours: Callable, repeats: int = 5, each: int = 1) -> dict:
        """Medians of both and their ratio; times are of one of `each` slices."""
        runs = self.runs({"baseline": baseline, "ours": ours}, repeats)
        runs = {name: [seconds / each for seconds in times] for name, times in runs.items()}
        times = {name: median(values) for name, values in runs.items()}
        ratios = [b / o for b, o in zip(runs["baseline"], runs["ours"], strict=True)]
        return {
            **times,
            "ratio": times["baseline"] / times["ours"],
            "ratio_lowest_highest": [min(ratios), max(ratios)],
            "repeats": len(ratios),
            "runs": runs,
        }


def segmenter(name: str, bench: Bench) -> nn.Module:
    """Random weights, the same for everyone, with batch-norm statistics of eight small phantoms.

    Without such statistics the features grow from layer to layer and every sigmoid is 0 or 1.
    """
    config = MODELS[name][0]
    if bench.smoke:
        config = replace(config, image_size=128, max_size=256, rpn_test_proposals=60)
    torch.manual_seed(0)
    model = lesion_mask_rcnn(config)
    slices = [torch.from_numpy(make_slice(seed, seed % 3, 128)[0]) for seed in range(8)]
    images = torch.stack(slices)[:, None].expand(-1, 3, -1, -1)  # [8, 3, 128, 128], 0..1
    for layer in model.backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # a plain mean, of one batch
    with torch.no_grad():
        model.backbone.train()((images - images.mean()) / images.std())
    return model.to(bench.device).eval()


def our_step(model, images: list[Tensor], labels: Tensor, optimizer, bench: Bench) -> None:
    """The step of `fit`: slices one by one on a CPU, the batch at once on a GPU."""
    size = len(images) if bench.device == "cuda" else 1
    optimizer.zero_grad()
    for first in range(0, len(images), size):
        piece = slice(first, first + size)
        with bench.autocast():
            loss = training.classification_loss(model(images[piece]), labels[piece])
        loss = loss * (size / len(images))
        loss.backward()
        loss.item()
    optimizer.step()


def step(name: str, regime: str, images: list, labels: Tensor, bench: Bench, repeats: int) -> dict:
    """A training step of eight slices: as `train_classifier` has it, and the released loop.

    There everything requires a gradient, and the optimiser takes a part. It is in float32.
    """
    loops = []
    for loop in (released_loop.training_step, partial(our_step, bench=bench)):
        model = covid_ct_mask_net(segmenter(name, bench), MODELS[name][1])
        set_regime(model, regime)
        picked = [parameter.requires_grad for parameter in model.parameters()]
        if loop is released_loop.training_step:
            model = released_loop.released(model)
        else:
            model.train().to(memory_format=torch.channels_last)
        parameters = [p for p, take in zip(model.parameters(), picked, strict=True) if take]
        adam = torch.optim.Adam(parameters, lr=1e-5, weight_decay=1e-3)
        loops.append(partial(loop, model, images, labels, adam))
    return bench.compare(*loops, repeats)


def heads_only(name: str, dataset: SliceImages, bench: Bench, step: float) -> dict:
    """S alone: the ranked boxes are constants, so they are computed once. Seconds of all epochs."""
    model = covid_ct_mask_net(segmenter(name, bench), MODELS[name][1])
    options = {"fabric": make_fabric(bench.precision, bench.device), "progress": False}
    part, count = Subset(dataset, range(4 if bench.smoke else 48)), 64 if bench.smoke else SLICES
    rows, labels = torch.rand(count, model.config.n_boxes, 5), torch.arange(count) % 3
    two = TrainingConfig(epochs=2, batch_size=BATCH)
    works = {
        "rank": partial(training.cache_ranked_boxes, model, part, **options),
        "train": partial(training.train_s, model.s, rows, labels, two, **options),
    }
    times = {key: median(seconds) for key, seconds in bench.runs(works, 3).items()}
    rank, epoch = SLICES * times["rank"] / len(part), SLICES * times["train"] / count / two.epochs
    baseline, ours = EPOCHS * SLICES / BATCH * step, rank + EPOCHS * epoch
    return {
        "baseline": baseline,
        "ours": ours,
        "ratio": baseline / ours,
        "ratio_to_uncached_no_grad": EPOCHS * (rank + epoch) / ours,
        "slices": SLICES,
        "epochs": EPOCHS,
        "measured": {"ranked_slices": len(part), "rows": count, "epochs": two.epochs, "repeats": 3},
    }


def inference(name: str, images: list[Tensor], bench: Bench) -> dict:
    """Seconds a slice; the baseline is in float32, as the released code is."""
    model = covid_ct_mask_net(segmenter(name, bench), MODELS[name][1])
    theirs, fast = released_loop.released(model), for_inference(model)

    def baseline() -> None:
        for image in images:
            released_loop.logits(theirs, image)  # builds a graph, as his evaluation does

    @torch.no_grad()
    def ours() -> None:
        with bench.autocast():
            rows = fast.ranked_boxes(images)
        fast.s(rows)

    found = bench.compare(baseline, ours, each=len(images))
    return {**found, "slices": len(images), "boxes": model.config.n_boxes}


def ap(name: str, dataset: LesionSlices, bench: Bench, repeats: int) -> dict:
    """AP over ten IoU thresholds: ten passes of the detector, or one."""
    model, fabric = segmenter(name, bench), make_fabric(bench.precision, bench.device)
    part = Subset(dataset, range(1 if bench.smoke else 10))
    case = released_loop.released(model), part, IOU_THRESHOLDS, torch.device(bench.device)
    baseline = partial(released_loop.average_precision, *case)
    options = {"fabric": fabric, "score": 0, "progress": False}
    ours = partial(training.evaluate_segmenter, model, part, **options)
    sizes = {"slices": len(part), "thresholds": len(IOU_THRESHOLDS)}
    return {**bench.compare(baseline, ours, repeats), **sizes}


def measure(bench: Bench, root: Path) -> dict:
    """Model -> part -> numbers, at one precision."""
    cuda, exact = bench.device == "cuda", bench.precision == "32-true"
    slices = SliceImages(root / "slices", "train")
    lesions = LesionSlices(root / "lesions", "test", min_area=PAPER.min_area)
    third = len(slices) // 3  # the classes stand one after the other
    chosen = [third * (i % 3) + i // 3 for i in range(BATCH)]
    images = [slices[i][0].to(bench.device) for i in chosen]
    labels = torch.tensor([slices.labels[i] for i in chosen], device=bench.device)
    result = {}
    for name in MODELS:
        slow = name == "ResNet-50" and not cuda  # its baseline takes minutes
        found = result[name] = {"inference": inference(name, images, bench)}
        if exact or cuda:  # bfloat16 on a CPU: for inference alone
            case = images, labels, bench, 3 if slow else 5
            found["step"] = {regime: step(name, regime, *case) for regime in ("heads_bn", "full")}
            seconds = found["step"]["heads_bn"]["baseline"]
            found["heads_only"] = heads_only(name, slices, bench, seconds)
        if exact:
            found["ap"] = ap(name, lesions, bench, 1 if slow else 3)
        print(f"{bench.precision}, {name}: {found}", flush=True)
    return result


def processor() -> str:
    """The processor's name, and whether it multiplies bfloat16 in hardware."""
    facts = Path("/proc/cpuinfo")
    text = facts.read_text("utf-8") if facts.is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    kinds = [kind for kind in ("avx512_bf16", "amx_bf16") if kind in text]
    return f"{name[1] if name else platform.machine()} ({', '.join(kinds) or 'no bfloat16'})"


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path | None = None,
    smoke: bool = False,
    page: bool = False,
) -> None:
    """Time everything and fill the pages.

    Args:
        smoke: toy sizes, into `out`: does it run?
        page: only fill the pages.
    """
    if smoke and out is None:
        sys.exit("--smoke needs --out, so that it cannot replace results")
    if page:
        return write()
    start = timer()
    result = {
        "about": "times on synthetic phantoms, random weights; see benchmarks/speed.py",
        **common.environment(),
        "processor": processor(),
        "scale": "smoke" if smoke else "full",
    }
    if device == "cuda":
        result["hardware"] = f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    size, slices, test, train = (128, 2, 1, 2) if smoke else (512, 5, 2, 4)
    phantoms = PhantomConfig(size, slices, (1, 1, test), (train, 1, 1))
    with TemporaryDirectory() as folder:
        root = write_phantoms(Path(folder) / "phantoms", phantoms, progress=False)
        for precision in ("32-true", "bf16-mixed"):
            result[precision] = measure(Bench(device, precision, smoke), root)
    result["minutes"] = (timer() - start) / 60
    own = RESULTS / f"benchmarks{'-cuda' if device == 'cuda' else ''}.json"
    common.write_text(out or own, json.dumps(result, indent=1) + "\n")
    if out is None:
        write()


def number(value: float) -> str:
    """Counts as they are, other numbers with two or more digits."""
    if not value or isinstance(value, int):
        return f"{value:,.0f}"
    digits = max(0, 1 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f}" if value >= 1e-3 else f"{value:.1e}"


def duration(seconds: float) -> str:
    for least, size, unit in ((129600, 86400, "days"), (5400, 3600, "h"), (90, 60, "min")):
        if seconds >= least:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds)} s" if seconds >= 0.1 else f"{number(1000 * seconds)} ms"


def timed(result: dict) -> list[tuple[str, str, dict]]:
    """Work, model and times, of all that was timed both ways."""
    rows = []
    for path, work in WORKS.items():
        for model in MODELS:
            found = result
            for key in path.format(model).split("/"):
                found = found.get(key, {})
            rows += [(work, model, found)] if found else []
    return rows


def ratios(result: dict) -> list[str]:
    body = []
    for work, model, v in timed(result):
        spread = ", ".join(f"{x:.3g}" for x in v.get("ratio_lowest_highest", [])) or "extrapolated"
        repeats = str(v.get("repeats") or v["measured"]["repeats"])
        times = duration(v["baseline"]), duration(v["ours"]), f"{v['ratio']:.3g}x"
        body.append([work, model, *times, spread, repeats])
    head = ["regime and work", "model", "baseline", "ours", "ratio", "lowest, highest", "repeats"]
    return common.table(head, body)


def made(result: dict, file: str) -> str:
    """The line below a table that says how it came about."""
    machine = f"{result['hardware']}, {result['processor']}, {result['threads']} threads"
    minutes = f"` (about {result['minutes']:.0f} minutes);"
    return common.origin(result, file, machine).replace("`;", minutes, 1)


def write() -> None:
    """Fill the tables of the page, of chapter 9, with its code, and of README.md."""
    file = "results/benchmarks.json"
    cpu = common.read(RESULTS / "benchmarks.json")
    cuda = common.read(RESULTS / "benchmarks-cuda.json")
    rows, other = (
        [*ratios(cpu), ""],
        [*ratios(cuda), "", made(cuda, "`results/benchmarks-cuda.json`")],
    )
    fill(PAGE, "ratios", "\n".join(["", *rows, made(cpu, f"`{file}`"), "\n"]))
    fill(PAGE, "gpu ratios", "\n".join(["", *other, "\n"]))
    short = ["|".join(row.split("|")[:6]) + "|" for row in ratios(cpu)]
    fill(README, "speed", "\n".join([*short, "", made(cpu, f"[{file}]({file})")]))
    fill(TWIN, "speed", "\n".join([*short[:8], "", made(cpu, f"`{file}`")]))
    code = [f'    ("{w.split(",")[0]}", "{m}"): {v["ratio"]:.3g},\n' for w, m, v in timed(cpu)[:6]]
    head = "speed = {  # (regime, model): times faster than the baseline\n"
    common.replace_between(TWIN, CODE_MARKS, "".join([head, *code, "}\n"]))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
