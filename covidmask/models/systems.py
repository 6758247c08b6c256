"""Other ways to classify a slice: the systems that COVID-CT-Mask-Net is compared with (Table 3).

Each is a module from B images, float32 [3,H,W] in 0..1, to logits [B,classes] (`ScanClassifier`
from B scans), and can be built again from the plain values in its `settings`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops import FeaturePyramidNetwork, roi_pool
from torchvision.transforms import v2

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.datasets.lungs import find_lungs
from covidmask.datasets.scans import LUNG_WINDOW
from covidmask.errors import CheckpointError, DataError
from covidmask.files import atomic_path, one_line
from covidmask.models.baselines import fit_area_classifier
from covidmask.models.classifier import CovidCTMaskNet
from covidmask.models.detector import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_images,
    lesion_maps,
    lesion_mask_rcnn,
    same_size_groups,
    with_weights,
)
from covidmask.models.ranked_boxes import propose, rank_boxes, run_box_head
from covidmask.models.weights import _config, _read, load_classifier, load_state

SEGMENTERS = ("unet", "fcn")
BAD_HEADER = (TypeError, AttributeError, LookupError, ValueError, RuntimeError, ArithmeticError)


def _square(images: Sequence[Tensor], size: int) -> Tensor:
    """Images of any size -> [B,3,size,size]."""
    options = {"size": (size, size), "mode": "bilinear", "antialias": True}
    return torch.cat([F.interpolate(image[None], **options) for image in images])


class ImageClassifier(nn.Module):
    """An ordinary classifier of whole slices, any of torchvision's or timm's, under a new head.

    Args:
        name: as `torchvision.models.get_model` has it, or "timm/" and a name of timm's.
        classes: their names.
        size: pixels per side; slices are resized to a square.
        weights: of ImageNet (downloaded), such as "IMAGENET1K_V1"; of timm's "pretrained".
        lungs: the three channels are the slice, what of it lies in the lungs, and the lungs, as the
            authors of COVID-CT give theirs [ZZHX20]; otherwise three times the slice.

    In train mode a slice is cut (60 to 100 % of its area) and mirrored at random.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        size: int = 224,
        weights: str | None = None,
        lungs: bool = False,
    ) -> None:
        super().__init__()
        self.settings = {"name": name, "classes": list(classes), "size": size, "lungs": lungs}
        self.classes, self.size, self.lungs = tuple(classes), size, lungs
        try:
            if name.startswith("timm/"):
                from timm import create_model

                self.network = create_model(name[5:], weights is not None, num_classes=len(classes))
            else:
                self.network = torchvision.models.get_model(name, num_classes=len(classes))
                if weights:
                    theirs = with_weights(name, weights).state_dict()
                    own = self.network.state_dict()  # all but the head fits
                    theirs = {k: v for k, v in theirs.items() if v.shape == own[k].shape}
                    self.network.load_state_dict(theirs, strict=False)
        except (ImportError, LookupError, ValueError, OSError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            remedy = "choose one of torchvision, or timm/NAME (`pip install timm`), and its weights"
            if isinstance(error, OSError):  # torchvision's are named by `with_weights`
                remedy = "check the network: timm gets them from huggingface.co"
            problem = f"classifier {name!r}, weights {weights}: {one_line(error)}"
            raise DataError(f"{problem}; {remedy}") from error
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.cut = v2.Compose(
            [v2.RandomResizedCrop(size, (0.6, 1), antialias=True), v2.RandomHorizontalFlip()]
        )

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        return self.network(self.ready(images, self.training))

    def ready(self, images: Sequence[Tensor], cut: bool) -> Tensor:
        """Images of any size -> what the network reads, float [B,3,size,size]."""
        check_images(images)
        if self.lungs:
            images = [with_lungs(image) for image in images]
        if cut:
            x = torch.stack([self.cut(image) for image in images])
        else:
            x = _square(images, self.size)  # [B, 3, size, size]
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


class ScanClassifier(ImageClassifier):
    """COVNet [LQX+20]: one network for all slices of a scan, and one answer for the scan.

    The network's features of each slice, pooled over its pixels, are joined by their element-wise
    maximum over the slices, which a linear layer reads. `model(scans)`: B scans, each a list of one
    or more images, float32 [3,H,W] in 0..1 -> logits [B,classes]. Theirs is on a ResNet-50, and
    looks at the segmented lungs; here any classifier of torchvision's will do whose last layer is
    linear, and it looks at whole slices. Arguments are those of `ImageClassifier`.
    """

    def __init__(self, name: str, classes: Sequence[str], *args: Any, **options: Any) -> None:
        super().__init__(name, classes, *args, **options)
        self.settings["system"] = "covnet"
        layers = [n for n, m in self.network.named_modules() if isinstance(m, nn.Linear)]
        last = layers[-1] if layers else ""
        self.linear = self.network.get_submodule(last)
        if getattr(self.linear, "out_features", None) != len(classes):
            raise DataError(f"covnet on {name}: does not end in a linear layer; choose resnet50")
        parent, _, child = last.rpartition(".")
        setattr(self.network.get_submodule(parent), child, nn.Identity())

    def forward(self, scans: Sequence[Sequence[Tensor]]) -> Tensor:
        if any(isinstance(scan, Tensor) or not len(scan) for scan in scans):
            raise DataError(
                "COVNet reads scans, each a list of slices, not slices one by one; judge it by "
                "`covidmask compare`"
            )
        rows = super().forward([image for scan in scans for image in scan])  # [slices, width]
        each = rows.split([len(scan) for scan in scans])
        return self.linear(torch.stack([part.amax(0) for part in each]))


class JointClassifier(ImageClassifier):
    """One encoder that classifies a slice and segments its lesions, in the manner of JCS [WGM+20].

    The class is read from the encoder's last map; a decoder, torchvision's feature pyramid, gives
    the labels of the pixels at each of its four levels, and all are trained (deep supervision).
    JCS has two encoders, Res2Net for the class and VGG-16 for the pixels, trained one after the
    other and joined by feature fusion, decoder blocks of its own, and knows one kind of lesion.
    Here both tasks share one ResNet of torchvision's and are learnt at once, nothing is fused, and
    lesions are those of the masks.

    Args:
        lesions: their names. channels: width of the decoder. Others as in `ImageClassifier`.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        lesions: Sequence[str],
        size: int = 224,
        weights: str | None = None,
        channels: int = 64,
    ) -> None:
        super().__init__(name, classes, size, weights)
        del self.settings["lungs"]
        self.settings |= {"system": "jcs", "lesions": list(lesions), "channels": channels}
        self.lesions, whole = tuple(lesions), self.network
        if not isinstance(whole, torchvision.models.ResNet):
            raise DataError(f"jcs on {name}: choose a ResNet of torchvision's, such as resnet18")
        stages = [f"layer{i}" for i in (1, 2, 3, 4)]
        widths = [whole.fc.in_features // part for part in (8, 4, 2, 1)]
        self.body = IntermediateLayerGetter(whole, {stage: stage for stage in stages})
        self.network = whole.fc  # the head
        self.decoder = FeaturePyramidNetwork(widths, channels)
        self.sides = nn.ModuleList(nn.Conv2d(channels, 1 + len(lesions), 1) for _ in stages)

    def forward(self, images: Sequence[Tensor], pixels: bool = False) -> Tensor | list[Tensor]:
        """Logits [B,classes]; or with `pixels` of each level, the finest first, those of pixels:
        [B,1 + lesion classes,size,size], of whole slices (nothing is cut in training).
        """
        maps = self.body(self.ready(images, self.training and not pixels))
        if not pixels:
            return self.network(maps["layer4"].mean((2, 3)))
        levels, shape = self.decoder(maps).values(), (self.size, self.size)
        found = [side(level) for side, level in zip(self.sides, levels, strict=True)]
        return [F.interpolate(logits, size=shape, mode="bilinear") for logits in found]


def with_lungs(image: Tensor) -> Tensor:
    """[3,H,W] grey in the lung window -> [3,H,W]: the slice, what lies in the lungs, the lungs."""
    level, width = LUNG_WINDOW
    hu = level + (image[0].cpu().numpy() - 0.5) * width
    lungs = torch.from_numpy(find_lungs(hu)).to(image)
    return torch.stack([image[0], image[0] * lungs, lungs])


class Features(nn.Module):
    """What a frozen network says about a slice, `width` numbers, before a linear layer."""

    width: int
    settings: dict[str, Any]

    def read(self, images: list[Tensor]) -> Tensor:  # of one size -> [B, width]
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: list[Tensor]) -> Tensor:
        check_images(images)
        rows: list[Tensor | None] = [None] * len(images)
        for group in same_size_groups(images):
            for i, row in zip(group, self.read([images[i] for i in group]), strict=True):
                rows[i] = row
        return torch.stack(rows)


class PooledMaps(Features):
    """Mean and maximum of every channel of a detector's feature pyramid: no box is looked at."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        detector.eval().requires_grad_(False)
        self.transform, self.backbone = detector.transform, detector.backbone
        self.settings = {"detector": asdict(detector.config)}
        self.width = 2 * detector.backbone.out_channels * len(detector.strides)

    def read(self, images: list[Tensor]) -> Tensor:
        batch, _ = self.transform(images)
        maps = self.backbone(batch.tensors)
        if isinstance(maps, Tensor):
            maps = {"0": maps}
        maps = [m for m in maps.values() if m.shape[1] == self.backbone.out_channels]
        return torch.cat([part for m in maps for part in (m.mean((2, 3)), m.amax((2, 3)))], 1)


class BoxMaps(Features):
    """What N ranked boxes look at: the largest value of each map channel, over all of them.

    `rows` has a row for each box and a column for each channel, in the place of score and deltas.
    """

    def __init__(self, detector: nn.Module, config: ClassifierConfig) -> None:
        super().__init__()
        self.detector, self.config = detector.eval().requires_grad_(False), config
        self.settings = {"detector": asdict(detector.config), "classifier": asdict(config)}
        self.width = detector.backbone.out_channels * len(detector.strides)

    def placed(self, boxes: Tensor, shape: tuple[int, int]) -> Tensor:
        """Where to look: the ranked boxes [K,4] of an image of `shape`, height and width."""
        return boxes

    def rows(self, images: list[Tensor]) -> list[Tensor]:  # images of one size -> [K, width] each
        features, proposals, shapes = propose(self.detector, images)
        found = *run_box_head(self.detector, features, proposals, shapes), proposals, shapes
        coder, channels = self.detector.roi_heads.box_coder, self.detector.backbone.out_channels
        boxes = [rank_boxes(*one, coder, self.config).box for one in zip(*found, strict=True)]
        boxes = [self.placed(*one) for one in zip(boxes, shapes, strict=True)]
        maps = [m for m in features.values() if m.shape[1] == channels]  # not the image itself
        parts = [
            roi_pool(m, boxes, 1, 1 / stride).flatten(1)
            for m, stride in zip(maps, self.detector.strides, strict=True)
        ]
        return list(torch.cat(parts, 1).split([len(part) for part in boxes]))

    def read(self, images: list[Tensor]) -> Tensor:
        none = torch.zeros(1, self.width, device=images[0].device)  # where there is no box
        return torch.stack([(r if len(r) else none).amax(0) for r in self.rows(images)])


class LesionAreas(Features):
    """Of each lesion class: how many detections score above 0.5, mean and share of its map."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector.eval().requires_grad_(False)
        self.settings = {"detector": asdict(detector.config)}
        self.width = 3 * len(detector.classes)

    def read(self, images: list[Tensor]) -> Tensor:
        rows = []
        for found in self.detector(images):
            maps = lesion_maps(found, len(self.detector.classes))  # [classes, H, W]
            sure = found["labels"][found["scores"] > 0.5]
            counts = torch.bincount(sure - 1, minlength=len(maps))
            shares = (maps.mean((1, 2)), (maps > 0.5).float().mean((1, 2)))
            rows.append(torch.cat([counts.to(maps), *shares]))
        return torch.stack(rows)


class Segmentation(nn.Module):
    """A network that names every pixel: B images -> logits [B,1 + lesion classes,size,size]."""

    def __init__(self, name: str, lesions: Sequence[str], size: int = 224, width: int = 1) -> None:
        super().__init__()
        self.settings = {"name": name, "lesions": list(lesions), "size": size, "width": width}
        self.lesions, self.size, labels = tuple(lesions), size, 1 + len(lesions)
        if name == "fcn":  # torchvision's, on a ResNet-18 of stride 8
            body = torchvision.models.resnet18()
            for layer in (body.layer3, body.layer4):
                layer[0].conv1.stride = layer[0].downsample[0].stride = (1, 1)
            self.network = FCN(
                IntermediateLayerGetter(body, {"layer4": "out"}), FCNHead(512, labels)
            )
        elif name == "unet":
            try:
                from segmentation_models_pytorch import Unet
            except ImportError as error:
                remedy = "run `pip install segmentation-models-pytorch`"
                raise DataError(
                    f"unet: segmentation-models-pytorch is missing; {remedy}"
                ) from error
            channels = [c // width for c in (256, 128, 64, 32, 16)]
            self.network = Unet("resnet18", encoder_weights=None, classes=labels,
                                decoder_channels=channels)  # fmt: skip
        else:
            raise DataError(f"segmentation {name!r}: choose {' or '.join(SEGMENTERS)}")

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        check_images(images)
        found = self.network(_square(images, self.size))
        return found["out"] if isinstance(found, dict) else found


class SegmentedAreas(Features):
    """Segment, then classify: mean and share of the map of each lesion class."""

    def __init__(self, network: Segmentation) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.settings = {"network": network.settings}
        self.width = 2 * len(network.lesions)

    def read(self, images: list[Tensor]) -> Tensor:
        maps = self.network(images).softmax(1)[:, 1:]  # [B, classes, size, size]
        return torch.cat([maps.mean((2, 3)), (maps > 0.5).float().mean((2, 3))], 1)


class LinearReader(nn.Module):
    """Features, then one linear layer, which `fit` finds by logistic regression."""

    def __init__(self, features: Features, classes: Sequence[str]) -> None:
        super().__init__()
        self.features, self.classes = features, tuple(classes)
        self.linear = nn.Linear(features.width, len(classes))
        kind = type(features).__name__
        self.settings = {"features": kind, "classes": list(classes), **features.settings}

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        return self.linear(self.features(images))

    def fit(self, rows: Tensor, labels: Sequence[int]) -> None:
        """Fit the layer to features of slices, float32 [M,width], and their labels, all there."""
        scale, regression = fit_area_classifier(rows.cpu().numpy(), labels)
        weight, bias = regression.coef_ / scale.scale_, regression.intercept_
        bias = bias - weight @ scale.mean_
        if len(weight) == 1:  # of two classes: the logit of the second
            weight, bias = np.vstack([0 * weight, weight]), np.append(0, bias)
        with torch.no_grad():
            self.linear.weight.copy_(torch.from_numpy(weight))
            self.linear.bias.copy_(torch.from_numpy(bias))


READERS = {kind.__name__: kind for kind in (PooledMaps, BoxMaps, LesionAreas, SegmentedAreas)}
TRAINED = {"covnet": ScanClassifier, "jcs": JointClassifier, None: ImageClassifier}


def save_system(model: ImageClassifier | LinearReader, path: str | Path, **card: Any) -> Path:
    """Write one of these to a .safetensors file; `load_system` builds it again."""
    header = {"format": 1, "kind": "system", "settings": model.settings, "card": card}
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"covidmask": json.dumps(header)}))
    return Path(path)


def load_system(path: str | Path) -> ImageClassifier | LinearReader | CovidCTMaskNet:
    """Read any classifier of slices: of `save_system`, or of `save_model`; eval mode.

    Raises `CheckpointError`: no file of a classifier, or damaged.
    """
    header, state = _read(path)
    if header["kind"] != "system":
        return load_classifier(path)
    try:
        settings = dict(header["settings"])
        if kind := settings.pop("features", None):
            classes = settings["classes"]
            parts: list[Any] = []
            if "network" in settings:
                parts = [Segmentation(**settings["network"])]
            else:
                config = _config(DetectorConfig, settings["detector"])
                parts = [lesion_mask_rcnn(config, masks=kind != "PooledMaps")]
            if "classifier" in settings:
                parts.append(_config(ClassifierConfig, settings["classifier"]))
            model: nn.Module = LinearReader(READERS[kind](*parts), classes)
        else:
            model = TRAINED[settings.pop("system", None)](**settings)
        sizes = [s["size"] for s in (settings, settings.get("network", {})) if "size" in s]
        if not all(isinstance(size, int) and 1 <= size <= 8192 for size in sizes):
            raise ValueError(f"size {sizes}")
        if len({str(name) for name in model.classes if isinstance(name, str)}) < 2:
            raise ValueError(f"classes {model.classes}")
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        RuntimeError,
        ArithmeticError,
    ) as error:
        raise CheckpointError(
            f"{path}: its model cannot be built ({one_line(error)}); install the version that "
            "wrote it"
        ) from error
    load_state(model, state, path)
    return model.eval()
