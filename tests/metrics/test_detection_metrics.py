import contextlib
import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from covidmask.metrics.detection import (
    IOU_THRESHOLDS,
    CocoAP,
    author_ap,
    author_image_ap,
    dice,
    overlap,
    overlap_means,
    semantic_mask,
)
from covidmask.models.detector import binary_masks, fuse, lesion_maps

SIZE = 48
KEYS = ("mask_ap", "mask_ap50", "mask_ap75", "box_ap", "box_ap50", "box_ap75")


def instances(boxes, labels, scores=None, size=SIZE):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    result = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}
    return result if scores is None else {**result, "scores": torch.tensor(scores)}


def random_images(rng, n, most, classes=3):
    """Targets, and predictions near some of them; some of either are empty."""
    predictions, targets = [], []
    for _ in range(n):
        k = int(rng.integers(0, 5))
        corners = rng.integers(0, SIZE - 16, (k, 2))
        boxes = np.concatenate([corners, corners + rng.integers(4, 15, (k, 2))], axis=1)
        labels = rng.integers(1, classes + 1, k)
        targets.append(instances(boxes, labels))
        m = int(rng.integers(most // 2, most + 1)) if rng.random() > 0.2 else 0
        corners = rng.integers(0, SIZE - 16, (m, 2))
        guesses = np.concatenate([corners, corners + rng.integers(4, 15, (m, 2))], axis=1)
        guess_labels = rng.integers(1, classes + 1, m)
        for i in range(m):
            if k and rng.random() < 0.7:
                j = rng.integers(k)
                guesses[i] = boxes[j] + [*rng.integers(-1, 2, 2), *rng.integers(0, 2, 2)]
                guess_labels[i] = labels[j] if rng.random() < 0.8 else guess_labels[i]
        guesses = np.clip(guesses, 0, SIZE)
        scores = rng.permutation(m).astype(np.float32) / max(m, 1)  # no ties
        predictions.append(instances(guesses, guess_labels, scores))
        predictions[-1]["masks"] = predictions[-1]["masks"][:, None] * 0.9  # as torchvision's
    return predictions, targets


def pycocotools_ap(predictions, targets, iou_type):
    from pycocotools import mask as coding
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def annotation(image, lesions, i):
        mask = binary_masks(lesions)[i].numpy().astype(np.uint8)
        x1, y1, x2, y2 = lesions["boxes"][i].tolist()
        return {
            "image_id": image,
            "category_id": int(lesions["labels"][i]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "segmentation": coding.encode(np.asfortranarray(mask)),
        }

    truth, found = [], []
    for image, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        for i in range(len(target["labels"])):
            area = int(target["masks"][i].sum())
            more = {"id": len(truth) + 1, "iscrowd": 0, "area": area}
            truth.append({**annotation(image, target, i), **more})
        for i in range(len(prediction["labels"])):
            score = float(prediction["scores"][i])
            found.append({**annotation(image, prediction, i), "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(len(targets))],
            "categories": [{"id": i} for i in (1, 2, 3)],
            "annotations": truth,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    per_class = evaluation.eval["precision"][0, :, :, 0, 2].mean(axis=0)
    return [*evaluation.stats[:3], *per_class]


@pytest.mark.parametrize(("seed", "most"), [(0, 6), (1, 10), (2, 10), (3, 140)])
def test_coco_ap_agrees_with_pycocotools(seed, most):
    rng = np.random.default_rng(seed)
    predictions, targets = random_images(rng, 8, most)
    if most > 100:
        assert max(len(prediction["labels"]) for prediction in predictions) > 100
    metric = CocoAP(classes=("one", "two", "three"))
    for start in range(0, 8, 3):
        metric.update(predictions[start : start + 3], targets[start : start + 3])
    values = metric.compute()
    assert set(KEYS) < set(values)
    for name, iou_type in (("mask", "segm"), ("box", "bbox")):
        keys = ("ap", "ap50", "ap75", "ap50_one", "ap50_two", "ap50_three")
        ours = [values[f"{name}_{key}"] for key in keys]
        np.testing.assert_allclose(
            ours, pycocotools_ap(predictions, targets, iou_type), atol=1e-6, rtol=0
        )


def test_coco_ap_of_one_class_by_hand():
    target = instances([[0, 0, 10, 10], [20, 20, 30, 30]], [1, 1])
    found = instances([[0, 0, 10, 10]], [1], [0.9])
    metric = CocoAP(classes=("GGO", "C"))
    metric.update([found], [target])
    values = metric.compute()
    assert values["mask_ap"] == pytest.approx(51 / 101)  # recalls 0, 0.01, ... 0.50 are reached
    assert values["box_ap50_GGO"] == pytest.approx(51 / 101)
    assert math.isnan(values["mask_ap50_C"])


def test_coco_ap_without_targets_is_nan():
    metric = CocoAP()
    metric.update([instances([], [], [])], [instances([], [])])
    assert all(math.isnan(value) for value in metric.compute().values())


def test_coco_ap_of_a_miss_is_zero():
    metric = CocoAP(classes=("GGO",))
    metric.update([instances([[0, 0, 5, 9]], [1], [0.9])], [instances([[20, 20, 30, 30]], [1])])
    values = metric.compute()
    assert set(values) == {*KEYS, "mask_ap50_GGO", "box_ap50_GGO"}
    assert set(values.values()) == {0.0}


def test_thresholds_are_those_of_coco():
    np.testing.assert_allclose(IOU_THRESHOLDS, np.linspace(0.5, 0.95, 10))


def test_coco_ap_keeps_no_graph():
    target = instances([[0, 0, 10, 10]], [1])
    found = instances([[0, 0, 10, 10]], [1], [0.9])
    found["masks"] = found["masks"][:, None].float()
    for key in ("boxes", "scores", "masks"):
        found[key].requires_grad_()
    metric = CocoAP()
    metric.update([found], [target])
    assert metric.compute()["mask_ap"] == pytest.approx(1)
    assert author_image_ap(found, target)[0] == 1
    assert semantic_mask(found)[0, 0] == 2


def test_coco_ap_joins_processes_with_unequal_numbers_of_images(monkeypatch):
    predictions, targets = random_images(np.random.default_rng(3), 5, 6)
    shares = [CocoAP(), CocoAP(), CocoAP()]  # of two processes, and of one that has all
    for i in range(5):
        shares[i % 2].update([predictions[i]], [targets[i]])
        shares[2].update([predictions[i]], [targets[i]])
    expected = shares[2].compute()
    assert expected != shares[0].compute()

    def all_gather_object(states, state):
        assert state.keys() == shares[0]._metric.metric_state.keys()
        states[:] = [share._metric.metric_state for share in shares[:2]]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert shares[0].compute() == pytest.approx(expected)


GOLDEN_CASES = ("perfect", "shifted", "wrong_class", "duplicates", "one_prediction_two_gts")


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_author_ap_is_that_of_the_released_code(case):
    folder = os.environ.get("COVIDMASK_GOLDEN")
    if not folder:
        pytest.skip("COVIDMASK_GOLDEN is unset: reference values of the released code")
    golden = np.load(Path(folder) / "out" / "unit_ap.npz")
    arrays = {key: golden[f"{case}/{key}"] for key in ("gt_boxes", "gt_labels")}
    found = [golden[f"{case}/pred_{key}"] for key in ("boxes", "labels", "scores")]
    target = instances(arrays["gt_boxes"], arrays["gt_labels"], size=100)
    ap = author_ap([instances(*found, size=100)], [target], golden[f"{case}/thresholds"])
    np.testing.assert_array_equal(ap.astype(np.float32), golden[f"{case}/ap"].astype(np.float32))


A, B = [0, 0, 10, 10], [20, 20, 30, 30]


@pytest.mark.parametrize(
    ("found", "target", "expected"),
    [
        # best first: hit, miss, hit -> precision 1 up to recall 1/2, then 2/3
        (
            ([A, [40, 40, 44, 44], B], [1, 1, 2], [0.9, 0.8, 0.7]),
            ([A, B], [1, 2]),
            0.5 + 0.5 * 2 / 3,
        ),
        # the same in the other order of scores: misses first -> precision 2/3 at both hits
        (([A, [40, 40, 44, 44], B], [1, 1, 2], [0.6, 0.8, 0.7]), ([A, B], [1, 2]), 2 / 3),
        # the right place, the wrong class
        (([A], [2], [0.9]), ([A], [1]), 0),
        # a target takes the better overlap (IoU 1) though it scores less than the other (IoU 0.9)
        (([A, [0, 0, 10, 9]], [1, 1], [0.3, 0.8]), ([A], [1]), 0.5),
        # one prediction for two targets counts once
        (([A], [1], [0.9]), ([A, [0, 0, 10, 9]], [1, 1]), 0.5),
        # IoU of exactly 0.5 is not above 0.5
        (([[0, 0, 10, 5]], [1], [0.9]), ([A], [1]), 0),
        (([], [], []), ([], []), 1),
        (([A], [1], [0.9]), ([], []), 0),
        (([], [], []), ([A], [1]), 0),
    ],
)
def test_author_ap_by_hand(found, target, expected):
    assert author_image_ap(instances(*found), instances(*target), [0.5]) == pytest.approx(expected)


def test_author_ap_is_the_mean_over_images_from_generators():
    found = instances([A], [1], [0.9])
    targets = [instances([A], [1]), instances([], [])]
    ap = author_ap((found for _ in targets), iter(targets))
    assert ap.tolist() == [0.5] * 10
    with pytest.raises(ValueError):
        author_ap([found], targets)
    with pytest.raises(ValueError, match="no image"):
        author_ap([], [])


def test_masks_decide_not_boxes():
    found, target = instances([A], [1], [0.9]), instances([A], [1])
    found["masks"] = found["masks"][:, None] * 0.6
    assert author_image_ap(found, target, [0.5]) == 1
    found["masks"] = binary_masks(found, 0.622)
    assert author_image_ap(found, target, [0.5]) == 0


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 4, 6), (2, 1, 1, 4, 6)])
def test_binary_masks_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="masks of shape"):
        binary_masks({"masks": torch.zeros(shape)})


def test_binary_masks_cuts_above_the_threshold():
    probabilities = torch.tensor([[[0.0, 0.5, 0.51, 0.7]]])  # [1, 1, 4]: one row
    assert binary_masks({"masks": probabilities}).tolist() == [[[False, False, True, True]]]
    assert binary_masks({"masks": probabilities[:, None]}, 0.6).tolist() == [
        [[False, False, False, True]]
    ]
    codes = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    assert binary_masks({"masks": codes}, 300).tolist() == [[[False, True, True]]]


def test_lesions_of_one_pixel_and_of_none():
    dot, nothing = [7, 3, 8, 4], [5, 5, 5, 5]
    assert author_image_ap(instances([dot], [1], [0.9]), instances([dot], [1]), [0.9]) == 1
    both = instances([dot, nothing], [1, 1], [0.9, 0.5])
    assert author_image_ap(both, instances([nothing], [1]), [0.5]) == 0


def test_of_equal_overlaps_the_one_that_scores_least_is_taken():
    """As in the released code, which looks at its predictions in rising score."""
    found = instances([[1, 0, 11, 10], A, A], [1, 1, 1], [0.9, 0.8, 0.3])
    assert author_image_ap(found, instances([A], [1]), [0.5]) == pytest.approx(1 / 3)


def test_semantic_mask_puts_the_best_score_on_top():
    found = instances([[0, 0, 4, 1], [1, 0, 3, 1], [2, 0, 4, 1]], [1, 2, 1], [0.8, 0.9, 0.75], 4)
    assert semantic_mask(found, 0.75)[0].tolist() == [2, 3, 3, 2]
    assert semantic_mask(found, 0.85)[0].tolist() == [0, 3, 3, 0]
    exact = instances([[0, 0, 1, 1], [1, 0, 2, 1]], [1, 2], [0.75, 0.8], 4)
    assert semantic_mask(exact)[0].tolist() == [0, 3, 0, 0]  # by default above 0.75
    tie = instances([[0, 0, 3, 1], [1, 0, 3, 1]], [1, 2], [0.8, 0.8], 4)
    assert semantic_mask(tie)[0].tolist() == [2, 3, 3, 0]  # of equals the last lies on top
    faint = {**exact, "masks": exact["masks"][:, None] * 0.6}
    assert semantic_mask(faint, 0.5).any()
    empty = semantic_mask({**instances([], [], []), "masks": torch.zeros(0, 1, 5, 6)})
    assert empty.shape == (5, 6)
    assert empty.dtype == np.uint8
    assert not empty.any()


def test_dice():
    first = np.array([[True, True], [False, False]])
    assert dice(first, first) == 1
    assert dice(first, ~first) == 0
    assert dice(first, [[True, False], [True, True]]) == pytest.approx(0.4)
    assert math.isnan(dice(first & False, first & False))
    with pytest.raises(ValueError, match="shapes"):
        dice(first, first[0])


def soft(labels, scores, masks):
    height, width = np.shape(masks)[1:]
    return {
        "boxes": torch.tensor([[0.0, 0.0, width, height]] * len(labels)),
        "labels": torch.tensor(labels),
        "scores": torch.tensor(scores),
        "masks": torch.tensor(masks)[:, None],  # [K, 1, H, W]
    }


def test_overlapping_detections_support_each_other():
    found = soft([1, 1, 2], [0.5, 0.5, 0.8], [[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.5]]])
    maps = lesion_maps(found, 2)
    assert maps.tolist() == [[[0.75, 0.5]], [[0.0, pytest.approx(0.4)]]]
    assert fuse(maps).tolist() == [[2, 2]]  # 1 - 0.5 * 0.6 = 0.7 is above 0.5; GGO is likelier
    assert fuse(maps, 0.72).tolist() == [[2, 0]]
    nothing = lesion_maps({key: value[:0] for key, value in found.items()}, 2)
    assert nothing.tolist() == [[[0.0, 0.0]], [[0.0, 0.0]]] and not fuse(nothing).any()


