"""COCO's average precision, the released code's, and Dice, of torchvision's dictionaries:
boxes float32 [K, 4] (x1, y1, x2, y2 in pixels), labels int64 [K], of predictions scores float32
[K], and masks: probabilities float [K, 1, H, W], or bool/uint8 [K, H, W]. K may be 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor, distributed

from covidmask.models.detector import Instances, binary_masks, fuse

IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


class CocoAP:
    """COCO's average precision (AP) of masks and boxes, by torchmetrics and faster-coco-eval.

    As in COCO, the 100 best detections of an image count, and AP is the mean over 101 recalls,
    10 IoU thresholds (0.50 to 0.95) and the classes that have a target. Under `torch.distributed`
    `compute` joins the images of all processes, whose numbers may differ; each must call it.

    Args:
        classes: names of labels 1, 2, ...; adds the AP at IoU 0.5 of each.
        mask_threshold: see `binary_masks`.
    """

    def __init__(self, classes: Sequence[str] = (), mask_threshold: float = 0.5) -> None:
        self.classes, self.mask_threshold = tuple(classes), mask_threshold
        self._metric = _mean_average_precision()

    def update(self, predictions: Sequence[Instances], targets: Sequence[Instances]) -> None:
        """Add images: one prediction and one target for each, of the same height and width."""
        for prediction, target in zip(predictions, targets, strict=True):
            _check_pair(prediction, target)
            self._metric.update([self._plain(prediction, "scores")], [self._plain(target)])

    def _plain(self, instances: Instances, *more: str) -> Instances:
        plain = {key: instances[key].detach().cpu() for key in ("boxes", "labels", *more)}
        return {**plain, "masks": binary_masks(instances, self.mask_threshold).cpu()}

    def compute(self) -> dict[str, float]:
        """mask_ap, mask_ap50, mask_ap75, box_ap, box_ap50 and box_ap75 of all images, 0..1.

        With `classes` also mask_ap50_<class> and box_ap50_<class>. NaN (COCO's -1): no target.
        """
        metric = self._metric
        if distributed.is_available() and distributed.is_initialized():
            states = [None] * distributed.get_world_size()
            distributed.all_gather_object(states, metric.metric_state)
            metric = _mean_average_precision()
            for name in metric.metric_state:
                setattr(metric, name, [image for state in states for image in state[name]])
            metric._update_count = 1  # else torchmetrics warns that nothing was added
        if not metric.groundtruth_labels:
            raise ValueError("average precision of no image: add at least one by `update`")
        values, result = metric.compute(), {}
        labels = values["classes"].reshape(-1).tolist()
        for name, prefix in (("mask", "segm"), ("box", "bbox")):
            for ours, theirs in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
                result[f"{name}_{ours}"] = float(values[f"{prefix}_{theirs}"])
            # precision [10 IoU, 101 recalls, classes, 4 areas (0: all), 3 limits (2: 100 boxes)]
            ap50 = values[f"{prefix}_precision"][0, :, :, 0, 2].mean(dim=0).tolist()
            ap50 = dict(zip(labels, ap50, strict=True))
            for label, lesion in enumerate(self.classes, start=1):
                result[f"{name}_ap50_{lesion}"] = ap50.get(label, -1.0)
        return {name: value if value >= 0 else float("nan") for name, value in result.items()}


def _mean_average_precision():
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(
        iou_type=("segm", "bbox"),
        backend="faster_coco_eval",
        # torchmetrics' own are float32: 0.2 becomes 0.200000003, so that a recall or an IoU of
        # exactly 1/5 misses it and AP differs from COCO's in the third digit
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        extended_summary=True,
        # its own way waits for ever when one process has more images than another
        sync_on_compute=False,
    )
    metric.warn_on_many_detections = False  # COCO's limit of 100 is meant
    return metric


def author_ap(
    predictions: Iterable[Instances],
    targets: Iterable[Instances],
    thresholds: Sequence[float] = IOU_THRESHOLDS,
) -> np.ndarray:
    """The mean of `author_image_ap` over images; predictions and targets may be generators.

    His script judges detections that score above 0.05 (his README, for the light models, 0.75), and
    targets of more than 100 pixels.
    """
    pairs = zip(predictions, targets, strict=True)
    rows = [author_image_ap(*pair, thresholds) for pair in pairs]
    if not rows:
        raise ValueError("average precision of no image: give at least one")
    return np.mean(rows, axis=0)


def author_image_ap(
    prediction: Instances, target: Instances, thresholds: Sequence[float] = IOU_THRESHOLDS
) -> np.ndarray:
    """AP of one image by the rule of the released code: float64 [T], 0..1, one per IoU threshold.

    Each target takes the prediction of its own class with the largest mask IoU above the threshold,
    whatever its score (of equals, the one that scores least). Two targets may take the same one,
    which counts once. One curve of precision over recall is drawn for all classes together, made
    monotonic as in PASCAL VOC 2010. Without targets and predictions the AP is 1; without one 0.
    """
    _check_pair(prediction, target)
    n_predictions, n_targets = len(prediction["labels"]), len(target["labels"])
    if not n_predictions or not n_targets:
        return np.full(len(thresholds), float(n_predictions == n_targets))
    order = prediction["scores"].detach().argsort(stable=True)  # rising
    masks = binary_masks(prediction)[order].flatten(1).float()  # [K, H*W]
    true = binary_masks(target).flatten(1).float()  # [L, H*W]
    both = masks @ true.T  # [K, L]
    iou = both / (masks.sum(1)[:, None] + true.sum(1) - both).clamp(min=1)  # 0 if both are empty
    same_class = prediction["labels"][order][:, None] == target["labels"]
    iou = iou.where(same_class, 0).cpu().numpy()
    best = iou.argmax(axis=0)  # [L], the first of equals
    hits = iou.max(axis=0) > np.array(thresholds, dtype=np.float32)[:, None]  # [T, L]
    right = np.zeros((len(thresholds), n_predictions))  # 1 where a prediction is taken
    threshold, taken = np.nonzero(hits)
    right[threshold, -1 - best[taken]] = 1  # the best score first
    precision = right.cumsum(1) / np.arange(1, n_predictions + 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # best from here on
    return (right * envelope).sum(1) / n_targets  # each hit is one step of recall


def semantic_mask(prediction: Instances, score_threshold: float = 0.75) -> np.ndarray:
    """Paint instances that score above a threshold, in rising score: the best lies on top.

    uint8 [H, W]: 0 background, else 1 + label (2 GGO, 3 C), as `mask_to_targets` without the lung.
    """
    masks = binary_masks(prediction).cpu().numpy()
    scores, labels = (prediction[key].detach().cpu().numpy() for key in ("scores", "labels"))
    codes = np.zeros(masks.shape[1:], dtype=np.uint8)
    for i in np.argsort(scores, kind="stable"):
        if scores[i] > score_threshold:
            codes[masks[i]] = labels[i] + 1
    return codes


def overlap(maps: Tensor, truth: ArrayLike, threshold: float = 0.5) -> list[list[float]]:
    """Compare `lesion_maps` with a mask of codes, uint8 [H, W]: first all lesions, then each class.

    A row for `overlap_means` has the pixels both in prediction and truth, predicted, true, and in
    all; and the sum of `|probability - truth|`.
    """
    truth, found = np.asarray(truth), fuse(maps, threshold)
    regions = [(found >= 2, truth >= 2, 1 - (1 - maps).prod(0))]
    regions += [(found == c, truth == c, part) for c, part in enumerate(maps, start=2)]
    result = []
    for predicted, true, probability in regions:
        error = np.abs(probability.numpy() - true).sum()
        counts = (predicted & true).sum(), predicted.sum(), true.sum(), true.size, error
        result.append([float(count) for count in counts])
    return result


def overlap_means(table: ArrayLike) -> dict[str, float]:
    """Means over slices of one region: `table` [slices, 5] has rows of `overlap`.

    dice, sensitivity, specificity, mae (mean absolute error of the probability), 0..1: as in
    COVID-SemiSeg's published tables a slice in which prediction and truth share no pixel counts 0.
    Then dice_present, over the slices with a truth (NaN without such), and present, their number.
    """
    both, predicted, true, pixels, error = np.asarray(table, dtype=float).T
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = {
            "dice": 2 * both / (predicted + true),
            "sensitivity": both / true,
            "specificity": (pixels - predicted - true + both) / (pixels - true),
        }
    present = true > 0
    return {
        **{name: float(np.where(both > 0, row, 0).mean()) for name, row in rows.items()},
        "mae": float((error / pixels).mean()),
        "dice_present": float(rows["dice"][present].mean()) if present.any() else float("nan"),
        "present": int(present.sum()),
    }


def dice(predicted: ArrayLike, true: ArrayLike) -> float:
    """Dice's coefficient of two bool masks of one shape: `2 |A and B| / (|A| + |B|)`, 0..1.

    NaN when both are empty: whoever takes a mean decides whether such a slice counts (as 1) or not.
    """
    predicted, true = np.asarray(predicted, dtype=bool), np.asarray(true, dtype=bool)
    if predicted.shape != true.shape:
        raise ValueError(f"masks of shapes {predicted.shape} and {true.shape}: they must agree")
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else float("nan")


def _check_pair(prediction: Instances, target: Instances) -> None:
    if prediction["scores"].isnan().any():
        raise ValueError("scores of detections must not be NaN")
    found, true = (tuple(one["masks"].shape) for one in (prediction, target))
    if found[0] and true[0] and found[-2:] != true[-2:]:
        raise ValueError(f"masks of shapes {found} and {true}: height and width must agree")
