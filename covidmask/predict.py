"""Lesions and class probabilities of slices and scans that need not belong to any data set."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from tqdm import tqdm

from covidmask.config import LESION_CLASSES
from covidmask.datasets.medical import Slice, hounsfield_to_unit
from covidmask.datasets.scans import (
    LUNG_WINDOW,
    Scan,
    choose_slices,
    find_scans,
    read_slices,
    write_image,
)
from covidmask.errors import CheckpointError, DataError, OutputError
from covidmask.files import atomic_path, some
from covidmask.models.detector import detect, for_inference, fuse, to_model
from covidmask.models.weights import load_classifier, load_segmenter
from covidmask.plotting import LESION_COLOURS, _grey, _lesion_arrays

PICTURE_SIDE = 512  # pixels: smaller slices are drawn larger, by a whole factor
TABLES = ("predictions.csv", "summary.csv")
MAX_STEM = 200  # bytes of a picture's name: systems allow 255, with what is added to it
BATCH = 4  # slices of one size that go through the networks together
BATCH_PIXELS = 2**22  # in all of them, or one alone: large pictures would fill the memory
FLAT = 1 / 8  # of the way from black to white: a picture that spans less shows the networks little
AIR = -500.0  # HU: every slice of a chest has darker pixels, in the lung and around the patient
CAUTION = (
    "A slice label is not a patient diagnosis, and the slice classifier was not validated on "
    "volumes."
)


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

    All slices are read before any weights, so that a bad one is reported at once. Outputs carry
    nothing of a DICOM or NIfTI file but pixels, slice and instance numbers, positions and areas:
    no other tag, and no file name, because names of files tell names of patients. Pictures (PNG,
    JPEG, TIFF) keep their file names, without the folder.

    predictions.csv has a row for each slice: image (a picture's name, or "volume 1"), slice (from
    1, nearest the feet where positions are known), instance (DICOM's number), position_mm,
    picture (<name>_lesions.png or slice_0001_lesions.png), lesions (boxes that score above
    `score`), the same by lesion class, lesion_pixels and lesion_mm2 (of the mask), a probability
    for each image class (a sigmoid each, so they need not sum to 1), and the likeliest class. What
    is unknown is empty.

    The mask that is drawn and measured is the one that `covidmask evaluate` scores: `fuse` of the
    maps of `metrics.detection.detect`. Weak boxes that support each other count in it, so a pixel
    may be lesion where no box is drawn, and the other way round.

    summary.csv has a row for each volume, and one for all pictures: slices, looked_at,
    lesion_slices (with a lesion pixel), and for each class the share of slices in which it is
    likeliest, and its mean and highest probability.

    Args:
        images: files and folders for `find_scans`.
        segmenter, classifier: weights files.
        out: folder, made if needed.
        score: boxes that score above it are drawn and counted, 0..1.
        device: a name of torch's.
        series: number of the series in a folder that holds several.
        slices, every: which slices of each volume; see `choose_slices`.
        window: level and width in HU, for DICOM and NIfTI.
        threshold: pixels whose probability in the fused maps is above it are lesion, 0..1.

    Returns:
        The rows of predictions.csv.

    Raises:
        DataError: an image cannot be used, a volume has no such slices, or `score` or `threshold`
            is not in 0..1.
        CheckpointError: a weights file cannot be used.
        OutputError: `out` cannot be written, or a picture there is one of `images`. Pictures that
            are there already are complete.
    """
    for name, value in (("score", score), ("threshold", threshold)):
        if not 0 <= value <= 1:
            raise DataError(f"{name} {value}: must be a number from 0 to 1")
    scans, notes = find_scans(images, series)
    jobs = _jobs(scans, slices, every)
    _check_outputs(jobs, Path(out), segmenter, classifier)
    if (slices, every, window) != (None, None, LUNG_WINDOW) and not any(s.volume for s in scans):
        notes.append("here is no volume, so --slices, --every and --window change nothing.")
    each = [job.slice for job in jobs]
    darkest = dict.fromkeys((scan.name for scan in scans), 1.0)
    flat = []
    for job, grey in zip(
        jobs, read_slices(tqdm(each, desc="checking images"), window), strict=True
    ):
        darkest[job.scan.name] = min(darkest[job.scan.name], float(grey.min()))
        # but for one pixel in 200, as a few bright ones do not help the rest
        if not job.scan.volume and np.ptp(np.percentile(grey, (0.5, 99.5))) < FLAT:
            flat.append(job.slice.path.name)
    if flat:
        notes.append(
            f"pictures: {some(flat)} use less than an eighth of the grey values from black to "
            "white, so the networks see next to nothing; rescale them if they should not be flat."
        )
    for scan in scans:
        if scan.volume:
            looked_at = sum(job.scan is scan for job in jobs)
            tqdm.write(
                f"{scan.name}: {scan.source}; looking at {looked_at} of {len(scan.slices)} slices"
            )
        if scan.volume and darkest[scan.name] > hounsfield_to_unit(AIR, window):
            notes.append(
                f"{scan.name}: no pixel is as dark as air; its values may be no Hounsfield units."
            )
    for note in notes:
        tqdm.write(f"Note: {note}")
    detector = for_inference(load_segmenter(segmenter, device))
    model = for_inference(load_classifier(classifier, device))
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(jobs), desc="looking at slices") as progress:
        for batch, greys in _batches(jobs, read_slices(each, window)):
            found_rows = _look(batch, greys, detector, model, Path(out), score, threshold, device)
            for row in found_rows:
                tqdm.write(_line(row, score, model.config.classes))
            rows += found_rows
            progress.update(len(batch))
    classes = model.config.classes
    summary = [_summary(scan, rows, jobs, classes) for scan in scans]
    for name, table in zip(TABLES, (rows, summary), strict=True):
        _write_table(Path(out) / name, table)
    for values in summary:
        if values["looked_at"] > 1:
            shares = ", ".join(f"{c} {values[f'share {c}']:.0%}" for c in classes)
            tqdm.write(
                f"{values['image']}: likeliest by slice: {shares}; lesions in "
                f"{values['lesion_slices']} of {values['looked_at']} slices"
            )
    tqdm.write(CAUTION)
    tqdm.write("Each probability is a sigmoid of its own: together they need not sum to 1.")
    return rows


