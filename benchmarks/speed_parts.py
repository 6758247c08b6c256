"""The parts that speed.py measures, a function each; what they share: models, sizes, clock."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import psutil
import released_loop
import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from covidmask.config import (
    PRESETS,
    ClassifierConfig,
    DetectorConfig,
    PhantomConfig,
    TrainingConfig,
)
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.memory import InMemory
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.datasets.phantoms import make_slice
from covidmask.metrics.detection import IOU_THRESHOLDS
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net, set_regime
from covidmask.models.detector import for_inference, lesion_mask_rcnn
from covidmask.models.ranked_boxes import Ranking, propose, rank_boxes, run_box_head
from covidmask.models.weights import ShippedWeights
from covidmask.training.classification import classification_loss, evaluate_classifier, train_s
from covidmask.training.loop import make_fabric
from covidmask.training.ranked_cache import cache_ranked_boxes
from covidmask.training.segmentation import evaluate_segmenter

SMALL = "ResNet-18 cut 1"
LIGHT = DetectorConfig(backbone="resnet18", cut=1, light_mask_head=True)
MODELS = {
    "ResNet-50": (DetectorConfig(), ClassifierConfig()),
    SMALL: (LIGHT, ClassifierConfig(n_boxes=128, hidden=512)),
}
BATCH = 8
SLICES, EPOCHS = 3000, 50  # the paper's
SAME_BOX = 0.9  # IoU above which two boxes of one class are the same box


SIZES = {  # full, and toy ones that say whether it runs
    "phantoms": (
        PhantomConfig(512, 5, (1, 1, 2), (4, 1, 1)),
        PhantomConfig(128, 2, (1, 1, 1), (2, 1, 1)),
    ),
    "changes": ({}, {"image_size": 128, "max_size": 256, "rpn_test_proposals": 60}),  # detector
    "repeats": (5, 1),
    "slow": (3, 1),  # for the full step of ResNet-50 and the AP of ResNet-18
    "slowest": (1, 1),  # for the AP of ResNet-50: the baseline takes minutes
    "ranked": (48, 4),  # slices whose ranking is timed
    "rows": (SLICES, 64),  # slices on which S is timed
    "ap_slices": (10, 2),
    "sides": ((128, 256, 512, 1024), (64, 128)),
    "n_boxes": ((16, 64, 256, 1024), (4, 16)),
    "slices": ((8, 16, 32, 60), (2, 4)),
}
FULL, SMOKE = (
    SimpleNamespace(**{key: sizes[toy] for key, sizes in SIZES.items()}) for toy in (0, 1)
)


class Bench:
    """Device, precision, sizes and the clock."""

    def __init__(
        self, device: str, precision: str = "32-true", scale: SimpleNamespace = FULL
    ) -> None:
        self.device = torch.device(device)
        self.precision = precision
        self.scale = scale
        self.cuda = self.device.type == "cuda"

    def fabric(self):
        return make_fabric(self.precision, self.device.type)

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"
        )

    def seconds(self, work: Callable[[], object]) -> float:
        start = timer()  # waits for the GPU
        work()
        return timer() - start

    def runs(
        self, works: dict[str, Callable], repeats: int | None = None, warm_up: bool = True
    ) -> dict[str, list[float]]:
        """Seconds of every run of each; all are run once unmeasured, then in turn."""
        for work in works.values() if warm_up else ():
            work()
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(repeats or self.scale.repeats):
            for name, work in works.items():
                times[name].append(self.seconds(work))
        return times

    def medians(self, works: dict[str, Callable], repeats: int | None = None) -> dict[str, float]:
        return {name: median(times) for name, times in self.runs(works, repeats).items()}

    def median(self, work: Callable, repeats: int | None = None) -> float:
        return self.medians({"": work}, repeats)[""]


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


def segmenter(name: str, bench: Bench, **changes) -> nn.Module:
    """Random weights, the same for everyone, with batch-norm statistics of eight small phantoms.

    Without such statistics the features grow from layer to layer and every sigmoid is 0 or 1.
    """
    torch.manual_seed(0)
    model = lesion_mask_rcnn(replace(MODELS[name][0], **{**bench.scale.changes, **changes}))
    slices = [torch.from_numpy(make_slice(seed, seed % 3, 128)[0]) for seed in range(8)]
    images = torch.stack(slices)[:, None].expand(-1, 3, -1, -1)  # [8, 3, 128, 128], 0..1
    for layer in model.backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # a plain mean, of one batch
    with torch.no_grad():
        model.backbone.train()((images - images.mean()) / images.std())
    return model.to(bench.device).eval()


def build(name: str, bench: Bench, n_boxes: int | None = None, **changes) -> CovidCTMaskNet:
    """The classifier on that detector."""
    classifier = MODELS[name][1]
    classifier = replace(classifier, n_boxes=n_boxes or classifier.n_boxes)
    return covid_ct_mask_net(segmenter(name, bench, **changes), classifier).to(bench.device)


def our_step(
    model: CovidCTMaskNet, images: list[Tensor], labels: Tensor, optimizer, bench: Bench
) -> None:
    """The step of `fit`: slices one by one on a CPU, the batch at once on a GPU."""
    size = len(images) if bench.cuda else 1
    optimizer.zero_grad()
    for first in range(0, len(images), size):
        piece = slice(first, first + size)
        with bench.autocast():
            loss = classification_loss(model(images[piece]), labels[piece])
        (loss * (len(images[piece]) / len(images))).backward()
    optimizer.step()


def trainee(name: str, regime: str, bench: Bench, baseline: bool = False, **changes):
    """A model and its optimiser: as `train_classifier` prepares them, or the released loop.

    There everything requires a gradient, and the optimiser takes a part.
    """
    model = build(name, bench, **changes)
    set_regime(model, regime)
    picked = [parameter.requires_grad for parameter in model.parameters()]
    if baseline:
        model = released_loop.released(model)
    else:
        model.train().to(memory_format=torch.channels_last)
    parameters = [p for p, take in zip(model.parameters(), picked, strict=True) if take]
    return model, torch.optim.Adam(parameters, lr=1e-5, weight_decay=1e-3)


# ---- memory ------------------------------------------------------------------------------------


def peak(bench: Bench, *case, **options) -> float:
    """Peak memory in MB of one case above what the imports and the model take."""
    if bench.cuda:  # torch counts what is in use, so no other process is needed
        return measure_peak(bench, *case, **options)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure_peak, bench, *case, **options).result()


def measure_peak(
    bench: Bench,
    name: str = SMALL,
    regime: str = "heads_bn",
    baseline: bool = False,
    side: int | None = None,
    slices: int = 0,
    n_boxes: int | None = None,
) -> float:
    """The most memory that one inference (`side`), ranking (`slices`) or step has at a time."""
    torch.manual_seed(1)
    pixels = side or bench.scale.changes.get("image_size", 512)
    images = [torch.rand(3, pixels, pixels, device=bench.device) for _ in range(BATCH)]
    labels = torch.arange(BATCH, device=bench.device) % 3
    if side:
        fast = for_inference(build(name, bench, image_size=side, max_size=2 * side))
        work = torch.no_grad()(partial(fast, images[:1]))
    elif slices:
        many = [(images[i % BATCH], 0) for i in range(slices)]
        work = partial(cache_ranked_boxes, build(name, bench), many, progress=False)
    else:
        model, optimizer = trainee(name, regime, bench, baseline, n_boxes=n_boxes)
        work = partial(our_step, model, images, labels, optimizer, bench)
        if baseline:
            work = partial(released_loop.training_step, model, images, labels, optimizer)
    gc.collect()
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return resident(work)


def resident(work: Callable[[], object]) -> float:
    """MB by which the memory of this process grows while `work` runs, looked at every 2 ms."""
    process, done = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(process.memory_info().rss)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(watch)
        try:
            work()
        finally:
            done.set()
    return (max(seen) - seen[0]) / 1e6


# ---- the parts ---------------------------------------------------------------------------------


def steps(
    name: str, regime: str, images: list[Tensor], labels: Tensor, bench: Bench, repeats: int
) -> dict:
    """A training step of eight slices. The baseline has the precision of the released code."""
    ours, optimizer = trainee(name, regime, bench)
    theirs, other = trainee(name, regime, bench, baseline=True)
    works = {
        "baseline": partial(released_loop.training_step, theirs, images, labels, other),
        "ours": partial(our_step, ours, images, labels, optimizer, bench),
    }
    return summary(bench.runs(works, repeats))


def batches(name: str, images: list[Tensor], labels: Tensor, bench: Bench) -> list[dict]:
    """Our heads+BN step on a GPU with more and more slices, until the memory is full."""
    result = []
    for times in (1, 2, 4, 8, 16):
        more = images * times, labels.repeat(times)
        count = len(more[0])
        try:
            model, optimizer = trainee(name, "heads_bn", bench)
            torch.cuda.reset_peak_memory_stats()
            step = bench.median(partial(our_step, model, *more, optimizer, bench), bench.scale.slow)
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            model = optimizer = None
            torch.cuda.empty_cache()
        megabytes = torch.cuda.max_memory_allocated() / 1e6
        result.append({"batch": count, "seconds_a_slice": step / count, "megabytes": megabytes})
    return result


def gradients(name: str, images: list[Tensor], labels: Tensor, bench: Bench) -> dict:
    """Loss and gradients of one step of both, from the same weights, float32 on the CPU.

    `same_layout` is the claim: ranking first and differentiating the N kept boxes changes nothing.
    `as_trained` has channels-last convolutions too, whose sums are rounded in another order.
    """
    theirs, other = trainee(name, "full", bench, baseline=True)
    result = {"loss": released_loop.training_step(theirs, images, labels, other)}
    wanted = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    for layout in ("same_layout", "as_trained"):
        ours, optimizer = trainee(name, "full", bench)
        if layout == "same_layout":
            ours.to(memory_format=torch.contiguous_format)
        with torch.no_grad():
            result[f"loss_{layout}"] = classification_loss(ours(images), labels).item()
        our_step(ours, images, labels, optimizer, bench)
        found = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
        # where no kept box lies on a level of the FPN, ours has no gradient and theirs is zero
        apart = {key: found.get(key, torch.zeros_like(grad)) - grad for key, grad in wanted.items()}
        squared = sum(difference.square().sum() for difference in apart.values())
        total = sum(grad.square().sum() for grad in wanted.values())
        result[layout] = float((squared / total).sqrt())
        result[f"{layout}_worst"] = max(
            float(apart[key].norm() / grad.norm()) for key, grad in wanted.items() if grad.any()
        )
    return result


def inference(name: str, images: list[Tensor], bench: Bench) -> dict:
    """Seconds a slice; how far our logits are from the baseline's, and how many boxes change.

    The baseline is in float32, as the released code is. A box is changed when none of ours, of
    the same class, has an IoU above `SAME_BOX` with it. Where two boxes score the same but for
    rounding, their order may change, and with it the vector that S reads: such slices are counted.
    """
    model = build(name, bench)
    theirs, fast = released_loop.released(model), for_inference(model)

    def baseline() -> None:
        for image in images:
            released_loop.logits(theirs, image)  # builds a graph, as his evaluation does

    @torch.no_grad()
    def ours(batch: int) -> Tensor:
        result = []
        for first in range(0, len(images), batch):
            with bench.autocast():
                rows = fast.ranked_boxes(images[first : first + batch])
            result.append(fast.s(rows))
        return torch.cat(result)

    works = {"baseline": baseline, "ours": partial(ours, BATCH), "one by one": partial(ours, 1)}
    runs = bench.runs(works)
    with torch.no_grad():
        exact = [released_loop.ranked(theirs, image) for image in images]
        plain = torch.cat([model.s(rows[None]) for rows, _ in exact])
    logits, changed, ordered = ours(BATCH), [], []
    for (_, wanted), found in zip(exact, rankings(fast, images, bench), strict=True):
        same = (box_iou(wanted.box, found.box) > SAME_BOX) & (wanted.label[:, None] == found.label)
        changed.append(int((~same.any(1)).sum()))
        ordered.append(bool(len(wanted.box) == len(found.box) and same.diagonal().all()))
    change = (logits.sigmoid() - plain.sigmoid()).abs()
    of_slice = (logits - plain).abs().amax(1).tolist()
    in_order = [value for value, same in zip(of_slice, ordered, strict=True) if same]
    return {
        **summary(runs, len(images)),
        "slices": len(images),
        "logits_difference": max(of_slice),
        "logits_difference_of_slice": of_slice,
        "order_changed_slices": ordered.count(False),
        "logits_difference_same_order": max(in_order, default=None),
        "largest_logit": float(plain.abs().max()),
        "probability_change": {"mean": float(change.mean()), "max": float(change.max())},
        "boxes_changed": sum(changed) / len(changed),
        "boxes": model.config.n_boxes,
    }


@torch.no_grad()
def rankings(model: CovidCTMaskNet, images: list[Tensor], bench: Bench) -> list[Ranking]:
    """The boxes that our model keeps of each image."""
    with bench.autocast():
        features, proposals, shapes = propose(model.detector, images)
        logits, deltas = run_box_head(model.detector, features, proposals, shapes)
        coder = model.detector.roi_heads.box_coder
        parts = zip(logits, deltas, proposals, shapes, strict=True)
        return [rank_boxes(*part, coder, model.config) for part in parts]


def heads_only(name: str, dataset: SliceImages, bench: Bench, step: float) -> dict:
    """S alone: the ranked boxes are constants, so they are computed once."""
    model, scale, fabric = build(name, bench), bench.scale, bench.fabric()
    set_regime(model, "heads")
    part = Subset(dataset, range(scale.ranked))
    ranking = partial(cache_ranked_boxes, model, part, fabric=fabric, progress=False)
    rank = bench.median(ranking, 3) / len(part)
    rows, labels = torch.rand(scale.rows, model.config.n_boxes, 5), torch.arange(scale.rows) % 3
    training = TrainingConfig(epochs=2, batch_size=BATCH)
    two = partial(train_s, model.s, rows, labels, training, fabric=fabric, progress=False)
    epoch = bench.median(two, 3) / training.epochs * SLICES / scale.rows
    ours = SLICES * rank + EPOCHS * epoch
    uncached = EPOCHS * (SLICES * rank + epoch)
    baseline = EPOCHS * SLICES / BATCH * step
    return {
        "seconds_rank_a_slice": rank,
        "seconds_epoch_of_s": epoch,
        "baseline": baseline,
        "uncached_no_grad": uncached,
        "ours": ours,
        "ratio": baseline / ours,
        "ratio_to_uncached_no_grad": uncached / ours,
        "slices": SLICES,
        "epochs": EPOCHS,
        "measured": {"ranked_slices": len(part), "rows": scale.rows, "epochs": 2, "repeats": 3},
    }


def ap(name: str, dataset: LesionSlices, bench: Bench, repeats: int) -> dict:
    """AP over ten IoU thresholds: ten passes of the detector, or one."""
    model, values = segmenter(name, bench), {}
    theirs, fabric = released_loop.released(model), bench.fabric()
    part = Subset(dataset, range(bench.scale.ap_slices))

    def baseline(some: Subset = part, thresholds: tuple = IOU_THRESHOLDS) -> None:
        found = released_loop.average_precision(theirs, some, thresholds, bench.device)
        values["baseline"] = sum(found) / len(found)

    def ours() -> None:
        found = evaluate_segmenter(model, part, fabric=fabric, score=0, progress=False)
        values["ours"] = found["author_ap"]

    baseline(Subset(part, range(1)), (0.5,))
    ours()  # both are warm now; a whole run of the baseline would be long
    runs = bench.runs({"baseline": baseline, "ours": ours}, repeats, warm_up=False)
    return {
        **summary(runs),
        "slices": len(part),
        "thresholds": len(IOU_THRESHOLDS),
        "ap_baseline": values["baseline"],
        "ap_ours": values["ours"],
    }


@torch.no_grad()
def stages(name: str, images: list[Tensor], bench: Bench) -> dict:
    """Seconds, FLOPs and bytes of each stage of our inference, a slice, and the share of peak."""
    fast = for_inference(build(name, bench)).detector
    matrix = torch.rand(8192 if bench.cuda else 2048, device=bench.device)
    matrix = matrix[:, None] * matrix
    if bench.precision == "bf16-mixed":
        matrix = matrix.bfloat16()
    vector = torch.rand(2**26, device=bench.device)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions are
    runs = bench.runs({"matmul": lambda: matrix @ matrix, "copy": vector.clone}, 10)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    flops_peak = 2 * len(matrix) ** 3 / min(runs["matmul"])
    bytes_peak = 2 * vector.nbytes / min(runs["copy"])
    result = {"peak_flops": flops_peak, "peak_bytes": bytes_peak}
    with bench.autocast():
        batch, _ = fast.transform(images)
        features = fast.backbone(batch.tensors)
        proposals, _ = fast.rpn(batch, features)
        works = {
            "backbone": partial(fast.backbone, batch.tensors),
            "RPN": partial(fast.rpn, batch, features),
            "RoIAlign and box head": partial(
                run_box_head, fast, features, proposals, batch.image_sizes
            ),
        }
        times = bench.medians(works)
        for stage, work in works.items():
            with FlopCounterMode(display=False) as counter:
                moved = layer_bytes(fast, work)
            if stage.startswith("RoIAlign"):  # it is no layer: it reads the maps, writes the bins
                maps = [features[key] for key in fast.roi_heads.box_roi_pool.featmap_names]
                bins = len(torch.cat(proposals)) * maps[0].shape[1] * 7 * 7
                moved += sum(map.nbytes for map in maps) + bins * maps[0].element_size()
            seconds, flops = times[stage] / len(images), counter.get_total_flops() / len(images)
            least = max(flops / flops_peak, moved / len(images) / bytes_peak)
            result[stage] = {
                "seconds": seconds,
                "gflops": flops / 1e9,
                "megabytes": moved / len(images) / 1e6,
                "share_of_roofline": least / seconds,
            }
    return result


def layer_bytes(model: nn.Module, work: Callable) -> int:
    """What the layers that `work` runs read and write: inputs, weights, outputs."""
    moved = []

    def add(module: nn.Module, inputs: tuple, output: object) -> None:
        tensors = [t for t in (*inputs, output, *module.parameters()) if isinstance(t, Tensor)]
        moved.append(sum(tensor.nbytes for tensor in tensors))

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(add) for module in leaves]
    work()
    for hook in hooks:
        hook.remove()
    return sum(moved)


def tried(name: str, images: list[Tensor], bench: Bench) -> dict:
    """Milliseconds of backbone and RoIAlign for one slice, for each thing that was tried."""
    model = build(name, bench).detector
    fast = for_inference(model)
    image = images[0][None]
    last = image.contiguous(memory_format=torch.channels_last)
    folded = for_inference(model).to(memory_format=torch.contiguous_format)
    moved = build(name, bench).detector.to(memory_format=torch.channels_last)
    stock = released_loop.released(model).roi_heads.box_roi_pool
    ours, head = model.roi_heads.box_roi_pool, model.roi_heads.box_head
    bf16 = torch.autocast(bench.device.type, torch.bfloat16)
    compiled = torch.compile(fast.backbone)
    with torch.no_grad():
        features, *boxes = propose(fast, images[:1])  # proposals and shapes
        contiguous = {key: map.contiguous() for key, map in features.items()}

        def in_parts() -> list[Tensor]:
            return [head(part) for _, part in ours.parts(features, *boxes)]

        works = {
            "backbone, as torchvision has it": partial(model.backbone, image),
            "backbone, channels last": partial(moved.backbone, last),
            "backbone, batch norm folded": partial(folded.backbone, image),
            "backbone, both (in use)": partial(fast.backbone, last),
            "backbone, both and torch.compile": partial(compiled, last),
            "backbone, both and bfloat16": bf16(partial(fast.backbone, last)),
            "RoIAlign and first layer, torchvision": lambda: head(stock(contiguous, *boxes)),
            "RoIAlign and first layer, matrix products, all boxes at once": lambda: head(
                ours(features, *boxes)
            ),
            "RoIAlign and first layer, matrix products in parts (in use)": in_parts,
            "RoIAlign and first layer, in parts and bfloat16": bf16(in_parts),
        }
        try:
            compile_seconds = bench.seconds(partial(compiled, last))
        except Exception as error:  # no compiler on this machine, for example
            print(f"torch.compile: {error}"[:200], flush=True)
            compile_seconds = None
            del works["backbone, both and torch.compile"]
        times = bench.medians(works)
    chosen = [part[: MODELS[name][1].n_boxes] for part in boxes[0]]
    maps = {key: map.detach().requires_grad_(True) for key, map in features.items()}
    plain = {key: map.detach().requires_grad_(True) for key, map in contiguous.items()}
    start = "RoIAlign forward and backward, "
    times |= bench.medians(
        {
            f"{start}torchvision, 1,000 boxes": lambda: stock(plain, *boxes).sum().backward(),
            f"{start}torchvision, N boxes": lambda: stock(plain, chosen, boxes[1]).sum().backward(),
            f"{start}matrix products, N boxes (in use)": lambda: (
                ours(maps, chosen, boxes[1]).sum().backward()
            ),
        }
    )
    milliseconds = {key: 1000 * seconds for key, seconds in times.items()}
    return {"milliseconds": milliseconds, "compile_seconds": compile_seconds}


def reading(dataset: SliceImages, step: float, inference: float, bench: Bench) -> dict:
    """What decoding costs a slice, from a file and from memory."""
    part = Subset(dataset, range(min(40, len(dataset))))
    start = timer()
    memory = InMemory(part, progress=False)
    filling = (timer() - start) / len(part)
    file, kept = (
        bench.median(lambda source=source: [source[i] for i in range(len(source))], 5) / len(part)
        for source in (part, memory)
    )
    return {
        "file": file,
        "memory": kept,
        "filling": filling,
        "kilobytes_a_slice": memory.nbytes / memory.kept / 1e3,
        "share_of_a_step_from_file": file * BATCH / (step + file * BATCH),
        "share_of_inference_from_file": file / (inference + file),
        "share_of_inference_from_memory": kept / (inference + kept),
    }


def waiting(name: str, dataset: SliceImages, bench: Bench) -> dict:
    """Share of a heads+BN epoch in which the device has nothing to do but wait for slices."""
    model, optimizer = trainee(name, "heads_bn", bench)
    shares = {}
    for where, source in (("file", dataset), ("memory", InMemory(dataset, progress=False))):
        for workers in (0, 4):
            loader = DataLoader(
                source, BATCH, collate_fn=list, num_workers=workers, pin_memory=True, drop_last=True
            )
            waited, start = 0.0, timer()
            batches = iter(loader)
            for _ in range(len(loader)):
                asked = timer()
                items = next(batches)
                waited += timer() - asked
                images = [image.to(bench.device, non_blocking=True) for image, _ in items]
                labels = torch.tensor([label for _, label in items], device=bench.device)
                our_step(model, images, labels, optimizer, bench)
            shares[f"{where}, {workers} workers"] = waited / (timer() - start)
    return shares


def trained(bench: Bench, folder: Path) -> dict:
    """The shipped classifier on the quick preset's test phantoms: what our rounding changes."""
    phantoms = PRESETS["quick"].phantoms
    if bench.scale == SMOKE:
        phantoms = replace(phantoms, lesion_patients=(1, 1, 1), class_patients=(1, 1, 1))
    dataset = SliceImages(write_phantoms(folder, phantoms, progress=False) / "slices", "test")
    model = ShippedWeights.CLASSIFIER_QUICK.load().to(bench.device)
    theirs, images = released_loop.released(model), (image for image, _ in dataset)
    with torch.no_grad():
        exact = torch.stack(
            [released_loop.logits(theirs, image.to(bench.device)).cpu() for image in images]
        )
    right = exact.argmax(1) == torch.tensor(dataset.labels)
    result = {"slices": len(dataset), "accuracy_baseline": float(right.float().mean())}
    for precision in ("32-true", "bf16-mixed"):
        fabric = make_fabric(precision, bench.device.type)
        found = evaluate_classifier(model, dataset, fabric=fabric, progress=False)
        change = (found["probabilities"] - exact.sigmoid()).abs().amax(1)  # [M]
        result[precision] = {
            "accuracy": found["accuracy"],
            "predictions_changed": int((found["predictions"] != exact.argmax(1)).sum()),
            "probability_change": {
                key: float(getattr(change, key)()) for key in ("mean", "median", "max")
            },
        }
    return result


