"""Lesions and class probabilities of slices and scans that need not belong to any data set."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

from covidmask.datasets.scans import LUNG_WINDOW, Scan, choose_slices, find_scans, read_slices
from covidmask.errors import CheckpointError, DataError, OutputError
from covidmask.files import atomic_path, some
from covidmask.models.detector import detect, for_inference, fuse, to_model
from covidmask.models.weights import load_classifier, load_segmenter
from covidmask.plotting import COLOURS

PICTURE_SIDE = 512  # pixels: smaller slices are drawn larger, by a whole factor
BATCH = 4  # slices of one size that go through the networks together
BATCH_PIXELS = 2**22  # in all of them, or one alone: large pictures would fill the memory
FLAT = 1 / 8  # of the way from black to white: a slice that spans less shows the networks little
CAUTION = "A slice label is not a patient diagnosis; the classifier was not validated on volumes."


@torch.no_grad()
def predict(
    images: Sequence[str | Path],
    segmenter: str | Path,
    classifier: str | Path,
    out: str | Path,
    score: float = 0.5,
    device: str = "cpu",
    *,
    series: int | None = None,
    slices: str | None = None,
    every: int | None = None,
    window: tuple[float, float] = LUNG_WINDOW,
    threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """Write a picture of each slice, predictions.csv and summary.csv; print one line a slice.

    Outputs carry nothing of a DICOM or NIfTI file but pixels, slice and instance numbers,
    positions and areas: no other tag, and no file name, which may tell a patient's. Pictures
    (PNG, JPEG, TIFF) keep their file names, without the folder.

    predictions.csv, whose rows are returned, has for each slice: image (a picture's name, or
    "volume 1"), slice (from 1, nearest the feet where positions are known), instance (DICOM's
    number), position_mm, picture (of the lesions), lesions (boxes; also by lesion class),
    lesion_pixels and lesion_mm2 (of the mask), a probability for each image class (a sigmoid each,
    so they need not sum to 1), and the likeliest class; what is unknown is empty. summary.csv, with
    a row for each volume and one for all pictures: slices, looked_at, lesion_slices (with a lesion
    pixel), and of each class the share of slices in which it is likeliest, mean and maximum.

    The mask is the one that `covidmask evaluate` scores, `fuse` of the maps of `detect`: weak boxes
    count in it, so a pixel may be lesion where no box is drawn, and the other way round.

    Args:
        images, series, slices, every: as in `find_scans` and `choose_slices`.
        score, threshold: boxes and pixels above them count as lesions, 0..1.
        window: level and width in HU, for DICOM and NIfTI.

    Raises `DataError`, `CheckpointError` where an input cannot be used, `OutputError` where `out`
    cannot be written or holds an input; pictures there are complete.
    """
    for name, value in (("score", score), ("threshold", threshold)):
        if not 0 <= value <= 1:
            raise DataError(f"{name} {value}: must be a number from 0 to 1")
    out, (scans, notes) = Path(out), find_scans(images, series)
    jobs = _jobs(scans, slices, every)
    owners, each, rows = map(list, zip(*jobs, strict=True))
    tables = [out / "predictions.csv", out / "summary.csv"]
    outputs = [*(out / row["picture"] for row in rows), *tables]
    _check_outputs(outputs, *(one.path for one in each), segmenter, classifier)
    greys = read_slices(tqdm(each, desc="checking images"), window)  # a bad one stops us here
    # but for one pixel in 200, as a few bright ones do not help the rest
    spans = [np.ptp(np.percentile(grey, (0.5, 99.5))) for grey in greys]
    if flat := [_called(row) for row, span in zip(rows, spans, strict=True) if span < FLAT]:
        why = "use less than an eighth of the grey values, so the networks see next to nothing"
        notes.append(f"{some(flat)} {why}; are they grey from black to white, volumes in HU?")
    for scan in scans:
        count = f"{owners.count(scan)} of {len(scan.slices)}"
        tqdm.write(f"{scan.name}: {scan.source}; looking at {count} slices")
    for note in notes:
        tqdm.write(f"Note: {note}")
    detector = for_inference(load_segmenter(segmenter, device))
    model = for_inference(load_classifier(classifier, device))
    classes, lesion_classes = model.config.classes, detector.classes
    names = [*rows[0], "lesions", "lesion_pixels", "lesion_mm2", "likeliest"]
    if len({*names, *lesion_classes, *classes}) < len(names) + len(lesion_classes) + len(classes):
        what = f"two columns would have one name ({', '.join((*lesion_classes, *classes))})"
        raise CheckpointError(f"{segmenter}, {classifier}: {what}; train with other class names")
    pairs = zip(jobs, read_slices(each, window), strict=True)
    looking = _look(pairs, detector, model, len(lesion_classes), device)
    for job, grey, found, p in tqdm(looking, total=len(jobs), desc="looking at slices"):
        (scan, one, row), codes = job, fuse(found["maps"].cpu(), threshold)  # uint8 [H, W]
        enlarge = max(1, PICTURE_SIDE // min(grey.shape))
        with atomic_path(out / row["picture"]) as temporary:
            overlay(grey, found, codes, lesion_classes, score, enlarge).save(temporary, "PNG")
        labels, mm = found["labels"][found["scores"] > score].tolist(), one.spacing
        pixels = int((codes > 0).sum())
        area = None if mm is None else pixels * mm[0] * mm[1]
        counts = {name: labels.count(label) for label, name in enumerate(lesion_classes, 1)}
        row |= {"lesions": len(labels)} | counts | {"lesion_pixels": pixels, "lesion_mm2": area}
        row |= dict(zip(classes, p, strict=True)) | {"likeliest": classes[p.index(max(p))]}
        place = "" if row["position_mm"] is None else f" ({row['position_mm']:.1f} mm)"
        text = f"{', '.join(f'{c} {row[c]:.3f}' for c in classes)}; lesions above {score:g}: "
        tqdm.write(f"{_called(row)}{place}: {text}{len(labels)}, lesion pixels: {pixels:,}")
    summary = []
    for scan in scans:
        own = [row for owner, row in zip(owners, rows, strict=True) if owner is scan]
        ill, n = sum(row["lesion_pixels"] > 0 for row in own), len(own)
        row = {"image": scan.name, "slices": len(scan.slices), "looked_at": n, "lesion_slices": ill}
        row |= {f"share {c}": sum(row["likeliest"] == c for row in own) / n for c in classes}
        row |= {f"mean {c}": sum(row[c] for row in own) / n for c in classes}
        row |= {f"max {c}": max(row[c] for row in own) for c in classes}
        summary.append(row | {"note": CAUTION})
        if n > 1:
            text = ", ".join(f"{c} {row[f'share {c}']:.0%}" for c in classes)
            tqdm.write(f"{scan.name}: likeliest by slice: {text}; lesions in {ill} of {n} slices")
    options = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # any file name
    for path, table in zip(tables, (rows, summary), strict=True):
        with atomic_path(path) as temporary, open(temporary, "w", **options) as file:
            writer = csv.writer(file)
            writer.writerow(table[0])
            for row in table:  # None is empty; probabilities have six digits, lengths and areas two
                digits = ((value, 2 if "_mm" in name else 6) for name, value in row.items())
                writer.writerow(f"{v:.{d}f}" if isinstance(v, float) else v for v, d in digits)
    tqdm.write(f"{CAUTION}\nEach probability is a sigmoid of its own: they need not sum to 1.")
    return rows


def _called(row: Mapping[str, Any]) -> str:
    return f"{row['image']}, slice {row['slice']}" if row["slice"] else row["image"]


def _jobs(scans: Sequence[Scan], slices: str | None, every: int | None) -> list[tuple]:
    # scan, slice, and the start of its row, with a name for its picture that names no patient
    jobs, used = [], set()
    many = sum(scan.volume for scan in scans) > 1
    for scan in scans:
        count, prefix = len(scan.slices), f"{scan.name.replace(' ', '_')}_" * many
        for k in choose_slices(count, slices, every, scan.name) if scan.volume else range(count):
            one = scan.slices[k]
            image, number, stem = scan.name, k + 1, f"{prefix}slice_{k + 1:04d}"
            if not scan.volume:  # systems allow names of 255 bytes, with what is added to it
                image, number, stem = one.path.name, None, one.path.stem[:80]
            name, n = stem, 1
            while name.lower() in used:  # some file systems take A.png and a.png for one file
                n += 1
                name = f"{stem}_{n}"
            used.add(name.lower())
            row = {"image": image, "slice": number, "instance": one.instance}
            row |= {"position_mm": one.position, "picture": f"{name}_lesions.png"}
            jobs.append((scan, one, row))
    return jobs


def _check_outputs(outputs: Sequence[Path], *inputs: str | Path) -> None:
    # nothing that the reader gave us is written over
    given = {(s.st_dev, s.st_ino) for s in map(os.stat, filter(os.path.exists, inputs))}
    for path in filter(Path.exists, outputs):
        if path.is_dir() or (path.stat().st_dev, path.stat().st_ino) in given:
            what = "a folder, one of the images to look at or a file of weights"
            raise OutputError(f"{path}: is {what}; choose another folder with --out")


def _look(
    pairs: Iterable[tuple], detector: nn.Module, model: nn.Module, classes: int, device: str
) -> Iterator[tuple[tuple, np.ndarray, dict[str, Tensor], list[float]]]:
    # job, grey values, lesions, and a probability for each image class
    # neighbours of one size together: in a mixed batch, padding would change what is found
    for (height, width), group in groupby(pairs, lambda pair: pair[1].shape):
        most = max(1, min(BATCH, BATCH_PIXELS // (height * width)))
        while batch := list(islice(group, most)):
            images = [torch.from_numpy(grey).repeat(3, 1, 1) for _, grey in batch]  # [3, H, W]
            images = to_model(images, torch.device(device))
            found = detect(detector, images, classes)
            probabilities = model(images).sigmoid()  # [B, classes]
            if not all(v.isfinite().all() for v in (probabilities, *(f["maps"] for f in found))):
                what = f"give values that are not numbers near {batch[-1][0][2]['picture']}"
                raise CheckpointError(f"the networks {what}; train them again")
            for (job, grey), lesions, p in zip(batch, found, probabilities.tolist(), strict=True):
                yield job, grey, lesions, p


def overlay(
    image: np.ndarray,
    lesions: Mapping[str, Tensor],
    codes: np.ndarray,
    classes: Sequence[str] = ("GGO", "C"),
    score_threshold: float = 0.0,
    enlarge: int = 1,
) -> Image.Image:
    """Tint the lesions of a slice, and frame those above `score_threshold` with class and score.

    Args:
        image: float32 [H, W] in 0..1.
        lesions: boxes, labels (1, 2, ... of `classes`) and scores, as from `detect`.
        codes: uint8 [H, W], what to tint, as from `fuse`.
        enlarge: draw each pixel as a square of so many, so that words fit on a small slice.
    """
    large = [torch.tensor(a.repeat(enlarge, 0).repeat(enlarge, 1)) for a in (image, codes)]
    grey = (255 * large[0].clamp(0, 1)).round().byte().repeat(3, 1, 1)  # [3, H, W]
    masks = torch.stack([large[1] == code for code in range(2, 2 + len(classes))])
    tinted = draw_segmentation_masks(grey, masks, alpha=0.45, colors=list(COLOURS[: len(classes)]))
    above = lesions["scores"] > score_threshold
    if above.any():
        boxes = enlarge * lesions["boxes"][above].cpu()
        boxes[:, 2:] = boxes[:, :2].maximum(boxes[:, 2:] - 1)  # the last pixels are inside
        labels = lesions["labels"][above].tolist()
        pairs = zip(labels, lesions["scores"][above].tolist(), strict=True)
        words = [f"{classes[label - 1]} {score:.2f}" for label, score in pairs]
        colours = [COLOURS[label - 1] for label in labels]
        tinted = draw_bounding_boxes(tinted, boxes, words, colours)
    return Image.fromarray(tinted.permute(1, 2, 0).numpy())
