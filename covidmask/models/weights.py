"""Weights on disk, as safetensors files: ours and yours, and the small ones that we ship."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import textwrap
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.errors import CheckpointError
from covidmask.files import atomic_path, is_there, one_line, weights_file
from covidmask.models.classifier import REGIMES, CovidCTMaskNet
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.ranked_boxes import Encoder

FORMAT = 2  # of the header
WHOSE_SHIPPED = "shipped with the package, trained on phantoms and wrong on real CT"
SHIPPED = Path(__file__).parent / "shipped"


def save_model(
    model: GeneralizedRCNN | CovidCTMaskNet, path: str | Path, *, half: bool = False, **card: Any
) -> Path:
    """Write weights and configuration to one .safetensors file.

    Args:
        model: from `lesion_mask_rcnn` or `covid_ct_mask_net`. Of parts of your own (backbone,
            encoder, S) the file names the class; loading it asks for such objects.
        half: store what has two or more dimensions as float16, where its values allow that.
            Loading gives float32 either way.
        card: plain values kept in the file, such as the command and the metrics.
    """
    classifier = isinstance(model, CovidCTMaskNet)
    detector = model.detector if classifier else model
    config = getattr(detector, "config", None)
    if not (isinstance(detector, GeneralizedRCNN) and isinstance(config, DetectorConfig)):
        raise ValueError(
            f"{path}: only detectors of `lesion_mask_rcnn` can be built again from their file; "
            "take off wrappers such as torch.compile, or save the state_dict of yours with torch"
        )
    header = {
        "format": FORMAT,
        "kind": "classifier" if classifier else "segmenter",
        "detector": asdict(config),
        "classifier": asdict(model.config) if classifier else None,
        "parts": _parts(model),
        "card": card,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    for name, tensor in tensors.items() if half else ():
        if tensor.ndim > 1 and tensor.abs().max() <= torch.finfo(torch.half).max:
            tensors[name] = tensor.half()
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"covidmask": json.dumps(header)}))
    return Path(path)


# the names of the classes of what may be a reader's own
def _parts(model: GeneralizedRCNN | CovidCTMaskNet) -> dict[str, str]:
    parts = {"backbone": getattr(model, "detector", model).backbone}
    if isinstance(model, CovidCTMaskNet):
        parts |= {"encoder": model.encoder, "s": model.s}
    return {name: type(part).__name__ for name, part in parts.items()}


def load_segmenter(
    path: str | Path, device: str | torch.device = "cpu", *, backbone: nn.Module | None = None
) -> GeneralizedRCNN:
    """Read a segmenter that `save_model` wrote, on your own `backbone` if it had one; eval mode.

    Raises:
        CheckpointError: no complete covidmask file, a classifier, or other weights or parts.
    """
    return _load(path, "segmenter", device, backbone)


def load_classifier(
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    backbone: nn.Module | None = None,
    encoder: Encoder | None = None,
    s: nn.Module | None = None,
) -> CovidCTMaskNet:
    """Read a classifier, as `load_segmenter`; `encoder` and `s` as in `covid_ct_mask_net`."""
    return _load(path, "classifier", device, backbone, encoder=encoder, s=s)


def _load(path: str | Path, kind: str, device, backbone: nn.Module | None, **parts: Any) -> Any:
    header, state = _read(path)
    if header["kind"] != kind:
        raise CheckpointError(f"{path}: holds a {header['kind']}; give a {kind} file here")
    try:
        config = _config(DetectorConfig, header["detector"])
        model = lesion_mask_rcnn(config, masks=kind == "segmenter", backbone=backbone)
        if kind == "classifier":
            config = _config(ClassifierConfig, header["classifier"])
            model = CovidCTMaskNet(model, config, **parts)
            if model.config != config:
                wanted, given = (", ".join(c.columns) for c in (config, model.config))
                raise ValueError(f"its columns are {wanted}; the encoder's are {given}")
        for part, name in _parts(model).items():
            if name != (own := header.get("parts", {}).get(part, name)):
                raise ValueError(f"its {part} is {own}, not {name}")
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its model cannot be built ({error}); pass parts of your own, as in "
            f"load_{kind}(path, backbone=...), or install the version that wrote it"
        ) from error
    load_state(model, state, path)
    return model.to(device).eval()


# JSON has lists where the dataclass has tuples
def _config(kind: type, values: dict[str, Any]) -> Any:
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_card(path: str | Path) -> dict[str, Any]:
    """The card that `save_model` was given."""
    return _read(path)[0]["card"]


def load_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load weights, or raise `CheckpointError`: what does not fit, or holds NaN or infinity."""
    own = model.state_dict()
    for name, value in state.items():  # loading would turn other types into numbers without a word
        floats = own.get(name, value).is_floating_point()
        if value.is_floating_point() != floats or not value.float().isfinite().all():
            raise CheckpointError(
                f"{path}: {name} holds NaN, infinity or another type, {value.dtype}; "
                "train these weights again"
            )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: weights of another architecture ({textwrap.shorten(str(error), 600)}); "
            "build the model with the configuration that these weights were trained with"
        ) from error


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe could block for ever
            raise OSError("this is a folder, pipe or device")
        open(path, "rb").close()  # safetensors says of any fault that there is no such file
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["covidmask"])
            _ = header["kind"], header["card"], dict(header.get("parts", {}))
            newer = header.get("format", 1) > FORMAT
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as a .safetensors file ({one_line(error)}); check the path, "
            "copy or train it again, or turn the author's .pth into one with `covidmask convert`"
        ) from error
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: a .safetensors file of another program; use one that covidmask wrote"
        ) from error
    if newer:
        raise CheckpointError(f"{path}: written by a newer covidmask; install that version")
    return header, state


