"""How much faster than the released code's loops: both timed in turn, in one run, on one machine.

    python benchmarks/speed.py                       # CPU: about 30 minutes on two idle cores
    python benchmarks/speed.py --device cuda         # GPU: float32 and bfloat16
    python benchmarks/speed.py --page                # fill the pages from the results, no timing
    python benchmarks/speed.py --smoke --out x.json  # everything at toy sizes: does it run?

Writes results/benchmarks.json (or results/benchmarks-cuda.json) and fills tables of book/fast.md,
chapter 6 and README.md. The baseline is `released_loop.py`. Weights are random, slices are
synthetic phantoms of 512 x 512; times are medians of runs that alternate between baseline and ours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil
import released_loop
import speed_page
import torch
from common import RESULTS, environment, save
from torch import Tensor, nn
from torch.utils.benchmark import timer
from torch.utils.data import Subset
from torchvision.ops import box_iou

from covidmask.config import PRESETS, PhantomConfig, TrainingConfig
from covidmask.datasets import LesionSlices, SliceImages, make_slice, write_phantoms
from covidmask.metrics.detection import IOU_THRESHOLDS
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net, set_regime
from covidmask.models.detector import for_inference, lesion_mask_rcnn
from covidmask.models.ranked_boxes import Columns, pad_rows, ranked_boxes
from covidmask.models.weights import ShippedWeights
from covidmask.training import cache_ranked_boxes, evaluate_classifier, evaluate_segmenter, train_s
from covidmask.training.classification import classification_loss
from covidmask.training.loop import make_fabric

PAPER = PRESETS["paper"]
MODELS = {
    "ResNet-50": (PAPER.detector, PAPER.classifier),
    "ResNet-18 cut 1": (
        replace(PAPER.detector, backbone="resnet18", cut=1, light_mask_head=True),
        replace(PAPER.classifier, n_boxes=128, hidden=512),
    ),
}
BATCH, REGIMES = 8, ("heads_bn", "full")
SLICES, EPOCHS = 3000, 50  # the paper's


@dataclass(frozen=True)
class Bench:
    """Where, how precisely and at which sizes."""

    device: str
    precision: str = "32-true"
    smoke: bool = False

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


def summary(runs: dict[str, list[float]], each: int = 1) -> dict:
    """Medians of `baseline` and `ours` and their ratio; times are of one of `each` slices."""
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


def our_step(model: CovidCTMaskNet, images: list[Tensor], labels: Tensor, optimizer, bench: Bench):
    """The step of `fit`: slices one by one on a CPU, the batch at once on a GPU. Gives the loss."""
    size, total = len(images) if bench.device == "cuda" else 1, 0.0
    optimizer.zero_grad()
    for first in range(0, len(images), size):
        piece = slice(first, first + size)
        with bench.autocast():
            loss = classification_loss(model(images[piece]), labels[piece])
        loss = loss * (len(images[piece]) / len(images))
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def trainee(
    name: str, regime: str, images: list[Tensor], labels: Tensor, bench: Bench, baseline: bool
) -> tuple[nn.Module, Callable[[], float]]:
    """A model, and its training step: as `train_classifier` has it, or the released loop.

    There everything requires a gradient, and the optimiser takes a part.
    """
    model = covid_ct_mask_net(segmenter(name, bench), MODELS[name][1])
    set_regime(model, regime)
    picked = [parameter.requires_grad for parameter in model.parameters()]
    if baseline:
        model = released_loop.released(model)
    else:
        model.train().to(memory_format=torch.channels_last)
    parameters = [p for p, take in zip(model.parameters(), picked, strict=True) if take]
    case = model, images, labels, torch.optim.Adam(parameters, lr=1e-5, weight_decay=1e-3)
    if baseline:
        return model, partial(released_loop.training_step, *case)
    return model, partial(our_step, *case, bench)


def steps(name: str, regime: str, images, labels: Tensor, bench: Bench, repeats: int) -> dict:
    """A training step of eight slices. The baseline has the precision of the released code."""
    case = name, regime, images, labels, bench
    loops = {who: trainee(*case, who == "baseline")[1] for who in ("baseline", "ours")}
    return summary(bench.runs(loops, repeats))


def heads_only(name: str, dataset: SliceImages, bench: Bench, step: float) -> dict:
    """S alone: the ranked boxes are constants, so they are computed once. Seconds of all epochs."""
    model = covid_ct_mask_net(segmenter(name, bench), MODELS[name][1])
    fabric = make_fabric(bench.precision, bench.device)
    part, count = Subset(dataset, range(4 if bench.smoke else 48)), 64 if bench.smoke else SLICES
    rows, labels = torch.rand(count, model.config.n_boxes, 5), torch.arange(count) % 3
    two = TrainingConfig(epochs=2, batch_size=BATCH)
    works = {
        "rank": partial(cache_ranked_boxes, model, part, fabric=fabric, progress=False),
        "train": partial(train_s, model.s, rows, labels, two, fabric=fabric, progress=False),
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
    """Seconds a slice; how far our logits are from the baseline's, and how many boxes change.

    The baseline is in float32, as the released code is. A box is changed when none of ours, of
    the same class, has an IoU above 0.9 with it. Where two boxes score the same but for rounding,
    their order may change, and with it the vector that S reads: such slices are counted.
    """
    model = covid_ct_mask_net(segmenter(name, bench), MODELS[name][1])
    theirs, fast, config = released_loop.released(model), for_inference(model), model.config

    def baseline() -> None:
        for image in images:
            released_loop.logits(theirs, image)  # builds a graph, as his evaluation does

    @torch.no_grad()
    def ours() -> Tensor:
        with bench.autocast():
            rows = fast.ranked_boxes(images)
        return fast.s(rows)

    runs = bench.runs({"baseline": baseline, "ours": ours})
    where, side = Columns(("x1", "y1", "x2", "y2", "label")), theirs.detector.transform.min_size[0]
    with torch.no_grad():
        exact = [released_loop.ranked(theirs, image) for image in images]
        plain = torch.cat([model.s(rows[None]) for rows, _ in exact])
        with bench.autocast():
            found = ranked_boxes(fast.detector, images, config, encoder=where)  # [B, N, 5]
    pairs = []  # of wanted and found, in shares of the side of square slices: do they agree?
    for (_, kept), mine in zip(exact, found, strict=True):
        wanted = pad_rows(torch.cat([kept.box / side, kept.label[:, None]], 1), config.n_boxes)
        near = box_iou(wanted[:, :4], mine[:, :4]) > 0.9
        pairs.append(near & (wanted[:, 4:] == mine[:, 4]))
    same, logits = torch.stack(pairs), ours()  # [B, N, N], [B, 3]
    ordered = same.diagonal(dim1=1, dim2=2).all(1)  # [B]
    in_order = (logits - plain).abs().amax(1)[ordered].tolist()
    change = (logits.sigmoid() - plain.sigmoid()).abs()
    return {
        **summary(runs, len(images)),
        "slices": len(images),
        "order_changed_slices": int((~ordered).sum()),
        "logits_difference_same_order": max(in_order, default=None),
        "probability_change": {"mean": float(change.mean()), "max": float(change.max())},
        "boxes_changed": float((~same.any(2)).sum(1).float().mean()),
        "boxes": config.n_boxes,
    }


def ap(name: str, dataset: LesionSlices, bench: Bench, repeats: int) -> dict:
    """AP over ten IoU thresholds: ten passes of the detector, or one."""
    model, fabric = segmenter(name, bench), make_fabric(bench.precision, bench.device)
    part = Subset(dataset, range(1 if bench.smoke else 10))
    case = released_loop.released(model), part, IOU_THRESHOLDS, torch.device(bench.device)
    ours = partial(evaluate_segmenter, model, part, fabric=fabric, score=0, progress=False)
    works = {"baseline": partial(released_loop.average_precision, *case), "ours": ours}
    sizes = {"slices": len(part), "thresholds": len(IOU_THRESHOLDS)}
    return {**summary(bench.runs(works, repeats)), **sizes}


def gradients(name: str, images: list[Tensor], labels: Tensor, bench: Bench) -> dict:
    """Loss and gradients of one step of both, from the same weights, float32 on the CPU.

    `same_layout` is the claim: ranking first and differentiating the N kept boxes changes nothing.
    `as_trained` has channels-last convolutions too, whose sums are rounded in another order.
    """

    def flat(model: nn.Module) -> Tensor:  # a level of the FPN without a box has no gradient, or 0
        grads = (p.new_zeros(p.shape) if p.grad is None else p.grad for p in model.parameters())
        return torch.cat([grad.flatten() for grad in grads])

    theirs, step = trainee(name, "full", images, labels, bench, True)
    result, wanted = {"loss": step()}, flat(theirs)
    for layout in ("same_layout", "as_trained"):
        ours, step = trainee(name, "full", images, labels, bench, False)
        if layout == "same_layout":
            ours.to(memory_format=torch.contiguous_format)
        result[f"loss_{layout}"] = step()
        result[layout] = float((flat(ours) - wanted).norm() / wanted.norm())
    return result


def peak(name: str, regime: str, baseline: bool, bench: Bench) -> float:
    """MB that the first step of eight slices has at a time, at most, above model and slices."""
    torch.manual_seed(1)
    side = 128 if bench.smoke else 512
    images = [torch.rand(3, side, side, device=bench.device) for _ in range(BATCH)]
    labels = torch.arange(BATCH, device=bench.device) % 3
    _, step = trainee(name, regime, images, labels, bench, baseline)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(process.memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    step()
    done.set()
    return (max(seen) - seen[0]) / 1e6


def trained(bench: Bench, folder: Path) -> dict:
    """The shipped classifier on the quick preset's test phantoms: what our rounding changes."""
    phantoms = PRESETS["quick"].phantoms
    if bench.smoke:
        phantoms = replace(phantoms, lesion_patients=(1, 1, 1), class_patients=(1, 1, 1))
    dataset = SliceImages(write_phantoms(folder, phantoms, progress=False) / "slices", "test")
    model = ShippedWeights.CLASSIFIER_QUICK.load(bench.device)
    theirs, images = released_loop.released(model), (image for image, _ in dataset)
    with torch.no_grad():
        logits = [released_loop.logits(theirs, image.to(bench.device)).cpu() for image in images]
    exact = torch.stack(logits)  # [M, 3]
    right = exact.argmax(1) == torch.tensor(dataset.labels)
    result = {"slices": len(dataset), "accuracy_baseline": float(right.float().mean())}
    for precision in ("32-true", "bf16-mixed"):
        fabric = make_fabric(precision, bench.device)
        found = evaluate_classifier(model, dataset, fabric=fabric, progress=False)
        change = (found["probabilities"] - exact.sigmoid()).abs().amax(1)  # [M]
        result[precision] = {
            "accuracy": found["accuracy"],
            "predictions_changed": int((found["predictions"] != exact.argmax(1)).sum()),
            "probability_change": {"mean": float(change.mean()), "max": float(change.max())},
        }
    return result


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
            found["step"] = {
                regime: steps(name, regime, images, labels, bench, 3 if slow else 5)
                for regime in REGIMES
            }
            step = found["step"]["heads_bn"]["baseline"]
            found["heads_only"] = heads_only(name, slices, bench, step)
        if exact:
            found["ap"] = ap(name, lesions, bench, 1 if slow else 3)
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                found["peak_megabytes"] = {  # each in a process of its own
                    regime: {
                        who: pool.apply(peak, (name, regime, who == "baseline", bench))
                        for who in ("baseline", "ours")
                    }
                    for regime in REGIMES
                }
        if exact and not cuda:
            found["gradients"] = gradients(name, images[:2], labels[:2], bench)
        print(f"{bench.precision}, {name}: {found}", flush=True)
    return result


