"""The author's released .pth files, read without running anything that they hold."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.errors import CheckpointError
from covidmask.models.classifier import CovidCTMaskNet
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import load_state

ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number, torch < 1.6


def load_author_checkpoint(path: str | Path) -> GeneralizedRCNN | CovidCTMaskNet:
    """Build the model of one of the author's released .pth files, in eval mode.

    Backbone, cut, lesion classes, N, width of S and anchors are read off the file. It may be in
    the format of torch 1.1, a pickle with a class of the author's own inside (nothing of it is
    imported or run), or a newer one of plain tensors, where `anchor_generator` is a dict of
    `sizes` and `aspect_ratios`. A detector of one lesion class is called "merged", because the
    file does not say whether it was trained on GGO alone.

    Raises:
        CheckpointError: not such a file, truncated, with foreign code, or of another architecture.
    """
    content = _read_author_file(Path(path))
    if not isinstance(content, dict) or not isinstance(content.get("model_weights"), dict):
        raise CheckpointError(
            f"{path}: holds no `model_weights`; give one of the author's released checkpoints"
        )
    state = {str(k): v for k, v in content["model_weights"].items() if isinstance(v, Tensor)}
    s = state.get("s2new.fc_scores.weight")
    try:
        config = _infer_detector(state, content.get("anchor_generator"))
        model, own = lesion_mask_rcnn(config, masks=s is None), state
    except (KeyError, ValueError, TypeError, IndexError) as error:  # others under the same names
        raise CheckpointError(
            f"{path}: not a Mask R-CNN of the author's ({error}); "
            "give a checkpoint with his ResNet-18, -34 or -50 backbone"
        ) from error
    if s is not None:
        hidden, features = s.shape
        model = CovidCTMaskNet(model, ClassifierConfig(n_boxes=features // 5, hidden=hidden))
        own = {
            name.replace("s2new.", "s.") if name.startswith("s2new.") else f"detector.{name}": value
            for name, value in state.items()
            if ".mask_" not in name  # his ResNet-50 files carry a mask branch that is never run
        }
    load_state(model, own, path)
    return model.eval()


def _infer_detector(state: dict[str, Tensor], generator: Any) -> DetectorConfig:
    body = "backbone.body.layer"
    last = max(int(name[len(body)]) for name in state if name.startswith(body))
    if f"{body}1.0.conv3.weight" in state:
        backbone = "resnet50"
    else:
        backbone = "resnet34" if f"{body}1.2.conv1.weight" in state else "resnet18"
    classes = len(state["roi_heads.box_predictor.cls_score.weight"])
    if classes not in (2, 3):
        raise ValueError(f"{classes - 1} lesion classes")
    values = generator if isinstance(generator, dict) else getattr(generator, "__dict__", {})
    anchors = []  # sizes and ratios of one location; he repeats them for five levels
    for key in ("sizes", "aspect_ratios"):
        levels = [tuple(float(value) for value in level) for level in values[key]]
        if len(set(levels)) != 1:
            raise ValueError(f"`anchor_generator` gives no {key} that are the same on every level")
        anchors.append(levels[0])
    return DetectorConfig(
        backbone=backbone,
        cut=4 - last,
        lesions="both" if classes == 3 else "merged",
        fpn_channels=len(state["rpn.head.conv.weight"]),
        box_features=len(state["roi_heads.box_head.fc6.weight"]),
        anchor_sizes=anchors[0],
        anchor_ratios=anchors[1],
        light_mask_head="roi_heads.mask_head.mask_fcn2.weight" not in state,
    )


def _read_author_file(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_START))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check it") from error
    try:
        if start.startswith(ZIP_START):
            return torch.load(path, map_location="cpu", weights_only=True)
        if start == LEGACY_START:
            inert = ModuleType("inert_pickle")  # as `torch.load(pickle_module=...)` wants one
            inert.Unpickler, inert.UnpicklingError = _InertUnpickler, pickle.UnpicklingError
            inert.load = lambda file, **options: _InertUnpickler(file, **options).load()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch compares the source of foreign classes
                return torch.load(path, "cpu", pickle_module=inert, weights_only=False)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if not isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(f"{path}: damaged ({line}); download it again") from error
        foreign = re.search(r"GLOBAL (\S+)", str(error))  # torch's message for zip files
        reason = f"it holds the foreign object {foreign[1]}" if foreign else line
        raise CheckpointError(
            f"{path}: not read, because {reason}; use a file from the author's own release"
        ) from error
    raise CheckpointError(f"{path}: not a file that torch.save wrote; check the download")


class _Inert:
    """Stands in for the author's classes: takes their state, runs nothing."""

    dump_patches = False  # read by torch while it compares sources

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _InertUnpickler(pickle.Unpickler):
    """Reads tensors and plain containers; his own classes become `_Inert`; refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("__builtin__", "builtins") and name in ("set", "frozenset"):
            return {"set": set, "frozenset": frozenset}[name]
        rebuilds = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
        if module == "torch._utils" and name in rebuilds:
            return getattr(torch._utils, name)
        if module == "torch" and (name == "Size" or name.endswith("Storage")):
            if isinstance(kind := getattr(torch, name, None), type):
                return kind
        # his modules, and torch's own module classes, which torch 1.1 pickled with their state
        elif module.split(".")[0] == "models" or module.startswith("torch.nn."):
            return _Inert
        raise pickle.UnpicklingError(f"it holds the foreign object {module}.{name}")
