"""Training and judging COVID-CT-Mask-Net in its three regimes (Algorithm 1, section 4)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from covidmask.config import TrainingConfig
from covidmask.errors import DataError, TrainingError
from covidmask.metrics.classification import confusion, report
from covidmask.models.classifier import ClassificationModule, CovidCTMaskNet, set_regime
from covidmask.models.detector import check_images
from covidmask.training.loop import digest, fit, item_names, make_fabric, plain
from covidmask.training.ranked_cache import cache_ranked_boxes, settings_digest


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each class on its own, averaged (Algorithm 1, line 9).

    The paper prints the positive term alone; the released code, and this, has both.

    Args:
        logits: float [B,C]. labels: int64 [B].
    """
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).float())


def check_classes(model: CovidCTMaskNet, dataset: Dataset) -> None:
    """Raise `DataError` where a data set has other classes, or labels, than the model."""
    classes = getattr(dataset, "classes", None)
    if classes is not None and tuple(classes) != model.config.classes:
        raise DataError(
            f"the data set's classes are {', '.join(classes)}, the model's "
            f"{', '.join(model.config.classes)}; use slices of the classes that it was made for"
        )
    last = len(model.config.classes) - 1
    for name, label in zip(item_names(dataset), getattr(dataset, "labels", ()), strict=False):
        if not 0 <= label <= last:
            raise DataError(f"{name}: label {label}; the model's classes are 0 to {last}")


def train_s(
    s: ClassificationModule,
    rows: Tensor,
    labels: Tensor,
    training: TrainingConfig,
    *,
    validation: tuple[Tensor, Tensor] | None = None,
    fabric: Fabric | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    names: list[str] | None = None,
    run: dict[str, Any] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train S alone on ranked boxes that were computed before.

    Args:
        rows: float32 [M,N,5]. labels: int64 [M].
        validation: rows and labels; with them the epoch of the best accuracy is kept.
    """
    fabric = fabric or make_fabric(training.precision)

    def losses(wrapped, items: list) -> dict[str, Tensor]:
        batch_rows, batch_labels = (torch.stack(part) for part in zip(*items, strict=True))
        return {"bce": classification_loss(wrapped(batch_rows), batch_labels)}

    def validate(epoch: int) -> dict[str, float]:
        true = validation[1]
        with torch.no_grad():
            predicted = s(validation[0].to(fabric.device)).argmax(1).cpu()
        return {"accuracy": (predicted == true).float().mean().item()}

    s.train()
    return fit(
        fabric,
        s,
        s.parameters(),
        TensorDataset(rows, labels),
        losses,
        training,
        names=names or [f"row {i}" for i in range(len(rows))],
        seed=seed,
        checkpoint=checkpoint,
        run=run,
        after_epoch=validate if validation else None,
        best="accuracy" if validation else None,
        progress=progress,
        title="S",
    )


def train_classifier(
    model: CovidCTMaskNet,
    dataset: Dataset,
    regime: str,
    training: TrainingConfig,
    *,
    validation: Dataset | None = None,
    fabric: Fabric | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    cache: str | Path | None = None,
    workers: int = 0,
    memory: float = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train the classifier in place in one of the three regimes (`set_regime`).

    In "heads" the detector is constant, so it runs once a slice and S trains on what it gave. In
    the other two each step runs it again, and keeps gradients for the N ranked boxes only. On a
    CPU a step takes its slices one by one, which is faster and needs the memory of one.

    Args:
        dataset: items (image, label) of `SliceImages`.
        validation: with it the epoch of the best accuracy is kept ("return the best model").
        checkpoint: written after each epoch; an existing one is resumed.
        cache: folder for the ranked boxes of "heads"; see `cache_ranked_boxes`.
        workers, memory: as in `fit`.

    Returns:
        One dict a step; see `fit`. The model ends in eval mode.
    """
    fabric = fabric or make_fabric(training.precision, find_unused_parameters=regime == "full")
    for part in (dataset, validation):
        if part is not None:
            check_classes(model, part)
    parameters = set_regime(model, regime)
    run = {
        "regime": regime,
        "detector": settings_digest(model.detector),
        "classifier": plain(asdict(model.config)),
        "segmenter": digest(model.detector),  # S of one detector must not go on with another
    }
    if regime == "heads":
        rows = cache_ranked_boxes(model, dataset, fabric=fabric, folder=cache, progress=progress)
        held_out = None
        if validation is not None:
            held_out_rows = cache_ranked_boxes(
                model,
                validation,
                fabric=fabric,
                folder=cache,
                progress=progress,
                title="ranking validation",
            )
            held_out = (held_out_rows, torch.tensor(validation.labels))
        return train_s(
            model.s,
            rows,
            torch.tensor(dataset.labels),
            training,
            validation=held_out,
            fabric=fabric,
            seed=seed,
            checkpoint=checkpoint,
            names=dataset.names,
            run=run,
            progress=progress,
        )

    def losses(wrapped, items: list) -> dict[str, Tensor]:
        images, labels = zip(*items, strict=True)
        target = torch.tensor(labels, device=fabric.device)
        return {"bce": classification_loss(wrapped(list(images)), target)}

    def validate(epoch: int) -> dict[str, float]:
        result = evaluate_classifier(model, validation, fabric=fabric, progress=False)
        model.train()
        return {"accuracy": result["accuracy"]}

    model.train()
    return fit(
        fabric,
        model,
        parameters,
        dataset,
        losses,
        training,
        names=dataset.names,
        seed=seed,
        checkpoint=checkpoint,
        run=run,
        after_epoch=validate if validation is not None else None,
        best="accuracy" if validation is not None else None,
        check=lambda items, names: check_images([image for image, _ in items], names=names),
        part=1 if fabric.device.type == "cpu" else None,  # slices do not touch each other
        workers=workers,
        memory=memory,
        progress=progress,
        title=f"classifier, {regime}",
    )


def evaluate_classifier(
    model: CovidCTMaskNet,
    dataset: Dataset,
    *,
    fabric: Fabric | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Classify each slice once and compare with its label. No graph is built.

    Returns:
        `probabilities` float32 [M,C] (a sigmoid each, so rows need not sum to 1), `predictions`
        and `labels` int64 [M], `confusion` int64 [C,C] and everything in `report(confusion)`, for
        the C classes of `model.config`.

    Raises:
        DataError: the data set has other classes.
        TrainingError: a logit is no number.
    """
    check_classes(model, dataset)
    fabric = fabric or make_fabric()
    rows = cache_ranked_boxes(
        model, dataset, fabric=fabric, batch_size=batch_size, progress=progress
    )
    with torch.no_grad():
        logits = model.s(rows.to(fabric.device)).cpu()  # [M, C]
    if not logits.isfinite().all():
        raise TrainingError("S gives logits that are not numbers; train its weights again")
    labels = torch.tensor(dataset.labels)
    counts = confusion(labels, logits.argmax(1), classes=len(model.config.classes))
    return {
        "probabilities": logits.sigmoid(),
        "predictions": logits.argmax(1),
        "labels": labels,
        "confusion": counts,
        **report(counts),
    }
