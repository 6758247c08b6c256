"""RoIAlign as matrix products: torchvision's numbers, several times faster on a CPU.

RoIAlign reads 7 x 7 bins of 2 x 2 points each from a feature map, every point by bilinear
interpolation of its four neighbours. Lesions are small: on a map of stride 16 all 196 points of a
box fall into a patch of a few pixels. So a box's bins are one matrix, [bins, pixels of the patch],
times the patch, [pixels, channels]; the matrix is the product of one for rows and one for columns.
torchvision's CPU kernel instead reads four neighbours for each point and channel, and its backward
adds to them one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

ROWS = 128  # boxes at a time: few enough to stay in the processor's cache
LARGEST_PATCH = 600  # pixels: beyond it a box has few points for its pixels; torchvision is faster


class LesionRoIAlign(MultiScaleRoIAlign):
    """torchvision's `MultiScaleRoIAlign`, by matrix products where the features lie on a CPU."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes) -> Tensor:
        """Pool every box.

        Args:
            x: maps [B,C,h,w] by name; those of `featmap_names` are read.
            boxes: B tensors [K,4], xyxy in pixels of the images; inside them.
            image_shapes: B pairs (height, width).

        Returns:
            [sum K, C, output height, output width].
        """
        if not _on_cpu(x):
            return super().forward(x, boxes, image_shapes)
        index, pooled = zip(*self.parts(x, boxes, image_shapes), strict=True)
        return torch.cat(pooled)[torch.cat(index).argsort()]

    def parts(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of `forward` a few at a time, in an order that makes each part fast.

        Yields:
            int64 [r], which rows of `forward`; and [r, C, output height, output width].
        """
        maps = [x[name] for name in self.featmap_names if name in x]
        rois = torch.cat(boxes)
        if len(rois) == 0 or not _on_cpu(x):
            pooled = super().forward(x, boxes, image_shapes)
            yield torch.arange(len(rois), device=rois.device), pooled
            return
        image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(boxes)])
        height = max(shape[0] for shape in image_shapes)  # as torchvision, which looks at no width
        scales = [2.0 ** round(math.log2(map.shape[-2] / height)) for map in maps]
        level = self._levels(rois, scales)
        for i, (map, scale) in enumerate(zip(maps, scales, strict=True)):
            rows = torch.where(level == i)[0]
            if len(rows):
                for part, pooled in self._pool(map, rois[rows], image[rows], scale):
                    yield rows[part], pooled

    def _levels(self, rois: Tensor, scales: list[float]) -> Tensor:
        """Which map a box is read from: equation 1 of the FPN paper, as torchvision has it."""
        first, last = (round(-math.log2(scale)) for scale in (scales[0], scales[-1]))
        side = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
        level = self.canonical_level + torch.log2(side / self.canonical_scale) + 1e-6
        return level.floor().clamp(first, last).to(torch.int64) - first

    def _pool(
        self, map: Tensor, rois: Tensor, image: Tensor, scale: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        channels, height, width = map.shape[1:]
        pixels = map.permute(0, 2, 3, 1).reshape(-1, channels)  # [B*h*w, C]; a view: channels last
        x1, y1, x2, y2 = (rois * scale).unbind(1)
        x = self._points(x1, x2, self.output_size[1])  # [K, bins, points]
        y = self._points(y1, y2, self.output_size[0])
        left, patch_width = _patch(x, width)  # [K], [K]
        top, patch_height = _patch(y, height)
        is_large = patch_height * patch_width > LARGEST_PATCH
        if is_large.any():
            part = torch.where(is_large)[0]
            boxes = torch.cat([image[part, None].to(rois), rois[part]], dim=1)  # [r, 5]
            pooled = roi_align(  # has no bfloat16 on a CPU
                map.float(), boxes, self.output_size, scale, self.sampling_ratio
            )
            yield part, pooled.to(map.dtype)
        small = torch.where(~is_large)[0]
        order = small[(patch_height * width + patch_width)[small].argsort()]  # like sizes together
        for part in order.split(ROWS) if len(order) else ():
            h, w = int(patch_height[part].max()), int(patch_width[part].max())
            columns = left[part, None] + torch.arange(w)  # [r, w]
            rows = top[part, None] + torch.arange(h)  # [r, h]
            weights = torch.einsum(
                "rah,rbw->rhwab", _hat(y[part], rows, height), _hat(x[part], columns, width)
            ).reshape(len(part), h * w, -1)  # [r, pixels of the patch, bins]
            place = (image[part, None] * height + rows.clamp(max=height - 1)) * width  # [r, h]
            place = place[:, :, None] + columns.clamp(max=width - 1)[:, None]  # [r, h, w]
            patch = F.embedding(place.flatten(1), pixels)  # [r, h*w, C]
            pooled = torch.bmm(patch.transpose(1, 2), weights.to(patch.dtype))  # [r, C, bins]
            yield part, pooled.reshape(len(part), channels, *self.output_size)

    def _points(self, start: Tensor, end: Tensor, bins: int) -> Tensor:
        """Where each bin reads along one axis, in pixels of the map: [K, bins, points]."""
        n = self.sampling_ratio
        size = ((end - start).clamp(min=1) / bins)[:, None, None]
        bin, point = torch.arange(bins)[:, None], torch.arange(n)
        return start[:, None, None] + bin * size + (point + 0.5) * size / n


def _on_cpu(maps: dict[str, Tensor]) -> bool:
    return next(iter(maps.values())).device.type == "cpu"


def _patch(points: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """First pixel and number of pixels that the points of each box read: int64 [K], [K]."""
    points = points.clamp(0, length - 1)
    first = points[:, 0, 0].floor().to(torch.int64)
    return first, points[:, -1, -1].floor().to(torch.int64) + 2 - first


def _hat(points: Tensor, pixels: Tensor, length: int) -> Tensor:
    """Weights of linear interpolation, mean over a bin's points: [r, bins, pixels].

    The weight of a pixel falls from 1 at its centre to 0 at its neighbours' centres. Points more
    than a pixel outside the map count as 0; others outside are moved to its edge.
    """
    inside = (points >= -1) & (points <= length)
    distance = points.clamp(0, length - 1)[..., None] - pixels[:, None, None]  # [r, bins, n, p]
    return ((1 - distance.abs()).clamp(min=0) * inside[..., None]).mean(2)
