"""Lesions and class probabilities of slices that need not belong to any data set."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from covidmask.config import IMAGE_CLASSES, LESION_CLASSES
from covidmask.data.images import read_image, write_image
from covidmask.files import atomic_path
from covidmask.models.weights import load_classifier, load_segmenter

PICTURE_SIDE = 512  # pixels: smaller slices are drawn larger, by a whole factor


@torch.no_grad()
def predict(
    images: Sequence[str | Path],
    segmenter: str | Path,
    classifier: str | Path,
    out: str | Path,
    score: float = 0.5,
    device: str = "cpu",
) -> Path:
    """Write <image>_lesions.png for each slice, and predictions.csv; print one line a slice.

    All images are read before any weights, so that a bad one is reported at once. Names and
    pixels are all that is taken from a file: no DICOM tag reaches an output.

    Args:
        images: files for `read_image`.
        segmenter, classifier: weights files.
        out: folder, made if needed.
        score: lesions that score above it are drawn and counted, 0..1.
        device: a name of torch's.

    Returns:
        The path of predictions.csv: image, picture, lesions, then a probability for each class
        (a sigmoid each, so they need not sum to 1), then the likeliest class.

    Raises:
        DataError: an image cannot be used.
        CheckpointError: a weights file cannot be used.
        OutputError: `out` cannot be written. Pictures that are there already are complete.
    """
    from covidmask.plotting import overlay  # loads matplotlib

    for path in tqdm(images, desc="checking images"):
        read_image(path)
    detector = load_segmenter(segmenter, device)
    model = load_classifier(classifier, device)
    classes = LESION_CLASSES[detector.config.lesions]
    rows = []
    for path, name in zip(
        tqdm(images, desc="looking at slices"), _picture_names(images), strict=True
    ):
        grey = read_image(path)  # [H, W]
        image = torch.from_numpy(grey).repeat(3, 1, 1).to(device)  # [3, H, W]
        found = detector([image])[0]
        probabilities = model([image])[0].sigmoid().tolist()  # [3]
        enlarge = max(1, PICTURE_SIDE // min(grey.shape))
        picture = overlay(grey, found, classes=classes, score_threshold=score, enlarge=enlarge)
        write_image(Path(out) / name, picture)
        count = int((found["scores"] > score).sum())
        best = IMAGE_CLASSES[probabilities.index(max(probabilities))]
        rows.append([path, name, count, *(f"{p:.6f}" for p in probabilities), best])
        each = ", ".join(f"{c} {p:.3f}" for c, p in zip(IMAGE_CLASSES, probabilities, strict=True))
        tqdm.write(f"{path}: {each}; lesions above {score:g}: {count}")
    tqdm.write("Each probability is a sigmoid of its own: the three need not sum to 1.")
    table = Path(out) / "predictions.csv"
    with atomic_path(table) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["image", "picture", "lesions", *IMAGE_CLASSES, "likeliest"])
        writer.writerows(rows)
    return table


def _picture_names(images: Sequence[str | Path]) -> list[str]:
    """<stem>_lesions.png, with a number where two images have the same stem."""
    names: list[str] = []
    used: set[str] = set()
    for path in map(Path, images):
        stem = path.name[:-7] if path.name.lower().endswith(".nii.gz") else path.stem
        name, number = f"{stem}_lesions.png", 1
        while name.lower() in used:  # some file systems take A.png and a.png for one file
            number += 1
            name = f"{stem}_{number}_lesions.png"
        used.add(name.lower())
        names.append(name)
    return names
