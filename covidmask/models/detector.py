"""Mask R-CNN for ground-glass opacity and consolidation (section 3.1).

All is torchvision's but for small subclasses; each says what it does in another way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import ops
from torchvision.models import get_model, get_model_weights
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, Bottleneck

from covidmask.config import LESION_CLASSES, DetectorConfig, lesion_classes
from covidmask.errors import DataError
from covidmask.files import LONGEST, one_line
from covidmask.models.semantic import SemanticBranch

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
STAGES = {  # torchvision's: layers that give a map, of half the size each; the last of stride 32
    **dict.fromkeys(("resnet18", "resnet34", "resnet50"), ("layer1", "layer2", "layer3", "layer4")),
    "mobilenet_v2": ("1", "3", "6", "13", "17"),
}
ROWS = 128  # boxes that RoIAlign takes at a time: few enough to stay in the processor's cache
LARGEST_PATCH = 600  # pixels: beyond it a box has few points for its pixels; torchvision is faster
# where a batch norm is known to read the convolution before it, and nothing else does
IN_ORDER = (nn.Sequential, IntermediateLayerGetter, BasicBlock, Bottleneck)
Instances = dict[str, Tensor]


class FPNBackbone(nn.Module):
    """A network that gives maps, and the feature pyramid on them, with no pooled level on top."""

    def __init__(self, body: nn.Module, strides: list[int], widths: list[int], channels: int):
        super().__init__()
        self.body, self.fpn = body, ops.FeaturePyramidNetwork(widths, channels)
        self.strides, self.widths, self.out_channels = strides, widths, channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """float32 [B,3,H,W] -> maps [B,out_channels,H/stride,W/stride], the finest first."""
        maps = self.body(x)
        if not isinstance(maps, dict):  # timm's are a list, and of some networks channels last
            pairs = zip(maps, self.widths, strict=True)
            maps = [m if m.shape[1] == width else m.permute(0, 3, 1, 2) for m, width in pairs]
            maps = {str(index): map for index, map in enumerate(maps)}
        return self.fpn(maps)


def with_weights(name: str, weights: str | None) -> nn.Module:
    """A network of torchvision's with weights of ImageNet, which torch hub keeps or downloads."""
    if weights is None:
        return get_model(name)
    known = get_model_weights(name).verify(weights)
    path = Path(torch.hub.get_dir(), "checkpoints", Path(known.url).name)
    try:
        return get_model(name, weights=known)
    except Exception as error:  # a copy can be damaged in many ways
        problem = f"the weights cannot be downloaded from {known.url.split('/')[2]}"
        remedy = f"check the network, or put a copy of {known.url} there (TORCH_HOME chooses where)"
        if path.exists():
            problem = "this copy of the weights cannot be read"
            remedy = "delete it, so that it is downloaded again"
        raise DataError(f"{path}: {problem} ({one_line(error)}); {remedy}") from error


def fpn_backbone(config: DetectorConfig, weights: str | None = None) -> FPNBackbone:
    """Build the feature extractor that `config` names; its batch norm is trainable.

    `weights` are of ImageNet (downloaded), or None for random ones: for torchvision's networks a
    name such as "IMAGENET1K_V1"; for timm's "pretrained", or the tag of one of its sets.
    """
    name, cut, levels = config.backbone, config.cut, config.levels
    if cut not in (0, 1, 2) or (name == "resnet50" and cut):
        raise DataError(f"cut {cut}: choose 0, 1 or 2, and 0 for resnet50")
    if levels is None:  # the paper's choice: all of ResNet-50, one of the light models
        levels = 4 if name == "resnet50" else 1
    try:
        if name in STAGES:
            stages, widths = STAGES[name][: len(STAGES[name]) - cut], []
            if not 1 <= levels <= len(stages):
                raise ValueError(f"it has 1 to {len(stages)} levels")
            body, stages = with_weights(name, weights), stages[-levels:]
            body = getattr(body, "features", body)
            for stage in stages:
                norms = [m for m in getattr(body, stage).modules() if isinstance(m, nn.BatchNorm2d)]
                widths.append(norms[-1].num_features)
            body = IntermediateLayerGetter(body, {stage: str(i) for i, stage in enumerate(stages)})
            strides = [32 >> cut + i for i in reversed(range(levels))]
        else:
            from timm import create_model

            name += "" if weights in (None, "pretrained") else f".{weights}"
            which = tuple(range(-levels - cut, -cut))
            body = create_model(name, weights is not None, features_only=True, out_indices=which)
            strides, widths = body.feature_info.reduction(), body.feature_info.channels()
    except (ImportError, LookupError, ValueError, OSError, RuntimeError, AssertionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"backbone {name!r}, weights {weights}, levels {levels}, cut {cut}: {one_line(error)}; "
            f"choose {', '.join(STAGES)}, or a network of timm's, after `pip install timm`"
        ) from error
    return FPNBackbone(body, strides, widths, config.fpn_channels)


