"""Train the weights that the package ships, judge them, and write their model cards.

    python tools/shipped_weights.py [--data data/phantoms-quick] [--out covidmask/models/shipped]
                                    [--missing]

Trains the segmenter and then S ("heads") of the preset `quick` from random weights, seed 0, on
phantoms of data seed 0. Judges both, as stored, on phantoms of data seed 3: no model was trained
on them and nothing was tuned on them. Writes the files, their SHA-256 into
covidmask/models/weights.py, and book/weights.md. With --missing it does nothing where the files are
there, of these phantoms and this preset.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import tyro

from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import GENERATOR, write_phantoms
from covidmask.files import write_text
from covidmask.metrics.detection import CocoAP
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import SHIPPED, load_classifier, load_segmenter, read_card, save_model
from covidmask.training.segmentation import predict_lesions, train_segmenter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import QUICK_DATA, environment, formatted, interval, judge, unseen  # noqa: E402
from quick_preset import train_heads  # noqa: E402

PAGE = ROOT / "book" / "weights.md"
PRESET = PRESETS["quick"]
SEGMENTER, CLASSIFIER = "segmenter-quick.safetensors", "classifier-quick.safetensors"
CT = "segmenter-ct.safetensors"  # benchmarks/segmenter_ct.py makes it
TITLES = {
    SEGMENTER: "Segmenter, preset `quick`",
    CLASSIFIER: "Classifier, preset `quick`",
    CT: "Segmenter for real scans, `SEGMENTER_CT`",
}
COLUMNS = {"metric": "{name}", "value": "{value:.3f}", "95 % interval": "{low:.3f} to {high:.3f}"}
CARD = """
## {title}

- **File**: `covidmask/models/shipped/{name}`, {size:.1f} MB. Weights of two or more dimensions are\
 stored as float16 and loaded as float32; the figures below are those of the stored weights.
- **SHA-256**: `{sha256}`
- **Trained on**: {data}, from random weights, seed {seed}.
- **Judged on**: {test_data}: {metrics[slices]} slices of {metrics[patients]} patients. No model\
 was trained on them{tuned}.
- **Command**: `{command}` ({hardware}; torch {torch}; {date}; commit {commit})
- **Limits**: {limits}