def test_the_semantic_branch_counts_as_much_as_the_detections():
    """Maps of 2 x 6 pixels; the branch's have half their height and width."""
    found = soft([1, 2], [0.5, 1.0], [[[0.0] * 6, [0.8] * 6], [[0.0] * 6, [0.0] * 5 + [0.6]]])
    semantic = torch.tensor([[[0.2, 0.2, 0.2]], [[0.0, 0.0, 1.0]]])  # [2, 1, 3]
    maps = lesion_maps({**found, "semantic": semantic}, 2)
    assert maps.shape == (2, 2, 6) and maps.dtype == torch.float32
    torch.testing.assert_close(maps[0], torch.tensor([[0.1] * 6, [0.3] * 6]))
    interpolated = torch.tensor([0.0, 0, 0, 0.25, 0.75, 1])
    torch.testing.assert_close(maps[1, 0], interpolated / 2)
    torch.testing.assert_close(maps[1, 1], (interpolated + torch.tensor([0.0] * 5 + [0.6])) / 2)
    assert lesion_maps(found, 2).tolist()[1][1][5] == pytest.approx(0.6)  # found is as it was


def test_a_probability_of_the_threshold_is_no_lesion():
    maps = torch.tensor([[[0.5, 0.625, 0.0]], [[0.0, 0.0, 0.75]]])
    assert fuse(maps).tolist() == [[0, 2, 3]] and fuse(maps).dtype == np.uint8
    assert fuse(maps, 0.625).tolist() == [[0, 0, 3]]
    assert [row[1] for row in overlap(maps, [[2, 2, 2]])] == [2, 1, 1]
    assert [row[1] for row in overlap(maps, [[2, 2, 2]], 0.7)] == [1, 0, 1]