class ShippedWeights(Enum):
    """Small weights for the preset `quick`, trained on phantoms: they say nothing about patients.

    Each value is (file in covidmask/models/shipped, its SHA-256); else a `CheckpointError`.
    """

    SEGMENTER_QUICK = (
        "segmenter-quick.safetensors",
        "bd005ad145604492b5b990f4bf9a0c532378531387b607ce21f9e5e7d8847642",
    )
    SEGMENTER_CT = (
        "segmenter-ct.safetensors",
        "906e1560442ded45254b535dcda8bd22dde9e20ca6441ee16aedda6eea8e92f0",
    )
    CLASSIFIER_QUICK = (
        "classifier-quick.safetensors",
        "15a594c611b5428b5aea3a00cc50ad662451cfa05493e66be42e9c1a22ae6b5d",
    )

    @property
    def path(self) -> Path:
        """The file, whose bytes were looked at."""
        path = SHIPPED / self.value[0]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != self.value[1]:
            problem = f"{path}: is missing or not the shipped file, of SHA-256 {self.value[1]}"
            raise CheckpointError(f"{problem}; install covidmask again")
        return path

    def load(self, device: str | torch.device = "cpu") -> GeneralizedRCNN | CovidCTMaskNet:
        """The model, in eval mode."""
        return _load(self.path, self.value[0].partition("-")[0], device, None)

    def card(self) -> dict[str, Any]:
        """Data, command, commit, metrics with intervals, limits."""
        return read_card(self.path)


def trained_segmenter(
    preset: str, device: str | torch.device = "cpu", *, shipped: bool = False
) -> GeneralizedRCNN:
    """The segmenter of a preset, in eval mode; which one, and what it raises: `find_weights`."""
    return load_segmenter(find_weights("segmenter", preset, shipped=shipped)[0], device)


def trained_classifier(
    preset: str, device: str | torch.device = "cpu", *, shipped: bool = False
) -> CovidCTMaskNet:
    """The classifier of a preset, as `trained_segmenter`."""
    return load_classifier(find_weights("classifier", preset, shipped=shipped)[0], device)


def find_weights(
    kind: str,
    preset: str,
    named: str | Path | None = None,
    regime: str | None = None,
    shipped: bool = False,
) -> tuple[Path, str]:
    """The weights to use: the named ones, else yours, else (preset quick) the shipped ones.

    Yours are what `covidmask train` writes in $COVIDMASK_DATA/weights. With `shipped` the shipped
    ones come before them, as in the book, whose text has their numbers. Returns the file and whose
    it is: "named", "yours" or `WHOSE_SHIPPED`.

    Raises:
        CheckpointError: there are none, several of yours, or `named` beside `regime`.
    """
    if named is not None:
        if regime is None:
            return Path(named), "named"
        raise CheckpointError(f"--regime {regime}: is for your own weights, not {named}; drop one")
    regimes = [regime] if regime else REGIMES if kind == "classifier" else [None]
    yours = [weights_file(kind, preset, each) for each in regimes]
    if shipped and preset == "quick" or not (yours := list(filter(is_there, yours))):
        if preset == "quick" and regime in (None, "heads"):  # the shipped one's regime
            return ShippedWeights[f"{kind.upper()}_QUICK"].path, WHOSE_SHIPPED
        raise CheckpointError(
            f"{weights_file(kind, preset, regime)}: there is no {kind} of preset {preset} yet, and "
            f"none comes with the package; train it with `covidmask train {kind} --preset {preset}"
            f"{f' --regime {regime}' if regime else ''}`"
        )
    if len(yours) > 1:
        several = f"{', '.join(map(str, yours))}: there are several of yours"
        raise CheckpointError(f"{several}; choose one with --regime, or name its file")
    return yours[0], "yours"
