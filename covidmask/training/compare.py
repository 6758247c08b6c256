"""COVID-CT-Mask-Net beside other classifiers of slices (Table 3), all under one budget.

What trains on images sees every training slice as often as any other, in batches of one size, with
Adam at a rate that falls along half a cosine; readers of frozen features are fitted to the end. The
last weights count: no epoch is chosen. (COVNet sees scans, in batches of about so many slices.)
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from lightning.fabric import Fabric
from scipy.stats import rankdata
from torch import Tensor, nn

from covidmask.config import ClassifierConfig, DetectorConfig, TrainingConfig, lesion_classes
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionDataset
from covidmask.datasets.predictions import read_predictions
from covidmask.errors import CovidmaskError, DataError, OutputError
from covidmask.files import atomic_path, one_line
from covidmask.metrics.classification import bootstrap, confusion, report
from covidmask.metrics.detection import overlap, overlap_means, semantic_mask
from covidmask.models.classifier import (
    CovidCTMaskNet,
    count_parameters,
    count_trainable,
    covid_ct_mask_net,
)
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.systems import (
    SEGMENTERS,
    BoxMaps,
    ImageClassifier,
    JointClassifier,
    LesionAreas,
    LinearReader,
    PooledMaps,
    ScanClassifier,
    Segmentation,
    SegmentedAreas,
    save_system,
)
from covidmask.models.weights import save_model
from covidmask.training.classification import classification_loss, logits_of, train_classifier
from covidmask.training.loop import fit, joined, make_fabric, read_batches
from covidmask.training.scans import Scans, owners, scan_logits
from covidmask.training.segmentation import predict_lesions, train_segmenter

DETECTORS = ("mask", "faster")  # trained here
OURS = ("heads", "heads_bn", "full", "scores", *DETECTORS, "maps", "inside", "areas", *SEGMENTERS)
BACKBONES = {"covnet": "resnet50", "jcs": "resnet18"}  # what they stand on, unless told otherwise
SEEDLESS = ("maps", "inside", "areas")  # nothing in them is drawn: a fit to what is frozen
MASKS = (*DETECTORS, *SEGMENTERS, "jcs")  # learn here from slices with lesion masks
CLASSIFIERS = set(torchvision.models.list_models(torchvision.models))
TIMED = 16  # slices for the milliseconds of one


@dataclass(frozen=True)
class Budget:
    """What all systems share, and what they are made of."""

    training: TrainingConfig  # of what trains on images; with ImageNet weights at `gentle` times lr
    lesion_training: TrainingConfig  # of detectors and segmentation networks that are trained here
    s_training: TrainingConfig  # of S on ranked boxes that do not change
    detector: DetectorConfig
    classifier: ClassifierConfig
    size: int = 224  # pixels per side, of what resizes slices itself
    weights: str | None = None  # of ImageNet, for ordinary classifiers
    gentle: float = 0.1


def part_of(dataset, chosen: Iterable[int]):
    """Some slices of a data set, whose lists have one entry for each slice."""
    chosen, part = list(chosen), copy.copy(dataset)
    for name, values in vars(dataset).items():
        if isinstance(values, list):
            setattr(part, name, [values[i] for i in chosen])
    return part


def folds_of(slices: SliceImages, folds: int, seed: int = 0) -> Iterator[tuple[list, list]]:
    """Training and test positions of each fold: no patient in both, classes in proportion."""
    from sklearn.model_selection import StratifiedGroupKFold

    empty, labels = np.zeros(len(slices)), np.array(slices.labels)
    try:
        cut = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for train, test in cut.split(empty, labels, owners(slices)):
            if set(labels[train]) < set(labels):
                raise ValueError("a class has too few patients for all training parts")
            yield train.tolist(), test.tolist()
    except ValueError as error:
        patients = f"the {len(set(owners(slices)))} patients of the training list"
        raise DataError(f"{folds} folds: {patients} cannot be divided ({error})") from error


def few(slices: SliceImages, per_class: int, seed: int) -> SliceImages:
    """`per_class` slices of each class, by a draw of this seed."""
    labels, chosen = np.array(slices.labels), []
    for label, name in enumerate(slices.classes):
        there = np.random.default_rng(seed).permutation(np.flatnonzero(labels == label))
        if len(there) < per_class:
            problem = f"of {name} there are {len(there)} slices to train on; choose at most so many"
            raise DataError(f"--per-class {per_class}: {problem}")
        chosen += there[:per_class].tolist()
    return part_of(slices, sorted(chosen))


def check_systems(names: Iterable[str]) -> None:
    """Raise `DataError` for what `train_system` does not know, before anything is trained."""
    for name in names:
        network, plus, extra = name.partition("+")
        if network in BACKBONES:
            kind = "ResNet" if network == "jcs" else "classifier"
            if plus and (extra not in CLASSIFIERS or (network == "jcs" and "resne" not in extra)):
                kind += f" of torchvision's, as in {network}+resnet18"
                raise DataError(f"system {name!r}: after + stands a {kind}")
            continue
        ours = network in OURS
        if plus and (ours or extra != "lungs"):
            raise DataError(
                f"system {name!r}: only +lungs may follow, and only a classifier's name"
            )
        if not ours and not network.startswith("timm/") and network not in CLASSIFIERS:
            raise DataError(
                f"system {name!r}: choose among {', '.join((*OURS, *BACKBONES))}, torchvision's "
                "classifiers such as resnet18 or mobilenet_v2, and timm/NAME"
            )


def train_system(
    name: str,
    slices: SliceImages,
    budget: Budget,
    detector: nn.Module,
    lesions: LesionDataset | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Train one system on `slices`; it gives logits for images, and is in eval mode.

    Args:
        name: `heads`, `heads_bn` or `full` (the paper's three regimes); `scores` (heads, but S
            reads the scores alone); `mask` (heads, on a detector trained here on `lesions`) and
            `faster` (the same without mask branch); `maps` (a linear layer on the detector's
            pooled feature maps); `inside` (on what of them lies in the ranked boxes); `areas` (on
            counts and areas of its lesions); `unet` or `fcn` (segmentation trained here on
            `lesions`, then a linear layer on areas); a classifier of torchvision's or
            timm's, see `ImageClassifier`; `+lungs` after its name gives it the lungs, too;
            `covnet` (`ScanClassifier`: gives logits for scans; a step has as many as have about
            `batch_size` slices); `jcs` (`JointClassifier`, pixels learnt from `lesions`); as in
            `covnet+resnet18`, a backbone may follow either.
        detector: trained, of `lesion_mask_rcnn`; a copy is used.
        options: `fabric` and `progress` of `fit`.
    """
    torch.manual_seed(seed)
    classes, options = tuple(slices.classes), options | {"seed": seed}
    config = replace(budget.classifier, classes=classes)
    network, _, extra = name.partition("+")
    if network in MASKS and lesions is None:
        raise DataError(f"{name}: learns from slices with lesion masks, and there are none here")
    if name in DETECTORS:
        detector = lesion_mask_rcnn(budget.detector, masks=name == "mask")
        train_segmenter(detector, lesions, budget.lesion_training, **options)
    if name in ("heads", "heads_bn", "full", "scores", *DETECTORS):
        if name == "scores":
            config = replace(config, columns=("score",))
        regime = name if name in ("heads_bn", "full") else "heads"
        model = covid_ct_mask_net(detector, config)
        how = budget.s_training if regime == "heads" else budget.training
        train_classifier(model, slices, regime, how, **options)
        return model.eval()
    if name in SEEDLESS:
        parts = copy.deepcopy(detector), *([config] if name == "inside" else [])
        features = {"maps": PooledMaps, "inside": BoxMaps, "areas": LesionAreas}[name](*parts)
        return _fitted(LinearReader(features, classes), slices, **options)
    if name in SEGMENTERS:
        segmentation = Segmentation(name, lesion_classes(lesions.lesions), budget.size)
        train_segmentation(segmentation, lesions, budget.lesion_training, **options)
        return _fitted(LinearReader(SegmentedAreas(segmentation), classes), slices, **options)
    check_systems([name])
    backbone, how, looks = extra or BACKBONES.get(network), budget.training, budget.size
    if budget.weights:
        how = replace(how, lr=how.lr * budget.gentle)
    if network == "covnet":
        model = ScanClassifier(backbone, classes, looks, budget.weights)
        slices = Scans(slices)
        each = sum(map(len, slices.members)) / len(slices)
        at_once = min(round(how.batch_size / each), len(slices))
        how, options = replace(how, batch_size=max(at_once, 1)), options | {"images": False}
    elif network == "jcs":
        names = lesion_classes(lesions.lesions)
        model = JointClassifier(backbone, classes, names, looks, budget.weights)
    else:
        model = ImageClassifier(network, classes, looks, budget.weights, extra == "lungs")

    def losses(wrapped, items: list) -> dict[str, Tensor]:
        images, labels = zip(*items, strict=True)
        logits = wrapped(list(images))
        found = {"bce": classification_loss(logits, torch.tensor(labels, device=logits.device))}
        if network == "jcs":  # as many slices with masks, drawn by the seed of the step
            drawn = [lesions[i] for i in torch.randint(len(lesions), (len(items),)).tolist()]
            sides = wrapped([image.to(logits.device) for image, _ in drawn], pixels=True)
            parts = [pixel_losses(side, [target for _, target in drawn]) for side in sides]
            found |= {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
        return found

    try:
        fit(model, slices, losses, how, title=name, run={"system": model.settings}, **options)
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        if isinstance(error, CovidmaskError) or "memory" in str(error):
            raise  # it says itself what is wrong
        what = f"cannot be trained on images of {budget.size} x {budget.size}"
        raise DataError(f"{name}: {what} ({one_line(error)}); try --size or another") from error
    return model


def train_segmentation(
    network: Segmentation, lesions: LesionDataset, training: TrainingConfig, **options: Any
) -> None:
    """Train on items of `LesionSlices` by cross-entropy and soft Dice, as `Segmentation` says."""

    def losses(wrapped, items: list) -> dict[str, Tensor]:
        logits = wrapped([image for image, _ in items])
        return pixel_losses(logits, [target for _, target in items])

    network.requires_grad_(True)
    run = {"segmentation": network.settings}
    fit(network, lesions, losses, training, title=network.settings["name"], run=run, **options)


def pixel_losses(logits: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Cross-entropy, and one minus the mean soft Dice, of logits [B,1 + classes,size,size]."""
    truth = torch.stack([labels_of(target, logits.shape[-1]) for target in targets])
    truth = truth.to(logits.device)
    shares = logits.softmax(1)[:, 1:]
    true = F.one_hot(truth, logits.shape[1]).movedim(3, 1)[:, 1:].float()
    both, total = (shares * true).sum((2, 3)), (shares + true).sum((2, 3))  # [B, classes]
    slack = 0.002 * truth[0].numel()
    dice = (1 - (2 * both + slack) / (total + slack)).mean()
    return {"ce": F.cross_entropy(logits, truth), "dice": dice}


def labels_of(target: dict[str, Tensor], size: int) -> Tensor:
    """The label of each pixel, int64 [size,size], of the masks of a target."""
    masks, labels = target["masks"], target["labels"]
    shape = masks.shape[-2:]
    codes = torch.zeros(shape, dtype=torch.float32)
    for mask, label in zip(masks, labels.tolist(), strict=True):
        codes[mask.bool()] = label
    return F.interpolate(codes[None, None], (size, size), mode="nearest-exact")[0, 0].long()


@torch.no_grad()
def _fitted(
    model: LinearReader,
    slices: SliceImages,
    fabric: Fabric | None = None,
    progress: bool = True,
    **_,
) -> LinearReader:
    """Read the features of every slice once, then fit the layer."""
    fabric = fabric or make_fabric()
    model, rows = model.to(fabric.device).eval(), torch.zeros(len(slices), model.features.width)
    for part, _, images in read_batches(slices, fabric, 8, "reading features", progress):
        rows[part] = model.features(images).cpu()
    model.fit(joined(rows, fabric), slices.labels)
    return model


def auc(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Area under the ROC curve: of two classes of the second, of more the mean of one v rest.

    Labels int [M], probabilities [M,C]; NaN where a class has no slice, or all.
    """
    parts = []
    for c in [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1]):
        ranks, own = rankdata(probabilities[:, c]), labels == c  # ties share a rank
        pairs = own.sum() * (~own).sum()
        wins = ranks[own].sum() - own.sum() * (own.sum() + 1) / 2
        parts.append(wins / pairs if pairs else np.nan)
    return float(np.mean(parts))


def judge(logits: Tensor, slices: SliceImages | Scans) -> dict[str, Any]:
    """The numbers of a row, with 95 % intervals from resampling patients (by class: `owners`).

    Where they have several slices, also `scans`, their number, and `scan_accuracy` and `scan_auc`
    of the mean of the softmax over the slices of each; their intervals are from resampling scans.
    Logits [M,C] of `Scans` have a row a scan: all numbers are of scans.
    """
    labels, classes = np.array(slices.labels), len(slices.classes)
    shares = (logits.softmax(1)).numpy()
    predicted = logits.argmax(1).numpy()
    owner = np.unique(owners(slices), return_inverse=True)[1]
    slices_of = [np.flatnonzero(owner == patient) for patient in range(owner.max() + 1)]
    found = report(confusion(labels, predicted, classes))
    there = [k for k, count in enumerate(found["support"]) if count]  # other classes count nowhere
    pairs = [(found["sensitivity"][k], found["ppv"][k]) for k in there]
    f1 = [2 * s * p / (s + p) if s > 0 else 0.0 for s, p in pairs]
    row = {
        **{key: found[key] for key in ("accuracy", "sensitivity", "ppv", "n")},
        "f1": float(np.mean(f1)),
        **_with_intervals(labels, shares, predicted, slices_of),
        "predictions": "".join(map(str, predicted)) if classes < 10 else predicted.tolist(),
        "probabilities": np.round(shares[:, 1:].astype(float), 6).tolist(),
    }
    if len(slices_of) < len(labels) or isinstance(slices, Scans):
        means = np.stack([shares[own].mean(0) for own in slices_of])  # [scans, C]
        whose = np.array([labels[own[0]] for own in slices_of])
        found = _with_intervals(whose, means, means.argmax(1), np.arange(len(means))[:, None])
        row |= {"scans": len(means)} | {f"scan_{key}": value for key, value in found.items()}
    return row


def _with_intervals(labels, shares, predicted, groups) -> dict[str, Any]:
    """Accuracy and AUC of rows, and their intervals when groups, positions of rows, are drawn."""

    def values(chosen: np.ndarray) -> list[float]:
        right = (predicted[chosen] == labels[chosen]).mean()
        return [float(right), auc(labels[chosen], shares[chosen])]

    def of_drawn(drawn: np.ndarray) -> list[float]:
        return values(np.concatenate([groups[group] for group in drawn]))

    ends = bootstrap(len(groups), of_drawn, repeats=500).T.tolist()
    both = values(np.arange(len(labels)))
    names = ("accuracy", "auc", "accuracy_interval", "auc_interval")
    return dict(zip(names, both + ends, strict=True))


def row_of_file(path: Path, slices: SliceImages) -> dict[str, Any]:
    """The row of predictions that were made elsewhere; see `read_predictions` for the CSV.

    With classes alone there is no AUC (NaN), and the class of a scan is that of most of its slices.
    """
    shares, known = read_predictions(path, slices)
    row = judge(torch.from_numpy(shares).log(), slices)
    if not known:
        del row["probabilities"]
        row |= {key: np.nan for key in row if key.endswith("auc")}
        row |= {key: [np.nan] * 2 for key in row if key.endswith("auc_interval")}
    return row


def row_of(
    name: str,
    parts: list[tuple[SliceImages, SliceImages]],
    lesions_test: LesionDataset | None = None,
    keep: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train on the first and judge on the second of each pair, all their test slices together.

    Options are those of `train_system`. `keep`: file for the weights, of a single pair. `ms` are
    those of a slice, of `covnet` of a scan.
    """
    seconds, found, test = 0.0, [], None
    looking = {key: options[key] for key in ("fabric", "progress") if key in options}
    for train, part in parts:
        start = time.process_time()
        model = train_system(name, train, **options)
        seconds += time.process_time() - start
        scans = isinstance(model, ScanClassifier)
        found.append((scan_logits if scans else logits_of)(model, part, **looking))
        test = part if test is None else together(test, part)
    if scans:  # no patient is in two parts, so the order is that of the logits
        test = Scans(test)
    images = [test[i][0] for i in range(min(2 if scans else TIMED, len(test)))]
    model.cpu().eval()
    with torch.no_grad():
        model(images[:1])  # the first call is slower
        clock = time.perf_counter()
        for image in images:
            model([image])
        each = (time.perf_counter() - clock) / len(images)
    if keep and len(parts) == 1:
        save = save_model if isinstance(model, CovidCTMaskNet) else save_system
        save(model, keep, system=name, seed=options.get("seed", 0))
    total = count_parameters(model)
    here = total if name in (*DETECTORS, *SEGMENTERS) else count_trainable(model)
    row = {
        "parameters": total,
        "trained": here,
        "seconds": seconds / len(parts),
        "ms": 1000 * each,
        **judge(torch.cat(found), test),
    }
    if lesions_test is not None and (dice := dice_of(model, lesions_test)):
        row["dice"] = dice
    return row


def together(first: SliceImages, second: SliceImages) -> SliceImages:
    """Two parts of one data set as one."""
    both = copy.copy(first)
    for name, values in vars(first).items():
        if isinstance(values, list):
            setattr(both, name, values + getattr(second, name))
    return both


def truth_of(target: dict[str, Tensor]) -> np.ndarray:
    """The mask of a target, uint8 [H,W], with the codes 2, 3, ... of its labels 1, 2, ..."""
    return semantic_mask({**target, "scores": torch.ones(len(target["labels"]))}, 0)


@torch.no_grad()
def dice_of(model: nn.Module, lesions: LesionDataset) -> dict[str, float]:
    """Mean Dice over slices of each region, of what finds lesions' pixels; else empty."""
    features, rows = getattr(model, "features", None), []
    kind = features.network if isinstance(features, SegmentedAreas) else features or model
    names = getattr(kind, "lesions", getattr(getattr(kind, "detector", None), "classes", ()))
    if tuple(names) != lesion_classes(lesions.lesions):
        return {}  # it finds other lesions than these
    if isinstance(kind, (Segmentation, JointClassifier)):
        for index in range(len(lesions)):
            image, target = lesions[index]
            joint = isinstance(kind, JointClassifier)
            logits = kind([image], pixels=True)[0] if joint else kind([image])
            maps = logits.softmax(1)[:, 1:]
            maps = F.interpolate(maps, size=image.shape[1:], mode="bilinear")[0]
            rows.append(overlap(maps, truth_of(target)))
    elif isinstance(features, LesionAreas):
        found = predict_lesions(features.detector, lesions, fused=True, progress=False)
        rows = [overlap(prediction["maps"], truth_of(target)) for _, prediction, target in found]
    else:
        return {}
    table = np.array(rows)
    regions = ("infection", *names)
    return {name: overlap_means(table[:, i])["dice"] for i, name in enumerate(regions)}


class Table:
    """Rows in a JSON file, added one by one; beside it as .csv and .txt.

    Raises `OutputError` where the file has rows of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.rows = self._there()
        for other in () if path.exists() else (path.with_suffix(".csv"), path.with_suffix(".txt")):
            if other.exists():  # perhaps a list of slices
                raise OutputError(f"{other}: is there and would be lost; name another --out")

    def _there(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            old = json.loads(self.path.read_text(encoding="utf-8"))
            rows, before = dict(old["rows"]), dict(old["settings"])
            for row in rows.values():
                numbers = [row["accuracy"], row["auc"], row["f1"]]
                low, high = zip(row["accuracy_interval"], row["auc_interval"], strict=True)
                _ = [float(number or 0) for number in (*numbers, *low, *high)]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise OutputError(
                f"{self.path}: is no table of `compare`; name another file"
            ) from error
        if other := [name for name, now in self.settings.items() if before.get(name) != now]:
            raise OutputError(
                f"{self.path}: its rows come from other settings ({', '.join(other)}); take the "
                "same ones, or name another file"
            )
        return rows

    def add(self, name: str, row: dict[str, Any]) -> None:
        row = json.loads(json.dumps(row), parse_constant=lambda nan: None)  # JSON has no NaN
        self.rows = self._there() | self.rows | {name: row}  # another process may have added some
        content = json.dumps({"settings": self.settings, "rows": self.rows}) + "\n"
        table = self.frame().to_csv(index_label="system, seed")
        for suffix, text in ((".json", content), (".csv", table), (".txt", self.text() + "\n")):
            with atomic_path(self.path.with_suffix(suffix)) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")

    def frame(self):
        """A pandas table of all rows: a column for each number, and each class."""
        from pandas import DataFrame, to_numeric

        flat, left_out = {}, ("predictions", "probabilities")
        for name, row in self.rows.items():
            values = flat[name] = {}
            for key, value in row.items():
                if isinstance(value, list) and key not in left_out:
                    values |= {f"{key} {i}": part for i, part in enumerate(value)}
                elif isinstance(value, dict):
                    values |= {f"{key} {part}": number for part, number in value.items()}
                elif key not in left_out:
                    values[key] = value
        return DataFrame.from_dict(flat, orient="index").apply(to_numeric)

    def text(self) -> str:
        """The table that people read: means over seeds would hide how far seeds lie apart."""
        table = self.frame()
        for key in {"accuracy", "auc", "scan_accuracy", "scan_auc"} & set(table):
            ends = (table.pop(f"{key}_interval {i}") for i in (0, 1))
            rows = zip(table[key], *ends, strict=True)
            texts = ["{:.3f} ({:.3f} to {:.3f})".format(*row) for row in rows]
            table[key] = [text.replace("nan (nan to nan)", "") for text in texts]
        return table.to_string(float_format="{:.3f}".format, na_rep="")