# names and strides of the maps of the reader's own backbone, from an empty image
def _own_maps(backbone: nn.Module, config: DetectorConfig) -> tuple[list[str], list[float]]:
    if config.cut:
        raise DataError(f"cut {config.cut}: an own backbone is not cut; choose 0")
    side = math.ceil(config.image_size / 32) * 32
    with torch.no_grad():  # on a copy, whose batch norm may go into eval mode
        maps = copy.deepcopy(backbone).cpu().eval()(torch.zeros(1, 3, side, side))
    maps = {"0": maps} if isinstance(maps, Tensor) else maps
    levels = len(maps) if config.levels is None else config.levels
    if not 1 <= levels <= len(maps):
        raise DataError(f"levels {levels}: choose 1 to {len(maps)}")
    return list(maps)[-levels:], [side / map.shape[-1] for map in maps.values()][-levels:]


def _with_image(backbone: nn.Module, inputs: tuple[Tensor], maps) -> dict[str, Tensor]:
    # the image, normalised float32 [B,3,H,W], as the last of the maps
    return {**({"0": maps} if isinstance(maps, Tensor) else maps), "image": inputs[0]}


class LesionRPNHead(RPNHead):
    """torchvision's, with results in float32: bfloat16 boxes end at every second pixel."""

    def forward(self, x):
        logits, deltas = super().forward(x)
        return [map.float() for map in logits], [map.float() for map in deltas]


class LesionRPN(RegionProposalNetwork):
    """torchvision's RPN on the maps `names`, with two points of the released code.

    Proposals are ranked on raw logits: a sigmoid rounds strong logits to the same number, and
    ties then decide. `config.rpn_box_beta` sets the smooth L1 loss of the boxes; 0 is plain L1.
    """

    def __init__(self, config: DetectorConfig, channels: int, names: list[str]) -> None:
        sizes, ratios = ((c,) * len(names) for c in (config.anchor_sizes, config.anchor_ratios))
        anchors = AnchorGenerator(sizes, ratios)
        head = LesionRPNHead(channels, anchors.num_anchors_per_location()[0])
        sampling = (*config.rpn_iou, config.rpn_batch, config.rpn_positive)
        kept = {"training": config.rpn_train_proposals, "testing": config.rpn_test_proposals}
        super().__init__(anchors, head, *sampling, kept, {**kept}, config.rpn_nms)
        self.names, self.min_size, self.box_beta = names, config.rpn_min_size, config.rpn_box_beta

    def forward(self, images, features, targets=None):
        return super().forward(images, {name: features[name] for name in self.names}, targets)

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):
        objectness = objectness.detach().reshape(len(proposals), -1)  # [B, A]
        counts = enumerate(num_anchors_per_level)
        levels = torch.cat([objectness.new_full((count,), level) for level, count in counts])
        best = self._get_top_n_idx(objectness, num_anchors_per_level)  # [B, T] per level, by logit
        kept = []
        for boxes, logits, index, shape in zip(
            proposals, objectness, best, image_shapes, strict=True
        ):
            boxes = ops.clip_boxes_to_image(boxes[index], shape)
            large = ops.remove_small_boxes(boxes, self.min_size)
            boxes, logits, level = boxes[large], logits[index[large]], levels[index[large]]
            keep = ops.batched_nms(boxes, logits, level, self.nms_thresh)[: self.post_nms_top_n()]
            kept.append((boxes[keep], logits[keep]))
        return map(list, zip(*kept, strict=True))

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        positive, negative = (torch.where(torch.cat(p))[0] for p in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        deltas, wanted = pred_bbox_deltas[positive], torch.cat(regression_targets)[positive]
        box_loss = F.smooth_l1_loss(deltas, wanted, beta=self.box_beta, reduction="sum")
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled]
        )
        return objectness_loss, box_loss / max(sampled.numel(), 1)


