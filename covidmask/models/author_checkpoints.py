"""The author's released .pth files, read without running anything that they hold."""

from __future__ import annotations

import pickle
import re
import types
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.errors import CheckpointError
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import load_state


def load_author_checkpoint(path: str | Path) -> GeneralizedRCNN | CovidCTMaskNet:
    """Build the model of one of the author's released .pth files, in eval mode.

    Backbone, cut, lesion classes, N, width of S and anchors are read off the file. It may be in
    the format of torch 1.1, a pickle with a class of the author's own inside (nothing of that
    class is imported or run: see `_InertUnpickler`), or a newer one of plain tensors, where
    `anchor_generator` is a dict of `sizes` and `aspect_ratios`.

    Returns:
        `CovidCTMaskNet` where the file holds the module S, else the segmenter. Proposals are
        ranked on raw logits and no minimal size is asked of them, as in his code. A detector of
        one lesion class is called "merged"; a file does not say whether it was trained on GGO
        alone.

    Raises:
        CheckpointError: not such a file, truncated, with foreign code, or of another architecture.
    """
    content = _read_author_file(Path(path))
    if not isinstance(content, dict) or not isinstance(content.get("model_weights"), dict):
        raise CheckpointError(
            f"{path}: holds no `model_weights`; give one of the author's released checkpoints"
        )
    state = {str(k): v for k, v in content["model_weights"].items() if isinstance(v, Tensor)}
    try:
        sizes, ratios = _anchors(content.get("anchor_generator"), path)
        detector_config = _infer_detector(state, sizes, ratios)
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError) as error:  # other things under the same names
        raise CheckpointError(
            f"{path}: not a Mask R-CNN of the author's ({error}); "
            "give a checkpoint with his ResNet-18, -34 or -50 backbone"
        ) from error
    if "s2new.fc_scores.weight" not in state:
        segmenter = lesion_mask_rcnn(detector_config)
        load_state(segmenter, state, path)
        return segmenter.eval()
    hidden, features = state["s2new.fc_scores.weight"].shape
    detector = lesion_mask_rcnn(detector_config, masks=False)
    model = covid_ct_mask_net(detector, ClassifierConfig(n_boxes=features // 5, hidden=hidden))
    own = {
        name.replace("s2new.", "s.") if name.startswith("s2new.") else f"detector.{name}": tensor
        for name, tensor in state.items()
        if ".mask_" not in name  # his ResNet-50 files carry a mask branch that is never run
    }
    load_state(model, own, path)
    return model


def _infer_detector(state: dict[str, Tensor], sizes, ratios) -> DetectorConfig:
    body = "backbone.body.layer"
    layers = {int(name[len(body)]) for name in state if name.startswith(body)}
    if not layers:
        raise KeyError(f"no {body}1")
    if f"{body}1.0.conv3.weight" in state:
        backbone = "resnet50"
    else:
        backbone = "resnet34" if f"{body}1.2.conv1.weight" in state else "resnet18"
    classes = len(state["roi_heads.box_predictor.cls_score.weight"])
    if classes not in (2, 3):
        raise ValueError(f"{classes - 1} lesion classes")
    return DetectorConfig(
        backbone=backbone,
        cut=4 - max(layers),
        lesions="both" if classes == 3 else "merged",
        fpn_channels=len(state["rpn.head.conv.weight"]),
        box_features=len(state["roi_heads.box_head.fc6.weight"]),
        anchor_sizes=sizes,
        anchor_ratios=ratios,
        light_mask_head="roi_heads.mask_head.mask_fcn2.weight" not in state,
    )


def _anchors(generator: Any, path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sizes and ratios of one location; the author repeats them for five levels."""
    values = generator if isinstance(generator, dict) else getattr(generator, "__dict__", {})
    found = []
    for key in ("sizes", "aspect_ratios"):
        levels = values.get(key)
        if not levels or any(tuple(level) != tuple(levels[0]) for level in levels):
            raise CheckpointError(
                f"{path}: `anchor_generator` gives no {key} that are the same on every level; "
                "give one of the author's released checkpoints"
            )
        found.append(tuple(float(value) for value in levels[0]))
    return found[0], found[1]


ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number, torch < 1.6


def _read_author_file(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            start = file.read(len(LEGACY_START))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path"
        ) from error
    try:
        if start.startswith(ZIP_START):
            return torch.load(path, map_location="cpu", weights_only=True)
        if start == LEGACY_START:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch compares the source of foreign classes
                return torch.load(
                    path, map_location="cpu", weights_only=False, pickle_module=_inert_pickle()
                )
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))  # torch's message for zip files
        reason = f"it holds the foreign object {foreign[1]}" if foreign else _one_line(error)
        raise CheckpointError(
            f"{path}: not read, because {reason}; use a file from the author's own release"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise CheckpointError(
            f"{path}: truncated or damaged ({_one_line(error)}); download it again"
        ) from error
    raise CheckpointError(f"{path}: not a file that torch.save wrote; check the download")


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


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
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return getattr(torch._utils, name)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return torch._utils._rebuild_parameter
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and name.endswith("Storage"):
            storage = getattr(torch, name, None)
            if isinstance(storage, type):
                return storage
        # his modules, and torch's own module classes, which torch 1.1 pickled with their state
        if module.split(".")[0] == "models" or module.startswith("torch.nn."):
            return _Inert
        raise pickle.UnpicklingError(f"it holds the foreign object {module}.{name}")


def _inert_pickle() -> types.ModuleType:
    """A stand-in for the module `pickle`, as `torch.load(pickle_module=...)` wants one."""
    module = types.ModuleType("inert_pickle")
    module.Unpickler = _InertUnpickler
    module.load = lambda file, **options: _InertUnpickler(file, **options).load()
    module.UnpicklingError = pickle.UnpicklingError
    return module
