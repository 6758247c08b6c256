"""The ranked boxes of every slice, computed once and kept: the detector of "heads" is constant."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torchvision
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

import covidmask
from covidmask.datasets.classes import SliceImages
from covidmask.errors import OutputError, TrainingError
from covidmask.files import atomic_path, check_writable, some
from covidmask.models.classifier import CovidCTMaskNet
from covidmask.models.detector import for_inference
from covidmask.models.ranked_boxes import COLUMNS, Columns
from covidmask.training import loop

SECONDS = 2.0  # of work that a killed run may lose


@torch.no_grad()
def cache_ranked_boxes(
    model: CovidCTMaskNet,
    dataset: Dataset,
    *,
    fabric: Fabric | None = None,
    batch_size: int = 8,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Tensor:
    """Run the detector once on each slice.

    Args:
        folder: keep the boxes in a file there and find them again. Its name is a hash of the
            detector's weights and settings, the precision, the slices, and the code that reads and
            ranks them, so that a change in one of them is another file. A run that was killed goes
            on. Not used where the encoder is yours, whose code could change unseen.

    Returns:
        float32 [M,N,columns] on the CPU, in the order of the data set; with `folder` memory-mapped.

    Raises:
        TrainingError: a box holds NaN.
    """
    fabric = fabric or loop.make_fabric()
    path = begun = None
    # what an encoder of yours does is not in the key; `Columns` takes no name of ours for yours
    known = type(model.encoder) is Columns and set(model.encoder.columns) <= set(COLUMNS)
    if folder is not None and known:
        path = Path(folder) / f"ranked-{_key(model, dataset, fabric)}.npy"
        begun = path.with_suffix(f".{fabric.global_rank}of{fabric.world_size}")  # for a next run
        rows = _read(path)
        if fabric.broadcast(rows is not None):  # the first process decides
            return _there(rows, path)
        check_writable(folder)
    shape = (model.config.n_boxes, len(model.config.columns))
    rows = torch.zeros(len(dataset), *shape)
    own = rows[fabric.global_rank :: fabric.world_size]  # a view
    names, done = loop.item_names(dataset), 0
    while begun and (found := _read(begun / f"{done}.npy")) is not None:  # named by the first row
        own[done : done + len(found)] = found
        done += len(found)
    kept, clock = done, time.monotonic()
    fast, title = for_inference(model.to(fabric.device).eval()), "ranking boxes"
    for part, _, images in loop.read_batches(dataset, fabric, batch_size, title, progress, done):
        batch = own[done : done + len(part)]
        with fabric.autocast():
            batch.copy_(fast.ranked_boxes(images))
        if bad := [names[i] for i, one in zip(part, batch, strict=True) if one.isnan().any()]:
            bad = f"{some(bad)}: the detector gives boxes that are not numbers"
            raise TrainingError(f"{bad}; look at these slices and at its weights")
        done += len(part)
        if begun and time.monotonic() - clock >= SECONDS:
            _write(begun / f"{kept}.npy", own[kept:done])
            kept, clock = done, time.monotonic()
    rows = loop.joined(rows, fabric)
    if path is None:
        return rows
    if fabric.global_rank == 0:
        _write(path, rows)
    fabric.barrier()  # now the file is there for all
    shutil.rmtree(begun, ignore_errors=True)
    return _there(_read(path), path)


def _there(rows: Tensor | None, path: Path) -> Tensor:
    if rows is None:
        raise OutputError(f"{path}: cannot be read; name a folder that all processes share")
    return rows


def _write(path: Path, rows: Tensor) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, rows.numpy())


def _read(path: Path) -> Tensor | None:
    """The rows in `path`, memory-mapped; None where there is no such file, or it is damaged."""
    try:
        rows = np.load(path, mmap_mode="c")  # torch wants memory that may be written to
    except (OSError, ValueError, EOFError):
        return None
    return None if np.isnan(rows.min(initial=0)) else torch.from_numpy(rows)


def settings_digest(detector: nn.Module) -> str:
    """A short hash of all but weights that decides what a detector gives, whoever built it.

    That is the plain attributes of its modules, such as thresholds, and of their helpers that are
    no modules, such as the weights of the box coder.
    """
    total = hashlib.sha256()
    for name, part in detector.named_modules():
        for place, owner in (("", part), *sorted(vars(part).items())):
            for key, value in sorted(getattr(owner, "__dict__", {}).items()):
                if "hooks" in key or {place, key} & {"training", "scales", "map_levels"}:
                    continue  # a forward pass writes the last two
                with suppress(TypeError, ValueError):  # what is no JSON is no setting
                    total.update(json.dumps([name, str(type(part)), place, key, value]).encode())
    return total.hexdigest()[:12]


def _key(model: CovidCTMaskNet, dataset: Dataset, fabric: Fabric) -> str:
    facts = {
        "versions": [covidmask.__version__, torch.__version__, torchvision.__version__],
        "weights": loop.digest(model.detector.state_dict().values()),
        "detector": settings_digest(model.detector),
        "classifier": asdict(model.config),
        "precision": fabric.strategy.precision.precision,
    }
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    package = Path(covidmask.__file__).parent
    for file in sorted([*package.glob("models/*.py"), *package.glob("datasets/*.py")]):
        total.update(file.read_bytes())
    # the files say it all only where nothing comes between, such as a crop in a subclass
    files = type(dataset).__getitem__ is SliceImages.__getitem__
    for index, name in enumerate(loop.item_names(dataset)):
        total.update(str(name).encode())
        if files:
            total.update((dataset.root / name).read_bytes())
        else:
            image = dataset[index][0]
            total.update(f"{image.dtype} {image.shape} {loop.digest([image])}".encode())
    return total.hexdigest()[:16]
