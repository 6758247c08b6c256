"""Lesions and class probabilities of slices and scans that need not belong to any data set."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

from covidmask.datasets.lungs import CLOSE, crop_box, find_lungs
from covidmask.datasets.medical import hounsfield_to_unit
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
CT_CAUTION = (
    "Lesions are those of a network that has seen drawn chests only, and it errs, see its card. "
    "There are no class probabilities: no classifier that comes with the package is right on scans."
)
WIDE = (0.0, 4096.0)  # level and width that keep all HU of a slice apart


@torch.no_grad()
def predict(
    images: Sequence[str | Path],
    segmenter: str | Path,
    classifier: str | Path,
    out: str | Path,
    score: float = 0.5,
    device: str = "cpu",
    *,
    ct: str | Path | None = None,
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
    lesion_pixels and lesion_mm2 (of the mask), lung_pixels and the share of them that is lesion
    (lung_share), where `ct` was used, a probability for each image class (a sigmoid each,
    so they need not sum to 1), and the likeliest class; what is unknown is empty. summary.csv, with
    a row for each volume and one for all pictures: slices, looked_at, lesion_slices (with a lesion
    pixel), and of each class the share of slices in which it is likeliest, mean and maximum.

    The mask is the one that `covidmask evaluate` scores, `fuse` of the maps of `detect`: weak boxes
    count in it, so a pixel may be lesion where no box is drawn, and the other way round.

    Args:
        images, series, slices, every: as in `find_scans` and `choose_slices`.
        score, threshold: boxes and pixels above them count as lesions, 0..1.
        ct: a segmenter for volumes: it sees the lungs alone, which `find_lungs` seeks, twice (once
            mirrored). Volumes then have no class probabilities. None: `segmenter` and `classifier`.
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
    apart = [scan for scan in scans if ct is not None and scan.volume]
    whole = [job for job in jobs if job[0] not in apart]
    classes, looking = (), []
    if whole:
        detector = for_inference(load_segmenter(segmenter, device))
        model = for_inference(load_classifier(classifier, device))
        classes, lesion_classes = model.config.classes, detector.classes
        looking.append(_look(whole, window, detector, model, len(lesion_classes), device))
    if apart:
        detector = for_inference(load_segmenter(ct, device))
        if whole and detector.classes != lesion_classes:
            raise CheckpointError(f"{ct}: has other lesion classes than {segmenter}; look apart")
        lesion_classes, inside = detector.classes, jobs[len(whole) :]  # pictures come first
        looking.append(_look_at_lungs(inside, window, detector))
    names = [*rows[0], "lesions", "lesion_pixels", "lesion_mm2", "likeliest"]
    names += ["lung_pixels", "lung_share"]
    if len({*names, *lesion_classes, *classes}) < len(names) + len(lesion_classes) + len(classes):
        what = f"two columns would have one name ({', '.join((*lesion_classes, *classes))})"
        raise CheckpointError(f"{segmenter}, {classifier}: {what}; train with other class names")
    looked = tqdm(chain(*looking), total=len(jobs), desc="looking at slices")
    for job, grey, found, p, lungs in looked:
        (scan, one, row), codes = job, fuse(found["maps"].cpu(), threshold)  # uint8 [H, W]
        enlarge = max(1, PICTURE_SIDE // min(grey.shape))
        with atomic_path(out / row["picture"]) as temporary:
            overlay(grey, found, codes, lesion_classes, score, enlarge).save(temporary, "PNG")
        labels, mm = found["labels"][found["scores"] > score].tolist(), one.spacing
        pixels = int((codes > 0).sum())
        area = None if mm is None else pixels * mm[0] * mm[1]
        counts = {name: labels.count(label) for label, name in enumerate(lesion_classes, 1)}
        row |= {"lesions": len(labels)} | counts | {"lesion_pixels": pixels, "lesion_mm2": area}
        lung = None if lungs is None else int(lungs.sum())
        share = float((codes > 0)[lungs].mean()) if lung else None
        row |= {"lung_pixels": lung, "lung_share": share}
        row |= dict(zip(classes, p or [None] * len(classes), strict=True))
        row["likeliest"] = classes[p.index(max(p))] if p else None
        place = "" if row["position_mm"] is None else f" ({row['position_mm']:.1f} mm)"
        said = [f"{c} {row[c]:.3f}" for c in classes if p]
        if lungs is not None:
            said.append("no lung" if share is None else f"{share:.1%} of the lung")
        text = f"{', '.join(said)}; lesions above {score:g}: "
        tqdm.write(f"{_called(row)}{place}: {text}{len(labels)}, lesion pixels: {pixels:,}")
    summary = []
    for scan in scans:
        own = [row for owner, row in zip(owners, rows, strict=True) if owner is scan]
        ill, n = sum(row["lesion_pixels"] > 0 for row in own), len(own)
        row = {"image": scan.name, "slices": len(scan.slices), "looked_at": n, "lesion_slices": ill}
        lung = sum(row["lung_pixels"] or 0 for row in own)
        called = sum((row["lung_pixels"] or 0) * (row["lung_share"] or 0) for row in own)
        row["lung_share"] = called / lung if lung else None
        judged = [] if scan in apart else own
        likeliest = [row["likeliest"] for row in judged]
        for c in classes:
            p = [row[c] for row in judged]
            row[f"share {c}"] = likeliest.count(c) / n if p else None
            row |= {f"mean {c}": sum(p) / n if p else None, f"max {c}": max(p, default=None)}
        summary.append(row | {"note": CT_CAUTION if scan in apart else CAUTION})
        if n > 1:
            text = f"{called / max(lung, 1):.1%} of the lung"
            if judged:
                shares = (f"{c} {row[f'share {c}']:.0%}" for c in classes)
                text = f"likeliest by slice: {', '.join(shares)}"
            tqdm.write(f"{scan.name}: {text}; lesions in {ill} of {n} slices")
        if scan in apart and not lung:
            tqdm.write(f"Note: {scan.name}: no lung is found in any slice; are the values HU?")
    options = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # any file name
    for path, table in zip(tables, (rows, summary), strict=True):
        with atomic_path(path) as temporary, open(temporary, "w", **options) as file:
            writer = csv.writer(file)
            writer.writerow(table[0])
            for row in table:  # None is empty; probabilities have six digits, lengths and areas two
                digits = ((value, 2 if "_mm" in name else 6) for name, value in row.items())
                writer.writerow(f"{v:.{d}f}" if isinstance(v, float) else v for v, d in digits)
    if apart:
        tqdm.write(CT_CAUTION)
    if whole:
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
    jobs: list[tuple], window, detector: nn.Module, model: nn.Module, classes: int, device: str
) -> Iterator[tuple]:
    # job, grey values, lesions, and a probability for each image class; no lungs
    pairs = zip(jobs, read_slices([one for _, one, _ in jobs], window), strict=True)
    # neighbours of one size together: in a mixed batch, padding would change what is found
    for (height, width), group in groupby(pairs, lambda pair: pair[1].shape):
        most = max(1, min(BATCH, BATCH_PIXELS // (height * width)))
        while batch := list(islice(group, most)):
            images = [torch.from_numpy(grey).repeat(3, 1, 1) for _, grey in batch]  # [3, H, W]
            images = to_model(images, torch.device(device))
            found = detect(detector, images, classes)
            probabilities = model(images).sigmoid()  # [B, classes]
            _check_numbers([probabilities, *(f["maps"] for f in found)], batch[-1][0])
            for (job, grey), lesions, p in zip(batch, found, probabilities.tolist(), strict=True):
                yield job, grey, lesions, p, None


def _look_at_lungs(jobs: list[tuple], window, detector: nn.Module) -> Iterator[tuple]:
    # as `_look`, with the lungs bool [H, W] in the place of probabilities
    pairs = zip(jobs, read_slices([one for _, one, _ in jobs], WIDE), strict=True)
    for job, stored in pairs:
        hu = (stored - 0.5) * WIDE[1] + WIDE[0]
        found, lungs = lesions_in_lungs(detector, hu, window)
        _check_numbers([found["maps"]], job)
        yield job, hounsfield_to_unit(hu, window), found, None, lungs


@torch.no_grad()
def lesions_in_lungs(
    detector: nn.Module, hu: np.ndarray, window: tuple[float, float] = LUNG_WINDOW
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Find the lungs of a slice, and the lesions in the part of it that holds them.

    Args:
        detector: a segmenter, ready by `for_inference`.
        hu: float32 [H, W], Hounsfield units.
        window: level and width that the detector sees.

    Returns:
        What `detect` gives, on the CPU and in the coordinates of the whole slice, with the mirrored
        slice, at most `CLOSE` of its side away from the lungs; and the lungs, bool [H, W]. Without
        lungs nothing is found.
    """
    lungs, classes = find_lungs(hu), len(detector.classes)
    if not lungs.any():
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        return empty | {"scores": torch.zeros(0), "maps": torch.zeros(classes, *hu.shape)}, lungs
    rows, columns = crop_box(lungs)
    grey = np.ascontiguousarray(hounsfield_to_unit(hu[rows, columns], window))
    device = next(detector.parameters()).device
    images = to_model([torch.from_numpy(grey).repeat(3, 1, 1)], device)  # [3, h, w]
    found = {key: value.cpu() for key, value in detect(detector, images, classes, True)[0].items()}
    # the liver and the wall of the chest lie in the crop, too: what is far from lung is left out
    near = distance_transform_edt(~lungs) <= CLOSE * max(hu.shape)
    boxes = found["boxes"] + torch.tensor([columns.start, rows.start] * 2)
    kept = []
    for x1, y1, x2, y2 in boxes.round().int().tolist():
        kept.append(near[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)].mean() > 0.5)
    kept = torch.tensor(kept, dtype=torch.bool)
    found |= {"boxes": boxes[kept], "labels": found["labels"][kept]}
    found["scores"] = found["scores"][kept]
    around = (columns.start, hu.shape[1] - columns.stop, rows.start, hu.shape[0] - rows.stop)
    found["maps"] = F.pad(found["maps"], around) * torch.from_numpy(near)  # [classes, H, W]
    return found, lungs


def _check_numbers(values: Sequence[Tensor], job: tuple) -> None:
    if not all(value.isfinite().all() for value in values):
        what = f"give values that are not numbers near {job[2]['picture']}"
        raise CheckpointError(f"the networks {what}; train them again")


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
