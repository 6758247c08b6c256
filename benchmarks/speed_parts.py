"""The parts that speed.py measures, a function each; see there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import released_loop
import torch
from speed_bench import (
    BATCH,
    MODELS,
    SLICES,
    SMALL,
    SMOKE,
    Bench,
    baseline_trainee,
    build,
    our_step,
    set_statistics,
    summary,
    trainee,
)
from speed_memory import peak
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from covidmask.config import PRESETS, TrainingConfig
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.memory import InMemory
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.metrics.detection import IOU_THRESHOLDS
from covidmask.models.classifier import CovidCTMaskNet, set_regime
from covidmask.models.detector import for_inference, lesion_mask_rcnn
from covidmask.models.ranked_boxes import Ranking, propose, rank_boxes, run_box_head
from covidmask.models.weights import ShippedWeights
from covidmask.training.classification import classification_loss, evaluate_classifier, train_s
from covidmask.training.loop import make_fabric
from covidmask.training.ranked_cache import cache_ranked_boxes
from covidmask.training.segmentation import evaluate_segmenter

EPOCHS = 50  # the paper's
SAME_BOX = 0.9  # IoU above which two boxes of one class are the same box


def steps(
    name: str, regime: str, images: list[Tensor], labels: Tensor, bench: Bench, repeats: int
) -> dict:
    """A training step of eight slices. The baseline has the precision of the released code."""
    ours, optimizer = trainee(name, regime, bench)
    theirs, other = baseline_trainee(name, regime, bench)
    runs = bench.runs(
        {
            "baseline": lambda: released_loop.training_step(theirs, images, labels, other),
            "ours": lambda: our_step(ours, images, labels, optimizer, bench),
        },
        repeats,
    )
    return summary(runs)


def batches(name: str, images: list[Tensor], labels: Tensor, bench: Bench) -> list[dict]:
    """Our heads+BN step on a GPU with more and more slices, until the memory is full."""
    result = []
    for times in (1, 2, 4, 8, 16):
        try:
            model, optimizer = trainee(name, "heads_bn", bench)
            torch.cuda.reset_peak_memory_stats()
            more = labels.repeat(times)
            step = bench.alternate(
                {"ours": lambda: our_step(model, images * times, more, optimizer, bench)},  # noqa: B023
                bench.scale.slow,
            )["ours"]
        except torch.cuda.OutOfMemoryError:
            break
        finally:
            model = optimizer = None
            torch.cuda.empty_cache()
        result.append(
            {
                "batch": len(more),
                "seconds_a_slice": step / len(more),
                "megabytes": torch.cuda.max_memory_allocated() / 1e6,
            }
        )
    return result


def gradients(name: str, images: list[Tensor], labels: Tensor, bench: Bench) -> dict:
    """Loss and gradients of one step of both, from the same weights, float32 on the CPU.

    `same_layout` is the claim: ranking first and differentiating the N kept boxes changes nothing.
    `as_trained` has channels-last convolutions too, whose sums are rounded in another order.
    """
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
        parts = []
        for first in range(0, len(images), batch):
            with bench.autocast():
                rows = fast.ranked_boxes(images[first : first + batch])
            parts.append(fast.s(rows))
        return torch.cat(parts)

    runs = bench.runs(
        {"baseline": baseline, "ours": lambda: ours(BATCH), "one by one": lambda: ours(1)}
    )
    with torch.no_grad():
        exact = [released_loop.ranked(theirs, image) for image in images]
        plain = torch.cat([model.s(rows[None]) for rows, _ in exact])
    logits, changed, ordered = ours(BATCH), [], []
    for (_, wanted), found in zip(exact, rankings(fast, images, bench), strict=True):
        same = (box_iou(wanted.box, found.box) > SAME_BOX) & (wanted.label[:, None] == found.label)
        changed.append(int((~same.any(1)).sum()))
        ordered.append(bool(len(wanted.box) == len(found.box) and same.diagonal().all()))
    change = (logits.sigmoid() - plain.sigmoid()).abs()
    of_slice = (logits - plain).abs().amax(1)  # [M]
    return {
        **summary(runs, len(images)),
        "slices": len(images),
        "logits_difference": float(of_slice.max()),
        "logits_difference_of_slice": of_slice.tolist(),
        "order_changed_slices": ordered.count(False),
        "logits_difference_same_order": max(
            (float(d) for d, same in zip(of_slice, ordered, strict=True) if same), default=None
        ),
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
    model = build(name, bench)
    set_regime(model, "heads")
    fabric = make_fabric(bench.precision, bench.device.type)
    scale = bench.scale
    part = Subset(dataset, range(scale.ranked))
    ranking = bench.alternate(
        {"ours": lambda: cache_ranked_boxes(model, part, fabric=fabric, progress=False)}, 3
    )
    rank = ranking["ours"] / len(part)
    rows = torch.rand(scale.rows, model.config.n_boxes, 5)
    labels = torch.arange(scale.rows) % 3
    training = TrainingConfig(epochs=2, batch_size=BATCH)
    runs = bench.alternate(
        {"s": lambda: train_s(model.s, rows, labels, training, fabric=fabric, progress=False)}, 3
    )
    epoch = runs["s"] / training.epochs * SLICES / scale.rows
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
    torch.manual_seed(0)
    segmenter = lesion_mask_rcnn(replace(MODELS[name][0], **dict(bench.scale.changes)))
    set_statistics(segmenter.backbone)
    segmenter.to(bench.device).eval()
    theirs = released_loop.released(segmenter)
    part = Subset(dataset, range(bench.scale.ap_slices))
    fabric = make_fabric(bench.precision, bench.device.type)
    values = {}

    def baseline() -> None:
        values["baseline"] = released_loop.average_precision(
            theirs, part, IOU_THRESHOLDS, bench.device
        )

    def ours() -> None:
        found = evaluate_segmenter(segmenter, part, fabric=fabric, score=0, progress=False)
        values["ours"] = found["author_ap"]

    released_loop.average_precision(theirs, Subset(part, range(1)), (0.5,), bench.device)
    ours()  # both are warm now; a whole run of the baseline would be long
    runs = bench.runs({"baseline": baseline, "ours": ours}, repeats, warm_up=False)
    return {
        **summary(runs),
        "slices": len(part),
        "thresholds": len(IOU_THRESHOLDS),
        "ap_baseline": sum(values["baseline"]) / len(IOU_THRESHOLDS),
        "ap_ours": values["ours"],
    }


def stages(name: str, images: list[Tensor], bench: Bench) -> dict:
    """Seconds, FLOPs and bytes of each stage of our inference, a slice, and the share of peak."""
    fast = for_inference(build(name, bench)).detector
    matrix = torch.rand(2048 if bench.device.type == "cpu" else 8192, device=bench.device)
    matrix = matrix[:, None] * matrix
    if bench.precision == "bf16-mixed":
        matrix = matrix.bfloat16()
    vector = torch.rand(2**26, device=bench.device)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions are
    runs = bench.runs({"matmul": lambda: matrix @ matrix, "copy": lambda: vector.clone()}, 10)
    best = {key: min(times) for key, times in runs.items()}
    torch.backends.cuda.matmul.allow_tf32 = allowed
    flops_peak = 2 * len(matrix) ** 3 / best["matmul"]
    bytes_peak = 2 * vector.nbytes / best["copy"]
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
            if stage.startswith("RoIAlign"):  # it is no layer: it reads the maps, writes the bins
                maps = [features[key] for key in fast.roi_heads.box_roi_pool.featmap_names]
                bins = len(torch.cat(proposals)) * maps[0].shape[1] * 7 * 7
                moved += sum(map.nbytes for map in maps) + bins * maps[0].element_size()
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
    model = build(name, bench).detector
    image = images[0][None]
    last = image.contiguous(memory_format=torch.channels_last)
    fast = for_inference(model)
    folded = for_inference(model).to(memory_format=torch.contiguous_format)
    moved = build(name, bench).detector.to(memory_format=torch.channels_last)
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
        compile_seconds = None
        try:
            compile_seconds = bench.seconds(lambda: compiled(last))
        except Exception as error:  # no compiler on this machine, for example
            print(f"torch.compile: {error}"[:200], flush=True)
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
        if compile_seconds is None:
            del works["backbone, both and torch.compile"]
        times = bench.alternate(works)
    rows = {key: 1000 * value for key, value in times.items()}
    chosen = [boxes[: MODELS[name][1].n_boxes] for boxes in proposals]
    maps = {key: map.detach().requires_grad_(True) for key, map in features.items()}
    plain = {key: map.detach().requires_grad_(True) for key, map in contiguous.items()}
    backward = bench.alternate(
        {
            "torchvision, 1,000 boxes": lambda: stock(plain, proposals, shapes).sum().backward(),
            "torchvision, N boxes": lambda: stock(plain, chosen, shapes).sum().backward(),
            "matrix products, N boxes (in use)": lambda: (
                ours(maps, chosen, shapes).sum().backward()
            ),
        }
    )
    rows |= {f"RoIAlign forward and backward, {k}": 1000 * v for k, v in backward.items()}
    return {"milliseconds": rows, "compile_seconds": compile_seconds}


def reading(dataset: SliceImages, step: float, inference: float) -> dict:
    """What decoding costs a slice, from a file and from memory."""
    part = Subset(dataset, range(min(40, len(dataset))))
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


def trained(bench: Bench, folder: Path) -> dict:
    """The shipped classifier on the quick preset's test phantoms: what our rounding changes."""
    phantoms = PRESETS["quick"].phantoms
    if bench.scale is SMOKE:
        phantoms = replace(phantoms, lesion_patients=(1, 1, 1), class_patients=(1, 1, 1))
    dataset = SliceImages(write_phantoms(folder, phantoms, progress=False) / "slices", "test")
    model = ShippedWeights.CLASSIFIER_QUICK.load().to(bench.device)
    theirs = released_loop.released(model)
    with torch.no_grad():
        exact = torch.stack(
            [
                released_loop.logits(theirs, dataset[i][0].to(bench.device)).cpu()
                for i in range(len(dataset))
            ]
        )
    labels = torch.tensor(dataset.labels)
    result: dict = {
        "slices": len(dataset),
        "accuracy_baseline": float((exact.argmax(1) == labels).float().mean()),
    }
    for precision in ("32-true", "bf16-mixed"):
        fabric = make_fabric(precision, bench.device.type)
        found = evaluate_classifier(model, dataset, fabric=fabric, progress=False)
        change = (found["probabilities"] - exact.sigmoid()).abs().amax(1)  # [M]
        result[precision] = {
            "accuracy": found["accuracy"],
            "predictions_changed": int((found["predictions"] != exact.argmax(1)).sum()),
            "probability_change": {
                "mean": float(change.mean()),
                "median": float(change.median()),
                "max": float(change.max()),
            },
        }
    return result


