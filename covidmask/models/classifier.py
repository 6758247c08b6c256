"""COVID-CT-Mask-Net: a detector, its ranked boxes, and the module S that reads them (Figure 3)."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import ClassifierConfig
from covidmask.errors import DataError
from covidmask.models.ranked_boxes import Columns, Encoder, ranked_boxes

REGIMES = ("heads", "heads_bn", "full")


class ClassificationModule(nn.Module):
    """Module S (Figure 3.3): the ranked boxes as one vector, two hidden layers, one logit a class.

    Each logit is read through a sigmoid of its own (Algorithm 1), so the three are no softmax.
    """

    def __init__(self, n_boxes: int, hidden: int, columns: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.fc_scores = nn.Linear(n_boxes * columns, hidden)
        self.fc_scores_2 = nn.Linear(hidden, hidden)
        self.fc_scores_img = nn.Linear(hidden, classes)
        for layer in (self.fc_scores, self.fc_scores_2, self.fc_scores_img):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """float32 [B,N,columns] -> logits [B,classes]."""
        x = rows.flatten(1)  # [B, N * columns]
        x = self.fc_scores(x).relu()  # [B, hidden]
        x = self.fc_scores_2(x).relu()  # [B, hidden]
        return self.fc_scores_img(x)  # [B, classes]


class CovidCTMaskNet(nn.Module):
    """Detector + S: `model(images)` gives logits [B,classes]; see `covid_ct_mask_net`.

    The detector stays in eval mode, also while the classifier trains: batch norm never updates its
    statistics, no sampler runs, and an image's result does not depend on the others in its batch.
    """

    def __init__(
        self,
        detector: GeneralizedRCNN,
        config: ClassifierConfig,
        encoder: Encoder | None = None,
        s: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(detector, GeneralizedRCNN):
            raise ValueError(
                f"{type(detector).__name__}: has no proposals to rank; give `lesion_mask_rcnn`, or "
                "a Faster, Mask or Keypoint R-CNN of torchvision, without a wrapper such as DDP's"
            )
        if len(config.classes) < 2 or len(set(config.classes)) < len(config.classes):
            raise DataError(f"classes {config.classes}: give two or more different names")
        self.detector = detector
        self.encoder = Columns(config.columns) if encoder is None else encoder
        width, classes = len(self.encoder.columns), len(config.classes)
        self.config = replace(config, columns=tuple(self.encoder.columns))
        self.s = s or ClassificationModule(config.n_boxes, config.hidden, width, classes)
        self.eval()
        with torch.no_grad():  # a try on empty rows, where S lies
            place = next(self.s.parameters(), torch.empty(0)).device
            found = list(self.s(torch.zeros(2, config.n_boxes, width, device=place)).shape)
        if found != [2, classes]:
            raise ValueError(
                f"{type(s).__name__}: gives {found}, not [2, {classes}], for two slices"
            )

    def train(self, mode: bool = True) -> CovidCTMaskNet:
        super().train(mode)
        self.detector.eval()
        return self

    def ranked_boxes(self, images: list[Tensor], generator: torch.Generator | None = None):
        """B images, float32 [3,H,W] in 0..1 -> float32 [B,N,columns]; see `ranked_boxes`."""
        return ranked_boxes(self.detector, images, self.config, generator, self.encoder)

    def forward(self, images: list[Tensor]) -> Tensor:
        """B images, float32 [3,H,W] in 0..1 -> logits [B,classes]."""
        return self.s(self.ranked_boxes(images))


def covid_ct_mask_net(
    segmenter: GeneralizedRCNN,
    config: ClassifierConfig,
    encoder: Encoder | None = None,
    s: nn.Module | None = None,
) -> CovidCTMaskNet:
    """Put a fresh S on a copy of a trained segmenter, less its masks (Algorithm 1, line 2).

    Args:
        segmenter: may be yours: any two-stage detector of torchvision (Faster, Mask or Keypoint
            R-CNN), with any number of classes. The classifier lies on its device.
        encoder: what makes rows of boxes; by default `Columns(config.columns)`.
        s: any module [B,N,columns] -> logits [B,classes]; by default `ClassificationModule`.
    """
    model = CovidCTMaskNet(copy.deepcopy(segmenter), config, encoder, s)
    heads = model.detector.roi_heads
    heads.mask_roi_pool = heads.mask_head = heads.mask_predictor = heads.semantic = None
    heads.keypoint_roi_pool = heads.keypoint_head = heads.keypoint_predictor = None
    return model.to(next(heads.parameters()).device)


def batch_norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The affine parameters, gamma and beta, of every batch-norm layer."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    return [parameter for layer in layers for parameter in layer.parameters()]


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, trained or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_trainable(model: nn.Module) -> int:
    """Numbers in the parameters that require a gradient; call `set_regime` first."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_batch_norm(model: nn.Module) -> int:
    """Numbers in gamma and beta of all batch-norm layers, downsample branches included."""
    return sum(parameter.numel() for parameter in batch_norm_parameters(model))


def set_regime(model: CovidCTMaskNet, regime: str) -> list[nn.Parameter]:
    """Say what trains (section 4); everything else is frozen.

    - "heads": S alone. The ranked boxes are then constants of a slice.
    - "heads_bn": S and the affine parameters of every batch-norm layer. (The released code misses
      those of the downsample branches by the name that it looks for.)
    - "full": every parameter, but no gradient reaches the RPN, because proposals are detached.

    Batch-norm statistics are never updated. Returns the parameters that train.
    """
    if regime not in REGIMES:
        raise ValueError(f"regime {regime!r}: choose one of {', '.join(REGIMES)}")
    affine = batch_norm_parameters(model.detector)
    if regime == "heads_bn" and not affine:
        raise ValueError(
            "regime 'heads_bn': the detector has no batch norm that could train (torchvision "
            "freezes it in pretrained backbones); choose heads or full"
        )
    trained = list((model if regime == "full" else model.s).parameters())
    trained += affine if regime == "heads_bn" else []
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained
