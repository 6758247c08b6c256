"""What the quick preset reaches from random weights, on this machine's CPU, seed by seed.

    python benchmarks/quick_preset.py [--seeds 0 1 2] [--out results/quick_preset.json]

For each seed: train the segmenter, rank the boxes of the classification slices, train S (timed);
then judge both on phantom patients that neither has seen, train S afresh on the boxes of a
detector with random weights, and, for comparison, two simple rules: an intensity threshold with
connected components as the detector, and logistic regression on the true lesion areas of a slice
as the classifier. All data are synthetic.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch
from common import RESULTS, ROOT, environment, fill, origin, save, table
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import PRESETS
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import phantom_mask, write_phantoms
from covidmask.metrics.classification import wilson
from covidmask.metrics.detection import CocoAP
from covidmask.models.baselines import area_features, fit_area_classifier, threshold_detections
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.training.classification import evaluate_classifier, train_classifier
from covidmask.training.segmentation import evaluate_segmenter, train_segmenter

PRESET = PRESETS["quick"]
OUT = RESULTS / "quick_preset.json"


def train_heads(detector: GeneralizedRCNN, slices: dict, seed: int) -> CovidCTMaskNet:
    """S on the ranked boxes of a detector that stays as it is."""
    model = covid_ct_mask_net(detector, PRESET.classifier)
    training, val = PRESET.classifier_training, slices["val"]
    train_classifier(model, slices["train"], "heads", training, validation=val, seed=seed)
    return model


def one_seed(seed: int, root: Path) -> dict:
    """Train and judge once. Core seconds are those of all threads, whatever else the cores do."""
    lesions = [
        LesionSlices(root / "lesions", split, min_area=PRESET.min_area)
        for split in ("train", "test")
    ]
    slices = {split: SliceImages(root / "slices", split) for split in ("train", "val", "test")}
    torch.manual_seed(seed)
    segmenter = lesion_mask_rcnn(PRESET.detector)
    clock = [time.process_time()]
    train_segmenter(segmenter, lesions[0], PRESET.segmenter, seed=seed)
    clock.append(time.process_time())
    model = train_heads(segmenter, slices, seed)
    clock.append(time.process_time())
    detection = evaluate_segmenter(segmenter, lesions[1])
    classified = evaluate_classifier(model, slices["test"])
    torch.manual_seed(seed)
    untrained = train_heads(lesion_mask_rcnn(PRESET.detector), slices, seed)
    return {
        "seed": seed,
        "core_seconds_segmenter": clock[1] - clock[0],
        "core_seconds_ranking_and_s": clock[2] - clock[1],
        "core_seconds_total": clock[2] - clock[0],
        "lesion_test_slices": len(lesions[1]),
        **{key: detection[key] for key in ("mask_ap", "mask_ap50", "box_ap", "box_ap50")},
        "class_test_slices": len(slices["test"]),
        "accuracy": classified["accuracy"],
        "accuracy_interval": wilson(int(classified["confusion"].trace()), len(slices["test"])),
        "sensitivity": list(classified["sensitivity"]),
        "ppv": list(classified["ppv"]),
        "confusion": classified["confusion"].tolist(),
        "accuracy_random_detector": evaluate_classifier(untrained, slices["test"])["accuracy"],
    }


def threshold_detector(root: Path) -> dict:
    """Best AP50 of thresholds chosen on the test slices themselves, lesions of one class."""
    dataset = LesionSlices(root / "lesions", "test", "merged", PRESET.min_area)
    images = [dataset.read(i)[0] for i in range(len(dataset))]
    targets = [dataset[i][1] for i in range(len(dataset))]
    best = {"mask_ap50": -1.0}
    for low in (0.35, 0.4, 0.45, 0.5):
        for high in (0.55, 0.6, 0.65, 0.7, 0.8):
            metric = CocoAP()
            found = [threshold_detections(image, low, high, PRESET.min_area) for image in images]
            metric.update(found, targets)
            ap50 = metric.compute()["mask_ap50"]
            if ap50 > best["mask_ap50"]:
                best = {"mask_ap50": ap50, "low": low, "high": high}
    return best


def area_classifier(root: Path, seed: int) -> float:
    """Accuracy of logistic regression on the TRUE lesion areas of the same slices."""
    features, labels = {}, {}
    for split in ("train", "test"):
        slices = SliceImages(root / "slices", split)
        masks = [phantom_mask(name, PRESET.phantoms.size, seed) for name in slices.names]
        features[split] = [area_features(mask) for mask in masks]
        labels[split] = slices.labels
    model = fit_area_classifier(features["train"], labels["train"])
    return float(model.score(features["test"], labels["test"]))


def markdown(result: dict) -> str:
    """The table of README.md."""
    head = ["seed", "core minutes", "mask AP50", "mask AP", "accuracy (95 %)"]
    body = []
    for row in result["seeds"]:
        low, high = row["accuracy_interval"]
        cells = [str(row["seed"]), f"{row['core_seconds_total'] / 60:.1f}"]
        cells += [f"{row[key]:.2f}" for key in ("mask_ap50", "mask_ap")]
        cells += [f"{row['accuracy']:.2f} ({low:.2f} to {high:.2f})"]
        body.append([*cells, f"{row['accuracy_random_detector']:.2f}"])
    first = result["seeds"][0]
    lines = [
        *table([*head, "same, random detector"], body),
        "",
        f"Synthetic phantoms of unseen patients: {first['lesion_test_slices']} slices for the AP, "
        f'{first["class_test_slices"]} for the accuracy of S alone ("heads"), three classes. '
        "No model saw them, but the phantoms and the settings of S were tuned while "
        "looking at results on these very patients, so expect a little less on other ones. "
        "Core minutes are the processor's time, summed over its cores, for both trainings and the "
        "ranking between them. The intervals (Wilson) take slices as independent, which slices of "
        "one patient are not. For comparison, an intensity "
        f"threshold with connected components reaches a mask AP50 of "
        f"{result['threshold_detector']['mask_ap50']:.2f} (lesions of one class, its thresholds "
        "chosen on the test slices; much of the consolidation, as bright as soft tissue, is out of "
        "its reach), and logistic regression on the true GGO and C areas of a "
        f"slice an accuracy of {result['area_classifier_accuracy']:.2f}.",
        "",
        origin(result, "[results/quick_preset.json](results/quick_preset.json)"),
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, run, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=Path("data/phantoms-quick"))
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    source = environment()  # first, so that the commit is that of the code which runs
    root = write_phantoms(arguments.data, PRESET.phantoms, arguments.data_seed)
    result = {
        "about": "quick preset on synthetic phantoms; nothing here is a figure of real CT",
        **source,
        "preset": asdict(PRESET),
        "seeds": [one_seed(seed, root) for seed in arguments.seeds],
        "threshold_detector": threshold_detector(root),
        "area_classifier_accuracy": area_classifier(root, arguments.data_seed),
    }
    save(arguments.out, result)
    print(f"{markdown(result)}\nwritten: {arguments.out}")
    if arguments.out == OUT:
        fill(ROOT / "README.md", "results", markdown(result))


if __name__ == "__main__":
    main()
