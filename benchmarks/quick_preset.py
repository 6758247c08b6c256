"""What the quick preset reaches from random weights, on this machine's CPU, seed by seed.

Beside it stand two simple rules: an intensity threshold as the detector, and logistic regression
on the true lesion areas of a slice as the classifier. All data are synthetic. Fills README.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from common import QUICK, QUICK_DATA, RESULTS, ROOT, command, formatted, judge, origin, quick_data

from covidmask import models, training
from covidmask.datasets import LesionSlices, phantom_mask
from covidmask.metrics import CocoAP

OUT = RESULTS / "quick_preset.json"
COLUMNS = {
    "seed": "{seed}",
    "core minutes": "{core_minutes:.1f}",
    "mask AP50": "{mask_ap50:.2f}",
    "mask AP": "{mask_ap:.2f}",
    "accuracy (95 %)": "{accuracy:.2f} ({accuracy_wilson[0]:.2f} to {accuracy_wilson[1]:.2f})",
    "same, random detector": "{accuracy_random_detector:.2f}",
}


def train_heads(detector, slices: dict, seed: int):
    """S on the ranked boxes of a detector that stays as it is."""
    model = models.covid_ct_mask_net(detector, QUICK.classifier)
    options = {"validation": slices["val"], "seed": seed}
    settings = "heads", QUICK.classifier_training
    training.train_classifier(model, slices["train"], *settings, **options)
    return model


def one_seed(seed: int, lesions: dict, slices: dict) -> dict:
    """Train and judge once. Core seconds are those of all threads, whatever else the cores do."""
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
    return {
        "seed": seed,
        "core_seconds_total": seconds,
        "lesion_test_slices": len(lesions["test"]),
        **{key: detection[key] for key in ("mask_ap", "mask_ap50", "box_ap", "box_ap50")},
        "class_test_slices": len(slices["test"]),
        **judge(model, slices["test"]),
        "accuracy_random_detector": by_chance["accuracy"],
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


def area_classifier(slices: dict, seed: int) -> float:
    """Accuracy of logistic regression on the TRUE lesion areas of the same slices."""

    def areas(split: str) -> tuple[list, list]:
        masks = (phantom_mask(name, QUICK.phantoms.size, seed) for name in slices[split].names)
        return [models.area_features(mask) for mask in masks], slices[split].labels

    return float(models.fit_area_classifier(*areas("train")).score(*areas("test")))


def markdown(result: dict) -> str:
    """The table of README.md."""
    rows = [row | {"core_minutes": row["core_seconds_total"] / 60} for row in result["seeds"]]
    lines = formatted(COLUMNS, rows)
    lines += [f"| intensity threshold | | {result['threshold_detector']['mask_ap50']:.2f} | | | |"]
    lines += [f"| true lesion areas | | | | {result['area_classifier_accuracy']:.2f} | |", ""]
    return "\n".join(
        [*lines, origin(result, "[results/quick_preset.json](results/quick_preset.json)")]
    )


def measure(
    seeds: tuple[int, ...] = (0, 1, 2),
    data: Path = QUICK_DATA,
    data_seed: int = 0,
    out: Path = OUT,
) -> Iterator[tuple[Path, dict]]:
    slices, lesions = quick_data(data, data_seed)
    result = {
        "about": "quick preset on synthetic phantoms; nothing here is a figure of real CT",
        "preset": asdict(QUICK),
        "seeds": [one_seed(seed, lesions, slices) for seed in seeds],
        "threshold_detector": threshold_detector(data),
        "area_classifier_accuracy": area_classifier(slices, data_seed),
    }
    yield out, result


if __name__ == "__main__":
    command(measure, OUT, (ROOT / "README.md", "results", markdown))
