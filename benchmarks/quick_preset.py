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
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
import torchvision
from marks import fill

from covidmask.config import PRESETS
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import phantom_mask, write_phantoms
from covidmask.files import atomic_path
from covidmask.metrics.classification import wilson
from covidmask.metrics.detection import CocoAP
from covidmask.models.baselines import area_features, fit_area_classifier, threshold_detections
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.training.classification import evaluate_classifier, train_classifier
from covidmask.training.segmentation import evaluate_segmenter, train_segmenter

ROOT = Path(__file__).resolve().parents[1]
PRESET = PRESETS["quick"]


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
    model = covid_ct_mask_net(segmenter, PRESET.classifier)
    train_classifier(
        model,
        slices["train"],
        "heads",
        PRESET.classifier_training,
        validation=slices["val"],
        seed=seed,
    )
    clock.append(time.process_time())
    detection = evaluate_segmenter(segmenter, lesions[1])
    classified = evaluate_classifier(model, slices["test"])

    torch.manual_seed(seed)
    random_model = covid_ct_mask_net(lesion_mask_rcnn(PRESET.detector), PRESET.classifier)
    train_classifier(
        random_model,
        slices["train"],
        "heads",
        PRESET.classifier_training,
        validation=slices["val"],
        seed=seed,
    )
    untrained = evaluate_classifier(random_model, slices["test"])
    correct = int(classified["confusion"].trace())
    return {
        "seed": seed,
        "core_seconds_segmenter": clock[1] - clock[0],
        "core_seconds_ranking_and_s": clock[2] - clock[1],
        "core_seconds_total": clock[2] - clock[0],
        "lesion_test_slices": len(lesions[1]),
        **{key: detection[key] for key in ("mask_ap", "mask_ap50", "box_ap", "box_ap50")},
        "class_test_slices": len(slices["test"]),
        "accuracy": classified["accuracy"],
        "accuracy_interval": wilson(correct, len(slices["test"])),
        "sensitivity": list(classified["sensitivity"]),
        "ppv": list(classified["ppv"]),
        "confusion": classified["confusion"].tolist(),
        "accuracy_random_detector": untrained["accuracy"],
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


def environment() -> dict:
    """Where and from what the figures came.

    Raises:
        SystemExit: the code that runs is in no commit. Results, chapters and README may differ:
            an earlier benchmark fills them.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    commit = git("describe", "--always", "--exclude", "*")
    if git("status", "--porcelain", "--", "benchmarks", "covidmask"):
        if not os.environ.get("ALLOW_DIRTY"):
            sys.exit(
                "benchmarks/ or covidmask/ holds changes that are in no commit: commit them, so "
                "that the results can name the code (or set ALLOW_DIRTY=1 for a trial)"
            )
        commit += "-dirty"
    return {
        "command": " ".join(["python", "benchmarks/quick_preset.py", *sys.argv[1:]]),
        "commit": commit,
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
    }


def markdown(result: dict) -> str:
    """The table of README.md."""
    lines = [
        "| seed | core minutes | mask AP50 | mask AP | accuracy (95 %) | same, random detector |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["seeds"]:
        low, high = row["accuracy_interval"]
        lines.append(
            f"| {row['seed']} | {row['core_seconds_total'] / 60:.1f} | {row['mask_ap50']:.2f} "
            f"| {row['mask_ap']:.2f} | {row['accuracy']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['accuracy_random_detector']:.2f} |"
        )
    first = result["seeds"][0]
    lines += [
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
        f"Command: `{result['command']}`; {result['hardware']}, {result['threads']} thread(s); "
        f"torch {result['torch']}; {result['date']}; commit {result['commit']}; all numbers in "
        "[results/quick_preset.json](results/quick_preset.json).",
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, run, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=Path("data/phantoms-quick"))
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "quick_preset.json")
    arguments = parser.parse_args()
    origin = environment()  # first, so that the commit is that of the code which runs
    root = write_phantoms(arguments.data, PRESET.phantoms, arguments.data_seed)
    result = {
        "about": "quick preset on synthetic phantoms; nothing here is a figure of real CT",
        **origin,
        "preset": asdict(PRESET),
        "seeds": [one_seed(seed, root) for seed in arguments.seeds],
        "threshold_detector": threshold_detector(root),
        "area_classifier_accuracy": area_classifier(root, arguments.data_seed),
    }
    with atomic_path(arguments.out) as temporary:
        text = json.dumps(result, indent=1) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")
    print(markdown(result))
    if arguments.out == ROOT / "results" / "quick_preset.json":
        marks = "<!-- results -->", "<!-- /results -->"
        fill(ROOT / "README.md", marks, markdown(result))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