class LesionRoIAlign(ops.MultiScaleRoIAlign):
    """torchvision's, by matrix products where the features lie on a CPU.

    It takes maps [B,C,h,w] by name, B tensors of boxes [K,4], xyxy in pixels of the images and
    inside them, and B pairs (height, width) of the images.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes) -> Tensor:
        """Pool every box: [sum K, C, output height, output width]."""
        if not next(iter(x.values())).is_cpu:
            return super().forward(x, boxes, image_shapes)
        index, pooled = zip(*self.parts(x, boxes, image_shapes), strict=True)
        return torch.cat(pooled)[torch.cat(index).argsort()]

    def parts(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield int64 [r], which rows of `forward`, and these, in an order that is fast."""
        rois = torch.cat(boxes)
        if len(rois) == 0 or not next(iter(x.values())).is_cpu:
            pooled = super().forward(x, boxes, image_shapes)
            yield torch.arange(len(rois), device=rois.device), pooled
            return
        maps = [x[name] for name in self.featmap_names if name in x]
        image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
        height = max(shape[0] for shape in image_shapes)  # as torchvision, which looks at no width
        steps = [round(math.log2(map.shape[-2] / height)) for map in maps]
        # which map a box is read from: equation 1 of the FPN paper, as torchvision has it
        side = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
        level = self.canonical_level + torch.log2(side / self.canonical_scale) + 1e-6
        level = level.floor().clamp(-steps[0], -steps[-1]).to(torch.int64) + steps[0]
        for i, (map, step) in enumerate(zip(maps, steps, strict=True)):
            rows = torch.where(level == i)[0]
            if len(rows):
                for part, pooled in self._pool(map, rois[rows], image[rows], 2.0**step):
                    yield rows[part], pooled

    def _pool(self, map: Tensor, rois: Tensor, image: Tensor, scale: float):
        channels, height, width = map.shape[1:]
        pixels = map.permute(0, 2, 3, 1).reshape(-1, channels)  # [B*h*w, C]; a view: channels last
        x1, y1, x2, y2 = (rois * scale).unbind(1)
        x, left, patch_width = self._points(x1, x2, self.output_size[1], width)
        y, top, patch_height = self._points(y1, y2, self.output_size[0], height)
        is_large = patch_height * patch_width > LARGEST_PATCH
        if is_large.any():
            part = torch.where(is_large)[0]
            boxes = torch.cat([image[part, None].to(rois), rois[part]], dim=1)  # [r, 5]
            options = self.output_size, scale, self.sampling_ratio
            pooled = ops.roi_align(map.float(), boxes, *options)  # has no bfloat16 on a CPU
            yield part, pooled.to(map.dtype)
        small = torch.where(~is_large)[0]
        order = small[(patch_height * width + patch_width)[small].argsort()]  # like sizes together
        for part in order.split(ROWS) if len(order) else ():
            columns = left[part, None] + torch.arange(int(patch_width[part].max()))  # [r, w]
            rows = top[part, None] + torch.arange(int(patch_height[part].max()))  # [r, h]
            hats = _hat(y[part], rows, height), _hat(x[part], columns, width)
            weights = torch.einsum("rah,rbw->rhwab", *hats).flatten(3).flatten(1, 2)
            place = (image[part, None] * height + rows.clamp(max=height - 1)) * width  # [r, h]
            place = place[:, :, None] + columns.clamp(max=width - 1)[:, None]  # [r, h, w]
            patch = F.embedding(place.flatten(1), pixels)  # [r, h*w, C]
            pooled = torch.bmm(patch.transpose(1, 2), weights.to(patch.dtype))  # [r, C, bins]
            yield part, pooled.reshape(len(part), channels, *self.output_size)

    def _points(self, start: Tensor, end: Tensor, bins: int, length: int):
        """Along one axis: where each bin reads, [K, bins, points]; first pixel, and how many."""
        n = self.sampling_ratio
        size = ((end - start).clamp(min=1) / bins)[:, None, None]
        bin, point = torch.arange(bins)[:, None], torch.arange(n)
        points = start[:, None, None] + bin * size + (point + 0.5) * size / n
        ends = points[:, (0, -1), (0, -1)].clamp(0, length - 1).floor().to(torch.int64)  # [K, 2]
        return points, ends[:, 0], ends[:, 1] + 2 - ends[:, 0]


