"""How much faster than the released code's loops: both timed in turn, in one run, on one machine.

    python benchmarks/speed.py                       # CPU: about 25 minutes on two cores
    python benchmarks/speed.py --device cuda         # GPU: float32 and bfloat16
    python benchmarks/speed.py --page                # rewrite the page from the results, no timing

Writes results/benchmarks.json (or results/benchmarks-cuda.json) and the page book/fast.md with its
figures. The baseline is `released_loop.py`. Weights are random, slices are synthetic phantoms of
512 x 512; times are medians of runs that alternate between baseline and ours.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import released_loop
import speed_page
import torch
from quick_preset import ROOT, environment
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from covidmask.config import (
    PAPER,
    PRESETS,
    ClassifierConfig,
    DetectorConfig,
    PhantomConfig,
    TrainingConfig,
)
from covidmask.data.lesions import LesionSlices
from covidmask.data.memory import InMemory
from covidmask.data.phantom_sets import write_phantoms
from covidmask.data.slices import SliceImages
from covidmask.files import atomic_path
from covidmask.metrics.detection import IOU_THRESHOLDS
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net, set_regime
from covidmask.models.inference import for_inference
from covidmask.models.ranked_boxes import propose, run_box_head
from covidmask.models.segmentation import lesion_mask_rcnn
from covidmask.models.weights import ShippedWeights
from covidmask.training.classification import (
    classification_loss,
    evaluate_classifier,
    train_s,
)
from covidmask.training.loop import make_fabric
from covidmask.training.ranked_cache import cache_ranked_boxes
from covidmask.training.segmentation import evaluate_segmenter

LIGHT = DetectorConfig(backbone="resnet18", cut=1, light_mask_head=True)
MODELS = {
    "ResNet-50": (DetectorConfig(), ClassifierConfig()),
    "ResNet-18 cut 1": (LIGHT, ClassifierConfig(n_boxes=128, hidden=512)),
}
PHANTOMS = PhantomConfig(512, 5, (1, 1, 2), (4, 1, 1))
BATCH = 8
# The released code itself, timed on two cores of this kind: seconds a slice, seconds a step of 8.
RELEASED_CODE = {"ResNet-50": (0.62, 18.2), "ResNet-18 cut 1": (0.23, 9.2)}
SLICES, EPOCHS = 3000, 50  # the paper's training set and its epochs


class Bench:
    """Device, precision and the clock."""

    def __init__(self, device: str, precision: str, repeats: int) -> None:
        self.device = torch.device(device)
        self.precision = precision
        self.repeats = repeats

    def autocast(self) -> torch.autocast:
        enabled = self.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def alternate(self, works: dict[str, Callable], repeats: int | None = None) -> dict[str, float]:
        """Median seconds of each; all are run once unmeasured, then in turn."""
        for work in works.values():
            work()
        times = {name: [] for name in works}
        for _ in range(repeats or self.repeats):
            for name, work in works.items():
                times[name].append(self.seconds(work))
        return {name: median(values) for name, values in times.items()}


def build(name: str, device: torch.device, **changes) -> CovidCTMaskNet:
    """Random weights, the same for everyone."""
    detector, classifier = MODELS[name]
    torch.manual_seed(0)
    kinds = {k: v for k, v in changes.items() if k != "n_boxes"}
    if "n_boxes" in changes:
        classifier = replace(classifier, n_boxes=changes["n_boxes"])
    return covid_ct_mask_net(lesion_mask_rcnn(replace(detector, **kinds)), classifier).to(device)


def our_step(
    model: CovidCTMaskNet, images: list[Tensor], labels: Tensor, optimizer, bench: Bench
) -> None:
    """The step of `fit`: slices one by one on a CPU, the batch at once on a GPU."""
    size = 1 if bench.device.type == "cpu" else len(images)
    optimizer.zero_grad()
    for first in range(0, len(images), size):
        piece = slice(first, first + size)
        with bench.autocast():
            loss = classification_loss(model(images[piece]), labels[piece])
        (loss * (len(images[piece]) / len(images))).backward()
    optimizer.step()


def trainee(name: str, regime: str, bench: Bench, **changes):
    """Our model and its optimiser, as `train_classifier` prepares them."""
    model = build(name, bench.device, **changes)
    parameters = set_regime(model, regime)
    model.train().to(memory_format=torch.channels_last)
    return model, torch.optim.Adam(parameters, lr=1e-5, weight_decay=1e-3)


def baseline_trainee(name: str, regime: str, bench: Bench):
    """The released loop's: everything requires a gradient, the optimiser takes a part."""
    model = build(name, bench.device)
    chosen = {id(parameter) for parameter in set_regime(model, regime)}
    picked = [id(parameter) in chosen for parameter in model.parameters()]
    model = released_loop.released(model)
    parameters = [p for p, take in zip(model.parameters(), picked, strict=True) if take]
    return model, torch.optim.Adam(parameters, lr=1e-5, weight_decay=1e-3)


