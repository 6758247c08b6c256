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

from covidmask.config import Preset, TrainingConfig
from covidmask.datasets.augmentation import Augmented
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.errors import DataError, TrainingError
from covidmask.files import some
from covidmask.metrics import detection
from covidmask.metrics.detection import IOU_THRESHOLDS, CocoAP, semantic_mask
from covidmask.models.detector import binary_masks, detect, for_inference, same_size_groups
from covidmask.training.loop import fit, joined, make_fabric, not_finite, read_batches


def train_segmenter(
    model: GeneralizedRCNN, dataset: Dataset, training: TrainingConfig, **options: Any
) -> list[dict[str, float]]:
    """Minimise the sum of the five losses of Mask R-CNN, in place, on items of `LesionSlices`.

    Options are `fabric`, `seed`, `checkpoint`, `workers`, `memory`, `progress`, `title` of `fit`.
    """

    def losses(wrapped, items: list) -> dict[str, Tensor]:
        images, targets = zip(*items, strict=True)
        return wrapped(list(images), list(targets))

    lesions = getattr(dataset, "dataset", dataset)
    run = {  # what decides the items besides their names; None where a data set does not say
        "segmenter": asdict(model.config),
        "augment": None,
        "lesions": getattr(lesions, "lesions", None),
        "min_area": getattr(lesions, "min_area", None),
    }
    if isinstance(dataset, Augmented):
        run["augment"] = asdict(dataset.config) | {"seed": dataset.seed}
    model.requires_grad_(True)
    return fit(model, dataset, losses, training, run=run, **{"title": "segmenter"} | options)


def pretrain_segmenter(
    model: GeneralizedRCNN,
    preset: Preset,
    folder: str | Path,
    *,
    fabric: Fabric | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> list[dict[str, float]]:
    """Train as the preset's `pretraining` says on random copies (`augment`) of its phantoms.

    They are drawn where `folder` lacks them; options are those of `train_segmenter`.
    """
    fabric = fabric or make_fabric(preset.pretraining.precision)
    if fabric.global_rank == 0:
        write_phantoms(folder, preset.phantoms, progress=progress)
    fabric.barrier()
    phantoms = LesionSlices(Path(folder) / "lesions", "train", preset.detector.lesions)
    copies = Augmented(phantoms, replace(preset.augment, copies=1, paste=0), seed)
    options |= {"fabric": fabric, "seed": seed, "progress": progress, "title": "phantoms first"}
    return train_segmenter(model, copies, preset.pretraining, **options)


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

    Each of several processes yields its share. Where sizes mix, indices come out of order, as
    padding would change results. With `fused` predictions have `maps`; see `detect`.
    """
    fabric = fabric or make_fabric()
    fast = for_inference(model.to(fabric.device).eval())
    classes = len(model.classes)
    for part, items, images in read_batches(dataset, fabric, batch_size, "detecting", progress):
        for group in same_size_groups(images):
            same = [images[i] for i in group]
            with fabric.autocast():
                predictions = detect(fast, same, classes, mirror) if fused else fast(same)
            for i, found in zip(group, predictions, strict=True):
                # not without blocking: the CPU would read a copy before it is there
                yield part[i], {key: value.cpu() for key, value in found.items()}, items[i][1]


def evaluate_segmenter(
    model: GeneralizedRCNN,
    dataset: Dataset,
    *,
    fabric: Fabric | None = None,
    score: float = 0.75,
    mask_threshold: float = 0.5,
    threshold: float = 0.5,
    **options: Any,
) -> dict[str, Any]:
    """Judge a segmenter; one detector pass for all thresholds, each slice once.

    Args:
        score: the released code's AP and Dice take detections that score above it; COCO's AP all.
        mask_threshold: where the masks of detections begin, in both APs and Dice; see
            `binary_masks`.
        threshold: pixels whose probability in the fused maps is above it are lesion; see `fuse`.
        options: `batch_size`, `mirror` and `progress` of `predict_lesions`.

    Returns:
        What `CocoAP.compute` gives; `author_ap` (mean over thresholds), `author_ap50` and
        `author_ap75` by the rule of the released code; `dice_<class>`, the mean over slices with
        that class in the truth or the detections (NaN where there is none); all 0..1. `overlap` has
        `overlap_means` of "infection" and of each class; `slices`, how many were judged; `table`,
        float64 [M, regions, 5], the `overlap` of each slice, in the order of the data set.
    """
    shares = {"score": score, "mask_threshold": mask_threshold, "threshold": threshold}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise DataError(f"{name} {value}: must be a number from 0 to 1")
    if bad := not_finite(model.state_dict()):  # they would detect nothing, without a word
        raise TrainingError(f"weights that are not finite: {some(bad)}; train the segmenter again")
    fabric = fabric or make_fabric()
    classes = model.classes
    regions, coco = ("infection", *classes), CocoAP(classes, mask_threshold)
    columns = [len(IOU_THRESHOLDS), len(classes), 5 * len(regions)]
    rows = torch.zeros(len(dataset), sum(columns), dtype=torch.float64)
    found = predict_lesions(model, dataset, fabric=fabric, fused=True, **options)
    for index, prediction, target in found:
        coco.update([prediction], [target])
        kept = prediction["scores"] > score
        sure = {key: prediction[key][kept] for key in ("labels", "scores", "masks")}
        sure["masks"] = binary_masks(sure, mask_threshold)
        painted = semantic_mask(sure, score)
        truth = semantic_mask({**target, "scores": torch.ones(len(target["labels"]))}, 0)
        row = [*detection.author_image_ap(sure, target)]
        row += [detection.dice(painted == 1 + k, truth == 1 + k) for k in range(1, len(regions))]
        row += chain.from_iterable(detection.overlap(prediction["maps"], truth, threshold))
        rows[index] = torch.tensor(row, dtype=torch.float64)
    author, dices, counts = joined(rows, fabric).split(columns, dim=1)
    author, dices = author.mean(0), dices.nanmean(0)
    table = counts.reshape(-1, len(regions), 5)  # [M, regions, 5]
    return {
        **coco.compute(),
        "author_ap": float(author.mean()),
        "author_ap50": float(author[IOU_THRESHOLDS.index(0.5)]),
        "author_ap75": float(author[IOU_THRESHOLDS.index(0.75)]),
        **{f"dice_{name}": float(v) for name, v in zip(classes, dices, strict=True)},
        "overlap": {name: detection.overlap_means(table[:, i]) for i, name in enumerate(regions)},
        "slices": len(dataset),
        "table": table,
    }