def growth(dataset: SliceImages, bench: Bench) -> dict:
    """Seconds and peak memory of the small model against side, N and number of slices."""
    scale = bench.scale
    result: dict[str, list] = {"side": [], "n_boxes": [], "slices": []}

    def add(key: str, x: int, work: Callable, repeats: int | None = None) -> None:
        seconds = bench.median(work, repeats)
        result[key].append({"x": x, "seconds": seconds, "megabytes": peak(bench, **{key: x})})

    for side in scale.sides:
        image = nn.functional.interpolate(dataset[0][0][None], size=side)[0].to(bench.device)
        fast = for_inference(build(SMALL, bench, image_size=side, max_size=2 * side))
        add("side", side, torch.no_grad()(partial(fast, [image])))
    images = [dataset[i % len(dataset)][0].to(bench.device) for i in range(BATCH)]
    labels = torch.arange(BATCH, device=bench.device) % 3
    for n in scale.n_boxes:
        model, optimizer = trainee(SMALL, "heads_bn", bench, n_boxes=n)
        add("n_boxes", n, partial(our_step, model, images, labels, optimizer, bench))
    rank = partial(cache_ranked_boxes, build(SMALL, bench), fabric=bench.fabric(), progress=False)
    for count in scale.slices:
        add("slices", count, partial(rank, Subset(dataset, range(count))), 3)
    return {"model": SMALL, **result}
