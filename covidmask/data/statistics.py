"""What the data hold: lesions per slice and their sizes (Fig. 1), slices and patients per class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from covidmask.config import IMAGE_CLASSES, LESION_CLASSES
from covidmask.data.lesions import LesionDataset
from covidmask.data.slices import SliceImages


@dataclass(frozen=True)
class LesionStatistics:
    """M slices with R lesion regions of C classes; class c of the C has label c + 1."""

    classes: tuple[str, ...]
    counts: np.ndarray  # int64 [M, C]: regions of each class in each slice
    region_labels: np.ndarray  # int64 [R]
    region_fractions: np.ndarray  # float64 [R]: area / area of the image, 0..1

    def share_of_slices_below(self, regions: int = 5) -> np.ndarray:
        """float64 [C]: share of the slices with fewer regions of a class (Fig. 1.1)."""
        return (self.counts < regions).mean(axis=0)

    def share_of_regions_below(self, *fractions: float) -> np.ndarray:
        """float64 [C]: share of a class's regions smaller than its fraction (Fig. 1.2).

        The paper's are 0.02 for GGO and 0.01 for consolidation. NaN for a class without regions.
        """
        return np.array(
            [
                (areas < limit).mean() if areas.size else np.nan
                for label, limit in enumerate(fractions, start=1)
                for areas in [self.region_fractions[self.region_labels == label]]
            ]
        )


@dataclass(frozen=True)
class ClassStatistics:
    """Slices and patients of each image class."""

    classes: tuple[str, ...]
    slices: np.ndarray  # int64 [3]
    patients: np.ndarray  # int64 [3]


def lesion_statistics(dataset: LesionDataset) -> LesionStatistics:
    """Count and measure the lesions of every slice; reads all files once.

    Raises:
        DataError: as the dataset does on reading.
    """
    classes = LESION_CLASSES[dataset.lesions]
    counts, labels, fractions = [], [], []
    for image, target in (dataset[i] for i in range(len(dataset))):
        found = target["labels"].numpy()
        counts.append(np.bincount(found, minlength=len(classes) + 1)[1:])
        labels.append(found)
        fractions.append(target["area"].double().numpy() / image[0].numel())
    return LesionStatistics(
        classes=classes,
        counts=np.stack(counts),
        region_labels=np.concatenate(labels),
        region_fractions=np.concatenate(fractions),
    )


def class_statistics(dataset: SliceImages) -> ClassStatistics:
    """Count the slices and patients of each class; reads no image."""
    pairs = set(zip(dataset.labels, dataset.patients, strict=True))
    n = len(IMAGE_CLASSES)
    return ClassStatistics(
        classes=IMAGE_CLASSES,
        slices=np.bincount(dataset.labels, minlength=n),
        patients=np.bincount([label for label, _ in pairs], minlength=n),
    )
