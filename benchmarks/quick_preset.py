"""What the quick preset reaches from random weights, on this machine's CPU, seed by seed.

Beside it stand an ordinary classifier of about the same core seconds, S on two boxes alone, and two
simple rules: an intensity threshold as the detector, and logistic regression on the true lesion
areas of a slice as the classifier. All data are synthetic. A second call does what the file of
results lacks, also with other seeds in another process. Fills README.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import common
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from common import QUICK, QUICK_DATA, RESULTS, ROOT, command, formatted, judge, origin, quick_data
from torch import Tensor

from covidmask import models, training
from covidmask.config import TrainingConfig
from covidmask.datasets import LesionSlices, SliceImages, phantom_mask
from covidmask.metrics import CocoAP
from covidmask.training.loop import fit

OUT = RESULTS / "quick_preset.json"
COLUMNS = {
    "seed": "{seed}",
    "core minutes": "{core_minutes:.1f}",
    "mask AP50": "{mask_ap50:.2f}",
    "mask AP": "{mask_ap:.2f}",
    "accuracy (95 %)": "{accuracy:.2f} ({accuracy_wilson[0]:.2f} to {accuracy_wilson[1]:.2f})",
    "same, random detector": "{accuracy_random_detector:.2f}",
}
FEW = 2  # boxes
# of a ResNet-18, chosen so that it costs about as many core seconds as segmenter and S
ORDINARY = TrainingConfig(epochs=2, batch_size=16, lr=1e-3, weight_decay=1e-4, cosine=True)


def train_heads(detector, slices: dict, seed: int, n_boxes: int = QUICK.classifier.n_boxes):
    """S on the ranked boxes of a detector that stays as it is."""
    model = models.covid_ct_mask_net(detector, replace(QUICK.classifier, n_boxes=n_boxes))
    options = {"validation": slices["val"], "seed": seed}
    settings = "heads", QUICK.classifier_training
    training.train_classifier(model, slices["train"], *settings, **options)
    return model


def ordinary_classifier(seed: int, data: Path, data_seed: int) -> dict:
    """Train and judge a ResNet-18 from random weights on whole slices, without lesion masks.

    As in `train_heads` the epoch of the best validation accuracy stays.
    """
    slices = quick_data(data, data_seed)[0]
    torch.manual_seed(seed)
    model = torchvision.models.resnet18(num_classes=len(slices["test"].classes))

    def losses(wrapped, items: list) -> dict[str, Tensor]:
        images, labels = zip(*items, strict=True)
        drawn = torch.rand(len(images)) < 0.5  # the seed of each step is that of `fit`
        images = [i.flip(-1) if flip else i for i, flip in zip(images, drawn, strict=True)]
        return {"ce": F.cross_entropy(wrapped(torch.stack(images)), torch.tensor(labels))}

    @torch.no_grad()
    def predict(part: SliceImages) -> Tensor:
        return torch.cat([model(part[i][0][None]).argmax(1) for i in range(len(part))])

    def accuracy() -> float:
        right = predict(slices["val"]) == torch.tensor(slices["val"].labels)
        return right.float().mean().item()

    options = {"seed": seed, "accuracy": accuracy, "title": "ordinary classifier"}
    start = time.process_time()
    fit(model, slices["train"], losses, ORDINARY, **options)
    cost = {"seed": seed, "core_seconds": time.process_time() - start}
    return cost | common.judged(predict(slices["test"]), slices["test"])


def one_seed(seed: int, data: Path, data_seed: int) -> dict:
    """Train and judge once. Core seconds are those of all threads, whatever else the cores do."""
    slices, lesions = quick_data(data, data_seed)
    torch.manual_seed(seed)
    segmenter = models.lesion_mask_rcnn(QUICK.detector)
    start = time.process_time()
    training.train_segmenter(segmenter, lesions["train"], QUICK.segmenter, seed=seed)
    model = train_heads(segmenter, slices, seed)
    seconds = time.process_time() - start
    detection = training.evaluate_segmenter(segmenter, lesions["test"])
    torch.manual_seed(seed)
    untrained = train_heads(models.lesion_mask_rcnn(QUICK.detector), slices, seed)
    by_chance = training.evaluate_classifier(untrained, slices["test"])
    torch.manual_seed(seed)
    few = train_heads(segmenter, slices, seed, FEW)
    return {
        "seed": seed,
        "core_seconds_total": seconds,
        "lesion_test_slices": len(lesions["test"]),
        **{key: detection[key] for key in ("mask_ap", "mask_ap50", "box_ap", "box_ap50")},
        "class_test_slices": len(slices["test"]),
        **judge(model, slices["test"]),
        "accuracy_random_detector": by_chance["accuracy"],
        "few_boxes": judge(few, slices["test"]),
    }


def threshold_detector(folder: Path) -> dict:
    """Best AP50 of thresholds chosen on the test slices themselves, lesions of one class."""
    dataset = LesionSlices(folder / "lesions", "test", "merged", QUICK.min_area)
    numbers, rows = range(len(dataset)), []
    images, targets = ([dataset.read(i)[0] for i in numbers], [dataset[i][1] for i in numbers])
    for low, high in product((0.35, 0.4, 0.45, 0.5), (0.55, 0.6, 0.65, 0.7, 0.8)):
        limits, coco = {"low": low, "high": high, "min_area": QUICK.min_area}, CocoAP()
        coco.update([models.threshold_detections(image, **limits) for image in images], targets)
        rows.append({"mask_ap50": coco.compute()["mask_ap50"], **limits})
    return max(rows, key=lambda row: row["mask_ap50"])


def area_classifier(data: Path, seed: int) -> float:
    """Accuracy of logistic regression on the TRUE lesion areas of the same slices."""
    slices = quick_data(data, seed)[0]

    def areas(split: str) -> tuple[list, list]:
        masks = (phantom_mask(name, QUICK.phantoms.size, seed) for name in slices[split].names)
        return [models.area_features(mask) for mask in masks], slices[split].labels

    return float(models.fit_area_classifier(*areas("train")).score(*areas("test")))


def markdown(result: dict) -> str:
    """The table of README.md."""
    parts = dict(sorted(result["parts"].items()))
    rows, ordinary = (
        [row for name, row in parts.items() if name.startswith(kind)]
        for kind in ("seed", "ordinary")
    )
    rows = [row | {"core_minutes": row["core_seconds_total"] / 60} for row in rows]
    lines = formatted(COLUMNS, rows)
    few = [row["few_boxes"] for row in rows if "few_boxes" in row]
    for name, own in ((f"S on {FEW} boxes", few), ("ordinary classifier", ordinary)):
        minutes = [row["core_seconds"] / 60 for row in own if "core_seconds" in row]
        cost = f"{np.mean(minutes):.1f} " if minutes else ""
        accuracies = " / ".join(f"{row['accuracy']:.2f}" for row in own) or "not measured yet"
        lines += [f"| {name} | {cost}| | | {accuracies} | |"]
    lines += [f"| intensity threshold | | {parts['threshold detector']['mask_ap50']:.2f} | | | |"]
    lines += [f"| true lesion areas | | | | {parts['area classifier']:.2f} | |", ""]
    return "\n".join(
        [*lines, origin(result, "[results/quick_preset.json](results/quick_preset.json)")]
    )


def measure(
    seeds: tuple[int, ...] = (0, 1, 2),
    data: Path = QUICK_DATA,
    data_seed: int = 0,
    jobs: int = 2,
    out: Path = OUT,
) -> Iterator[tuple[Path, dict]]:
    """Do what an earlier call with the same settings has not done, in `jobs` processes."""
    quick_data(data, data_seed)  # before several processes look for it
    settings = {
        "about": "quick preset on synthetic phantoms; nothing here is a figure of real CT",
        "generator": common.GENERATOR,
        "preset": asdict(QUICK),
        "ordinary_training": asdict(ORDINARY),
        "data_seed": data_seed,
    }
    parts = {f"seed {seed}": (one_seed, seed, data, data_seed) for seed in seeds}
    parts |= {f"ordinary {seed}": (ordinary_classifier, seed, data, data_seed) for seed in seeds}
    parts["threshold detector"] = threshold_detector, data
    parts["area classifier"] = area_classifier, data, data_seed
    yield from common.lacking(out, settings, parts, jobs)


if __name__ == "__main__":
    command(measure, OUT, (ROOT / "README.md", "results", markdown))
