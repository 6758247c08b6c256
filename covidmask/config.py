"""Every setting, as frozen dataclasses, and the presets `quick`, `colab`, `paper` and `semiseg`.

The defaults of `DetectorConfig` are those of the paper and its released code; a preset states
only what it changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from covidmask.errors import DataError

IMAGE_CLASSES = ("Control", "Common pneumonia", "COVID-19")  # labels 0, 1, 2
NAME_CLASSES = ("Normal", "CP", "NCP")  # how COVIDx-CT-1 calls them in file names
# what the detector tells apart; label 0 is background
LESION_CLASSES = {"both": ("GGO", "C"), "ggo": ("GGO",), "merged": ("lesion",)}


def lesion_classes(lesions: str) -> tuple[str, ...]:
    """Names of the detector's labels 1, 2, ...: those of LESION_CLASSES, or your own.

    Yours are joined by commas ("nodule,cyst"; one alone is "nodule,", so that a slip of the pen is
    no class); in masks they have the codes 2, 3, ... in this order, because 1 is lung.

    Raises:
        DataError: neither.
    """
    if lesions in LESION_CLASSES:
        return LESION_CLASSES[lesions]
    names = tuple(name.strip() for name in lesions.removesuffix(",").split(","))
    if "," not in lesions or not all(names) or len(set(names)) < len(names):
        raise DataError(
            f"lesions {lesions!r}: choose one of {', '.join(LESION_CLASSES)}, or give your own "
            'names with commas, such as "nodule,cyst", or "nodule," alone'
        )
    return names


@dataclass(frozen=True)
class DetectorConfig:
    """Mask R-CNN of the paper (section 3.1). Lengths are pixels of the resized image."""

    backbone: str = "resnet50"  # or resnet34, resnet18, mobilenet_v2, or a network of timm's
    cut: int = 0  # not of resnet50: last stages removed, 0 | 1 | 2 -> stride 32 | 16 | 8
    lesions: str = "both"  # both | ggo | merged | your own names; see `lesion_classes`
    image_size: int = 512  # shorter side after resizing
    max_size: int = 1024  # longer side, at most
    fpn_channels: int = 256
    anchor_sizes: tuple[float, ...] = (2, 4, 8, 16, 32)  # all sizes at every level
    anchor_ratios: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0)  # height / width
    # region proposal network
    rpn_nms: float = 0.75
    rpn_train_proposals: int = 2000
    rpn_test_proposals: int = 1000
    rpn_batch: int = 256  # anchors sampled per image for the loss
    rpn_positive: float = 0.75
    rpn_iou: tuple[float, float] = (0.7, 0.3)  # foreground above, background below
    rpn_min_size: float = 0.0  # shorter proposals are dropped; torchvision: 1e-3
    rpn_box_beta: float = 0.0  # smooth L1 of the RPN boxes; 0 is L1, as in the released code
    # box and mask heads
    box_features: int = 128
    box_batch: int = 256  # RoIs sampled per image for the loss
    box_positive: float = 0.75
    box_iou: tuple[float, float] = (0.75, 0.5)
    box_beta: float = 1.0  # smooth L1 of the RoI boxes, as in the released code; torchvision: 1/9
    box_nms: float = 0.75
    box_score: float = 0.05  # detections below it are dropped by the segmenter
    box_detections: int = 100  # detections per image of the segmenter
    light_mask_head: bool = False  # one 3x3 convolution, as in the author's light models
    # not in the paper
    levels: int | None = None  # the last maps, a level each; None: 4 of resnet50, 1 of the others
    semantic: bool = False  # a branch that labels every pixel, beside the boxes


@dataclass(frozen=True)
class ClassifierConfig:
    """Module S and the vector it reads (section 3.2)."""

    n_boxes: int = 256  # N
    hidden: int = 1024  # width of both hidden layers of S
    score: float = -0.01  # keeps every box: a softmax is never below 0
    nms: float = 0.75
    classes: tuple[str, ...] = IMAGE_CLASSES  # names of labels 0, 1, ...
    columns: tuple[str, ...] = ("score", "dx", "dy", "dw", "dh")  # see models.ranked_boxes.COLUMNS


@dataclass(frozen=True)
class TrainingConfig:
    """One training run, at a constant learning rate unless `warmup` or `cosine` is set."""

    epochs: int  # passes over the training slices
    batch_size: int  # slices per step, over all processes together
    lr: float = 1e-5  # learning rate of Adam
    weight_decay: float = 1e-3
    warmup: int = 0  # steps over which the rate grows linearly from 0
    cosine: bool = False  # fall to 0 along half a cosine after the warm-up
    average: float = 0.0  # decay of a running average of the weights, to keep; 0: the last ones
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"  # of Lightning Fabric


@dataclass(frozen=True)
class PhantomConfig:
    """How many synthetic patients, and how large their slices are."""

    size: int  # pixels per side
    slices_per_patient: int
    lesion_patients: tuple[int, int, int]  # COVID patients with masks: train, val, test
    class_patients: tuple[int, int, int]  # patients of EACH image class: train, val, test
    severe: bool = False  # COVID-19 of up to half a lung, in published pictures
    hospital: int = 0  # 1: another scanner, with a sharp kernel, more noise, another window


@dataclass(frozen=True)
class AugmentConfig:
    """Random copies of slices with masks; see `covidmask.datasets.augmentation`."""

    size: int  # pixels per side of every copy
    copies: int  # of each slice in an epoch
    min_area: int  # lesions of fewer pixels of a copy are no instances
    paste: float = 0.0  # share of the copies that get the lesions of another slice, too


@dataclass(frozen=True)
class Preset:
    """A scale at which the whole method runs."""

    name: str
    phantoms: PhantomConfig
    detector: DetectorConfig
    segmenter: TrainingConfig
    classifier: ClassifierConfig
    classifier_training: TrainingConfig
    min_area: int  # lesions of fewer pixels are no instances (the released code drops <= 100)
    augment: AugmentConfig | None = None  # the segmenter trains on such copies, not on the slices
    pretraining: TrainingConfig | None = None  # of the segmenter, on phantoms, before `segmenter`


PAPER = Preset(
    name="paper",
    phantoms=PhantomConfig(512, 5, (130, 10, 20), (200, 40, 80)),
    detector=DetectorConfig(),
    segmenter=TrainingConfig(epochs=100, batch_size=1),
    classifier=ClassifierConfig(),
    classifier_training=TrainingConfig(epochs=50, batch_size=8),
    min_area=101,
)

FIT = TrainingConfig(epochs=5, batch_size=4, lr=1e-3, weight_decay=1e-4, warmup=30, cosine=True)
FIT_S = TrainingConfig(epochs=20, batch_size=32, lr=1e-3, weight_decay=2e-2, cosine=True)

# Two CPU cores, from random weights: ResNet-18 cut after layer2 (stride 8), a narrow FPN, N = 32.
QUICK = Preset(
    name="quick",
    phantoms=PhantomConfig(128, 3, (250, 16, 107), (700, 33, 67)),
    detector=DetectorConfig(
        backbone="resnet18",
        cut=2,
        image_size=128,
        max_size=256,
        fpn_channels=64,
        rpn_train_proposals=300,
        rpn_test_proposals=200,
        rpn_iou=(0.6, 0.3),
        box_batch=64,
        box_positive=0.5,
        box_iou=(0.5, 0.5),
        box_beta=1 / 9,
        rpn_box_beta=1 / 9,
        light_mask_head=True,
    ),
    segmenter=replace(FIT, epochs=6),
    classifier=ClassifierConfig(n_boxes=32, hidden=256),
    classifier_training=FIT_S,
    min_area=7,
)

# One small GPU: the author's light model (ResNet-18 cut 1, N = 128, S 512) at 256 pixels.
COLAB = Preset(
    name="colab",
    phantoms=PhantomConfig(256, 5, (200, 20, 60), (200, 20, 40)),
    detector=replace(
        QUICK.detector,
        cut=1,
        image_size=256,
        max_size=512,
        fpn_channels=256,
        rpn_train_proposals=1000,
        rpn_test_proposals=1000,
        box_batch=128,
    ),
    segmenter=replace(FIT, epochs=20, batch_size=8, lr=5e-4, warmup=200),
    classifier=ClassifierConfig(n_boxes=128, hidden=512),
    classifier_training=replace(FIT_S, epochs=30, batch_size=16, lr=3e-4, weight_decay=1e-3),
    min_area=26,
)

# The 50 training slices of COVID-SemiSeg, after phantoms, on two CPU cores. Lesions there are as
# large as half a lung, so anchors are larger than the paper's; they fray and merge, so pixels are
# labelled, too, on a pyramid of strides 4, 8 and 16.
SEMISEG = replace(
    QUICK,
    name="semiseg",
    phantoms=PhantomConfig(256, 5, (120, 10, 20), (10, 5, 5), severe=True),
    detector=replace(
        QUICK.detector,
        cut=1,
        levels=3,
        semantic=True,
        image_size=256,
        max_size=512,
        anchor_sizes=(10, 20, 40, 80, 150),
        anchor_ratios=(0.4, 1.0, 2.5),
        box_batch=32,  # the mask head on 64 RoIs takes longer than the backbone
    ),
    segmenter=replace(FIT, epochs=20, average=0.998),
    min_area=1,
    augment=AugmentConfig(size=256, copies=10, min_area=20, paste=0.5),
    pretraining=replace(FIT, epochs=4),
)

PRESETS = {preset.name: preset for preset in (QUICK, COLAB, PAPER, SEMISEG)}
