"""Mask R-CNN for ground-glass opacity and consolidation (section 3.1).

Everything is torchvision's but small subclasses: `LesionRPN` ranks proposals on raw logits, it and
`LesionRoIHeads` take the shape of their box loss from the configuration, boxes and scores stay
float32 in mixed precision, and `LesionRoIAlign` is RoIAlign made faster on CPUs. For small sets of
real CT there is a branch that the paper does not have, `SemanticBranch`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes
from torchvision.ops.misc import Conv2dNormActivation

from covidmask.config import DetectorConfig
from covidmask.models.backbones import fpn_backbone
from covidmask.models.inputs import check_images
from covidmask.models.roi_align import LesionRoIAlign

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class LesionRPN(RegionProposalNetwork):
    """torchvision's RPN with two points of the released code that its own does not offer.

    Proposals are ranked on raw logits: a sigmoid rounds strong logits to the same number, and
    ties then decide. `box_beta` sets the smooth L1 loss of the boxes; 0 is plain L1.
    """

    def __init__(self, *args, min_size: float, box_beta: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.min_size = min_size
        self.box_beta = box_beta

    def forward(self, images, features, targets=None):
        maps = {name: map for name, map in features.items() if name != "image"}
        return super().forward(images, maps, targets)

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):
        objectness = objectness.detach().reshape(len(proposals), -1)  # [B, A]
        levels = torch.cat(
            [
                torch.full((count,), level, device=objectness.device)
                for level, count in enumerate(num_anchors_per_level)
            ]
        )
        best = self._get_top_n_idx(objectness, num_anchors_per_level)  # [B, T] per level, by logit
        final_boxes, final_logits = [], []
        for boxes, logits, index, shape in zip(
            proposals, objectness, best, image_shapes, strict=True
        ):
            boxes, logits, level = boxes[index], logits[index], levels[index]
            boxes = clip_boxes_to_image(boxes, shape)
            keep = remove_small_boxes(boxes, self.min_size)
            boxes, logits, level = boxes[keep], logits[keep], level[keep]
            keep = batched_nms(boxes, logits, level, self.nms_thresh)[: self.post_nms_top_n()]
            final_boxes.append(boxes[keep])
            final_logits.append(logits[keep])
        return final_boxes, final_logits

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets):
        positive, negative = self.fg_bg_sampler(labels)
        positive = torch.where(torch.cat(positive))[0]
        sampled = torch.cat([positive, torch.where(torch.cat(negative))[0]])
        box_loss = F.smooth_l1_loss(
            pred_bbox_deltas[positive],
            torch.cat(regression_targets)[positive],
            beta=self.box_beta,
            reduction="sum",
        ) / max(sampled.numel(), 1)
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled]
        )
        return objectness_loss, box_loss


class LesionRPNHead(RPNHead):
    """torchvision's, with results in float32: bfloat16 boxes end at every second pixel."""

    def forward(self, x):
        logits, deltas = super().forward(x)
        return [map.float() for map in logits], [map.float() for map in deltas]


class LesionPredictor(FastRCNNPredictor):
    """torchvision's, in float32, also in mixed precision: bfloat16 scores would tie."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class SemanticBranch(nn.Module):
    """A class for each pixel, from the finest map of the pyramid, as in Panoptic FPN.

    Not in the paper. Lesions of real CT fray and merge: where one instance ends is often a matter
    of taste, which pixels are ground glass is less so. Every pixel teaches the backbone here, not
    just those of the sampled boxes. The image itself, at half its size, joins the map, as in the
    top level of a U-Net: it has the grey values and the borders that strides have blurred.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.coarse = Conv2dNormActivation(channels, 64)
        self.image = Conv2dNormActivation(3, 16)
        self.fine = nn.Sequential(
            Conv2dNormActivation(64 + 16, 32),
            Conv2dNormActivation(32, 32),
            nn.Conv2d(32, classes, 1),
        )

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """Maps, the finest first, and "image" [B,3,H,W] -> logits [B,classes,H/2,W/2].

        Class 0 is background.
        """
        image = F.avg_pool2d(features["image"], 2)  # [B, 3, H/2, W/2]
        coarse = self.coarse(next(iter(features.values())))  # [B, 64, h, w]
        coarse = F.interpolate(coarse, size=image.shape[-2:], mode="bilinear")
        return self.fine(torch.cat([coarse, self.image(image)], dim=1))

    def loss(self, features: dict[str, Tensor], image_shapes, targets) -> Tensor:
        """Cross-entropy of all pixels, and one minus the mean soft Dice.

        Dice is taken of each slice on its own, as the slices are judged: a small lesion counts as
        much as a large one. Its regions are the lesion classes and any lesion; `slack` keeps it
        smooth where a slice has next to nothing of one.
        """
        logits = self(features)
        side = _stride(logits, image_shapes)
        height, width = (side * length for length in logits.shape[-2:])
        truth = torch.zeros(len(targets), height, width, dtype=torch.int64, device=logits.device)
        for labels, target in zip(truth, targets, strict=True):  # [height, width]
            for label, mask in zip(target["labels"], target["masks"], strict=True):
                labels[: mask.shape[0], : mask.shape[1]][mask > 0] = label
        logits = F.interpolate(logits.float(), size=(height, width), mode="bilinear")
        shares = logits.softmax(1)  # [B, classes, height, width]
        true = F.one_hot(truth, logits.shape[1]).movedim(3, 1).float()
        # class 0 gives way to its opposite, any lesion
        shares, true = (torch.cat([1 - map[:, :1], map[:, 1:]], dim=1) for map in (shares, true))
        both, total = (shares * true).sum((2, 3)), (shares + true).sum((2, 3))  # [B, classes]
        slack = 0.002 * height * width
        dice = (2 * both + slack) / (total + slack)
        return F.cross_entropy(logits, truth) + (1 - dice).mean()

    def probabilities(self, features: dict[str, Tensor], image_shapes) -> list[Tensor]:
        """For each image float32 [classes - 1, h, w]: its part of the padded map."""
        shares = self(features).float().softmax(1)[:, 1:]
        side = _stride(shares, image_shapes)
        return [
            map[:, : math.ceil(height / side), : math.ceil(width / side)]
            for map, (height, width) in zip(shares, image_shapes, strict=True)
        ]