def steps(name: str, images: list[Tensor], labels: Tensor, bench: Bench) -> dict:
    """Training steps of eight slices, and the largest difference of a gradient."""
    result = {}
    for regime in ("heads_bn", "full"):
        ours, optimizer = trainee(name, regime, bench)
        theirs, other = baseline_trainee(name, regime, bench)

        def baseline(theirs=theirs, other=other) -> None:
            with bench.autocast():
                released_loop.training_step(theirs, images, labels, other)

        times = bench.alternate(
            {
                "baseline": baseline,
                "ours": lambda ours=ours, optimizer=optimizer: our_step(
                    ours, images, labels, optimizer, bench
                ),
            }
        )
        result[regime] = {**times, "ratio": times["baseline"] / times["ours"]}
    return result


def gradients(name: str, images: list[Tensor], labels: Tensor) -> dict:
    """Loss and gradients of one step of both, from the same weights, float32 on the CPU.

    `same_layout` is the claim: ranking first and differentiating the N kept boxes changes nothing.
    `as_trained` has channels-last convolutions too, whose sums are rounded in another order.
    """
    bench = Bench("cpu", "32-true", 1)
    theirs, other = baseline_trainee(name, "full", bench)
    loss = released_loop.training_step(theirs, images, labels, other)
    wanted = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    result = {"loss": loss}
    for layout in ("same_layout", "as_trained"):
        ours, optimizer = trainee(name, "full", bench)
        if layout == "same_layout":
            ours.to(memory_format=torch.contiguous_format)
        with torch.no_grad():
            result[f"loss_{layout}"] = classification_loss(ours(images), labels).item()
        our_step(ours, images, labels, optimizer, bench)
        found = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
        squared = sum((found[key] - grad).square().sum() for key, grad in wanted.items())
        total = sum(grad.square().sum() for grad in wanted.values())
        result[layout] = float((squared / total).sqrt())
        result[f"{layout}_worst"] = max(
            float((found[key] - grad).norm() / grad.norm())
            for key, grad in wanted.items()
            if grad.norm() > 0
        )
    return result


def inference(name: str, images: list[Tensor], bench: Bench) -> dict:
    """Seconds a slice; how far our logits are from the baseline's, and how many boxes change."""
    model = build(name, bench.device)
    theirs, fast = released_loop.released(model), for_inference(model)
    with torch.no_grad():
        plain = model(images).cpu()  # float32
        rows = model.ranked_boxes(images).cpu()

    def baseline() -> None:
        for image in images:
            with bench.autocast():
                released_loop.logits(theirs, image)  # builds a graph, as his evaluation does

    @torch.no_grad()
    def ours(batch: int) -> Tensor:
        parts = []
        for first in range(0, len(images), batch):
            with bench.autocast():
                parts.append(fast.ranked_boxes(images[first : first + batch]))
        return torch.cat(parts)

    times = bench.alternate(
        {"baseline": baseline, "ours": lambda: ours(BATCH), "one by one": lambda: ours(1)}
    )
    times = {key: value / len(images) for key, value in times.items()}
    found = ours(BATCH).cpu()
    with torch.no_grad():
        logits = fast.s.cpu()(found)
    distance = torch.cdist(rows, found).min(dim=2).values  # [B, N]: nearest of our rows
    change = (logits.sigmoid() - plain.sigmoid()).abs()
    return {
        **times,
        "ratio": times["baseline"] / times["ours"],
        "logits_difference": float((logits - plain).abs().max()),
        "probability_change": {"mean": float(change.mean()), "max": float(change.max())},
        "boxes_changed": float((distance > 0.05).sum(1).float().mean()),
        "boxes": rows.shape[1],
    }


