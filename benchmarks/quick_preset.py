"""What the quick preset reaches from random weights, on this machine's CPU, seed by seed.

    python benchmarks/quick_preset.py [--seeds 0 1 2] [--out results/quick_preset.json]

For each seed: train the segmenter, rank the boxes of the classification slices, train S (timed);
then judge both on phantom patients that neither has seen, and train S afresh on the boxes of a
detector with random weights. For comparison, two simple rules: an intensity threshold with
connected components as the detector, and logistic regression on the true lesion areas of a slice
as the classifier. All data are synthetic.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from common import RESULTS, ROOT, environment, fill, formatted, judge, origin, save
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import PRESETS
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import phantom_mask, write_phantoms
from covidmask.metrics.detection import CocoAP
from covidmask.models.baselines import area_features, fit_area_classifier, threshold_detections
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.training.classification import evaluate_classifier, train_classifier
from covidmask.training.segmentation import evaluate_segmenter, train_segmenter

PRESET = PRESETS["quick"]
OUT = RESULTS / "quick_preset.json"
COLUMNS = {
    "seed": "{seed}",
    "core minutes": "{core_minutes:.1f}",
    "mask AP50": "{mask_ap50:.2f}",
    "mask AP": "{mask_ap:.2f}",
    "accuracy (95 %)": "{accuracy:.2f} ({accuracy_wilson[0]:.2f} to {accuracy_wilson[1]:.2f})",
    "same, random detector": "{accuracy_random_detector:.2f}",
}


def train_heads(detector: GeneralizedRCNN, slices: dict, seed: int) -> CovidCTMaskNet:
    """S on the ranked boxes of a detector that stays as it is."""
    model = covid_ct_mask_net(detector, PRESET.classifier)
    training, val = PRESET.classifier_training, slices["val"]
    train_classifier(model, slices["train"], "heads", training, validation=val, seed=seed)
    return model


def one_seed(seed: int, lesions: dict, slices: dict) -> dict:
    """Train and judge once. Core seconds are those of all threads, whatever else the cores do."""
    torch.manual_seed(seed)
    segmenter = lesion_mask_rcnn(PRESET.detector)
    start = time.process_time()
    train_segmenter(segmenter, lesions["train"], PRESET.segmenter, seed=seed)
    model = train_heads(segmenter, slices, seed)
    seconds = time.process_time() - start
    detection = evaluate_segmenter(segmenter, lesions["test"])
    torch.manual_seed(seed)
    untrained = train_heads(lesion_mask_rcnn(PRESET.detector), slices, seed)
    return {
        "seed": seed,
        "core_seconds_total": seconds,
        "lesion_test_slices": len(lesions["test"]),
        **{key: detection[key] for key in ("mask_ap", "mask_ap50", "box_ap", "box_ap50")},
        "class_test_slices": len(slices["test"]),
        **judge(model, slices["test"]),
        "accuracy_random_detector": evaluate_classifier(untrained, slices["test"])["accuracy"],
    }


def threshold_detector(root: Path) -> dict:
    """Best AP50 of thresholds chosen on the test slices themselves, lesions of one class."""
    dataset = LesionSlices(root / "lesions", "test", "merged", PRESET.min_area)
    images = [dataset.read(i)[0] for i in range(len(dataset))]
    targets = [dataset[i][1] for i in range(len(dataset))]
    rows = []
    for low in (0.35, 0.4, 0.45, 0.5):
        for high in (0.55, 0.6, 0.65, 0.7, 0.8):
            coco = CocoAP()
            found = [threshold_detections(image, low, high, PRESET.min_area) for image in images]
            coco.update(found, targets)
            rows.append({"mask_ap50": coco.compute()["mask_ap50"], "low": low, "high": high})
    return max(rows, key=lambda row: row["mask_ap50"])


def area_classifier(slices: dict, seed: int) -> float:
    """Accuracy of logistic regression on the TRUE lesion areas of the same slices."""

    def areas(split: str) -> tuple[list, list]:
        masks = (phantom_mask(name, PRESET.phantoms.size, seed) for name in slices[split].names)
        return [area_features(mask) for mask in masks], slices[split].labels

    return float(fit_area_classifier(*areas("train")).score(*areas("test")))


def markdown(result: dict) -> str:
    """The table of README.md."""
    rows = [row | {"core_minutes": row["core_seconds_total"] / 60} for row in result["seeds"]]
    lines = formatted(COLUMNS, rows)
    lines += [f"| intensity threshold | | {result['threshold_detector']['mask_ap50']:.2f} | | | |"]
    lines += [f"| true lesion areas | | | | {result['area_classifier_accuracy']:.2f} | |", ""]
    lines += [origin(result, "[results/quick_preset.json](results/quick_preset.json)")]
    return "\n".join(lines)


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    data: Path = Path("data/phantoms-quick"),
    data_seed: int = 0,
    out: Path = OUT,
) -> None:
    """Measure and write the results; those of `OUT` fill README.md, too."""
    source = environment()  # first, so that the commit is that of the code which runs
    root = write_phantoms(data, PRESET.phantoms, data_seed)
    slices = {split: SliceImages(root / "slices", split) for split in ("train", "val", "test")}
    lesions = {
        split: LesionSlices(root / "lesions", split, min_area=PRESET.min_area)
        for split in ("train", "test")
    }
    result = {
        "about": "quick preset on synthetic phantoms; nothing here is a figure of real CT",
        **source,
        "preset": asdict(PRESET),
        "seeds": [one_seed(seed, lesions, slices) for seed in seeds],
        "threshold_detector": threshold_detector(root),
        "area_classifier_accuracy": area_classifier(slices, data_seed),
    }
    save(out, result)
    print(f"{markdown(result)}\nwritten: {out}")
    if out == OUT:
        fill(ROOT / "README.md", "results", markdown(result))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