def _stride(map: Tensor, image_shapes) -> int:
    """Pixels of the images, padded to multiples of 32, for one pixel of the map."""
    return math.ceil(max(width for _, width in image_shapes) / 32) * 32 // map.shape[-1]


class LesionRoIHeads(RoIHeads):
    """torchvision's RoI heads; `box_beta` sets the smooth L1 loss of the boxes.

    With `semantic` there is a sixth loss, and each prediction has `semantic`, float32
    [classes - 1, h, w]: the probability of each lesion class at the stride of the finest map.
    """

    def __init__(self, *args, box_beta: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.box_beta = box_beta
        self.semantic: SemanticBranch | None = None

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            found, losses = super().forward(features, proposals, image_shapes, targets)
            if self.semantic is not None:
                maps = self.semantic.probabilities(features, image_shapes)
                found = [{**one, "semantic": map} for one, map in zip(found, maps, strict=True)]
            return found, losses
        proposals, matched, labels, regression_targets = self.select_training_samples(
            proposals, targets
        )
        pooled = self.box_roi_pool(features, proposals, image_shapes)  # [R, C, 7, 7]
        class_logits, box_regression = self.box_predictor(self.box_head(pooled))  # [R,C], [R,4C]
        all_labels = torch.cat(labels)
        positive = torch.where(all_labels > 0)[0]
        deltas = box_regression.reshape(len(all_labels), -1, 4)[positive, all_labels[positive]]
        box_loss = F.smooth_l1_loss(
            deltas, torch.cat(regression_targets)[positive], beta=self.box_beta, reduction="sum"
        ) / max(all_labels.numel(), 1)
        losses = {
            "loss_classifier": F.cross_entropy(class_logits, all_labels),
            "loss_box_reg": box_loss,
        }
        lesions = [torch.where(label > 0)[0] for label in labels]  # masks learn on positive RoIs
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
    config: DetectorConfig, weights: str | None = None, masks: bool = True
) -> GeneralizedRCNN:
    """Build the detector, with random weights but for an optional ImageNet backbone.

    Args:
        config: every number of section 3.1 and of the released code.
        weights: passed to `fpn_backbone`.
        masks: without masks the detector is the one inside the classifier: it can be run and
            ranked, not trained on lesions.

    Returns:
        torchvision's `GeneralizedRCNN`, with the configuration as `model.config`. Input: a list
        of float32 [3,H,W] in 0..1. In eval mode it returns, per image, `boxes` [K,4] (pixels of
        the input image, xyxy), `labels` [K], `scores` [K] in 0..1 and `masks` [K,1,H,W]
        (probabilities). In train mode, given targets too, it returns the five losses. With
        `config.semantic` see `LesionRoIHeads`.
    """
    backbone = fpn_backbone(config, weights)
    levels = len(config.layers)
    names = [str(level) for level in range(levels)]
    channels = config.fpn_channels
    anchors = AnchorGenerator((config.anchor_sizes,) * levels, (config.anchor_ratios,) * levels)
    rpn = LesionRPN(
        anchors,
        LesionRPNHead(channels, anchors.num_anchors_per_location()[0]),
        *config.rpn_iou,
        config.rpn_batch,
        config.rpn_positive,
        {"training": config.rpn_train_proposals, "testing": config.rpn_test_proposals},
        {"training": config.rpn_train_proposals, "testing": config.rpn_test_proposals},
        config.rpn_nms,
        min_size=config.rpn_min_size,
        box_beta=config.rpn_box_beta,
    )
    heads = LesionRoIHeads(
        LesionRoIAlign(names, output_size=7, sampling_ratio=2),
        TwoMLPHead(channels * 7 * 7, config.box_features),
        LesionPredictor(config.box_features, config.num_classes),
        *config.box_iou,
        config.box_batch,
        config.box_positive,
        None,  # the box coder's usual weights, (10, 10, 5, 5)
        config.box_score,
        config.box_nms,
        config.box_detections,
        box_beta=config.box_beta,
    )
    if masks:
        widths = (128,) if config.light_mask_head else (256,) * 4
        heads.mask_roi_pool = LesionRoIAlign(names, output_size=14, sampling_ratio=2)
        heads.mask_head = MaskRCNNHeads(channels, widths, dilation=1)
        heads.mask_predictor = MaskRCNNPredictor(widths[-1], widths[-1], config.num_classes)
        if config.semantic:
            heads.semantic = SemanticBranch(channels, config.num_classes)
    transform = GeneralizedRCNNTransform(
        config.image_size, config.max_size, IMAGENET_MEAN, IMAGENET_STD
    )
    model = LesionMaskRCNN(backbone, rpn, heads, transform)
    model.config = config
    return model
