"""How large the models are, by stated counting rules (the paper's Table 1).

Three rules are in use. `parameters` counts what an optimiser could change. `entries` counts every
number in the state dict: parameters, batch-norm statistics and batch-norm counters. `trainable`
counts the parameters of one training regime.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.models.classifier import (
    ClassificationModule,
    batch_norm_parameters,
    covid_ct_mask_net,
    set_regime,
)
from covidmask.models.detector import lesion_mask_rcnn


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, trained or frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_entries(model: nn.Module) -> int:
    """Numbers in the state dict: parameters, batch-norm statistics and counters."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def count_trainable(model: nn.Module) -> int:
    """Numbers in the parameters that require a gradient; call `set_regime` first."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_batch_norm(model: nn.Module) -> int:
    """Numbers in gamma and beta of all batch-norm layers, downsample branches included."""
    return sum(parameter.numel() for parameter in batch_norm_parameters(model))


@dataclass(frozen=True)
class ModelSize:
    """The counts of one backbone; see the module's text for the rules."""

    backbone: str
    cut: int
    segmenter_parameters: int
    segmenter_entries: int
    classifier_parameters: int  # without the mask branch, which the classifier never runs
    classifier_entries: int
    s_parameters: int  # what "heads" trains
    batch_norm_parameters: int  # what "heads_bn" trains besides S
    heads_bn_trainable: int


def model_size(detector: DetectorConfig, classifier: ClassifierConfig) -> ModelSize:
    """Build both models and count. The weights are random and thrown away."""
    segmenter = lesion_mask_rcnn(detector)
    model = covid_ct_mask_net(segmenter, classifier)
    set_regime(model, "heads_bn")
    return ModelSize(
        detector.backbone,
        detector.cut,
        count_parameters(segmenter),
        count_entries(segmenter),
        count_parameters(model),
        count_entries(model),
        count_parameters(model.s),
        count_batch_norm(model),
        count_trainable(model),
    )


def paper_and_light_sizes() -> list[ModelSize]:
    """The paper's ResNet-50 (N 256, S 1024) and the author's six light models (N 128, S 512)."""
    sizes = [model_size(DetectorConfig(), ClassifierConfig())]
    for backbone in ("resnet34", "resnet18"):
        for cut in (0, 1, 2):
            detector = DetectorConfig(backbone=backbone, cut=cut, light_mask_head=True)
            sizes.append(model_size(detector, ClassifierConfig(n_boxes=128, hidden=512)))
    return sizes


@dataclass(frozen=True)
class PublishedCount:
    """A number in millions, as printed, and the rule that gives it."""

    name: str
    millions: float
    rule: str  # "none" where no rule on the released code gives the number
    count: int | None  # by that rule; None where there is none


def published_counts() -> list[PublishedCount]:
    """The sizes that the paper (Table 1) and the author's README print, each with its rule.

    Most numbers are cut, not rounded, to two decimals: 34.14M is 34,146,336. (The 11.45M of a
    light segmenter is rounded.) Where no rule is known, `count` is None: the number is reported,
    not matched.
    """
    full, *light = paper_and_light_sizes()
    s = count_parameters(ClassificationModule(256, 1024))
    resnet34, resnet18 = light[:3], light[3:]
    rule = "classifier entries"
    none = [(name, millions, "none", None) for name, millions in UNEXPLAINED]
    return [
        PublishedCount(*row)
        for row in [
            ("Mask R-CNN", 31.78, "segmenter entries", full.segmenter_entries),
            ("full", 34.14, "segmenter entries + S", full.segmenter_entries + s),
            ("heads+BN", 2.36, "S alone", s),
            ("ResNet-34 cut 0", 24.86, rule, resnet34[0].classifier_entries),
            ("ResNet-18 cut 0", 14.75, rule, resnet18[0].classifier_entries),
            ("S of a light model", 0.6, "S alone", resnet18[0].s_parameters),
            *none,
        ]
    ]


UNEXPLAINED = (
    (
        "heads",
        2.25,
    ),  # S / 2**20 gives it, and so do RPN head + box head + predictor: no single rule
    ("ResNet-34 cut 1", 11.74),
    ("ResNet-18 cut 1", 6.35),
    ("ResNet-34 cut 2", 4.92),
    ("ResNet-18 cut 2", 4.25),
)