def heads_only(name: str, dataset: SliceImages, bench: Bench, step: float) -> dict:
    """S alone: the ranked boxes are constants, so they are computed once."""
    model = build(name, bench.device)
    set_regime(model, "heads")
    fabric = make_fabric(bench.precision, bench.device.type)
    part = Subset(dataset, range(48))
    rank = median(
        bench.seconds(lambda: cache_ranked_boxes(model, part, fabric=fabric, progress=False))
        / len(part)
        for _ in range(3)
    )
    rows = torch.rand(SLICES, model.config.n_boxes, 5)
    labels = torch.arange(SLICES) % 3
    training = TrainingConfig(epochs=2, batch_size=BATCH)
    seconds = bench.seconds(
        lambda: train_s(model.s, rows, labels, training, fabric=fabric, progress=False)
    )
    epoch = seconds / training.epochs
    ours = SLICES * rank + EPOCHS * epoch
    uncached = EPOCHS * (SLICES * rank + epoch)
    baseline = EPOCHS * SLICES / BATCH * step
    return {
        "seconds_rank_a_slice": rank,
        "seconds_epoch_of_s": epoch,
        "baseline": baseline,
        "ours": ours,
        "ratio": baseline / ours,
        "ratio_to_uncached_no_grad": uncached / ours,
        "extrapolated": f"linear, to {SLICES} slices and {EPOCHS} epochs: the step of the released "
        f"loop from {bench.repeats} steps, ranking from {len(part)} slices, S from 2 epochs",
    }


def ap(name: str, dataset: LesionSlices, bench: Bench, repeats: int) -> dict:
    """AP over ten IoU thresholds: ten passes of the detector, or one."""
    torch.manual_seed(0)
    segmenter = lesion_mask_rcnn(MODELS[name][0]).to(bench.device).eval()
    theirs = released_loop.released(segmenter)
    ten = InMemory(Subset(dataset, range(10)), progress=False)
    fabric = make_fabric(bench.precision, bench.device.type)
    values = {}

    def baseline() -> None:
        with bench.autocast():
            values["baseline"] = released_loop.average_precision(
                theirs, ten, IOU_THRESHOLDS, bench.device
            )

    def ours() -> None:
        found = evaluate_segmenter(segmenter, ten, fabric=fabric, score=0, progress=False)
        values["ours"] = found["author_ap"]

    ours()  # warm-up; the baseline's runs are long, and warm themselves
    times = {"baseline": [], "ours": []}
    for _ in range(repeats):
        times["baseline"].append(bench.seconds(baseline))
        times["ours"].append(bench.seconds(ours))
    times = {key: median(seconds) for key, seconds in times.items()}
    theirs_mean = sum(values["baseline"]) / len(IOU_THRESHOLDS)
    return {
        **times,
        "ratio": times["baseline"] / times["ours"],
        "repeats": repeats,
        "ap_baseline": theirs_mean,
        "ap_ours": values["ours"],
    }


def stages(name: str, images: list[Tensor], bench: Bench) -> dict:
    """Seconds, FLOPs and bytes of each stage of our inference, a slice, and the share of peak."""
    fast = for_inference(build(name, bench.device)).detector
    matrix = torch.rand(2048 if bench.device.type == "cpu" else 8192, device=bench.device)
    matrix = matrix[:, None] * matrix
    if bench.precision == "bf16-mixed":
        matrix = matrix.bfloat16()
    vector = torch.rand(2**26, device=bench.device)
    peak = bench.alternate({"matmul": lambda: matrix @ matrix, "copy": lambda: vector.clone()})
    flops_peak = 2 * len(matrix) ** 3 / peak["matmul"]
    bytes_peak = 2 * vector.nbytes / peak["copy"]
    result = {"peak_flops": flops_peak, "peak_bytes": bytes_peak}
    with torch.no_grad(), bench.autocast():
        batch, _ = fast.transform(images)
        features = fast.backbone(batch.tensors)
        proposals, _ = fast.rpn(batch, features)
        works = {
            "backbone": lambda: fast.backbone(batch.tensors),
            "RPN": lambda: fast.rpn(batch, features),
            "RoIAlign and box head": lambda: run_box_head(
                fast, features, proposals, batch.image_sizes
            ),
        }
        times = bench.alternate(works)
        for stage, work in works.items():
            moved = _bytes(fast, work)
            with FlopCounterMode(display=False) as counter:
                work()
            seconds, flops = times[stage] / len(images), counter.get_total_flops() / len(images)
            least = max(flops / flops_peak, moved / len(images) / bytes_peak)
            result[stage] = {
                "seconds": seconds,
                "gflops": flops / 1e9,
                "megabytes": moved / len(images) / 1e6,
                "share_of_roofline": least / seconds,
            }
    return result


def _bytes(model: torch.nn.Module, work: Callable) -> int:
    """What the layers that `work` runs read and write: inputs, weights, outputs."""
    total = 0

    def add(module, inputs, output) -> None:
        nonlocal total
        tensors = [t for t in (*inputs, output, *module.parameters()) if isinstance(t, Tensor)]
        total += sum(tensor.nbytes for tensor in tensors)

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(add) for module in leaves]
    work()
    for hook in hooks:
        hook.remove()
    return total


def tried(name: str, images: list[Tensor], bench: Bench) -> dict:
    """Milliseconds of backbone and RoIAlign for one slice, for each thing that was tried."""
    model = build(name, bench.device).detector
    image = images[0][None]
    last = image.contiguous(memory_format=torch.channels_last)
    fast = for_inference(model)
    folded = for_inference(model).to(memory_format=torch.contiguous_format)
    moved = build(name, bench.device).detector.to(memory_format=torch.channels_last)
    stock = released_loop.released(model).roi_heads.box_roi_pool
    ours = model.roi_heads.box_roi_pool
    with torch.no_grad():
        features, proposals, shapes = propose(fast, images[:1])
        contiguous = {key: map.contiguous() for key, map in features.items()}
        head = model.roi_heads.box_head

        def bf16(work: Callable) -> Callable:
            def run():
                with torch.autocast(bench.device.type, torch.bfloat16):
                    return work()

            return run

        compiled = torch.compile(fast.backbone)
        start = time.perf_counter()
        compiled(last)
        compile_seconds = time.perf_counter() - start
        works = {
            "backbone, as torchvision has it": lambda: model.backbone(image),
            "backbone, channels last": lambda: moved.backbone(last),
            "backbone, batch norm folded": lambda: folded.backbone(image),
            "backbone, both (in use)": lambda: fast.backbone(last),
            "backbone, both and torch.compile": lambda: compiled(last),
            "backbone, both and bfloat16": bf16(lambda: fast.backbone(last)),
            "RoIAlign and first layer, torchvision": lambda: head(
                stock(contiguous, proposals, shapes)
            ),
            "RoIAlign and first layer, matrix products, all boxes at once": lambda: head(
                ours(features, proposals, shapes)
            ),
            "RoIAlign and first layer, matrix products in parts (in use)": lambda: [
                head(part) for _, part in ours.parts(features, proposals, shapes)
            ],
            "RoIAlign and first layer, in parts and bfloat16": bf16(
                lambda: [head(part) for _, part in ours.parts(features, proposals, shapes)]
            ),
        }
        times = bench.alternate(works)
    rows = {key: 1000 * value for key, value in times.items()}
    chosen = [boxes[: MODELS[name][1].n_boxes] for boxes in proposals]
    maps = {key: map.detach().requires_grad_(True) for key, map in features.items()}
    plain = {key: map.detach().requires_grad_(True) for key, map in contiguous.items()}
    backward = bench.alternate(
        {
            "torchvision, 1,000 boxes": lambda: stock(plain, proposals, shapes).sum().backward(),
            "torchvision, N boxes": lambda: stock(plain, chosen, shapes).sum().backward(),
            "matrix products, N boxes (in use)": lambda: ours(maps, chosen, shapes)
            .sum()
            .backward(),
        }
    )
    rows |= {f"RoIAlign forward and backward, {k}": 1000 * v for k, v in backward.items()}
    return {"milliseconds": rows, "compile_seconds": compile_seconds}


def reading(dataset: SliceImages, step: float, inference: float) -> dict:
    """What decoding costs a slice, from a file and from memory."""
    part = Subset(dataset, range(40))
    start = time.perf_counter()
    memory = InMemory(part, progress=False)
    filling = (time.perf_counter() - start) / len(part)
    seconds = {}
    for name, source in (("file", part), ("memory", memory)):
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            for i in range(len(source)):
                source[i]
            runs.append((time.perf_counter() - start) / len(source))
        seconds[name] = median(runs)
    return {
        **seconds,
        "filling": filling,
        "kilobytes_a_slice": memory.nbytes / memory.kept / 1e3,
        "share_of_a_step_from_file": seconds["file"] * BATCH / (step + seconds["file"] * BATCH),
        "share_of_inference_from_file": seconds["file"] / (inference + seconds["file"]),
        "share_of_inference_from_memory": seconds["memory"] / (inference + seconds["memory"]),
    }


def waiting(name: str, dataset: SliceImages, bench: Bench) -> dict:
    """Share of a heads+BN epoch in which the device has nothing to do but wait for slices."""
    model, optimizer = trainee(name, "heads_bn", bench)
    memory = InMemory(dataset, progress=False)
    shares = {}
    for source, workers in ((dataset, 0), (dataset, 4), (memory, 0), (memory, 4)):
        loader = DataLoader(
            source, BATCH, collate_fn=list, num_workers=workers, pin_memory=True, drop_last=True
        )
        waited, start = 0.0, time.perf_counter()
        batches = iter(loader)
        for _ in range(len(loader)):
            asked = time.perf_counter()
            items = next(batches)
            waited += time.perf_counter() - asked
            images = [image.to(bench.device, non_blocking=True) for image, _ in items]
            labels = torch.tensor([label for _, label in items], device=bench.device)
            our_step(model, images, labels, optimizer, bench)
            bench.wait()
        where = "memory" if source is memory else "file"
        shares[f"{where}, {workers} workers"] = waited / (time.perf_counter() - start)
    return shares


def bf16_accuracy(device: str) -> dict:
    """The shipped classifier on the quick preset's test phantoms, in float32 and bfloat16."""
    dataset = SliceImages(ROOT / "data" / "phantoms-quick" / "slices", "test")
    model = ShippedWeights.CLASSIFIER_QUICK.load()
    results = {
        precision: evaluate_classifier(
            model, dataset, fabric=make_fabric(precision, device), progress=False
        )
        for precision in ("32-true", "bf16-mixed")
    }
    exact, rough = results.values()
    change = (exact["probabilities"] - rough["probabilities"]).abs()
    return {
        "slices": len(dataset),
        "accuracy": {key: value["accuracy"] for key, value in results.items()},
        "predictions_changed": int((exact["predictions"] != rough["predictions"]).sum()),
        "probability_change": {"mean": float(change.mean()), "max": float(change.max())},
    }


def growth(dataset: SliceImages, bench: Bench) -> dict:
    """Seconds and peak memory of ResNet-18 cut 1 against side, N and number of slices."""
    name = "ResNet-18 cut 1"
    result: dict[str, list] = {"side": [], "n_boxes": [], "slices": []}
    for side in (128, 256, 512, 1024):
        image = torch.nn.functional.interpolate(dataset[0][0][None], size=side)[0]
        image = image.to(bench.device)
        fast = for_inference(build(name, bench.device, image_size=side, max_size=2 * side))
        with torch.no_grad():
            times = bench.alternate({"infer": lambda fast=fast, image=image: fast([image])})
        memory = peak(["--side", str(side)], bench)
        result["side"].append({"x": side, "seconds": times["infer"], "megabytes": memory})
    images = [dataset[i][0].to(bench.device) for i in range(BATCH)]
    labels = torch.tensor(dataset.labels[:BATCH], device=bench.device)
    for n in (16, 64, 256, 1024):
        model, optimizer = trainee(name, "heads_bn", bench, n_boxes=n)
        times = bench.alternate(
            {
                "step": lambda model=model, optimizer=optimizer: our_step(
                    model, images, labels, optimizer, bench
                )
            },
            3,
        )
        memory = peak(["--n-boxes", str(n)], bench)
        result["n_boxes"].append({"x": n, "seconds": times["step"], "megabytes": memory})
    model, fabric = build(name, bench.device), make_fabric(bench.precision, bench.device.type)
    for count in (8, 16, 32, 60):
        part = Subset(dataset, range(count))
        times = bench.alternate(
            {"rank": lambda part=part: cache_ranked_boxes(model, part, fabric=fabric, progress=False)},
            3,
        )
        memory = peak(["--slices", str(count)], bench)
        result["slices"].append({"x": count, "seconds": times["rank"], "megabytes": memory})
    return result


# ---- peak memory: each case in a process of its own ------------------------------------------


def peak(options: list[str], bench: Bench) -> float:
    """Peak memory in MB of one case above what the imports and the model take."""
    command = [sys.executable, __file__, "--device", bench.device.type, "--peak", *options]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[-1])


