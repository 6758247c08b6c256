"""Train the weights that the package ships, judge them, and write their model cards.

    python tools/shipped_weights.py [--data data/phantoms-quick] [--out covidmask/models/shipped]

Trains the segmenter and then S ("heads") of the preset `quick` from random weights, seed 0, on
phantoms of data seed 0. Judges both, as stored, on phantoms of data seed 1: no model was trained
on them and nothing was tuned on them. Writes the files, their SHA-256 into
covidmask/models/weights.py, and book/weights.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torchvision

from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.files import atomic_path
from covidmask.metrics.classification import patient_bootstrap, report, wilson
from covidmask.metrics.detection import CocoAP
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import load_classifier, load_segmenter, read_card, save_model
from covidmask.training.classification import evaluate_classifier, train_classifier
from covidmask.training.segmentation import predict_lesions, train_segmenter

ROOT = Path(__file__).resolve().parents[1]
PRESET = PRESETS["quick"]
SEED, DATA_SEED, TEST_SEED = 0, 0, 1
RESAMPLES = 200
NAMES = ("segmenter-quick.safetensors", "classifier-quick.safetensors")
LIMITS = (
    "Synthetic data only: on real CT these weights are wrong. For teaching; not a medical device, "
    "not for diagnosis."
)


def train(root: Path, out: Path, origin: dict) -> None:
    """Train both models and write them, without their metrics."""
    lesions = LesionSlices(root / "lesions", "train", min_area=PRESET.min_area)
    train_slices, val_slices = (SliceImages(root / "slices", split) for split in ("train", "val"))
    torch.manual_seed(SEED)
    segmenter = lesion_mask_rcnn(PRESET.detector)
    train_segmenter(segmenter, lesions, PRESET.segmenter, seed=SEED)
    segmenter.cpu()
    # float16 first, so that S is trained on the ranked boxes of the detector that is shipped
    save_model(segmenter, out / NAMES[0], half=True, **origin)
    segmenter = load_segmenter(out / NAMES[0])
    model = covid_ct_mask_net(segmenter, PRESET.classifier)
    train_classifier(
        model,
        train_slices,
        "heads",
        PRESET.classifier_training,
        validation=val_slices,
        seed=SEED,
    )
    save_model(model.cpu(), out / NAMES[1], half=True, **origin)


def judge_segmenter(path: Path, root: Path) -> dict:
    """COCO AP with intervals from resampling whole patients."""
    dataset = LesionSlices(root / "lesions", "test", min_area=PRESET.min_area)
    pairs = [pair[1:] for pair in predict_lesions(load_segmenter(path), dataset)]
    patients = np.array(dataset.patients)
    of_patient = {name: np.flatnonzero(patients == name) for name in np.unique(patients)}
    rng = np.random.default_rng(SEED)

    def values(indices) -> dict:
        coco = CocoAP()
        coco.update(*zip(*(pairs[i] for i in indices), strict=True))
        result = coco.compute()
        return {name: result[name] for name in ("mask_ap50", "mask_ap")}

    whole = values(range(len(pairs)))
    draws = []
    for _ in range(RESAMPLES):
        names = rng.choice(list(of_patient), len(of_patient))
        draws.append(values(np.concatenate([of_patient[name] for name in names])))
    result = {"slices": len(dataset), "patients": len(of_patient)}
    for name, value in whole.items():
        low, high = np.quantile([draw[name] for draw in draws], (0.025, 0.975))
        result[name] = {"value": value, "low": float(low), "high": float(high)}
    return result


def judge_classifier(path: Path, root: Path) -> dict:
    """Accuracy (intervals by patients) and sensitivities (intervals by slices, Wilson)."""
    dataset = SliceImages(root / "slices", "test")
    found = evaluate_classifier(load_classifier(path), dataset)
    low, high = patient_bootstrap(
        found["labels"],
        found["predictions"],
        dataset.patients,
        lambda counts: report(counts)["accuracy"],
        seed=SEED,
    )
    result = {"slices": len(dataset), "patients": len(set(dataset.patients))}
    result["accuracy"] = {"value": found["accuracy"], "low": low, "high": high}
    for label, name in enumerate(IMAGE_CLASSES):
        row = found["confusion"][label]
        low, high = wilson(int(row[label]), int(row.sum()))
        value = found["sensitivity"][label]
        result[f"sensitivity, {name}"] = {"value": float(value), "low": low, "high": high}
    return result


def add_card(path: Path, load, metrics: dict, origin: dict) -> None:
    """Write the file again with its metrics; the weights stay the same."""
    save_model(load(path), path, half=True, **origin, metrics=metrics, limits=LIMITS)


def environment() -> dict:
    """Where and from what the weights came."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False, cwd=ROOT)
    return {
        "command": "python tools/shipped_weights.py",
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "seed": SEED,
        "data": f"phantoms of the preset quick, data seed {DATA_SEED} (synthetic)",
        "test_data": f"phantoms of the preset quick, data seed {TEST_SEED}, other patients",
        "preset": json.loads(json.dumps(asdict(PRESET))),
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sums(out: Path, source: Path) -> None:
    """Put the SHA-256 of each file into the enum `ShippedWeights`."""
    text = source.read_text(encoding="utf-8")
    for path in sorted(out.glob("*.safetensors")):
        text = re.sub(
            rf'\("{re.escape(path.name)}",\s+"[0-9a-f]*"', f'("{path.name}", "{sha256(path)}"', text
        )
    with atomic_path(source) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def card_page(folder: Path) -> str:
    """The page book/weights.md: one model card for each file of `folder`."""
    lines = [
        "# Shipped weights",
        "",
        "Two small files come with the package, so that every chapter can start alone. Chapters 3",
        "and 6 train from random weights all the same. `make weights` makes both files and this",
        "page.",
        "",
        "```python",
        "from covidmask.models.weights import ShippedWeights",
        "",
        "segmenter = ShippedWeights.SEGMENTER_QUICK.load()  # checks the SHA-256 first",
        "card = ShippedWeights.SEGMENTER_QUICK.card()  # what this page says, as a dictionary",
        "```",
        "",
        "```{admonition} Limits",
        ":class: warning",
        LIMITS,
        "```",
    ]
    for name in NAMES:
        card = read_card(folder / name)
        metrics = card["metrics"]
        lines += [
            "",
            f"## {name.split('-')[0].capitalize()}, preset `quick`",
            "",
            f"- **File**: `covidmask/models/shipped/{name}`,"
            f" {(folder / name).stat().st_size / 1e6:.1f} MB. Weights of two or more dimensions are"
            " stored as float16 and loaded as float32; the figures below are those of the stored"
            " weights.",
            f"- **SHA-256**: `{sha256(folder / name)}`",
            f"- **Trained on**: {card['data']}, from random weights, seed {card['seed']}.",
            f"- **Judged on**: {card['test_data']}: {metrics['slices']} slices of"
            f" {metrics['patients']} patients. No model was trained on them; nothing was tuned on"
            " them.",
            f"- **Command**: `{card['command']}` ({card['hardware']}; torch {card['torch']};"
            f" {card['date']}; commit {card['commit']})",
            "",
            "| metric | value | 95 % interval |",
            "|---|---|---|",
        ]
        for metric, value in metrics.items():
            if isinstance(value, dict):
                label = metric.replace("mask_ap50", "mask AP50").replace("mask_ap", "mask AP")
                interval = f"{value['low']:.3f} to {value['high']:.3f}"
                lines.append(f"| {label} | {value['value']:.3f} | {interval} |")
    lines += [
        "",
        "The intervals of AP and accuracy come from resampling whole patients, those of the",
        "sensitivities from Wilson's formula, which takes slices as independent. They hold for one",
        "training seed; the table of results in the README shows how much seeds differ.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/phantoms-quick"))
    parser.add_argument("--out", type=Path, default=ROOT / "covidmask" / "models" / "shipped")
    arguments = parser.parse_args()
    origin = environment()  # first, so that the commit is that of the code which runs
    arguments.out.mkdir(parents=True, exist_ok=True)
    root = write_phantoms(arguments.data, PRESET.phantoms, DATA_SEED)
    config = PRESET.phantoms
    unseen = replace(
        config,
        lesion_patients=(0, 0, config.lesion_patients[2]),
        class_patients=(0, 0, config.class_patients[2]),
    )
    unseen_root = arguments.data.with_name(f"{arguments.data.name}-seed{TEST_SEED}")
    write_phantoms(unseen_root, unseen, TEST_SEED)
    train(root, arguments.out, origin)
    for name, load, judge in zip(
        NAMES, (load_segmenter, load_classifier), (judge_segmenter, judge_classifier), strict=True
    ):
        metrics = judge(arguments.out / name, unseen_root)
        add_card(arguments.out / name, load, metrics, origin)
        print(name, json.dumps(metrics, indent=1))
    write_sums(arguments.out, ROOT / "covidmask" / "models" / "weights.py")
    with atomic_path(ROOT / "book" / "weights.md") as temporary:
        temporary.write_text(card_page(arguments.out), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