def growth(dataset: SliceImages, bench: Bench) -> dict:
    """Seconds and peak memory of the small model against side, N and number of slices."""
    scale = bench.scale
    result: dict[str, list] = {"side": [], "n_boxes": [], "slices": []}
    for side in scale.sides:
        image = torch.nn.functional.interpolate(dataset[0][0][None], size=side)[0]
        image = image.to(bench.device)
        fast = for_inference(build(SMALL, bench, image_size=side, max_size=2 * side))
        with torch.no_grad():
            times = bench.alternate({"infer": lambda fast=fast, image=image: fast([image])})
        memory = peak(["--side", str(side)], bench)
        result["side"].append({"x": side, "seconds": times["infer"], "megabytes": memory})
    images = [dataset[i % len(dataset)][0].to(bench.device) for i in range(BATCH)]
    labels = torch.arange(BATCH, device=bench.device) % 3
    for n in scale.n_boxes:
        model, optimizer = trainee(SMALL, "heads_bn", bench, n_boxes=n)
        times = bench.alternate(
            {
                "step": lambda model=model, optimizer=optimizer: our_step(
                    model, images, labels, optimizer, bench
                )
            }
        )
        memory = peak(["--n-boxes", str(n)], bench)
        result["n_boxes"].append({"x": n, "seconds": times["step"], "megabytes": memory})
    model, fabric = build(SMALL, bench), make_fabric(bench.precision, bench.device.type)
    for count in scale.slices:
        part = Subset(dataset, range(count))
        times = bench.alternate(
            {
                "rank": lambda part=part: cache_ranked_boxes(
                    model, part, fabric=fabric, progress=False
                )
            },
            3,
        )
        memory = peak(["--slices", str(count)], bench)
        result["slices"].append({"x": count, "seconds": times["rank"], "megabytes": memory})
    return {"model": SMALL, **result}
