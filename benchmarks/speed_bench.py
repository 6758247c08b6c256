"""What the timings of speed.py share: the models, the sizes, the clock, one step of each loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import released_loop
import torch
from torch import Tensor

from covidmask.config import ClassifierConfig, DetectorConfig, PhantomConfig
from covidmask.datasets.phantoms import make_slice
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net, set_regime
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.training.classification import classification_loss

LIGHT = DetectorConfig(backbone="resnet18", cut=1, light_mask_head=True)
MODELS = {
    "ResNet-50": (DetectorConfig(), ClassifierConfig()),
    "ResNet-18 cut 1": (LIGHT, ClassifierConfig(n_boxes=128, hidden=512)),
}
SMALL = "ResNet-18 cut 1"
BATCH = 8
SLICES = 3000  # the paper's training set


@dataclass(frozen=True)
class Scale:
    """Sizes and numbers of repeats."""

    phantoms: PhantomConfig = PhantomConfig(512, 5, (1, 1, 2), (4, 1, 1))
    changes: tuple[tuple[str, int], ...] = ()  # to the detector
    repeats: int = 5
    slow: int = 3  # for the full step of ResNet-50 and the AP of ResNet-18
    slowest: int = 1  # for the AP of ResNet-50: the baseline takes minutes
    ranked: int = 48  # slices whose ranking is timed
    rows: int = SLICES  # slices on which S is timed
    ap_slices: int = 10
    sides: tuple[int, ...] = (128, 256, 512, 1024)
    n_boxes: tuple[int, ...] = (16, 64, 256, 1024)
    slices: tuple[int, ...] = (8, 16, 32, 60)


FULL = Scale()
SMOKE = Scale(
    phantoms=PhantomConfig(128, 2, (1, 1, 1), (2, 1, 1)),
    changes=(("image_size", 128), ("max_size", 256), ("rpn_test_proposals", 60)),
    repeats=1,
    slow=1,
    ranked=4,
    rows=64,
    ap_slices=2,
    sides=(64, 128),
    n_boxes=(4, 16),
    slices=(2, 4),
)


class Bench:
    """Device, precision, sizes and the clock."""

    def __init__(self, device: str, precision: str = "32-true", scale: Scale = FULL) -> None:
        self.device = torch.device(device)
        self.precision = precision
        self.scale = scale

    def autocast(self, precision: str | None = None) -> torch.autocast:
        enabled = (precision or self.precision) == "bf16-mixed"
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

    def alternate(self, works: dict[str, Callable], repeats: int | None = None) -> dict[str, float]:
        """Median seconds of each; see `runs`."""
        return {name: median(times) for name, times in self.runs(works, repeats).items()}


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


def build(name: str, bench: Bench, **changes) -> CovidCTMaskNet:
    """Random weights, the same for everyone, with batch-norm statistics of phantoms.

    Without such statistics the features grow from layer to layer and every sigmoid is 0 or 1.
    """
    detector, classifier = MODELS[name]
    torch.manual_seed(0)
    if "n_boxes" in changes:
        classifier = replace(classifier, n_boxes=changes.pop("n_boxes"))
    detector = replace(detector, **{**dict(bench.scale.changes), **changes})
    segmenter = lesion_mask_rcnn(detector)
    set_statistics(segmenter.backbone)
    return covid_ct_mask_net(segmenter, classifier).to(bench.device)


@torch.no_grad()
def set_statistics(backbone: torch.nn.Module) -> None:
    """Means and variances of each batch norm, from one pass over eight small phantoms."""
    slices = [torch.from_numpy(make_slice(seed, seed % 3, 128)[0]) for seed in range(8)]
    images = torch.stack(slices)[:, None].expand(-1, 3, -1, -1)  # [8, 3, 128, 128], 0..1
    layers = [layer for layer in backbone.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = None  # a plain mean, of one batch
    backbone.train()((images - images.mean()) / images.std())
    backbone.eval()


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
    model = build(name, bench, **changes)
    parameters = set_regime(model, regime)
    model.train().to(memory_format=torch.channels_last)
    return model, torch.optim.Adam(parameters, lr=1e-5, weight_decay=1e-3)


def baseline_trainee(name: str, regime: str, bench: Bench):
    """The released loop's: everything requires a gradient, the optimiser takes a part."""
    model = build(name, bench)
    chosen = {id(parameter) for parameter in set_regime(model, regime)}
    picked = [id(parameter) in chosen for parameter in model.parameters()]
    model = released_loop.released(model)
    parameters = [p for p, take in zip(model.parameters(), picked, strict=True) if take]
    return model, torch.optim.Adam(parameters, lr=1e-5, weight_decay=1e-3)