{table}
"""


def train(root: Path, out: Path, origin: dict) -> None:
    """Train both models and write them, without their metrics."""
    lesions = LesionSlices(root / "lesions", "train", min_area=PRESET.min_area)
    slices = {split: SliceImages(root / "slices", split) for split in ("train", "val")}
    torch.manual_seed(0)
    segmenter = lesion_mask_rcnn(PRESET.detector)
    train_segmenter(segmenter, lesions, PRESET.segmenter)
    # float16 first, so that S is trained on the ranked boxes of the detector that is shipped
    save_model(segmenter, out / SEGMENTER, half=True, **origin)
    model = train_heads(load_segmenter(out / SEGMENTER), slices, 0)
    save_model(model, out / CLASSIFIER, half=True, **origin)


def judge_segmenter(path: Path, root: Path) -> dict:
    """COCO AP with intervals from resampling whole patients."""
    dataset = LesionSlices(root / "lesions", "test", min_area=PRESET.min_area)
    pairs = [pair[1:] for pair in predict_lesions(load_segmenter(path), dataset)]

    def ap(indices: np.ndarray) -> list[float]:
        coco = CocoAP()
        coco.update(*zip(*(pairs[i] for i in indices), strict=True))
        found = coco.compute()
        return [found["mask_ap50"], found["mask_ap"]]

    values = np.array([ap(np.arange(len(pairs))), *interval(ap, dataset.patients, repeats=200)])
    return metrics(dataset, ("mask_ap50", "mask_ap"), values.T.tolist())


def judge_classifier(path: Path, root: Path) -> dict:
    """Accuracy (intervals by patients) and sensitivities (intervals by slices, Wilson)."""
    dataset = SliceImages(root / "slices", "test")
    found = judge(load_classifier(path), dataset)
    both = zip(found["sensitivity"], found["sensitivity_wilson"], strict=True)
    values = [(found["accuracy"], *found["accuracy_by_patient"]), *((v, *ends) for v, ends in both)]
    return metrics(dataset, ("accuracy", *(f"sensitivity, {c}" for c in IMAGE_CLASSES)), values)


def metrics(dataset: LesionSlices | SliceImages, names: tuple[str, ...], values: list) -> dict:
    """What a card keeps: how many were judged, and value, low and high of each metric."""
    rows = (dict(zip(("value", "low", "high"), each, strict=True)) for each in values)
    counts = {"slices": len(dataset), "patients": len(set(dataset.patients))}
    return counts | dict(zip(names, rows, strict=True))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def card_page(folder: Path) -> str:
    """The page book/weights.md: one model card for each file of `folder` between what it says."""
    head, *_, tail = re.split(r"(?=\n## |\nThe intervals)", PAGE.read_text(encoding="utf-8"))
    for path in (folder / name for name in TITLES):
        header = read_card(path)
        named = {name.replace("mask_ap", "mask AP"): v for name, v in header["metrics"].items()}
        rows = [{"name": name, **v} for name, v in named.items() if isinstance(v, dict)]
        header |= {"name": path.name, "title": TITLES[path.name]}
        if before := header.get("before"):  # it went on from other weights
            first = f"{before['command']}` (commit {before['commit']}), then `"
            header["command"] = first + header["command"]
        header["tuned"] = "" if path.name == CT else "; nothing was tuned on them"
        header |= {"size": path.stat().st_size / 1e6, "sha256": sha256(path)}
        head += CARD.format(table="\n".join(formatted(COLUMNS, rows)), **header)
    return head + tail


def main(data: Path = QUICK_DATA, out: Path = SHIPPED, missing: bool = False) -> None:
    """Train, judge, write."""
    facts = {
        "seed": 0,
        "generator": GENERATOR,
        "data": "phantoms of the preset quick, data seed 0 (synthetic)",
        "test_data": "phantoms of the preset quick, data seed 3, other patients",
        "preset": json.loads(json.dumps(asdict(PRESET))),
    }
    if missing and all(is_made(out / name, facts) for name in (SEGMENTER, CLASSIFIER)):
        print(f"{out}: the weights of generator {GENERATOR}, preset quick, seed 0 are there")
        return
    origin = {**environment(), **facts}  # first, so that the commit is that of the code which runs
    limits = (
        "Synthetic data only: on real CT these weights are wrong. For teaching; not a medical "
        "device, not for diagnosis."
    )
    test = write_phantoms(data.with_name(f"{data.name}-seed3"), unseen(PRESET.phantoms), 3)
    train(write_phantoms(data, PRESET.phantoms, 0), out, origin)
    for name, load, judged in (
        (SEGMENTER, load_segmenter, judge_segmenter),
        (CLASSIFIER, load_classifier, judge_classifier),
    ):
        found = judged(out / name, test)  # then the file again, the same weights and a card
        save_model(load(out / name), out / name, half=True, **origin, metrics=found, limits=limits)
        print(name, json.dumps(found, indent=1))
    name_bytes(out)


def is_made(path: Path, facts: dict) -> bool:
    """Whether a file is there, judged, and made of these."""
    card = read_card(path) if path.is_file() else {}
    return "metrics" in card and all(card.get(key) == value for key, value in facts.items())


def name_bytes(out: Path) -> None:
    """Write the SHA-256 of the files into the package, and the page of their cards."""
    source = ROOT / "covidmask" / "models" / "weights.py"
    text = source.read_text(encoding="utf-8")
    for name in TITLES:
        text = re.sub(rf'("{name}",\s+)"[0-9a-f]*"', rf'\1"{sha256(out / name)}"', text)
    write_text(source, text)
    write_text(PAGE, card_page(out))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