class _Job(NamedTuple):
    scan: Scan
    number: int  # of the slice in its scan, from 1
    slice: Slice
    picture: str  # name of the output


def _jobs(scans: Sequence[Scan], slices: str | None, every: int | None) -> list[_Job]:
    """The slices to look at, with names for their pictures that differ and name no patient."""
    jobs: list[_Job] = []
    used: set[str] = set()
    many = sum(scan.volume for scan in scans) > 1
    for scan in scans:
        count = len(scan.slices)
        chosen = choose_slices(count, slices, every, scan.name) if scan.volume else range(count)
        for k in chosen:
            stem = scan.slices[k].path.stem
            while len(os.fsencode(stem)) > MAX_STEM:
                stem = stem[:-1]
            if scan.volume:
                stem = f"{scan.name.replace(' ', '_')}_" * many + f"slice_{k + 1:04d}"
            name, number = f"{stem}_lesions.png", 1
            while name.lower() in used:  # some file systems take A.png and a.png for one file
                number += 1
                name = f"{stem}_{number}_lesions.png"
            used.add(name.lower())
            jobs.append(_Job(scan, k + 1, scan.slices[k], name))
    return jobs


def _check_outputs(jobs: Sequence[_Job], out: Path, *weights: str | Path) -> None:
    """Refuse to write over something that the reader gave us."""
    read = [*(job.slice.path for job in jobs), *filter(os.path.exists, weights)]
    try:
        inputs = {(s.st_dev, s.st_ino) for s in map(os.stat, read)}
        for name in (*(job.picture for job in jobs), *TABLES):
            path = out / name
            if path.is_dir():
                raise OutputError(f"{path}: is a folder; choose another one with --out")
            if path.exists() and (path.stat().st_dev, path.stat().st_ino) in inputs:
                raise OutputError(
                    f"{path}: is one of the images to look at or a file of weights, and would be "
                    "overwritten; choose another folder with --out"
                )
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{error.filename}: cannot be looked at ({error.strerror}); choose another folder"
        ) from error


