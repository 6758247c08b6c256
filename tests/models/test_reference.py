"""The package against the released code's rules in plain loops (tests/reference), in small numbers.

Unlike `test_golden.py` this needs no folder of reference files.
"""

import numpy as np
import pytest
import torch
from reference import make_reference
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.metrics.detection import author_image_ap
from covidmask.models.detector import LesionRoIAlign, lesion_mask_rcnn
from covidmask.models.ranked_boxes import author_padding, encoded_rows, pad_rows, rank_boxes


@pytest.fixture(scope="module")
def stored():
    with np.load(make_reference.FILE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_the_file_is_what_its_script_makes(stored):
    made = make_reference.arrays()
    assert made.keys() == stored.keys()
    for name, array in made.items():
        torch.testing.assert_close(torch.from_numpy(array), stored[name], rtol=1e-5, atol=1e-5)


def rank(stored, n_boxes, **changes):
    parts = [stored[f"ranked/{key}"] for key in ("logits", "deltas", "proposals")]
    shape = tuple(stored["ranked/shape"].tolist())
    config = ClassifierConfig(n_boxes=n_boxes, nms=0.75, **changes)
    ranking = rank_boxes(*parts, shape, BoxCoder((10.0, 10.0, 5.0, 5.0)), config)
    return ranking, encoded_rows(parts[0][ranking.roi], parts[1][ranking.roi], ranking.label)


@pytest.mark.parametrize("n_boxes", [1, 20, 68, 500])
def test_ranked_boxes_of_an_oblong_image(stored, n_boxes):
    ranking, rows = rank(stored, n_boxes)
    assert ranking.roi.tolist() == stored["ranked/roi"][:n_boxes].tolist()
    assert ranking.label.tolist() == stored["ranked/label"][:n_boxes].tolist()
    torch.testing.assert_close(ranking.box, stored["ranked/box"][:n_boxes], rtol=0, atol=1e-4)
    torch.testing.assert_close(rows, stored["ranked/row"][:n_boxes], rtol=0, atol=1e-6)
    torch.testing.assert_close(ranking.score, rows[:, 0], rtol=0, atol=1e-6)


def test_the_file_asks_for_every_step(stored):
    """Else a step could be left out unseen."""
    height, width = stored["ranked/shape"].tolist()
    box, roi = stored["ranked/box"], stored["ranked/roi"]
    assert height < width and box[:, 2].max() == width and box[:, 3].max() == height
    assert len(box) < 2 * len(stored["ranked/logits"]) - 4  # four have no area, others fall to NMS
    assert len(roi.unique()) < len(roi)  # a RoI twice, once a class
    grown = stored["ranked/row"][:, 3] > 5 * np.log(1000 / 16)  # where exp is capped,
    assert (grown & (box[:, 0] > 0) & (box[:, 2] < width)).any()  # and the cap is seen


def test_padding(stored):
    _, rows = rank(stored, 500)
    for name in (name for name in stored if name.startswith("padding/")):
        n, k, seed = map(int, name.removeprefix("padding/").split("_"))
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        assert author_padding(k, n, generators[0]).tolist() == stored[name].tolist()
        padded = pad_rows(rows[:k], n, generators[1])
        torch.testing.assert_close(padded, rows[stored[name]], rtol=0, atol=0)


def test_average_precision_of_the_released_code(stored):
    case = {name.removeprefix("ap/"): value for name, value in stored.items() if "ap/" in name}
    height, width = case["shape"].tolist()
    masks, true_masks = (
        torch.from_numpy(make_reference.masks_of(case[key].numpy(), height, width))
        for key in ("boxes", "true_boxes")
    )
    ap = author_image_ap(
        {"masks": masks, "labels": case["labels"], "scores": case["scores"]},
        {"masks": true_masks, "labels": case["true_labels"]},
        case["thresholds"].tolist(),
    )
    assert len(set(ap)) > 3
    np.testing.assert_allclose(ap, case["ap"], rtol=1e-12)


def test_anchors_of_an_oblong_image(stored):
    rows, columns, stride = stored["anchors/map"].tolist()
    config = DetectorConfig(backbone="resnet18", cut=0, fpn_channels=8, box_features=8)
    generator = lesion_mask_rcnn(config, masks=False).rpn.anchor_generator
    shape = (rows * stride, columns * stride)
    batch = ImageList(torch.zeros(1, 3, *shape), [shape])
    anchors = generator(batch, [torch.zeros(1, 8, rows, columns)])[0]
    torch.testing.assert_close(anchors, stored["anchors/all"], rtol=0, atol=0)


def test_roi_align_of_an_oblong_image(stored):
    align = LesionRoIAlign(["0"], 7, 2)
    pooled = align({"0": stored["align/map"][None, None]}, [stored["align/boxes"]], [(60, 100)])
    torch.testing.assert_close(pooled[:, 0], stored["align/pooled"], rtol=1e-5, atol=1e-5)
