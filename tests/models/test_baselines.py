import numpy as np
import pytest
import torch

from covidmask.metrics.detection import CocoAP
from covidmask.models.baselines import area_features, fit_area_classifier, threshold_detections


def body_with(lesions):
    """Soft tissue 0.9 around two lungs of 0.3, in air of 0; lesions (y, x, size, intensity)."""
    image = np.zeros((64, 64), dtype=np.float32)
    image[4:60, 4:60] = 0.9
    image[10:54, 10:30] = image[10:54, 34:54] = 0.3
    for y, x, size, intensity in lesions:
        image[y : y + size, x : x + size] = intensity
    return image


def test_threshold_detections_finds_what_is_in_the_band_inside_the_body():
    image = body_with([(20, 12, 8, 0.5), (30, 40, 6, 0.5), (40, 40, 6, 0.8), (45, 14, 3, 0.5)])
    image[0:3, 0:20] = 0.5  # in the band, outside the body
    found = threshold_detections(image, 0.4, 0.6, min_area=20)
    assert found["boxes"].tolist() == [[12, 20, 20, 28], [40, 30, 46, 36]]  # largest first
    assert found["labels"].tolist() == [1, 1]
    np.testing.assert_allclose(found["scores"], np.array([64, 36]) / 64**2)
    assert found["masks"].sum((1, 2)).tolist() == [64, 36]
    assert found["masks"].dtype == torch.uint8


def test_threshold_detections_joins_corners_and_drops_lines():
    found = threshold_detections(body_with([(20, 12, 5, 0.5), (25, 17, 5, 0.5)]), 0.4, 0.6, 20)
    assert found["boxes"].tolist() == [[12, 20, 22, 30]]
    image = body_with([])
    image[12:50, 20] = 0.5
    assert len(threshold_detections(image, 0.4, 0.6, 20)["labels"]) == 0


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_threshold_detections_without_a_body_finds_nothing(value):
    found = threshold_detections(np.full((32, 40), value, dtype=np.float32))
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape == (0, 32, 40)
    assert found["scores"].shape == (0,)


def test_threshold_detections_suit_the_metric():
    found = threshold_detections(body_with([(20, 12, 8, 0.5)]))
    metric = CocoAP()
    metric.update([found], [{key: found[key] for key in ("boxes", "labels", "masks")}])
    assert metric.compute()["mask_ap"] == pytest.approx(1)


def test_area_features():
    mask = np.array([[0, 1, 2, 2], [3, 0, 0, 2]], dtype=np.uint8)
    assert area_features(mask).tolist() == [3 / 8, 1 / 8]
    assert area_features(torch.from_numpy(mask)).tolist() == [3 / 8, 1 / 8]


def test_area_classifier_separates_what_areas_separate():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    centres = np.array([[0, 0], [0.1, 0.01], [0.01, 0.05]])
    features = centres[labels] + rng.normal(0, 0.005, (120, 2))
    classifier = fit_area_classifier(features[::2], labels[::2])
    assert classifier.score(features[1::2], labels[1::2]) > 0.95
    shuffled = fit_area_classifier(features[::2], rng.permutation(labels[::2]))
    assert shuffled.score(features[1::2], labels[1::2]) < 0.7
