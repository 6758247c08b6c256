"""Lesions and class probabilities of slices and scans that need not belong to any data set."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from covidmask.config import IMAGE_CLASSES, LESION_CLASSES
from covidmask.data.images import LUNG_WINDOW, write_image
from covidmask.data.medical import hounsfield_to_unit
from covidmask.data.series import Slice
from covidmask.data.volumes import Scan, choose_slices, find_scans, read_slices
from covidmask.files import atomic_path
from covidmask.metrics.detection import binary_masks
from covidmask.models.weights import load_classifier, load_segmenter

PICTURE_SIDE = 512  # pixels: smaller slices are drawn larger, by a whole factor
BATCH = 4  # slices of one size that go through the networks together
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
) -> list[dict[str, Any]]:
    """Write a picture of each slice, predictions.csv and summary.csv; print one line a slice.

    All slices are read before any weights, so that a bad one is reported at once. Outputs carry
    nothing of a DICOM or NIfTI file but pixels, slice and instance numbers, positions and areas:
    no other tag, and no file name, because names of files tell names of patients. Pictures (PNG,
    JPEG, TIFF) keep their file names, without the folder.

    predictions.csv has a row for each slice: image (a picture's name, or "volume 1"), slice (from
    1, nearest the feet where positions are known), instance (DICOM's number), position_mm,
    picture (<name>_lesions.png or slice_0001_lesions.png), lesions above `score`, the same by
    lesion class, lesion_mm2 (area of their union), a probability for each image class (a sigmoid
    each, so they need not sum to 1), and the likeliest class. What is unknown is empty.

    summary.csv has a row for each volume, and one for all pictures: slices, looked_at,
    lesion_slices (with a lesion above `score`), and for each class the share of slices in which it
    is likeliest, and its mean and highest probability.

    Args:
        images: files and folders for `find_scans`.
        segmenter, classifier: weights files.
        out: folder, made if needed.
        score: lesions that score above it are drawn and counted, 0..1.
        device: a name of torch's.
        series: number of the series in a folder that holds several.
        slices, every: which slices of each volume; see `choose_slices`.
        window: level and width in HU, for DICOM and NIfTI.

    Returns:
        The rows of predictions.csv.

    Raises:
        DataError: an image cannot be used, or a volume has no such slices.
        CheckpointError: a weights file cannot be used.
        OutputError: `out` cannot be written. Pictures that are there already are complete.
    """
    scans, notes = find_scans(images, series)
    jobs = _jobs(scans, slices, every)
    each = [job.slice for job in jobs]
    darkest = dict.fromkeys((scan.name for scan in scans), 1.0)
    for job, grey in zip(
        jobs, read_slices(tqdm(each, desc="checking images"), window), strict=True
    ):
        darkest[job.scan.name] = min(darkest[job.scan.name], float(grey.min()))
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
    detector = load_segmenter(segmenter, device)
    model = load_classifier(classifier, device)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(jobs), desc="looking at slices") as progress:
        for batch, greys in _batches(jobs, read_slices(each, window)):
            found_rows = _look(batch, greys, detector, model, Path(out), score, device)
            for row in found_rows:
                tqdm.write(_line(row, score))
            rows += found_rows
            progress.update(len(batch))
    summary = [_summary(scan, rows, jobs) for scan in scans]
    _write_table(Path(out) / "predictions.csv", rows)
    _write_table(Path(out) / "summary.csv", summary)
    for values in summary:
        if values["looked_at"] > 1:
            shares = ", ".join(f"{c} {values[f'share {c}']:.0%}" for c in IMAGE_CLASSES)
            tqdm.write(
                f"{values['image']}: likeliest by slice: {shares}; lesions in "
                f"{values['lesion_slices']} of {values['looked_at']} slices"
            )
    tqdm.write(CAUTION)
    tqdm.write("Each probability is a sigmoid of its own: the three need not sum to 1.")
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
            if scan.volume:
                stem = f"{scan.name.replace(' ', '_')}_" * many + f"slice_{k + 1:04d}"
            name, number = f"{stem}_lesions.png", 1
            while name.lower() in used:  # some file systems take A.png and a.png for one file
                number += 1
                name = f"{stem}_{number}_lesions.png"
            used.add(name.lower())
            jobs.append(_Job(scan, k + 1, scan.slices[k], name))
    return jobs


def _batches(
    jobs: Sequence[_Job], greys: Iterable[np.ndarray]
) -> Iterator[tuple[list[_Job], list[np.ndarray]]]:
    """Neighbours of one size: in a mixed batch, padding would change what the detector finds."""
    batch: list[_Job] = []
    held: list[np.ndarray] = []
    for job, grey in zip(jobs, greys, strict=True):
        if held and (len(held) == BATCH or held[0].shape != grey.shape):
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
    device: str,
) -> list[dict[str, Any]]:
    """Run both networks on slices of one size, write their pictures and give their rows."""
    from covidmask.plotting import overlay  # loads matplotlib

    classes = LESION_CLASSES[detector.config.lesions]
    images = [torch.from_numpy(grey).repeat(3, 1, 1).to(device) for grey in greys]  # [3, H, W]
    every_found = detector(images)
    every_probability = model(images).sigmoid().tolist()  # [B, 3]
    rows = []
    for job, grey, found, probabilities in zip(
        batch, greys, every_found, every_probability, strict=True
    ):
        enlarge = max(1, PICTURE_SIDE // min(grey.shape))
        picture = overlay(grey, found, classes=classes, score_threshold=score, enlarge=enlarge)
        write_image(out / job.picture, picture)
        above = found["scores"] > score
        labels = found["labels"][above]
        row: dict[str, Any] = {"image": job.slice.path.name, "slice": None, "instance": None}
        row |= {"position_mm": None, "picture": job.picture, "lesions": len(labels)}
        if job.scan.volume:
            row |= {"image": job.scan.name, "slice": job.number, "instance": job.slice.instance}
            row["position_mm"] = job.slice.position
        row |= {name: int((labels == label).sum()) for label, name in enumerate(classes, 1)}
        row["lesion_mm2"] = None
        if job.slice.spacing is not None:
            pixels = int(binary_masks(found)[above].any(0).sum())
            row["lesion_mm2"] = pixels * job.slice.spacing[0] * job.slice.spacing[1]
        row |= dict(zip(IMAGE_CLASSES, probabilities, strict=True))
        row["likeliest"] = IMAGE_CLASSES[probabilities.index(max(probabilities))]
        rows.append(row)
    return rows


def _line(row: dict[str, Any], score: float) -> str:
    name = row["image"] if row["slice"] is None else f"{row['image']}, slice {row['slice']}"
    if row["position_mm"] is not None:
        name += f" ({row['position_mm']:.1f} mm)"
    each = ", ".join(f"{c} {row[c]:.3f}" for c in IMAGE_CLASSES)
    return f"{name}: {each}; lesions above {score:g}: {row['lesions']}"


def _summary(scan: Scan, rows: Sequence[dict[str, Any]], jobs: Sequence[_Job]) -> dict[str, Any]:
    own = [row for row, job in zip(rows, jobs, strict=True) if job.scan is scan]
    values: dict[str, Any] = {
        "image": scan.name,
        "slices": len(scan.slices),
        "looked_at": len(own),
        "lesion_slices": sum(row["lesions"] > 0 for row in own),
    }
    for name in IMAGE_CLASSES:
        values[f"share {name}"] = sum(row["likeliest"] == name for row in own) / len(own)
    for name in IMAGE_CLASSES:
        values[f"mean {name}"] = sum(row[name] for row in own) / len(own)
    for name in IMAGE_CLASSES:
        values[f"max {name}"] = max(row[name] for row in own)
    return values | {"note": CAUTION}


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """CSV: None is empty; probabilities have six digits, lengths and areas two."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(
                f"{value:.{2 if '_mm' in key else 6}f}" if isinstance(value, float) else value
                for key, value in row.items()
            )