def processor() -> str:
    """The processor's name, and whether it multiplies bfloat16 in hardware."""
    facts = Path("/proc/cpuinfo")
    text = facts.read_text("utf-8") if facts.is_file() else ""
    name = re.search(r"model name\s*: (.*)", text)
    kinds = [kind for kind in ("avx512_bf16", "amx_bf16") if kind in text]
    return f"{name[1] if name else platform.machine()} ({', '.join(kinds) or 'no bfloat16'})"


def main() -> None:
    """Read the command line, time, write the results and the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true", help="only fill the pages")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run?")
    arguments = parser.parse_args()
    if arguments.smoke and arguments.out is None:
        parser.error("--smoke needs --out, so that it cannot replace results")
    if not arguments.page:
        name = "benchmarks-cuda.json" if arguments.device == "cuda" else "benchmarks.json"
        save(arguments.out or RESULTS / name, run(arguments.device, arguments.smoke))
    if arguments.page or arguments.out is None:
        speed_page.write()


def run(device: str, smoke: bool) -> dict:
    """Measure everything."""
    start = timer()
    result = {
        "about": "times on synthetic phantoms, random weights; see benchmarks/speed.py",
        **environment(),
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
        result["trained"] = trained(Bench(device, smoke=smoke), Path(folder) / "quick")
    return {**result, "minutes": (timer() - start) / 60}


if __name__ == "__main__":
    main()