def _hat(points: Tensor, pixels: Tensor, length: int) -> Tensor:
    """Weights of linear interpolation, mean over a bin's points: [r, bins, pixels]."""
    inside = (points >= -1) & (points <= length)  # further outside counts 0; else the edge counts
    distance = points.clamp(0, length - 1)[..., None] - pixels[:, None, None]  # [r, bins, n, p]
    return ((1 - distance.abs()).clamp(min=0) * inside[..., None]).mean(2)


class LesionPredictor(FastRCNNPredictor):
    """torchvision's, in float32, also in mixed precision: bfloat16 scores would tie."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class LesionRoIHeads(RoIHeads):
    """torchvision's, with `config.box_beta` for the smooth L1 loss of the boxes.

    `config.semantic` adds a loss, and to predictions `semantic`, float32 [classes - 1, h, w]: the
    probability of each lesion class at half the size of the image.
    """

    def __init__(
        self, config: DetectorConfig, channels: int, names: list[str], classes: int, masks: bool
    ) -> None:
        pool = LesionRoIAlign(names, output_size=7, sampling_ratio=2)
        box_head = TwoMLPHead(channels * 7 * 7, config.box_features)
        predictor = LesionPredictor(config.box_features, classes)
        sampling = (*config.box_iou, config.box_batch, config.box_positive)
        kept = config.box_score, config.box_nms, config.box_detections
        super().__init__(pool, box_head, predictor, *sampling, None, *kept)  # None: (10, 10, 5, 5)
        self.box_beta, self.semantic = config.box_beta, None
        if masks:
            widths = (128,) if config.light_mask_head else (256,) * 4
            self.mask_roi_pool = LesionRoIAlign(names, output_size=14, sampling_ratio=2)
            self.mask_head = MaskRCNNHeads(channels, widths, dilation=1)
            self.mask_predictor = MaskRCNNPredictor(widths[-1], widths[-1], classes)
            if config.semantic:
                self.semantic = SemanticBranch(channels, classes)

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            found, losses = super().forward(features, proposals, image_shapes, targets)
            if self.semantic is not None:
                maps = self.semantic.probabilities(features, image_shapes)
                found = [{**one, "semantic": map} for one, map in zip(found, maps, strict=True)]
            return found, losses
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)  # [R, C, 7, 7]
        class_logits, box_regression = self.box_predictor(self.box_head(pooled))  # [R,C], [R,4C]
        all_labels = torch.cat(labels)
        positive = torch.where(all_labels > 0)[0]
        deltas = box_regression.reshape(len(all_labels), -1, 4)[positive, all_labels[positive]]
        wanted = torch.cat(wanted)[positive]
        box_loss = F.smooth_l1_loss(deltas, wanted, beta=self.box_beta, reduction="sum")
        losses = {
            "loss_classifier": F.cross_entropy(class_logits, all_labels),
            "loss_box_reg": box_loss / max(all_labels.numel(), 1),
        }
        if self.has_mask():
            # masks learn on positive RoIs
            lesions = [torch.where(label > 0)[0] for label in labels]
            rois = [boxes[index] for boxes, index in zip(proposals, lesions, strict=True)]
            matched = [match[index] for match, index in zip(matched, lesions, strict=True)]
            pooled = self.mask_roi_pool(features, rois, image_shapes)  # [M, C, 14, 14]
            mask_logits = self.mask_predictor(self.mask_head(pooled))  # [M, classes, 28, 28]
            masks, true_labels = ([t[key] for t in targets] for key in ("masks", "labels"))
            losses["loss_mask"] = maskrcnn_loss(mask_logits, rois, masks, true_labels, matched)
        if self.semantic is not None:
            losses["loss_semantic"] = self.semantic.loss(features, image_shapes, targets)
        return [], losses


class LesionMaskRCNN(GeneralizedRCNN):
    """torchvision's detector, which looks at its images first; see `check_images`."""

    def forward(self, images, targets=None):
        check_images(images, self)
        return super().forward(images, targets)