def _batches(
    jobs: Sequence[_Job], greys: Iterable[np.ndarray]
) -> Iterator[tuple[list[_Job], list[np.ndarray]]]:
    """Neighbours of one size: in a mixed batch, padding would change what the detector finds."""
    batch: list[_Job] = []
    held: list[np.ndarray] = []
    for job, grey in zip(jobs, greys, strict=True):
        most = min(BATCH, BATCH_PIXELS // grey.size)
        if held and (len(held) >= most or held[0].shape != grey.shape):
            yield batch, held
            batch, held = [], []
        batch.append(job)
        held.append(grey)
    yield batch, held


def _look(
    batch: Sequence[_Job],
    greys: Sequence[np.ndarray],
    detector: nn.Module,
    model: nn.Module,
    out: Path,
    score: float,
    threshold: float,
    device: str,
) -> list[dict[str, Any]]:
    """Run both networks on slices of one size, write their pictures and give their rows."""
    from covidmask.predict import overlay

    classes, image_classes = LESION_CLASSES[detector.config.lesions], model.config.classes
    images = [torch.from_numpy(grey).repeat(3, 1, 1) for grey in greys]  # [3, H, W]
    images = to_model(images, torch.device(device))
    every_found = detect(detector, images, len(classes))
    every_probability = model(images).sigmoid()  # [B, classes]
    if not all(v.isfinite().all() for v in [every_probability, *(f["maps"] for f in every_found)]):
        names = ", ".join(job.picture for job in batch)
        raise CheckpointError(
            f"the networks give values that are not numbers ({names}); train their weights again"
        )
    every_probability = every_probability.tolist()
    rows = []
    for job, grey, found, probabilities in zip(
        batch, greys, every_found, every_probability, strict=True
    ):
        enlarge = max(1, PICTURE_SIDE // min(grey.shape))
        codes = fuse(found["maps"].cpu(), threshold)  # uint8 [H, W]
        picture = overlay(
            grey, found, classes=classes, score_threshold=score, codes=codes, enlarge=enlarge
        )
        write_image(out / job.picture, picture)
        above = found["scores"] > score
        labels = found["labels"][above]
        row: dict[str, Any] = {"image": job.slice.path.name, "slice": None, "instance": None}
        row |= {"position_mm": None, "picture": job.picture, "lesions": len(labels)}
        if job.scan.volume:
            row |= {"image": job.scan.name, "slice": job.number, "instance": job.slice.instance}
            row["position_mm"] = job.slice.position
        row |= {name: int((labels == label).sum()) for label, name in enumerate(classes, 1)}
        row["lesion_pixels"], row["lesion_mm2"] = int((codes > 0).sum()), None
        if job.slice.spacing is not None:
            height, width = job.slice.spacing
            row["lesion_mm2"] = row["lesion_pixels"] * height * width
        row |= dict(zip(image_classes, probabilities, strict=True))
        row["likeliest"] = image_classes[probabilities.index(max(probabilities))]
        rows.append(row)
    return rows


def _line(row: dict[str, Any], score: float, classes: Sequence[str]) -> str:
    name = row["image"] if row["slice"] is None else f"{row['image']}, slice {row['slice']}"
    if row["position_mm"] is not None:
        name += f" ({row['position_mm']:.1f} mm)"
    each = ", ".join(f"{c} {row[c]:.3f}" for c in classes)
    return (
        f"{name}: {each}; lesions above {score:g}: {row['lesions']}, "
        f"lesion pixels: {row['lesion_pixels']:,}"
    )


def _summary(
    scan: Scan, rows: Sequence[dict[str, Any]], jobs: Sequence[_Job], classes: Sequence[str]
) -> dict[str, Any]:
    own = [row for row, job in zip(rows, jobs, strict=True) if job.scan is scan]
    values: dict[str, Any] = {
        "image": scan.name,
        "slices": len(scan.slices),
        "looked_at": len(own),
        "lesion_slices": sum(row["lesion_pixels"] > 0 for row in own),
    }
    for name in classes:
        values[f"share {name}"] = sum(row["likeliest"] == name for row in own) / len(own)
    for name in classes:
        values[f"mean {name}"] = sum(row[name] for row in own) / len(own)
    for name in classes:
        values[f"max {name}"] = max(row[name] for row in own)
    return values | {"note": CAUTION}


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """CSV: None is empty; probabilities have six digits, lengths and areas two."""
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # any file name
    with atomic_path(path) as temporary, open(temporary, "w", **text) as f:
        writer = csv.writer(f)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(
                f"{value:.{2 if '_mm' in key else 6}f}" if isinstance(value, float) else value
                for key, value in row.items()
            )


def overlay(
    image: ArrayLike,
    lesions: Mapping,
    *,
    classes: Sequence[str] = ("GGO", "C"),
    score_threshold: float = 0.0,
    mask_threshold: float = 0.5,
    codes: ArrayLike | None = None,
    enlarge: int = 1,
) -> np.ndarray:
    """Tint the lesions of a slice and frame them with their class and score.

    Args:
        image, lesions, classes, score_threshold, mask_threshold: as in `show_lesions`.
        codes: uint8 [H, W] of `metrics.detection.fuse`, tinted instead of the masks of `lesions`.
        enlarge: draw each pixel as a square of so many, so that words fit on a small slice.

    Returns:
        uint8 [enlarge * H, enlarge * W, 3], to be written as PNG; no pyplot state is touched.
    """
    import torch
    from PIL import Image, ImageDraw
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    grey = torch.tensor(_grey(image).repeat(enlarge, 0).repeat(enlarge, 1)).clamp(0, 1)
    picture = (255 * grey).round().byte().repeat(3, 1, 1)  # [3, H, W]
    boxes, labels, masks, scores = _lesion_arrays(lesions, score_threshold, mask_threshold)
    colours = [LESION_COLOURS[label - 1] for label in labels]
    tints = colours
    if codes is not None:
        tints = LESION_COLOURS[: len(classes)]
        masks = np.stack([np.asarray(codes) == label + 1 for label in range(1, len(classes) + 1)])
    if masks is not None and len(masks):
        large = torch.from_numpy(masks.repeat(enlarge, 1).repeat(enlarge, 2))
        picture = draw_segmentation_masks(picture, large, alpha=0.45, colors=list(tints))
    if len(boxes):
        boxes = boxes * enlarge
        text = [classes[label - 1] for label in labels]
        if scores is not None:
            text = [f"{name} {score:.2f}" for name, score in zip(text, scores, strict=True)]
        corners = torch.from_numpy(boxes)
        corners[:, 2:] = torch.maximum(corners[:, 2:] - 1, corners[:, :2])  # last pixel inside
        picture = draw_bounding_boxes(picture, corners, colors=colours)
        drawing = Image.fromarray(picture.permute(1, 2, 0).numpy())
        pen = ImageDraw.Draw(drawing)
        for (x1, y1, _, y2), words, colour in zip(boxes, text, colours, strict=True):
            # above the box, so that the lesion stays in view; below it at the upper border
            pen.text((x1, y1 - 12 if y1 >= 12 else y2), words, fill=colour)
        return np.array(drawing)
    return picture.permute(1, 2, 0).numpy()
