"""Which parts of the ranked boxes carry the information? Chapter 11 of the book, at full scale.

The shipped segmenter looks once at each slice; module S is trained on variants of these rows, a few
seeds each, and judged on patients of another data seed, on which nothing was tuned. All synthetic.
Nothing is done where the file of results is there, of these phantoms and settings. Fills
chapter 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
from common import QUICK, formatted, gain, origin
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask import metrics, models
from covidmask.config import IMAGE_CLASSES
from covidmask.datasets import SliceImages, mask_to_targets, phantom_mask, write_phantoms
from covidmask.files import SPLITS
from covidmask.training import train_s

OUT = common.RESULTS / "ablations.json"
TWIN = common.TWINS / "11_what_makes_it_work.py"
N, FEW = QUICK.classifier.n_boxes, 2
SCORE, DELTAS, LABEL, PLACE = (0,), (1, 2, 3, 4), (5, 6), (7, 8, 9, 10)  # columns of a wide row
NMS = ("NMS 0.75", "NMS 0.25", "no NMS")
SETTINGS = {  # how boxes are chosen; every list is cut at 2N boxes
    name: replace(QUICK.classifier, n_boxes=2 * N, **change)
    for name, change in zip(NMS, ({}, {"nms": 0.25}, {"nms": 1.0}), strict=True)
} | {"score > 0.05": replace(QUICK.classifier, n_boxes=2 * N, score=0.05)}
WIDER = {
    "+ lesion class": SCORE + DELTAS + LABEL,
    "place instead of deltas": SCORE + PLACE,
    "place instead of deltas, + lesion class": SCORE + PLACE + LABEL,
}


class Variant(NamedTuple):
    """One vector that S reads."""

    group: str
    name: str
    setting: str = "NMS 0.75"
    columns: tuple[int, ...] = SCORE + DELTAS
    n: int = N
    shuffled: bool = False
    linear: bool = False
    random_detector: bool = False


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
VARIANTS = [
    Variant("The paper's vector", f"score and deltas, N = {N}, NMS 0.75"),
    Variant("Columns", "scores alone", columns=SCORE),
    Variant("Columns", "deltas alone", columns=DELTAS),
    Variant("Order", "ranks shuffled", shuffled=True),
    Variant("Order", "ranks shuffled, scores alone", columns=SCORE, shuffled=True),
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
            features, proposals, shapes = models.propose(detector, images)
            found = models.run_box_head(detector, features, proposals, shapes)
            for parts, name in product(zip(*found, proposals, shapes, strict=True), settings):
                ranked = models.rank_boxes(*parts, detector.roi_heads.box_coder, settings[name])
                rows = models.encoded_rows(parts[0][ranked.roi], parts[1][ranked.roi], ranked.label)
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
        padded = [models.pad_rows(r[: variant.n], variant.n) for r in rows[split]]
        vectors[split] = torch.stack(padded)[..., variant.columns]  # [M, n, F]
        if variant.shuffled:  # the rows of each slice in an order of its own
            generator = torch.Generator().manual_seed(10 * seed + number)
            order = torch.rand(vectors[split].shape[:2], generator=generator).argsort(dim=1)
            vectors[split] = vectors[split].take_along_dim(order[..., None], dim=1)
    torch.manual_seed(seed)
    columns = len(variant.columns)
    s = models.ClassificationModule(variant.n, QUICK.classifier.hidden, columns)
    if variant.linear:
        s = nn.Sequential(nn.Flatten(), nn.Linear(variant.n * columns, len(IMAGE_CLASSES)))
    train, val = ((vectors[split], labels[split]) for split in SPLITS[:2])
    options = {"validation": val, "seed": seed, "progress": False}
    train_s(s, *train, QUICK.classifier_training, **options)
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
    masks = [phantom_mask(name, QUICK.phantoms.size, seed) for name in names]
    areas = np.array([models.area_features(mask) for mask in masks])
    targets = [mask_to_targets(mask, min_area=QUICK.min_area) for mask in masks]
    counts = np.array([[(t["labels"] == k).sum().item() for k in (1, 2)] for t in targets])
    return {"true areas": areas, "true areas and counts": np.hstack([areas, counts])}


def judge(runs: list[dict], base: list[dict], labels: dict, patients: list[str]) -> dict:
    """Accuracy of each seed, their mean and range, that on training slices, and sensitivities.

    The difference is to the accuracy of `base`, the paper's vector, on the same slices.
    """

    def right(runs: list[dict], split: str) -> np.ndarray:
        return np.array([run[split] == labels[split].numpy() for run in runs])  # [S, M]

    own, before = right(runs, "test"), right(base, "test")
    reports = [metrics.report(metrics.confusion(labels["test"], run["test"])) for run in runs]
    more, *limits = gain(own.mean(0), before.mean(0), patients, repeats=2000)
    accuracies = own.mean(1).tolist()
    return {
        "accuracies": accuracies,
        "mean": float(np.mean(accuracies)),
        "range": [min(accuracies), max(accuracies)],
        "mean_train": float(right(runs, "train").mean()),
        "sensitivity": np.mean([r["sensitivity"] for r in reports], axis=0).tolist(),
        "difference": more,
        "difference_interval": limits,
    }


def predictions(
    seeds: tuple[int, ...], slices: dict, labels: dict, test_seed: int
) -> Iterator[tuple[str, str, int | None, list[dict]]]:
    """Group, name, N and the predictions of each run: of each variant, then of each rule."""
    rows = wide_rows(models.ShippedWeights.SEGMENTER_QUICK.load(), slices, SETTINGS)
    torch.manual_seed(0)
    untrained = models.lesion_mask_rcnn(QUICK.detector).eval()
    random_rows = wide_rows(untrained, slices, {"NMS 0.75": SETTINGS["NMS 0.75"]})
    for variant in VARIANTS:
        source = (random_rows if variant.random_detector else rows)[variant.setting]
        runs = [predict_with_s(variant, source, labels, seed) for seed in seeds]
        yield variant.group, variant.name, variant.n, runs
    features = {
        split: simple_features({setting: rows[setting][split] for setting in NMS})
        | true_features(slices[split].names, test_seed if split == "test" else 0)
        for split in SPLITS
    }
    for name, values in features["train"].items():
        model = models.fit_area_classifier(values, labels["train"].numpy())
        run = {split: model.predict(features[split][name]) for split in SPLITS}
        yield "Logistic regression", name, None, [run]


def markdown(result: dict) -> str:
    """The table of chapter 11."""
    lines = formatted(COLUMNS, [])
    for group, rows in groupby(result["variants"], lambda row: row["group"]):
        lines += [f"| **{group}** |" + " |" * (len(COLUMNS) - 1), *formatted(COLUMNS, rows)[2:]]
    few = next(row for row in result["variants"] if row["name"] == f"N = {FEW}")
    low, high = few["difference_interval"]
    more = f"{-few['difference']:+.3f} ({-high:+.3f} to {-low:+.3f})"
    counts = (
        "{train_slices:,} slices train, {val_slices} choose the epoch, {test_slices} slices of "
    )
    counts += "{test_patients} other patients judge"
    text = [f"Accuracy with N = {N} minus that with N = {FEW}, NMS 0.75: {more}.", ""]
    text += [f"{counts.format(**result)}; one detector, {len(result['seeds'])} seeds of S.", ""]
    return "\n".join([*lines, "", *text, origin(result, "`results/ablations.json`")])


def measure(
    seeds: tuple[int, ...] = (0, 1, 2),
    data: Path = common.QUICK_DATA,
    test_data: Path = Path(f"{common.QUICK_DATA}-seed3"),
    test_seed: int = 3,
    out: Path = OUT,
) -> Iterator[tuple[Path, dict]]:
    slices = common.quick_data(data)[0]
    write_phantoms(test_data, common.unseen(QUICK.phantoms), test_seed)
    slices["test"] = SliceImages(test_data / "slices", "test")
    labels = {split: torch.tensor(dataset.labels) for split, dataset in slices.items()}
    result = {
        "about": "variants of the ranked boxes on synthetic phantoms; no figure of real CT",
        "generator": common.GENERATOR,
        "preset": asdict(QUICK),
        "segmenter": models.ShippedWeights.SEGMENTER_QUICK.value,
        "test_seed": test_seed,
        **{f"{split}_slices": len(dataset) for split, dataset in slices.items()},
        "test_patients": len(set(slices["test"].patients)),
        "seeds": seeds,
    }
    if common.complete(out, result):
        return
    result["variants"], base = [], None
    for group, name, n, runs in predictions(seeds, slices, labels, test_seed):
        base = base or runs
        row = judge(runs, base, labels, slices["test"].patients)
        result["variants"].append({"group": group, "name": name, "n": n, **row})
        print(f"{name:45} {row['mean']:.3f}", flush=True)
    yield out, result


if __name__ == "__main__":
    common.command(measure, OUT, (TWIN, "ablations", markdown))
