"""Training and judging the segmenter (section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from tqdm import tqdm

from covidmask.config import LESION_CLASSES, Preset, TrainingConfig
from covidmask.datasets.augmentation import Augmented
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.errors import DataError, TrainingError
from covidmask.files import some
from covidmask.metrics.detection import (
    IOU_THRESHOLDS,
    CocoAP,
    author_image_ap,
    dice,
    overlap,
    overlap_means,
    semantic_mask,
)
from covidmask.models.detector import (
    check_images,
    detect,
    for_inference,
    same_size_groups,
    to_model,
)
from covidmask.training.loop import (
    fit,
    gather,
    item_names,
    make_fabric,
    not_finite,
    plain,
    share,
    to_device,
)


def train_segmenter(
    model: GeneralizedRCNN,
    dataset: Dataset,
    training: TrainingConfig,
    *,
    fabric: Fabric | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    workers: int = 0,
    memory: float = 0,
    progress: bool = True,
    title: str = "segmenter",
) -> list[dict[str, float]]:
    """Minimise the sum of the five losses of Mask R-CNN, in place.

    Args:
        dataset: items (image, target) of `LesionSlices`.
        checkpoint: written after each epoch; an existing one is resumed.
        workers, memory: as in `fit`.

    Returns:
        One dict a step; see `fit`. The model ends in eval mode.
    """
    fabric = fabric or make_fabric(training.precision)

    def losses(wrapped, items: list) -> dict[str, Tensor]:
        images, targets = zip(*items, strict=True)
        return wrapped(list(images), list(targets))

    model.train().requires_grad_(True)
    return fit(
        fabric,
        model,
        model.parameters(),
        dataset,
        losses,
        training,
        names=dataset.names,
        seed=seed,
        checkpoint=checkpoint,
        run={"segmenter": plain(asdict(model.config)), **_item_settings(dataset)},
        check=lambda items, names: check_images([image for image, _ in items], names=names),
        workers=workers,
        memory=memory,
        progress=progress,
        title=title,
    )


def _item_settings(dataset: Dataset) -> dict[str, Any]:
    """What decides the items besides their names; None where a data set does not say."""
    augment, lesions = None, dataset
    if isinstance(dataset, Augmented):
        augment, lesions = asdict(dataset.config) | {"seed": dataset.seed}, dataset.dataset
    return {
        "augment": augment,
        "lesions": getattr(lesions, "lesions", None),
        "min_area": getattr(lesions, "min_area", None) if augment is None else augment["min_area"],
    }


def pretrain_segmenter(
    model: GeneralizedRCNN,
    preset: Preset,
    folder: str | Path,
    *,
    fabric: Fabric | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    workers: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train on random copies of a preset's phantoms, which are drawn where they are absent.

    Args:
        preset: one with `augment` and `pretraining`.
        folder: of the phantoms.

    Returns:
        As `train_segmenter`.
    """
    fabric = fabric or make_fabric(preset.pretraining.precision)
    if fabric.global_rank == 0:
        write_phantoms(folder, preset.phantoms, progress=progress)
    fabric.barrier()
    phantoms = LesionSlices(Path(folder) / "lesions", "train", preset.detector.lesions)
    return train_segmenter(
        model,
        Augmented(phantoms, replace(preset.augment, copies=1, paste=0), seed),
        preset.pretraining,
        fabric=fabric,
        seed=seed,
        checkpoint=checkpoint,
        workers=workers,
        progress=progress,
        title="phantoms first",
    )


@torch.no_grad()
def predict_lesions(
    model: GeneralizedRCNN,
    dataset: Dataset,
    *,
    fabric: Fabric | None = None,
    batch_size: int = 8,
    fused: bool = False,
    mirror: bool = False,
    progress: bool = True,
) -> Iterator[tuple[int, dict[str, Tensor], dict[str, Tensor]]]:
    """Run the detector once on each slice; yield (index, prediction, target), both on the CPU.

    With several processes each yields the slices of its share. Slices of different sizes never
    share a batch, because padding changes the result; so where sizes mix, indices come out of
    order.

    Args:
        fused: add `maps`, as `metrics.detection.detect` does.
        mirror: as there; needs `fused`.
    """
    fabric = fabric or make_fabric()
    fast = for_inference(model.to(fabric.device).eval())
    classes = len(model.classes)
    indices = list(share(len(dataset), fabric))
    names = item_names(dataset)
    hidden = not (progress and fabric.global_rank == 0)
    with tqdm(total=len(indices), desc="detecting", disable=hidden) as bar:
        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            items = [dataset[i] for i in part]
            images = [image for image, _ in items]
            images = to_model(images, fabric.device, [names[i] for i in part])
            for group in same_size_groups(images):
                same = [images[i] for i in group]
                with fabric.autocast():
                    predictions = detect(fast, same, classes, mirror) if fused else fast(same)
                for i, prediction in zip(group, predictions, strict=True):
                    yield part[i], to_device(prediction, torch.device("cpu")), items[i][1]
            bar.update(len(part))


