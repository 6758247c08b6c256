"""The author's released .pth files, read without running anything that they hold."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.errors import CheckpointError
from covidmask.files import one_line
from covidmask.models.classifier import CovidCTMaskNet
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import load_state

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickled number, torch < 1.6
PLAIN = {  # what a pickle may name: tensors and containers, which run nothing of the file
    *(("torch._utils", f"_rebuild_{kind}") for kind in ("tensor", "tensor_v2", "parameter")),
    *(("__builtin__", "set"), ("builtins", "set"), ("torch", "Size")),
    ("collections", "OrderedDict"),
}


def load_author_checkpoint(path: str | Path) -> GeneralizedRCNN | CovidCTMaskNet:
    """Build the model of one of the author's released .pth files, in eval mode.

    Backbone, cut, N, width of S and anchors are read off the file: a pickle of torch 1.1 with a
    class of the author's own inside (nothing of it is run), or a newer one of plain tensors, where
    `anchor_generator` is a dict of `sizes` and `aspect_ratios`. One lesion class is called
    "merged", because the file does not say whether it was GGO alone.

    Raises:
        CheckpointError: not such a file, truncated, with foreign code, or of another architecture.
    """
    content = _read_author_file(path)
    try:
        weights, generator = content["model_weights"], content["anchor_generator"]
        state = {str(k): v for k, v in weights.items() if isinstance(v, Tensor)}
        s = state.get("s2new.fc_scores.weight")
        model = lesion_mask_rcnn(_infer_detector(state, generator), masks=s is None)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a Mask R-CNN of the author's ({one_line(error)}); "
            "give one of his released checkpoints, of ResNet-18, -34 or -50"
        ) from error
    if s is not None:
        hidden, features = s.shape
        model = CovidCTMaskNet(model, ClassifierConfig(n_boxes=features // 5, hidden=hidden))
        state = {
            name.replace("s2new.", "s.") if name.startswith("s2new.") else f"detector.{name}": value
            for name, value in state.items()
            if ".mask_" not in name  # his ResNet-50 files carry a mask branch that is never run
        }
    load_state(model, state, path)
    return model.eval()


def _infer_detector(state: dict[str, Tensor], generator: Any) -> DetectorConfig:
    body = "backbone.body.layer"
    last = max(int(name[len(body)]) for name in state if name.startswith(body))
    backbone = "resnet34" if f"{body}1.2.conv1.weight" in state else "resnet18"
    if f"{body}1.0.conv3.weight" in state:
        backbone = "resnet50"
    classes = len(state["roi_heads.box_predictor.cls_score.weight"])
    if classes not in (2, 3):
        raise ValueError(f"{classes - 1} lesion classes")
    values = generator if isinstance(generator, dict) else vars(generator)
    # one location's sizes and ratios; he repeats them for five levels
    (sizes,), (ratios,) = (
        {tuple(map(float, level)) for level in values[key]} for key in ("sizes", "aspect_ratios")
    )
    return DetectorConfig(
        backbone=backbone,
        cut=4 - last,
        lesions="both" if classes == 3 else "merged",
        fpn_channels=len(state["rpn.head.conv.weight"]),
        box_features=len(state["roi_heads.box_head.fc6.weight"]),
        anchor_sizes=sizes,
        anchor_ratios=ratios,
        light_mask_head="roi_heads.mask_head.mask_fcn2.weight" not in state,
    )


def _read_author_file(path: str | Path) -> Any:
    inert = ModuleType("inert_pickle")  # as `torch.load(pickle_module=...)` wants one
    inert.Unpickler, inert.UnpicklingError = _InertUnpickler, pickle.UnpicklingError
    inert.load = lambda file, **options: _InertUnpickler(file, **options).load()
    if not Path(path).is_file():  # a pipe could block for ever
        raise CheckpointError(f"{path}: there is no such file, or it is a folder; check the path")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            start = file.read(len(LEGACY_START))
            file.seek(0)
            if start == LEGACY_START:
                warnings.simplefilter("ignore")  # torch compares the source of foreign classes
                return torch.load(file, "cpu", pickle_module=inert, weights_only=False)
            if start.startswith(b"PK"):
                return torch.load(file, "cpu", weights_only=True)
            raise pickle.UnpicklingError("torch.save wrote no such file")
    except Exception as error:  # a damaged file can fail anywhere in the reader
        foreign = re.search(r"(?:GLOBAL|class) (\S+)", str(error))  # torch's words, and ours
        reason = f"it holds the foreign object {foreign[1]}" if foreign else one_line(error)[:200]
        raise CheckpointError(
            f"{path}: not read ({reason}); download a file of the author's own release again"
        ) from error


class _Inert:  # stands in for the author's classes: takes their state, runs nothing
    dump_patches = False  # read by torch while it compares sources

    def __setstate__(self, state) -> None:
        self.__dict__.update(state)


class _InertUnpickler(pickle.Unpickler):
    """Reads `PLAIN` things and storages; the author's classes become `_Inert`; refuses the rest."""

    def find_class(self, module: str, name: str) -> Any:
        # his modules, and torch's own module classes, which torch 1.1 pickled with their state
        if module.split(".")[0] == "models" or module.startswith("torch.nn."):
            return _Inert
        storage = module == "torch" and name.isidentifier() and name.endswith("Storage")
        if (module, name) in PLAIN or storage:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