def lesion_mask_rcnn(
    config: DetectorConfig,
    weights: str | None = None,
    masks: bool = True,
    backbone: nn.Module | None = None,
) -> GeneralizedRCNN:
    """Build the detector (section 3.1), with random weights but for an optional ImageNet backbone.

    Args:
        weights: see `fpn_backbone`.
        masks: without masks it is the one inside the classifier: run and ranked, not trained.
        backbone: yours, as torchvision wants it: it has `out_channels` and gives a map, or an
            ordered dict of maps, the finest first, of which the last `config.levels` are used.

    Returns:
        torchvision's `GeneralizedRCNN`, with `config`, `classes` (names of labels 1, 2, ...) and
        `strides`. Input: a list of float32 [3,H,W] in 0..1. In eval mode it returns, per image,
        `boxes` [K,4] (pixels of the input image, xyxy), `labels` [K], `scores` [K] in 0..1 and
        `masks` [K,1,H,W] (probabilities); in train mode, given targets too, the five losses.
    """
    classes = LESION_CLASSES.get(config.lesions) or lesion_classes(config.lesions)
    if not config.anchor_sizes or not config.anchor_ratios:
        raise DataError("there are no anchors; give one size and one ratio or more")
    for side in (config.image_size, config.max_size):
        if not 1 <= side <= 8192:
            raise DataError(f"image size {side}: give 1 to 8192 pixels for both sides")
    if backbone is None:
        backbone = fpn_backbone(config, weights)
        strides = backbone.strides
        names = [str(level) for level in range(len(strides))]
    else:
        names, strides = _own_maps(backbone, config)
        config = replace(config, backbone=type(backbone).__name__)
    powers = [math.log2(stride) for stride in strides]  # RoIAlign rounds them
    if powers != [int(powers[0]) + level for level in range(len(powers))]:
        raise DataError(
            f"backbone {config.backbone!r}: strides {', '.join(f'{s:g}' for s in strides)}; "
            "give powers of two, each twice the one before, or take fewer levels"
        )
    if config.semantic:
        backbone.register_forward_hook(_with_image)
    options, sizes = (config, backbone.out_channels, names), (config.image_size, config.max_size)
    rpn, heads = LesionRPN(*options), LesionRoIHeads(*options, 1 + len(classes), masks)
    transform = GeneralizedRCNNTransform(*sizes, IMAGENET_MEAN, IMAGENET_STD)
    model = LesionMaskRCNN(backbone, rpn, heads, transform)
    model.config, model.classes, model.strides = config, classes, strides
    return model


def check_images(
    images: Sequence[Tensor], model: nn.Module | None = None, names: Sequence[str] | None = None
) -> None:
    """Refuse images that a network would take without a word, and answer with nonsense.

    Each has to be a tensor [3,H,W] of a float up to 32 bits, with values in 0..1, none NaN. Values
    on a GPU are not looked at, because the CPU would have to wait for them; see `to_model`.
    """
    if len(images) == 0:
        raise DataError("no image is given; give a list of float32 tensors [3, H, W] in 0..1")
    if model is not None and next(model.parameters(), torch.empty(0)).dtype == torch.float64:
        raise DataError("the model's weights are torch.float64; use model.float()")
    kinds = (torch.float32, torch.bfloat16, torch.float16)  # mixed precision makes the others
    for number, image in enumerate(images):
        kind, shape = getattr(image, "dtype", None), list(getattr(image, "shape", []))
        fits = kind in kinds and len(shape) == 3 and shape[0] == 3 and image.numel()
        found = f"{type(image).__name__}, {kind} {shape}; give a torch.float32 tensor [3, H, W]"
        if fits and max(shape[1:]) > LONGEST * min(shape[1:]):
            fits, found = False, f"{shape[2]} x {shape[1]} pixels, too thin a strip; crop it"
        elif fits and image.is_cpu:
            low, high = (float(end) for end in image.detach().aminmax())  # NaN if one value is
            fits = low >= -1e-3 and high <= 1.001  # interpolation may step over by its rounding
            found = f"its values run from {low:.4g} to {high:.4g}, not within 0..1; divide 8-bit "
            found += "grey by 255; for CT see covidmask.datasets.medical.hounsfield_to_unit"
        if not fits:
            raise DataError(f"{names[number] if names else f'image {number}'}: {found}")


def to_model(
    images: Sequence[Tensor], device: torch.device, names: Sequence[str] | None = None
) -> list[Tensor]:
    """The images on `device`, after `check_images`, which costs no wait before they are there."""
    check_images(images, names=names)
    return [image.to(device) for image in images]


