"""Which parts of the ranked boxes carry the information? Chapter 8 of the book, at full scale.

    python benchmarks/ablations.py [--seeds 0 1 2 3 4] [--out results/ablations.json]

The shipped segmenter looks once at every classification slice of the preset quick. From that one
pass come rows with more columns than the paper's five, at several settings of NMS and score. Then
module S is trained on variants of the rows, a few seeds each; validation slices keep the best
epoch. All are judged on 600 slices of patients from another data seed, on which nothing was tuned.
All data are synthetic.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, ROOT, environment, fill, gain, origin, save, table
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import IMAGE_CLASSES, PRESETS
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import mask_to_targets
from covidmask.datasets.phantom_sets import phantom_mask, write_phantoms
from covidmask.metrics.classification import confusion, report, wilson
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
TEST_PATIENTS = replace(  # other patients, those on which the shipped weights were judged
    PRESET.phantoms,
    lesion_patients=(0, 0, PRESET.phantoms.lesion_patients[2]),
    class_patients=(0, 0, PRESET.phantoms.class_patients[2]),
)

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
def wide_rows(
    detector: GeneralizedRCNN, images: list[Tensor], settings: dict
) -> dict[str, list[Tensor]]:
    """Per setting and image [K, 11]: score, 4 deltas, one-hot lesion class, centre and size."""
    features, proposals, shapes = propose(detector, images)
    logits, deltas = run_box_head(detector, features, proposals, shapes)
    result: dict[str, list[Tensor]] = {name: [] for name in settings}
    for name, config in settings.items():
        for parts in zip(logits, deltas, proposals, shapes, strict=True):
            ranking = rank_boxes(*parts, detector.roi_heads.box_coder, config)
            rows = encoded_rows(parts[0][ranking.roi], parts[1][ranking.roi], ranking.label)
            one_hot = nn.functional.one_hot(ranking.label - 1, 2).float()  # [K, 2]
            corner, end = ranking.box[:, :2], ranking.box[:, 2:]
            height, width = parts[3]
            side = torch.tensor([width, height])
            place = torch.cat([(corner + end) / 2 / side, (end - corner) / side], dim=1)  # [K, 4]
            result[name].append(torch.cat([rows, one_hot, place], dim=1))
    return result


def all_rows(detector: GeneralizedRCNN, slices: dict, settings: dict) -> dict:
    """{setting: {split: M tensors [K, 11]}}; the detector runs once on each slice."""
    result: dict = {name: {split: [] for split in slices} for name in settings}
    for split, dataset in slices.items():
        for start in range(0, len(dataset), 8):
            images = [dataset[i][0] for i in range(start, min(start + 8, len(dataset)))]
            for name, rows in wide_rows(detector, images, settings).items():
                result[name][split] += rows
    return result


def shuffled(rows: Tensor, seed: int) -> Tensor:
    """[M, N, F] with the rows of each slice in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows.shape[:2], generator=generator).argsort(dim=1)
    return rows.gather(1, order[..., None].expand_as(rows))


def predict_with_s(variant: Variant, rows: dict, labels: dict, seed: int) -> dict[str, np.ndarray]:
    """Train S on one variant; the classes it gives the slices of each split, int64 [M]."""
    vectors = {}
    for number, split in enumerate(SPLITS):
        padded = [pad_rows(r[: variant.n], variant.n) for r in rows[split]]
        vectors[split] = torch.stack(padded)[..., list(variant.columns)]  # [M, n, F]
        if variant.shuffled:
            vectors[split] = shuffled(vectors[split], 10 * seed + number)
    torch.manual_seed(seed)
    columns = len(variant.columns)
    s = ClassificationModule(variant.n, PRESET.classifier.hidden, columns)
    if variant.linear:
        s = nn.Sequential(nn.Flatten(), nn.Linear(variant.n * columns, len(IMAGE_CLASSES)))
    train_s(
        s,
        vectors["train"],
        labels["train"],
        PRESET.classifier_training,
        validation=(vectors["val"], labels["val"]),
        seed=seed,
        progress=False,
    )
    with torch.no_grad():
        return {split: s(part).argmax(1).numpy() for split, part in vectors.items()}


def simple_features(rows: dict[str, list[Tensor]]) -> dict[str, np.ndarray]:
    """A handful of numbers for each slice, from its rankings at several settings of NMS."""
    best = np.array([[float(r[0, 0])] for r in rows["NMS 0.75"]])
    features = {"best score": best}
    for setting in NMS:
        strong = [r[r[:, 0] > 0.5] for r in rows[setting]]
        count = np.array([[len(r)] for r in strong])
        features[f"count of scores above 0.5, {setting}"] = count
        features[f"best score and count, {setting}"] = np.hstack([best, count])
        features[f"best score and count of each lesion class, {setting}"] = np.array(
            [
                [*(float((r[:, 0] * r[:, k]).max()) for k in LABEL), *s[:, LABEL].sum(0).tolist()]
                for r, s in zip(rows[setting], strong, strict=True)
            ]
        )
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
    right = {
        split: np.array([p[split] == labels[split].numpy() for p in predictions])  # [S, M]
        for split in SPLITS
    }
    test = right["test"].mean(1).tolist()
    reports = [report(confusion(labels["test"], p["test"])) for p in predictions]
    before = np.array([p["test"] == labels["test"].numpy() for p in base])
    means = right["test"].mean(0), before.mean(0)
    more, *limits = gain(*means, patients, len(base), repeats=2000)
    return {
        "accuracies": test,
        "mean": float(np.mean(test)),
        "range": [min(test), max(test)],
        **{f"mean_{split}": float(right[split].mean()) for split in SPLITS[:2]},
        "sensitivity": np.mean([r["sensitivity"] for r in reports], axis=0).tolist(),
        "difference": more,
        "difference_interval": limits,
    }


