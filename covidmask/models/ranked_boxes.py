"""From detections to a feature vector: the N best boxes, ranked (section 3.2, "Batch to features").

Here boxes with low scores stay, because they are all that a healthy slice has, and each box is
written down as the network wrote it: its score and four encoded deltas, best score first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import batched_nms, box_area, clip_boxes_to_image

from covidmask.config import ClassifierConfig
from covidmask.errors import DataError
from covidmask.models.detector import LesionRoIAlign, check_images, same_size_groups


class Ranking(NamedTuple):
    """The K <= N boxes that one image keeps, best first. A RoI can appear once per lesion class."""

    roi: Tensor  # int64 [K], row of the proposal
    label: Tensor  # int64 [K], 1.. (0 is background)
    score: Tensor  # float32 [K], falling, 0..1
    box: Tensor  # float32 [K,4], decoded and clipped, pixels of the resized image, xyxy


class Boxes(NamedTuple):
    """What an encoder reads: the K boxes of one image, best first. Gradients flow through two."""

    score: Tensor  # float32 [K], 0..1; with gradient
    deltas: Tensor  # float32 [K,4], raw outputs of the box predictor; with gradient
    label: Tensor  # int64 [K], 1..
    place: Tensor  # float32 [K,4], xyxy as shares of the resized image, 0..1


Encoder = Callable[[Boxes], Tensor]  # with the names of its columns as `columns`; see `Columns`
COLUMNS: dict[str, Callable[[Boxes], Tensor]] = {  # name -> [K]; one line makes a column
    "score": lambda boxes: boxes.score,
    "dx": lambda boxes: boxes.deltas[:, 0],
    "dy": lambda boxes: boxes.deltas[:, 1],
    "dw": lambda boxes: boxes.deltas[:, 2],
    "dh": lambda boxes: boxes.deltas[:, 3],
    "label": lambda boxes: boxes.label,  # one number, 1, 2, ...
    "x1": lambda boxes: boxes.place[:, 0],
    "y1": lambda boxes: boxes.place[:, 1],
    "x2": lambda boxes: boxes.place[:, 2],
    "y2": lambda boxes: boxes.place[:, 3],
    "cx": lambda boxes: boxes.place[:, 0::2].mean(1),
    "cy": lambda boxes: boxes.place[:, 1::2].mean(1),
    "w": lambda boxes: boxes.place[:, 2] - boxes.place[:, 0],
    "h": lambda boxes: boxes.place[:, 3] - boxes.place[:, 1],
    "area": lambda boxes: (boxes.place[:, 2:] - boxes.place[:, :2]).prod(1),
}


class Columns:
    """Turns `Boxes` into rows, a column for each name of `COLUMNS` or function of yours.

    Any other object will do that has names in `columns` and, called with `Boxes`, gives float32
    [K, len(columns)]; a module with weights of its own trains in the regime "full".
    """

    def __init__(self, columns: Iterable[str | Callable[[Boxes], Tensor]]) -> None:
        self.parts = tuple(columns)
        self.columns = tuple(p if isinstance(p, str) else p.__name__ for p in self.parts)
        ours = [isinstance(part, str) for part in self.parts]  # and no name of ours for yours
        if not ours or ours != [name in COLUMNS for name in self.columns]:
            choice = f"choose among {', '.join(COLUMNS)}, or pass functions of other names"
            raise DataError(f"columns {', '.join(self.columns) or 'none'}: {choice}")

    def __call__(self, boxes: Boxes) -> Tensor:
        found = (COLUMNS[p] if isinstance(p, str) else p for p in self.parts)
        return torch.stack([column(boxes).to(boxes.score.dtype) for column in found], dim=1)


def ranked_boxes(
    detector: GeneralizedRCNN,
    images: list[Tensor],
    config: ClassifierConfig,
    generator: torch.Generator | None = None,
    encoder: Encoder | None = None,
) -> Tensor:
    """Rank the boxes of each image by score; keep the N best, as [score, dx, dy, dw, dh].

    The deltas are the raw outputs of the box predictor for the box's class, before they are
    divided by the box coder's weights. Gradients flow through scores and deltas into box head,
    RoIAlign and backbone, not into the proposals, so the RPN never learns from S. Where one is
    needed, the boxes are first chosen without it and only the N chosen RoIs are differentiated:
    the same gradient for less work. Images of other sizes are run apart from each other, because
    the padding that a mixed batch needs would change features and proposals.

    Args:
        detector: in eval mode; `lesion_mask_rcnn`, or any two-stage detector of torchvision
            (Faster, Mask or Keypoint R-CNN; RoIAlign is slower there on a CPU).
        images: B tensors, float32 [3,H,W] in 0..1; see `check_images`.
        generator: pads by the author's random rule; by default see `even_padding`.

    Returns:
        float32 [B,N,columns]. An image with no box at all gives zeros: score 0 and no shift.
    """
    check_images(images, detector)
    if detector.training:  # batch norm would learn from these images
        raise ValueError("the detector is in train mode; call its eval() first")
    encoder = Columns(config.columns) if encoder is None else encoder
    learned = (*detector.parameters(), *images)  # a saliency map asks for the image's gradient
    with_gradient = torch.is_grad_enabled() and any(value.requires_grad for value in learned)
    rows: list[Tensor | None] = [None] * len(images)
    for group in same_size_groups(images):
        features, proposals, shapes = propose(detector, [images[i] for i in group])
        with torch.no_grad():
            found = *run_box_head(detector, features, proposals, shapes), proposals
            rankings = [
                rank_boxes(*one, detector.roi_heads.box_coder, config)
                for one in zip(*found, shapes, strict=True)
            ]
        logits, deltas, kept = (  # of the K boxes
            [each[ranking.roi] for each, ranking in zip(part, rankings, strict=True)]
            for part in found
        )
        if with_gradient:
            torch.clear_autocast_cache()  # its copies of the weights were made without gradient
            logits, deltas = run_box_head(detector, features, kept, shapes)
        for i, *one, ranking, (height, width) in zip(
            group, logits, deltas, rankings, shapes, strict=True
        ):
            values = encoded_rows(*one, ranking.label)  # [K, 5]
            place = ranking.box / ranking.box.new_tensor([width, height, width, height])
            encoded = encoder(Boxes(values[:, 0], values[:, 1:], ranking.label, place)).float()
            if encoded.shape != (wanted := (len(place), len(encoder.columns))):
                raise ValueError(f"the encoder gives {list(encoded.shape)}, not {list(wanted)}")
            rows[i] = pad_rows(encoded, config.n_boxes, generator)  # [N, columns]
    return torch.stack(rows)  # [B, N, columns]


def propose(detector: GeneralizedRCNN, images: list[Tensor]):
    """Run backbone and RPN: features, proposals, shapes.

    They are a dict of maps [B,C,h,w]; B tensors [P,4], detached, xyxy in pixels of the resized
    images; and B pairs (height, width) of these.
    """
    batch, _ = detector.transform(images)
    features = detector.backbone(batch.tensors)
    if isinstance(features, Tensor):  # of a backbone with one map, as torchvision takes it
        features = {"0": features}
    with torch.no_grad():
        detached = {name: map.detach() for name, map in features.items()}
        proposals, _ = detector.rpn(batch, detached)
    return features, proposals, batch.image_sizes


def run_box_head(detector: GeneralizedRCNN, features, proposals: list[Tensor], shapes):
    """RoIAlign, box head and predictor: per image logits [P,C] and deltas [P,4C], class-major."""
    heads, rows, parts, counts = detector.roi_heads, [], [], [len(boxes) for boxes in proposals]
    pool = heads.box_roi_pool
    if isinstance(pool, LesionRoIAlign):
        pieces = pool.parts(features, proposals, shapes)
    else:
        every = torch.arange(sum(counts), device=proposals[0].device)
        pieces = [(every, pool(features, proposals, shapes))]
    for index, pooled in pieces:
        rows.append(index)
        hidden = heads.box_head(pooled)  # [r, box_features]
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 scores would tie
            parts.append(heads.box_predictor(hidden.float()))  # [r, C], [r, 4C]
    order = torch.cat(rows).argsort()
    logits, deltas = (torch.cat(part)[order].float() for part in zip(*parts, strict=True))
    if logits.shape[1] < 2 or deltas.shape[1] != 4 * logits.shape[1]:
        raise ValueError(
            f"the box predictor gives {logits.shape[1]} classes and {deltas.shape[1]} deltas; give "
            "one with background, a lesion class or more, and four deltas for each of them"
        )
    return logits.split(counts), deltas.split(counts)


def rank_boxes(
    class_logits: Tensor,
    box_regression: Tensor,
    proposals: Tensor,
    image_shape: tuple[int, int],  # height and width of the resized image
    box_coder: BoxCoder,
    config: ClassifierConfig,
) -> Ranking:
    """Choose and order the boxes of one image: [P,C], [P,4C] class-major, [P,4] xyxy.

    Softmax over all classes; background dropped; boxes decoded and clipped; boxes of no area and
    of scores at or below `config.score` dropped; NMS per class on the decoded boxes; best N.
    """
    boxes = box_coder.decode(box_regression, [proposals])  # [P, C, 4]
    boxes = clip_boxes_to_image(boxes, image_shape)[:, 1:].reshape(-1, 4)  # [P*(C-1), 4] RoI-major
    scores = class_logits.softmax(-1)[:, 1:].flatten()  # [P*(C-1)]
    lesions = class_logits.shape[1] - 1
    index = torch.where((box_area(boxes) > 0) & (scores > config.score))[0]
    label = index % lesions + 1
    keep = batched_nms(boxes[index], scores[index], label, config.nms)[: config.n_boxes]
    index = index[keep]
    return Ranking(index // lesions, label[keep], scores[index], boxes[index])


def encoded_rows(class_logits: Tensor, box_regression: Tensor, label: Tensor) -> Tensor:
    """[K,C], [K,4C], [K] -> [K,5]: score and raw deltas of the class `label`."""
    row = torch.arange(len(label), device=label.device)
    scores = class_logits.softmax(-1)[row, label]  # [K]
    deltas = box_regression.reshape(len(label), class_logits.shape[1], 4)[row, label]  # [K, 4]
    return torch.cat([scores[:, None], deltas], dim=1)


def pad_rows(rows: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """[K,F] -> [n,F]: repeat rows in place when K < n, so that the order by score stays."""
    k = len(rows)
    if k == 0:
        return rows.new_zeros(n, rows.shape[1])
    if k >= n:
        return rows[:n]
    index = even_padding(k, n) if generator is None else author_padding(k, n, generator)
    return rows[index.to(rows.device)]


def even_padding(k: int, n: int) -> Tensor:
    """Row i shows box floor(i * k / n): each of k boxes floor(n/k) or ceil(n/k) times, in order."""
    return torch.arange(n) * k // n


def author_padding(k: int, n: int, generator: torch.Generator) -> Tensor:
    """The released code's rule: k - 1 random places at which the next box starts, 1 <= k < n.

    Each box is used, in order, and the last one fills at least two rows.
    """
    starts = torch.zeros(n, dtype=torch.int64)
    starts[torch.randperm(n - 2, generator=generator)[: k - 1] + 1] = 1
    return starts.cumsum(0)
