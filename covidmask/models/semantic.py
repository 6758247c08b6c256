"""A class for each pixel, beside the boxes: for small sets of real CT, not in the paper."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation


class SemanticBranch(nn.Module):
    """A class for each pixel, from the finest map of the pyramid, as in Panoptic FPN.

    Lesions of real CT fray and merge: where one instance ends is often a matter of taste. The image
    itself, at half its size, joins the map, as in a U-Net: its borders are not blurred by strides.
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
        """Maps, the finest first, and "image" [B,3,H,W] -> logits [B,classes,H/2,W/2]; 0: none."""
        image = F.avg_pool2d(features["image"], 2)  # [B, 3, H/2, W/2]
        coarse = self.coarse(next(iter(features.values())))  # [B, 64, h, w]
        coarse = F.interpolate(coarse, size=image.shape[-2:], mode="bilinear")
        return self.fine(torch.cat([coarse, self.image(image)], dim=1))

    def loss(self, features: dict[str, Tensor], image_shapes, targets) -> Tensor:
        """The `pixel_loss` of the labels that the masks of the targets give."""
        logits = self(features)
        side = _stride(logits, image_shapes)
        height, width = (side * length for length in logits.shape[-2:])
        truth = torch.zeros(len(targets), height, width, dtype=torch.int64, device=logits.device)
        for labels, target in zip(truth, targets, strict=True):  # [height, width]
            for label, mask in zip(target["labels"], target["masks"], strict=True):
                labels[: mask.shape[0], : mask.shape[1]][mask > 0] = label
        logits = F.interpolate(logits.float(), size=(height, width), mode="bilinear")
        return pixel_loss(logits, truth)

    def probabilities(self, features: dict[str, Tensor], image_shapes) -> list[Tensor]:
        """For each image float32 [classes - 1, h, w]: its part of the padded map."""
        shares = self(features).float().softmax(1)[:, 1:]
        side = _stride(shares, image_shapes)
        parts = [[math.ceil(length / side) for length in shape] for shape in image_shapes]
        return [map[:, :h, :w] for map, (h, w) in zip(shares, parts, strict=True)]


def pixel_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of pixels, and one minus the mean soft Dice of each class and any lesion.

    Dice is taken of each slice on its own: a small lesion counts as much as a large one. Logits are
    float32 [B,classes,H,W], truth int64 [B,H,W]; class 0: none.
    """
    shares, true = logits.softmax(1), F.one_hot(truth, logits.shape[1]).movedim(3, 1).float()
    # class 0 gives way to its opposite, any lesion
    shares, true = (torch.cat([1 - map[:, :1], map[:, 1:]], dim=1) for map in (shares, true))
    both, total = (shares * true).sum((2, 3)), (shares + true).sum((2, 3))  # [B, classes]
    slack = 0.002 * truth[0].numel()  # keeps it smooth where a slice has next to nothing
    return F.cross_entropy(logits, truth) + (1 - (2 * both + slack) / (total + slack)).mean()


def _stride(map: Tensor, image_shapes) -> int:  # of the images, padded to multiples of 32
    return math.ceil(max(width for _, width in image_shapes) / 32) * 32 // map.shape[-1]