def evaluate_segmenter(
    model: GeneralizedRCNN,
    dataset: Dataset,
    *,
    fabric: Fabric | None = None,
    batch_size: int = 8,
    score: float = 0.75,
    threshold: float = 0.5,
    mirror: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Judge a segmenter; one detector pass for all thresholds, each slice once.

    Args:
        score: the released code's AP and Dice take detections that score above it (0.75 in the
            paper); COCO's AP takes all.
        threshold: pixels whose probability in the fused maps is above it are lesion; see `fuse`.
        mirror: judge the mean of the maps of each slice and of its mirror image.

    Returns:
        Values in 0..1: those of `CocoAP.compute`, with one AP50 a class; `author_ap` (mean over
        thresholds), `author_ap50` and `author_ap75` by the rule of the released code;
        `dice_<class>`, the mean over slices with that class in the truth or the detections (NaN
        where there is none). `overlap` holds `overlap_means` of "infection" and of each class in
        the fused maps; `slices`, how many were judged; and `table`, float64 [M, regions, 5], the
        `Overlap` of each slice, in the order of the data set.

    Raises:
        DataError: `score` or `threshold` is not in 0..1, or an image is refused by `check_images`.
        TrainingError: a weight is NaN or infinite.
        ValueError: the data set is empty.
    """
    for name, value in (("score", score), ("threshold", threshold)):
        if not 0 <= value <= 1:
            raise DataError(f"{name} {value}: must be a number from 0 to 1")
    if bad := not_finite(model.state_dict()):  # they would detect nothing, without a word
        raise TrainingError(f"weights that are not finite: {some(bad)}; train the segmenter again")
    fabric = fabric or make_fabric()
    classes = LESION_CLASSES[model.config.lesions]
    coco, rows = CocoAP(classes), {}  # index -> what is measured of the slice
    for index, prediction, target in predict_lesions(
        model,
        dataset,
        fabric=fabric,
        batch_size=batch_size,
        fused=True,
        mirror=mirror,
        progress=progress,
    ):
        maps = prediction.pop("maps")
        prediction.pop("semantic", None)
        coco.update([prediction], [target])
        kept = prediction["scores"] > score
        author = author_image_ap({key: v[kept] for key, v in prediction.items()}, target)
        found = semantic_mask(prediction, score)
        truth = semantic_mask({**target, "scores": torch.ones(len(target["labels"]))}, 0)
        painted = (dice(found == c + 2, truth == c + 2) for c in range(len(classes)))
        counts = chain.from_iterable(overlap(maps, truth, threshold))
        rows[index] = [*author, *painted, *counts]
    regions = ("infection", *classes)
    width = len(IOU_THRESHOLDS) + len(classes) + 5 * len(regions)
    ordered = [rows[index] for index in sorted(rows)]  # as `gather` expects them
    part = torch.tensor(ordered, dtype=torch.float64).reshape(-1, width)
    columns = [len(IOU_THRESHOLDS), len(classes), 5 * len(regions)]
    author, painted, counts = gather(part, len(dataset), fabric).split(columns, dim=1)
    author, painted = author.mean(0), painted.nanmean(0)
    table = counts.reshape(-1, len(regions), 5)  # [M, regions, 5]
    return {
        **coco.compute(),
        "author_ap": float(author.mean()),
        "author_ap50": float(author[IOU_THRESHOLDS.index(0.5)]),
        "author_ap75": float(author[IOU_THRESHOLDS.index(0.75)]),
        **{f"dice_{name}": float(v) for name, v in zip(classes, painted, strict=True)},
        "overlap": {name: overlap_means(table[:, i]) for i, name in enumerate(regions)},
        "slices": len(dataset),
        "table": table,
    }
