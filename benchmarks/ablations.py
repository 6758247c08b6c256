"""Which parts of the ranked boxes carry the information? Chapter 8 of the book, at full scale.

    python benchmarks/ablations.py [--seeds 0 1 2 3 4] [--out results/ablations.json]

The shipped segmenter looks once at every classification slice of the preset quick. From that one
pass come rows with more columns than the paper's five, at several settings of NMS and score. Then
module S is trained on variants of the rows, a few seeds each; validation slices keep the best
epoch. All are judged on 600 slices of patients from another data seed, on which nothing was tuned.
All data are synthetic.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path

import numpy as np
import torch
import tyro
from common import RESULTS, ROOT, environment, fill, formatted, gain, origin, save, unseen
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import mask_to_targets
from covidmask.datasets.phantom_sets import phantom_mask, write_phantoms
from covidmask.metrics.classification import confusion, report
from covidmask.models.baselines import area_features, fit_area_classifier
from covidmask.models.classifier import ClassificationModule
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.ranked_boxes import encoded_rows, pad_rows, propose, rank_boxes, run_box_head
from covidmask.models.weights import ShippedWeights
from covidmask.training.classification import train_s

OUT = RESULTS / "ablations.json"
TWIN = ROOT / "book" / "py" / "08_what_makes_it_work.py"
PRESET = PRESETS["quick"]
N = PRESET.classifier.n_boxes
SPLITS = ("train", "val", "test")
SCORE, DELTAS, LABEL, PLACE = [0], [1, 2, 3, 4], [5, 6], [7, 8, 9, 10]  # columns of a wide row
FULL = SCORE + DELTAS
SETTINGS = {  # how boxes are chosen; every list is cut at 2N boxes
    "NMS 0.75": replace(PRESET.classifier, n_boxes=2 * N),
    "NMS 0.25": replace(PRESET.classifier, n_boxes=2 * N, nms=0.25),
    "no NMS": replace(PRESET.classifier, n_boxes=2 * N, nms=1.0),
    "score > 0.05": replace(PRESET.classifier, n_boxes=2 * N, score=0.05),
}


@dataclass(frozen=True)
class Variant:
    """One vector that S reads."""

    group: str
    name: str
    setting: str = "NMS 0.75"
    columns: tuple[int, ...] = tuple(FULL)
    n: int = N
    shuffled: bool = False
    linear: bool = False
    random_detector: bool = False


WIDER = {
    "+ lesion class": (*FULL, *LABEL),
    "place instead of deltas": (*SCORE, *PLACE),
    "place instead of deltas, + lesion class": (*SCORE, *PLACE, *LABEL),
}
COLUMNS = {
    "what S reads (phantoms)": "{name}",
    "accuracy: mean (range)": "{mean:.3f} ({range[0]:.3f} to {range[1]:.3f})",
    "difference (95 %)": "{difference:+.3f} "
    "({difference_interval[0]:+.3f} to {difference_interval[1]:+.3f})",
    "training": "{mean_train:.2f}",
    "control": "{sensitivity[0]:.2f}",
    "pneumonia": "{sensitivity[1]:.2f}",
    "COVID-19": "{sensitivity[2]:.2f}",
}
NMS = ("NMS 0.75", "NMS 0.25", "no NMS")
VARIANTS = [
    Variant("The paper's vector", f"score and deltas, N = {N}, NMS 0.75"),
    Variant("Columns", "scores alone", columns=tuple(SCORE)),
    Variant("Columns", "deltas alone", columns=tuple(DELTAS)),
    Variant("Order", "ranks shuffled", shuffled=True),
    Variant("Order", "ranks shuffled, scores alone", columns=tuple(SCORE), shuffled=True),
    *(Variant("Number of boxes", f"N = {n}", n=n) for n in (1, 2, 4, 8, 16, 2 * N)),
    Variant("Low scores", "score above 0.05 only, then padded", "score > 0.05"),
    *(
        Variant(group, f"N = {n}, {setting}", setting, n=n)
        for group, setting in zip(("Less overlap", "More overlap"), NMS[1:], strict=True)
        for n in (2, 4, 8, 16, N)
    ),
    Variant("More overlap", f"ranks shuffled, N = {N}, no NMS", "no NMS", shuffled=True),
    *(
        Variant("Beyond the paper: wider rows", f"{name}, {setting}", setting, columns)
        for setting in NMS
        for name, columns in WIDER.items()
    ),
    Variant("Other parts", "S without hidden layers", linear=True),
    Variant("Other parts", "S without hidden layers, no NMS", "no NMS", linear=True),
    Variant("Other parts", "detector with random weights", random_detector=True),
]


@torch.no_grad()
def wide_rows(detector: GeneralizedRCNN, slices: dict, settings: dict) -> dict:
    """{setting: {split: M tensors [K, 11]}}; the detector runs once on each slice.

    Columns: score, 4 deltas, one-hot lesion class, centre and size as shares of the slice.
    """
    result: dict = {name: {split: [] for split in slices} for name in settings}
    for split, dataset in slices.items():
        for start in range(0, len(dataset), 8):
            images = [dataset[i][0] for i in range(start, min(start + 8, len(dataset)))]
            features, proposals, shapes = propose(detector, images)
            found = run_box_head(detector, features, proposals, shapes)
            for parts, name in product(zip(*found, proposals, shapes, strict=True), settings):
                ranked = rank_boxes(*parts, detector.roi_heads.box_coder, settings[name])
                rows = encoded_rows(parts[0][ranked.roi], parts[1][ranked.roi], ranked.label)
                one_hot = nn.functional.one_hot(ranked.label - 1, 2).float()  # [K, 2]
                corner, end = ranked.box[:, :2], ranked.box[:, 2:]
                side = torch.tensor(parts[3][::-1])  # width, height
                place = (corner + end) / 2 / side, (end - corner) / side  # [K, 2] each
                result[name][split].append(torch.cat([rows, one_hot, *place], dim=1))
    return result


def predict_with_s(variant: Variant, rows: dict, labels: dict, seed: int) -> dict[str, np.ndarray]:
    """Train S on one variant; the classes it gives the slices of each split, int64 [M]."""
    vectors = {}
    for number, split in enumerate(SPLITS):
        padded = [pad_rows(r[: variant.n], variant.n) for r in rows[split]]
        vectors[split] = torch.stack(padded)[..., list(variant.columns)]  # [M, n, F]
        if variant.shuffled:  # the rows of each slice in an order of its own
            generator = torch.Generator().manual_seed(10 * seed + number)
            order = torch.rand(vectors[split].shape[:2], generator=generator).argsort(dim=1)
            vectors[split] = vectors[split].take_along_dim(order[..., None], dim=1)
    torch.manual_seed(seed)
    columns = len(variant.columns)
    s = ClassificationModule(variant.n, PRESET.classifier.hidden, columns)
    if variant.linear:
        s = nn.Sequential(nn.Flatten(), nn.Linear(variant.n * columns, len(IMAGE_CLASSES)))
    train, val = ((vectors[split], labels[split]) for split in SPLITS[:2])
    options = {"validation": val, "seed": seed, "progress": False}
    train_s(s, *train, PRESET.classifier_training, **options)
    with torch.no_grad():
        return {split: s(part).argmax(1).numpy() for split, part in vectors.items()}


def simple_features(rows: dict[str, list[Tensor]]) -> dict[str, np.ndarray]:
    """A handful of numbers for each slice, from its rankings at several settings of NMS."""
    best = np.array([[float(r[0, 0])] for r in rows["NMS 0.75"]])
    features = {"best score": best}
    for setting in NMS:
        strong = [r[r[:, 0] > 0.5] for r in rows[setting]]
        count = np.array([[len(r)] for r in strong])
        scores = [[float((r[:, 0] * r[:, k]).max()) for k in LABEL] for r in rows[setting]]
        counts = [r[:, LABEL].sum(0).tolist() for r in strong]
        features[f"count of scores above 0.5, {setting}"] = count
        features[f"best score and count, {setting}"] = np.hstack([best, count])
        name = f"best score and count of each lesion class, {setting}"
        features[name] = np.hstack([scores, counts])
    return features


def true_features(names: list[str], seed: int) -> dict[str, np.ndarray]:
    """The same from the true masks, which no method has."""
    masks = [phantom_mask(name, PRESET.phantoms.size, seed) for name in names]
    areas = np.array([area_features(mask) for mask in masks])
    targets = [mask_to_targets(mask, min_area=PRESET.min_area) for mask in masks]
    counts = np.array([[(t["labels"] == k).sum().item() for k in (1, 2)] for t in targets])
    return {"true areas": areas, "true areas and counts": np.hstack([areas, counts])}


def judge(predictions: list[dict], base: list[dict], labels: dict, patients: list[str]) -> dict:
    """Accuracy of each seed, their mean and range, means of the other splits, sensitivities.

    The difference is to the accuracy of `base`, the paper's vector, on the same slices.
    """

    def right(runs: list[dict], split: str) -> np.ndarray:
        return np.array([run[split] == labels[split].numpy() for run in runs])  # [S, M]

    own, before = right(predictions, "test"), right(base, "test")
    reports = [report(confusion(labels["test"], p["test"])) for p in predictions]
    more, *limits = gain(own.mean(0), before.mean(0), patients, repeats=2000)
    accuracies = own.mean(1).tolist()
    return {
        "accuracies": accuracies,
        "mean": float(np.mean(accuracies)),
        "range": [min(accuracies), max(accuracies)],
        **{f"mean_{split}": float(right(predictions, split).mean()) for split in SPLITS[:2]},
        "sensitivity": np.mean([r["sensitivity"] for r in reports], axis=0).tolist(),
        "difference": more,
        "difference_interval": limits,
    }


def run(seeds: tuple[int, ...], slices: dict, test_seed: int) -> list[dict]:
    """A row for each variant, and one for each rule."""
    labels = {split: torch.tensor(dataset.labels) for split, dataset in slices.items()}
    rows = wide_rows(ShippedWeights.SEGMENTER_QUICK.load(), slices, SETTINGS)
    torch.manual_seed(0)
    untrained = lesion_mask_rcnn(PRESET.detector).eval()
    random_rows = wide_rows(untrained, slices, {"NMS 0.75": SETTINGS["NMS 0.75"]})
    entries: list[dict] = []
    base: list[dict] = []

    def add(group: str, name: str, n: int | None, columns: int, predictions: list[dict]) -> None:
        base.extend(predictions if not base else [])
        entry = {"group": group, "name": name, "n": n, "columns": columns}
        entries.append(entry | judge(predictions, base, labels, slices["test"].patients))
        print(f"{name:45} {entries[-1]['mean']:.3f}", flush=True)

    for variant in VARIANTS:
        source = (random_rows if variant.random_detector else rows)[variant.setting]
        predictions = [predict_with_s(variant, source, labels, seed) for seed in seeds]
        add(variant.group, variant.name, variant.n, len(variant.columns), predictions)
    features = {
        split: simple_features({setting: rows[setting][split] for setting in NMS})
        | true_features(slices[split].names, test_seed if split == "test" else 0)
        for split in SPLITS
    }
    for name, values in features["train"].items():
        model = fit_area_classifier(values, labels["train"].numpy())
        predictions = [{split: model.predict(features[split][name]) for split in SPLITS}]
        add("Logistic regression", name, None, values.shape[1], predictions)
    return entries


def markdown(result: dict) -> str:
    """The table of chapter 8."""
    lines = formatted(COLUMNS, [])
    for group, rows in groupby(result["variants"], lambda row: row["group"]):
        lines += [f"| **{group}** |" + " |" * (len(COLUMNS) - 1), *formatted(COLUMNS, rows)[2:]]
    return "\n".join([*lines, "", origin(result, "`results/ablations.json`")])


def main(
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    data: Path = Path("data/phantoms-quick"),
    test_data: Path = Path("data/phantoms-quick-seed1"),
    test_seed: int = 1,
    out: Path = OUT,
) -> None:
    """Measure and write the results; those of `OUT` fill the chapter, too."""
    source = environment()  # first, so that the commit is that of the code which runs
    write_phantoms(data, PRESET.phantoms, 0)
    write_phantoms(test_data, unseen(PRESET.phantoms), test_seed)
    slices = {split: SliceImages(data / "slices", split) for split in ("train", "val")}
    slices["test"] = SliceImages(test_data / "slices", "test")
    result = {
        "about": "variants of the ranked boxes on synthetic phantoms; no figure of real CT",
        **source,
        "preset": asdict(PRESET),
        **{f"{split}_slices": len(dataset) for split, dataset in slices.items()},
        "test_patients": len(set(slices["test"].patients)),
        "seeds": seeds,
        "variants": run(seeds, slices, test_seed),
    }
    save(out, result)
    print(f"{markdown(result)}\nwritten: {out}")
    if out == OUT:
        fill(TWIN, "ablations", markdown(result))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