def measure_peak(arguments: argparse.Namespace) -> float:
    """What `peak` runs: one inference, step or ranking, and its highest resident memory."""
    bench = Bench(arguments.device, "32-true", 1)
    side = arguments.side or 512
    torch.manual_seed(1)
    images = [torch.rand(3, side, side, device=bench.device) for _ in range(BATCH)]
    labels = torch.arange(BATCH, device=bench.device) % 3
    name = arguments.model
    if arguments.case == "baseline":
        model, optimizer = baseline_trainee(name, "heads_bn", bench)

        def work() -> None:
            released_loop.training_step(model, images, labels, optimizer)
    elif arguments.side:
        fast = for_inference(build(name, bench.device, image_size=side, max_size=2 * side))

        @torch.no_grad()
        def work() -> None:
            fast(images[:1])
    elif arguments.slices:
        model = build(name, bench.device)
        many = [(images[i % BATCH], 0) for i in range(arguments.slices)]

        def work() -> None:
            cache_ranked_boxes(model, many, progress=False)
    else:
        changes = {"n_boxes": arguments.n_boxes} if arguments.n_boxes else {}
        model, optimizer = trainee(name, arguments.case, bench, **changes)

        def work() -> None:
            our_step(model, images, labels, optimizer, bench)

    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


def measure(bench: Bench, folder: Path) -> dict:
    """Every table, at one precision."""
    root = write_phantoms(folder, PHANTOMS, progress=False)
    slices = SliceImages(root / "slices", "train")
    lesions = LesionSlices(root / "lesions", "test", min_area=PAPER.min_area)
    chosen = [0, 20, 40, 1, 21, 41, 2, 22]  # of all classes
    images = [slices[i][0].to(bench.device) for i in chosen]
    labels = torch.tensor([slices.labels[i] for i in chosen], device=bench.device)
    exact = bench.precision == "32-true"
    result: dict[str, dict] = {}
    for name in MODELS:
        print(f"{name}, {bench.precision}", flush=True)
        rows: dict[str, dict] = {"inference": inference(name, images, bench)}
        rows["stages"] = stages(name, images, bench)
        if exact or bench.device.type == "cuda":  # bfloat16 on a CPU: for inference alone
            rows["step"] = steps(name, images, labels, bench)
            released_step = rows["step"]["heads_bn"]["baseline"]
            rows["heads_only"] = heads_only(name, slices, bench, released_step)
        if exact:
            rows["ap"] = ap(name, lesions, bench, 1 if name == "ResNet-50" else 3)
            if bench.device.type == "cpu":
                rows["gradients"] = gradients(name, images[:2], labels[:2])
                rows["tried"] = tried(name, images, bench)
            rows["peak_megabytes"] = {
                case: peak(["--model", name, "--case", case], bench)
                for case in ("baseline", "heads_bn", "full")
            }
        if bench.device.type == "cuda":
            rows["waiting"] = waiting(name, slices, bench)
        result[name] = rows
        print(json.dumps(rows, indent=1), flush=True)
    if exact:
        light = result["ResNet-18 cut 1"]
        step, infer = light["step"]["heads_bn"]["ours"], light["inference"]["ours"]
        result["reading"] = reading(slices, step, infer)
        result["growth"] = growth(slices, bench)
    return result


def main() -> None:
    """Read the command line, time, write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true", help="only rewrite the page")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=list(MODELS), default="ResNet-18 cut 1")
    parser.add_argument("--case", default="heads_bn", help=argparse.SUPPRESS)
    for name in ("--side", "--n-boxes", "--slices"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(measure_peak(arguments))
        return
    if not arguments.page:
        suffix = "" if arguments.device == "cpu" else f"-{arguments.device}"
        out = arguments.out or ROOT / "results" / f"benchmarks{suffix}.json"
        origin = {
            **environment(),
            "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        }
        if arguments.device == "cuda":
            origin["hardware"] = torch.cuda.get_device_name()
        write_phantoms(ROOT / "data" / "phantoms-quick", PRESETS["quick"].phantoms)
        result = {"about": "times on synthetic phantoms, random weights", **origin}
        result["repeats"] = arguments.repeats
        result["released_code_seconds"] = RELEASED_CODE
        with TemporaryDirectory() as folder:
            for precision in ("32-true", "bf16-mixed"):
                bench = Bench(arguments.device, precision, arguments.repeats)
                result[precision] = measure(bench, Path(folder) / "phantoms")
        result["bf16_accuracy"] = bf16_accuracy(arguments.device)
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {out}")
        if arguments.out is not None:
            return
    speed_page.write(ROOT)


if __name__ == "__main__":
    main()