def test_overlap_counts_pixels_of_infection_and_classes():
    maps = torch.tensor([[[0.9, 0.9, 0.0, 0.0]], [[0.0, 0.0, 0.8, 0.0]]])
    infection, ggo, consolidation = overlap(maps, [[2, 3, 3, 0]])
    assert infection == [3, 3, 3, 4, pytest.approx(0.4)]
    assert ggo[:4] == [1, 2, 1, 4] and consolidation[:4] == [1, 1, 2, 4]


def test_means_follow_the_published_convention():
    table = [[5, 10, 10, 100, 10], [0, 0, 0, 100, 0], [0, 4, 0, 100, 4], [8, 8, 8, 100, 0]]
    means = overlap_means(table)
    assert means["dice"] == pytest.approx((0.5 + 0 + 0 + 1) / 4)  # no shared pixel: 0
    assert means["sensitivity"] == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert means["specificity"] == pytest.approx((85 / 90 + 0 + 0 + 1) / 4)
    assert means["mae"] == pytest.approx(0.14 / 4)
    assert means["dice_present"] == pytest.approx(0.75) and means["present"] == 2
    assert math.isnan(overlap_means(table[1:2])["dice_present"])
    dot = overlap_means([[1, 3, 1, 100, 2], *table[1:2]])  # one pixel is a lesion, too
    assert dot["dice_present"] == 0.5 and dot["present"] == 1


