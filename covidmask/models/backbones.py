"""ResNets with a feature pyramid, as the paper and the author's light models use them."""

from __future__ import annotations

from torch import Tensor
from torchvision.models import resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from covidmask.config import DetectorConfig


class WithImage(BackboneWithFPN):
    """Hands on the image, too, as the last of the maps: "image", float32 [B,3,H,W], normalised."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {**super().forward(x), "image": x}


def fpn_backbone(config: DetectorConfig, weights: str | None = None) -> BackboneWithFPN:
    """Build the feature extractor of the detector (section 3.1).

    ResNet-50 gives four maps (layer1..4, strides 4, 8, 16, 32). ResNet-18 and -34 give one map,
    of the last layer that `config.cut` leaves (stride 32, 16 or 8). `config.levels` asks for the
    last so many instead. No pooled level is added and batch norm is trainable, not frozen, both
    unlike torchvision's ready-made detectors.

    Args:
        config: `backbone`, `cut`, `levels` and `fpn_channels` are read.
        weights: a name of torchvision's weights, such as "IMAGENET1K_V1" (downloaded), or None
            for random weights.

    Returns:
        A module: float32 [B,3,H,W] -> ordered dict of maps [B,fpn_channels,H/stride,W/stride];
        with `config.semantic` also the image, see `WithImage`.
    """
    body = getattr(resnet, config.backbone)(weights=weights)
    channels = [body.inplanes // 2 ** (4 - layer) for layer in config.layers]
    return_layers = {f"layer{layer}": str(index) for index, layer in enumerate(config.layers)}
    kind = WithImage if config.semantic else BackboneWithFPN
    backbone = kind(body, return_layers, channels, config.fpn_channels)
    backbone.fpn.extra_blocks = None  # torchvision would add a max-pooled level
    return backbone