def run(seeds: list[int], data: Path, test_data: Path, test_seed: int) -> dict:
    """Everything but the origin of the numbers."""
    start = time.perf_counter()
    slices = {split: SliceImages(data / "slices", split) for split in ("train", "val")}
    slices["test"] = SliceImages(test_data / "slices", "test")
    labels = {split: torch.tensor(dataset.labels) for split, dataset in slices.items()}
    truth, patients = labels["test"].numpy(), slices["test"].patients
    rows = all_rows(ShippedWeights.SEGMENTER_QUICK.load(), slices, SETTINGS)
    torch.manual_seed(0)
    untrained = lesion_mask_rcnn(PRESET.detector).eval()
    one = {"NMS 0.75": SETTINGS["NMS 0.75"]}
    random_rows = all_rows(untrained, slices, one)
    print(f"boxes ranked after {time.perf_counter() - start:.0f} s", flush=True)

    entries, base = [], None

    def add(group: str, name: str, n: int | None, columns: int, predictions: list[dict]) -> None:
        nonlocal base
        base = base or predictions
        entry = {"group": group, "name": name, "n": n, "columns": columns}
        entries.append({**entry, **judge(predictions, base, labels, patients)})
        clock = f"{time.perf_counter() - start:.0f} s"
        print(f"{clock:>7} {name:45} {entries[-1]['mean']:.3f}", flush=True)

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
    few = {
        name: float(np.mean([len(r) < N for split in SPLITS for r in parts[split]]))
        for name, parts in rows.items()
    }
    strong = {
        setting: np.array([int((r[:, 0] > 0.5).sum()) for r in rows[setting]["test"]])
        for setting in NMS
    }
    return {
        "train_slices": len(slices["train"]),
        "val_slices": len(slices["val"]),
        "test_slices": len(slices["test"]),
        "test_patients": len(set(patients)),
        "seeds": seeds,
        "interval_half_width": float(np.diff(wilson(round(0.8 * len(truth)), len(truth)))[0] / 2),
        "variants": entries,
        "share_of_slices_with_fewer_boxes_than_n": few,
        "mean_count_of_scores_above_0.5_by_class": {
            setting: [float(counts[truth == label].mean()) for label in range(3)]
            for setting, counts in strong.items()
        },
    }


def markdown(result: dict) -> str:
    """The table of chapter 8."""
    head = ["what S reads (phantoms)", "accuracy: mean (range)", "difference (95 %)", "training"]
    head += ["control", "pneumonia", "COVID-19"]
    body, group = [], None
    for entry in result["variants"]:
        if entry["group"] != group:
            group = entry["group"]
            body.append([f"**{group}**" + " |" * 6])
        low, high = entry["range"]
        span = f" ({low:.3f} to {high:.3f})" if len(entry["accuracies"]) > 1 else ""
        left, right = entry["difference_interval"]
        more = f"{entry['difference']:+.3f} ({left:+.3f} to {right:+.3f})"
        cells = [entry["name"], f"{entry['mean']:.3f}{span}", more if len(body) > 1 else "0"]
        shares = entry["mean_train"], *entry["sensitivity"]
        body.append([*cells, *(f"{value:.2f}" for value in shares)])
    lines = [
        *table(head, body),
        "",
        f"Synthetic phantoms: {result['train_slices']:,} slices train, {result['val_slices']} "
        f"choose the epoch, {result['test_slices']} slices of {result['test_patients']} other "
        f"patients judge; one detector, {len(result['seeds'])} seeds of S. The difference is to "
        "the first line; its interval resamples patients. *Training* is the accuracy on the "
        "training slices; the last three columns are sensitivities on the test slices. Logistic "
        "regression has no seed and reads the numbers named.",
        "",
        origin(result, "`results/ablations.json`"),
    ]
    return "\n".join(lines)


def show(result: dict, twin: Path = TWIN) -> None:
    """Fill the chapter."""
    fill(twin, "ablations", f"\n{markdown(result)}\n\n")


def main() -> None:
    """Read the command line, run, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--data", type=Path, default=Path("data/phantoms-quick"))
    parser.add_argument("--test-data", type=Path, default=Path("data/phantoms-quick-seed1"))
    parser.add_argument("--test-seed", type=int, default=1, help="data seed of the test patients")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    source = environment()  # first, so that the commit is that of the code which runs
    write_phantoms(arguments.data, PRESET.phantoms, 0)
    write_phantoms(arguments.test_data, TEST_PATIENTS, arguments.test_seed)
    result = {
        "about": "variants of the ranked boxes on synthetic phantoms; no figure of real CT",
        **source,
        "preset": asdict(PRESET),
        **run(arguments.seeds, arguments.data, arguments.test_data, arguments.test_seed),
    }
    save(arguments.out, result)
    print(f"{markdown(result)}\nwritten: {arguments.out}")
    if arguments.out == OUT:
        show(result)


if __name__ == "__main__":
    main()
