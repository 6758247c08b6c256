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
import re
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch

from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.metrics.classification import patient_bootstrap, report, wilson
from covidmask.metrics.detection import CocoAP
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import load_classifier, load_segmenter, read_card, save_model
from covidmask.training.classification import evaluate_classifier, train_classifier
from covidmask.training.segmentation import predict_lesions, train_segmenter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import environment, interval, table, write_text  # noqa: E402

PAGE = ROOT / "book" / "weights.md"
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
    training = PRESET.classifier_training
    train_classifier(model, train_slices, "heads", training, validation=val_slices, seed=SEED)
    save_model(model.cpu(), out / NAMES[1], half=True, **origin)


def judge_segmenter(path: Path, root: Path) -> dict:
    """COCO AP with intervals from resampling whole patients."""
    dataset = LesionSlices(root / "lesions", "test", min_area=PRESET.min_area)
    pairs = [pair[1:] for pair in predict_lesions(load_segmenter(path), dataset)]

    @cache  # both intervals draw the same patients
    def ap(*indices: int) -> dict:
        coco = CocoAP()
        coco.update(*zip(*(pairs[i] for i in indices), strict=True))
        return coco.compute()

    result = {"slices": len(dataset), "patients": len(set(dataset.patients))}
    for name in ("mask_ap50", "mask_ap"):
        low, high = interval(
            lambda drawn, name=name: ap(*drawn)[name],
            dataset.patients,
            repeats=RESAMPLES,
            seed=SEED,
        )
        result[name] = {"value": ap(*range(len(pairs)))[name], "low": low, "high": high}
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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sums(out: Path, source: Path) -> None:
    """Put the SHA-256 of each file into the enum `ShippedWeights`."""
    text = source.read_text(encoding="utf-8")
    for path in sorted(out.glob("*.safetensors")):
        text = re.sub(
            rf'\("{re.escape(path.name)}",\s+"[0-9a-f]*"', f'("{path.name}", "{sha256(path)}"', text
        )
    write_text(source, text)


def card_page(folder: Path) -> str:
    """The page book/weights.md: one model card for each file of `folder` between what it says."""
    head, *_, tail = re.split(r"(?=\n## |\nThe intervals)", PAGE.read_text(encoding="utf-8"))
    return head + "\n".join(line for name in NAMES for line in card(folder / name)) + "\n" + tail


def card(path: Path) -> list[str]:
    """The lines of one model card."""
    card = read_card(path)
    metrics = card["metrics"]
    body = [
        [
            label.replace("mask_ap", "mask AP"),
            f"{value['value']:.3f}",
            f"{value['low']:.3f} to {value['high']:.3f}",
        ]
        for label, value in metrics.items()
        if isinstance(value, dict)
    ]
    return [
        "",
        f"## {path.name.split('-')[0].capitalize()}, preset `quick`",
        "",
        f"- **File**: `covidmask/models/shipped/{path.name}`,"
        f" {path.stat().st_size / 1e6:.1f} MB. Weights of two or more dimensions are"
        " stored as float16 and loaded as float32; the figures below are those of the stored"
        " weights.",
        f"- **SHA-256**: `{sha256(path)}`",
        f"- **Trained on**: {card['data']}, from random weights, seed {card['seed']}.",
        f"- **Judged on**: {card['test_data']}: {metrics['slices']} slices of"
        f" {metrics['patients']} patients. No model was trained on them; nothing was tuned on"
        " them.",
        f"- **Command**: `{card['command']}` ({card['hardware']}; torch {card['torch']};"
        f" {card['date']}; commit {card['commit']})",
        "",
        *table(["metric", "value", "95 % interval"], body),
    ]


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data/phantoms-quick"))
    parser.add_argument("--out", type=Path, default=ROOT / "covidmask" / "models" / "shipped")
    arguments = parser.parse_args()
    origin = {
        **environment(),  # first, so that the commit is that of the code which runs
        "seed": SEED,
        "data": f"phantoms of the preset quick, data seed {DATA_SEED} (synthetic)",
        "test_data": f"phantoms of the preset quick, data seed {TEST_SEED}, other patients",
        "preset": json.loads(json.dumps(asdict(PRESET))),
    }
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
        path = arguments.out / name
        metrics = judge(path, unseen_root)  # then the file again, the same weights and a card
        save_model(load(path), path, half=True, **origin, metrics=metrics, limits=LIMITS)
        print(name, json.dumps(metrics, indent=1))
    write_sums(arguments.out, ROOT / "covidmask" / "models" / "weights.py")
    write_text(PAGE, card_page(arguments.out))


if __name__ == "__main__":
    main()