def same_size_groups(images: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the images, grouped by shape, in order of first appearance."""
    groups: dict[torch.Size, list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(image.shape, []).append(position)
    return list(groups.values())


def binary_masks(instances: Instances, mask_threshold: float = 0.5) -> Tensor:
    """bool [K, H, W]: probabilities above `mask_threshold`, or the non-zero pixels of uint8."""
    masks = instances["masks"].detach()
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]  # [K, 1, H, W] -> [K, H, W]
    if masks.ndim != 3:
        raise ValueError(f"masks of shape {tuple(masks.shape)}: give [K, H, W] or [K, 1, H, W]")
    return masks > mask_threshold if masks.is_floating_point() else masks.bool()


def lesion_maps(prediction: Instances, classes: int) -> Tensor:
    """float32 [classes, H, W], 0..1: how probable it is that a pixel belongs to a lesion.

    `1 - prod(1 - score * mask probability)` over the detections of each class, as if each were
    right or wrong on its own. Where the prediction has `semantic`, too, the mean of both.
    """
    masks = prediction["masks"][:, 0]  # [K, H, W]; 0 away from their boxes
    shape = masks.shape[1:]
    missed = masks.new_ones(classes, *shape, dtype=torch.float32)  # masks may be bfloat16
    facts = (prediction[key].tolist() for key in ("boxes", "labels", "scores"))
    for mask, (x1, y1, x2, y2), label, score in zip(masks, *facts, strict=True):
        rows, columns = _window(y1, y2), _window(x1, x2)
        missed[label - 1, rows, columns] *= 1 - score * mask[rows, columns].float()
    if "semantic" not in prediction:
        return 1 - missed
    semantic = prediction["semantic"][None].float()  # [1, classes, h, w]
    return (1 - missed + F.interpolate(semantic, size=shape, mode="bilinear")[0]) / 2


def _window(start: float, end: float) -> slice:
    # where torchvision pastes the mask of a box: 28 pixels, and one more on either side
    margin = (end - start) / 28 + 2
    return slice(max(0, int(start - margin)), int(end + margin))


def detect(
    model: nn.Module, images: list[Tensor], classes: int, mirror: bool = False
) -> list[Instances]:
    """Run a detector on images of one size; add `maps`, the `lesion_maps`, to each prediction.

    With `mirror` they are the mean of those of the images and of mirrored ones.
    """
    predictions = model(images)
    for prediction in predictions:
        prediction["maps"] = lesion_maps(prediction, classes)
    if mirror:
        others = model([image.flip(-1) for image in images])
        for prediction, other in zip(predictions, others, strict=True):
            prediction["maps"] = (prediction["maps"] + lesion_maps(other, classes).flip(-1)) / 2
    return predictions


def fuse(maps: Tensor, threshold: float = 0.5) -> np.ndarray:
    """uint8 [H, W], the codes of `semantic_mask`, from the maps of `lesion_maps`.

    The likeliest class where the probability of any, `1 - prod(1 - map)`, is above `threshold`.
    """
    lesion = 1 - (1 - maps).prod(0) > threshold  # [H, W]
    return (lesion * (maps.argmax(0) + 2)).to(dtype=torch.uint8).numpy()


def for_inference(model: nn.Module) -> nn.Module:
    """Copy a detector or classifier for prediction: fewer layers, channels last, eval mode.

    In eval mode batch norm is a fixed scale and shift of each channel. In torchvision's ResNets and
    in sequences it is folded into the convolution before it: one pass over the feature map less,
    and results that differ by rounding. The copy shares nothing, and needs no gradient.
    """
    fast = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(fast.modules()):
        if not any(type(module).forward is kind.forward for kind in IN_ORDER):
            continue
        for (name, layer), (next_name, follower) in pairwise(list(module._modules.items())):
            plain = type(layer) is nn.Conv2d and type(follower) is nn.BatchNorm2d  # no subclass
            # hooks may change weights and results, or read them
            hooks = [(m._forward_pre_hooks, m._forward_hooks) for m in (layer, follower) if plain]
            if plain and follower.running_mean is not None and not any(map(any, hooks)):
                setattr(module, name, fuse_conv_bn_eval(layer, follower))
                setattr(module, next_name, nn.Identity())
    return fast.eval().requires_grad_(False).to(memory_format=torch.channels_last)
