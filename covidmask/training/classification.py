"""Training and judging COVID-CT-Mask-Net in its three regimes (Algorithm 1, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from covidmask.config import TrainingConfig
from covidmask.errors import DataError, TrainingError
from covidmask.metrics.classification import confusion, report
from covidmask.models.classifier import CovidCTMaskNet, set_regime
from covidmask.models.detector import for_inference
from covidmask.training.loop import digest, fit, item_names, joined, make_fabric, read_batches
from covidmask.training.ranked_cache import cache_ranked_boxes, settings_digest


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each class on its own, averaged (Algorithm 1, line 9).

    The paper prints the positive term alone; the released code, and this, has both. Logits are
    float [B,C], labels int64 [B].
    """
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).float())


def check_classes(model: nn.Module, dataset: Dataset) -> None:
    """Raise `DataError` where a data set has other classes, or labels, than the model."""
    ours, theirs = getattr(model, "config", model).classes, getattr(dataset, "classes", None)
    if theirs is not None and tuple(theirs) != tuple(ours):
        raise DataError(
            f"the data set's classes are {', '.join(theirs)}, the model's {', '.join(ours)}; "
            "use slices of the classes that it was made for"
        )
    for name, label in zip(item_names(dataset), getattr(dataset, "labels", ()), strict=False):
        if not 0 <= label < len(ours):
            raise DataError(f"{name}: label {label}; the model's classes are 0 to {len(ours) - 1}")


@torch.no_grad()
def s_logits(s: nn.Module, rows: Tensor) -> Tensor:  # [M, C] on the CPU, computed where S lies
    return s(rows.to(next(s.parameters()).device)).cpu()


def train_s(
    s: nn.Module,
    rows: Tensor,
    labels: Tensor,
    training: TrainingConfig,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    names: Sequence[str] | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """Train S alone on ranked boxes, float32 [M,N,columns], and labels, int64 [M]; see `fit`.

    `names` are those of the rows, for messages. With the rows and labels of `validation` the epoch
    of the best accuracy is kept.
    """
    data = TensorDataset(rows, labels)
    data.names = names

    def losses(wrapped, items: list) -> dict[str, Tensor]:
        batch_rows, batch_labels = map(torch.stack, zip(*items, strict=True))
        return {"bce": classification_loss(wrapped(batch_rows), batch_labels)}

    def accuracy() -> float:
        predicted = s_logits(s, validation[0]).argmax(1)
        return (predicted == validation[1]).float().mean().item()

    options |= {"accuracy": accuracy if validation else None, "images": False, "title": "S"}
    return fit(s, data, losses, training, **options)


def train_classifier(
    model: CovidCTMaskNet,
    dataset: Dataset,
    regime: str,
    training: TrainingConfig,
    *,
    validation: Dataset | None = None,
    fabric: Fabric | None = None,
    cache: str | Path | None = None,
    workers: int = 0,
    memory: float = 0,
    progress: bool = True,
    **options: Any,
) -> list[dict[str, float]]:
    """Train the classifier in place in one of the three regimes (`set_regime`); see `fit`.

    In "heads" the detector is constant, so it runs once a slice and S trains on what it gave. In
    the other two each step runs it again, and keeps gradients for the N ranked boxes only.

    Args:
        dataset: items (image, label) of `SliceImages`; of `validation` the best epoch is kept.
        cache: folder for the ranked boxes of "heads"; see `cache_ranked_boxes`.
        options: `seed` and `checkpoint` of `fit`.
    """
    fabric = fabric or make_fabric(training.precision, find_unused_parameters=regime == "full")
    for part in (dataset, validation):
        if part is not None:
            check_classes(model, part)
    set_regime(model, regime)
    options |= {"fabric": fabric, "progress": progress}
    options["run"] = {
        "regime": regime,
        "detector": settings_digest(model.detector),
        "classifier": asdict(model.config),
        # S of one detector must not go on with another
        "segmenter": digest(model.detector.state_dict().values()),
    }
    if regime == "heads":

        def ranked(part: Dataset) -> tuple[Tensor, Tensor]:
            rows = cache_ranked_boxes(model, part, fabric=fabric, folder=cache, progress=progress)
            return rows, torch.tensor(part.labels)

        options["names"] = item_names(dataset)
        options["validation"] = None if validation is None else ranked(validation)
        return train_s(model.s, *ranked(dataset), training, **options)

    def losses(wrapped, items: list) -> dict[str, Tensor]:
        images, labels = zip(*items, strict=True)
        target = torch.tensor(labels, device=fabric.device)
        return {"bce": classification_loss(wrapped(list(images)), target)}

    def accuracy() -> float:
        return evaluate_classifier(model, validation, fabric=fabric, progress=False)["accuracy"]

    options |= {"workers": workers, "memory": memory, "title": f"classifier, {regime}"}
    options["singly"] = fabric.device.type == "cpu"  # faster there, and the memory of one slice
    options["accuracy"] = None if validation is None else accuracy
    return fit(model, dataset, losses, training, **options)


@torch.no_grad()
def logits_of(
    model: nn.Module,
    dataset: Dataset,
    *,
    fabric: Fabric | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Tensor:
    """The logits of every slice, float32 [M,C], on the CPU; `model` as in `evaluate_classifier`."""
    options = {"fabric": fabric or make_fabric(), "batch_size": batch_size, "progress": progress}
    if isinstance(model, CovidCTMaskNet):
        return s_logits(model.s, cache_ranked_boxes(model, dataset, **options))
    fabric = options["fabric"]
    fast, rows = for_inference(model.to(fabric.device)), None
    batches = read_batches(dataset, fabric, batch_size, "classifying", progress)
    for part, _, images in batches:
        with fabric.autocast():
            found = fast(images).float().cpu()
        rows = torch.zeros(len(dataset), found.shape[1]) if rows is None else rows
        rows[part] = found
    return joined(rows, fabric)


def evaluate_classifier(
    model: nn.Module,
    dataset: Dataset,
    *,
    fabric: Fabric | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Classify each slice once and compare with its label. No graph is built.

    Args:
        model: of `covid_ct_mask_net`, or of `models.systems`.

    Returns:
        `probabilities` float32 [M,C] (a sigmoid each, so rows need not sum to 1), `predictions`
        and `labels` int64 [M], `confusion` int64 [C,C] and everything in `report(confusion)`, for
        the C classes of the model, which the data set must have.
    """
    check_classes(model, dataset)
    options = {"fabric": fabric, "batch_size": batch_size, "progress": progress}
    logits = logits_of(model, dataset, **options)  # [M, C]
    if not logits.isfinite().all():
        raise TrainingError("S gives logits that are not numbers; train its weights again")
    labels, predictions = torch.tensor(dataset.labels), logits.argmax(1)
    counts = confusion(labels, predictions, classes=logits.shape[1])
    return {
        "probabilities": logits.sigmoid(),
        "predictions": predictions,
        "labels": labels,
        "confusion": counts,
        **report(counts),
    }