def test_specificity_is_the_share_of_healthy_pixels_left_alone():
    """20 x 5 pixels, 30 of them lesion; 40 called lesion, 25 rightly: 55 of 70 are left alone."""
    assert overlap_means([[25, 40, 30, 100, 0]])["specificity"] == pytest.approx(55 / 70)
    assert overlap_means([[30, 30, 30, 100, 0]])["specificity"] == 1
    # no shared pixel counts 0, also where nothing was found and nothing is there
    for row in ([0, 0, 0, 100, 0], [0, 0, 30, 100, 0], [0, 40, 0, 100, 0], [0, 40, 30, 100, 0]):
        means = overlap_means([row, [25, 40, 30, 100, 0]])
        assert means["specificity"] == pytest.approx(55 / 70 / 2)
        assert means["sensitivity"] == pytest.approx(25 / 30 / 2)
        assert means["dice"] == pytest.approx(50 / 70 / 2)


def test_maps_read_all_that_torchvision_pastes():
    torch.manual_seed(0)
    boxes = torch.rand(20, 2) * 60
    boxes = torch.cat([boxes, boxes + 1 + torch.rand(20, 2) * 70], dim=1).clamp(max=96)
    masks = paste_masks_in_image(torch.rand(20, 1, 28, 28), boxes, (96, 96))  # [20, 1, 96, 96]
    labels, scores = torch.arange(20) % 2 + 1, torch.rand(20)
    found = {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}
    everywhere = 1 - scores[:, None, None] * masks[:, 0]
    expected = [1 - everywhere[labels == label].prod(0) for label in (1, 2)]
    torch.testing.assert_close(lesion_maps(found, 2), torch.stack(expected))


def test_average_precision_of_no_image():
    with pytest.raises(ValueError, match="of no image: add at least one"):
        CocoAP().compute()


def test_pairs_that_do_not_fit():
    box = [(1, 1, 5, 5)]
    target = instances(box, [1])
    for bad, words in (
        (instances(box, [1], [math.nan]), "must not be NaN"),
        (
            {**instances(box, [1], [0.9]), "masks": torch.ones(1, 3, 4)},
            "height and width must agree",
        ),
    ):
        for judge in (
            lambda bad: CocoAP().update([bad], [target]),
            lambda bad: author_image_ap(bad, target),
        ):
            with pytest.raises(ValueError, match=words):
                judge(bad)


def test_maps_of_mixed_precision_are_float32():
    prediction = soft([1], [0.5], [[[0.75] * 4] * 4])
    whole = lesion_maps(prediction, 2)
    short = {**prediction, "masks": prediction["masks"].bfloat16()}
    maps = lesion_maps(short, 2)
    assert maps.dtype == torch.float32 and torch.equal(maps, whole)
