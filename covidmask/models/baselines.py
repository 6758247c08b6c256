"""What a trivial method reaches: a detector by intensity, a classifier by lesion area."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from covidmask.datasets.lesions import CONSOLIDATION, GGO, mask_to_targets


def threshold_detections(
    image: np.ndarray, low: float = 0.42, high: float = 0.65, min_area: int = 20
) -> dict:
    """Call everything inside the body that is neither air nor soft tissue a GGO.

    Image: float32 [H, W] in 0..1. GGO lies in `low`..`high` (the defaults suit the lung window of
    `read_image`), in regions of `min_area` pixels or more. Returns what `mask_to_targets` does, all
    of label 1, with float32 scores: shares of the image, falling.
    """
    # the body is the largest region brighter than `high`, its holes (the lungs) filled
    tissue, n = ndimage.label(image > high)
    largest = np.bincount(tissue.ravel())[1:].argmax() + 1 if n else -1
    body = ndimage.binary_fill_holes(tissue == largest)
    candidates = body & (image >= low) & (image <= high)
    candidates = ndimage.binary_opening(candidates, np.ones((3, 3)))  # no vessels, no borders
    found = mask_to_targets(np.where(candidates, GGO, 0), "ggo", min_area)
    order = found["area"].argsort(descending=True, stable=True)
    found = {key: value[order] for key, value in found.items()}
    return {**found, "scores": found["area"] / image.size}


def area_features(mask: ArrayLike) -> np.ndarray:
    """float64 [2]: the shares of the image that are GGO and consolidation; mask codes [H, W]."""
    return np.array([(np.asarray(mask) == code).mean() for code in (GGO, CONSOLIDATION)])


def fit_area_classifier(features: ArrayLike, labels: ArrayLike):
    """Logistic regression of labels, int [M], on standardised features, float [M, F].

    `.score(features, labels)` of the scikit-learn pipeline is its accuracy on other slices.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return classifier.fit(np.asarray(features), np.asarray(labels))
