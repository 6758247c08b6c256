"""The ranked boxes of every slice, computed once and kept: the detector of "heads" is constant."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

import covidmask
from covidmask.datasets.classes import SliceImages
from covidmask.errors import OutputError, TrainingError
from covidmask.files import atomic_path, check_writable
from covidmask.models.classifier import CovidCTMaskNet
from covidmask.models.detector import for_inference, to_model
from covidmask.models.weights import own_parts
from covidmask.training.loop import as_bytes, digest, gather, item_names, make_fabric, share


@torch.no_grad()
def cache_ranked_boxes(
    model: CovidCTMaskNet,
    dataset: Dataset,
    *,
    fabric: Fabric | None = None,
    batch_size: int = 8,
    folder: str | Path | None = None,
    progress: bool = True,
    title: str = "ranking boxes",
) -> Tensor:
    """Run the detector once on each slice.

    Args:
        folder: keep the boxes in a file there and find them again. Its name is a hash of the
            detector's weights and settings, the precision, the slices, and the code that reads and
            ranks them, so that a change in one of them is another file. Of `SliceImages` the bytes
            of the files are hashed; another data set is read once more for its pixels. A run that
            was killed goes on.

    Returns:
        float32 [M,N,5] on the CPU, in the order of the data set; with `folder` memory-mapped.

    Raises:
        OutputError: `folder` cannot be written.
        TrainingError: a box holds NaN.
    """
    fabric = fabric or make_fabric()
    shape = (len(dataset), model.config.n_boxes, len(model.config.columns))
    if "encoder" in own_parts(model):  # its code is not in the key
        folder = None
    path = None if folder is None else Path(folder) / f"ranked-{_key(model, dataset, fabric)}.npy"
    if path is not None and fabric.broadcast(_read(path, shape) is not None):  # the first decides
        return _kept(path, shape)
    indices = share(len(dataset), fabric)
    names = item_names(dataset)
    rows = torch.full((len(indices), *shape[1:]), torch.nan)
    started, done = None, 0
    if path is not None:
        check_writable(path.parent)
        process = f"{fabric.global_rank}of{fabric.world_size}"
        started = path.with_name(f".{path.stem}.{process}.part")
        done = _read_part(started, rows)
    fast = for_inference(model.to(fabric.device).eval())
    hidden = not (progress and fabric.global_rank == 0)
    with tqdm(total=len(indices), initial=done, desc=title, disable=hidden) as bar:
        for start in range(done, len(indices), batch_size):
            part = slice(start, start + batch_size)
            images = [dataset[i][0] for i in indices[part]]
            images = to_model(images, fabric.device, [names[i] for i in indices[part]])
            with fabric.autocast():
                rows[part] = fast.ranked_boxes(images).cpu()
            if started is not None:
                _append(started, rows[part], start)
            bar.update(len(images))
    whole = gather(rows, len(dataset), fabric)
    if bad := torch.where(whole.flatten(1).isnan().any(1))[0].tolist():
        if started is not None:
            started.unlink(missing_ok=True)
        raise TrainingError(
            f"{names[bad[0]]}: the detector gives boxes that are not numbers, here and on "
            f"{len(bad) - 1} other slices; look at these slices and at the detector's weights"
        )
    if path is None:
        return whole
    if fabric.global_rank == 0:
        with atomic_path(path) as temporary:
            np.save(temporary, whole.numpy())
    fabric.barrier()  # now the file is there for all
    with suppress(OSError):
        started.unlink()
    return _kept(path, shape)


def settings_digest(detector: nn.Module) -> str:
    """A short hash of all but weights that decides what a detector gives, whoever built it.

    That is the plain attributes of its modules, such as thresholds and numbers of proposals, and
    those of their helpers that are no modules, such as the weights of the box coder.
    """
    ours = [
        (name, str(type(part)), place, key, value)
        for name, part in detector.named_modules()
        for place, owner in (("", part), *sorted(vars(part).items()))
        for key, value in sorted(getattr(owner, "__dict__", {}).items())
        if key not in ("training", "scales") and _is_plain(value)  # a forward pass writes `scales`
    ]
    return hashlib.sha256(repr(ours).encode()).hexdigest()[:12]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


def _key(model: CovidCTMaskNet, dataset: Dataset, fabric: Fabric) -> str:
    facts = {
        "versions": [covidmask.__version__, torch.__version__, torchvision.__version__],
        "weights": digest(model.detector),
        "detector": settings_digest(model.detector),
        "classifier": asdict(model.config),
        "precision": fabric.strategy.precision.precision,
    }
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    package = Path(covidmask.__file__).parent
    for file in sorted([*package.glob("models/*.py"), *package.glob("data/*.py")]):
        total.update(file.read_bytes())
    # the files say it all only where nothing comes between, such as a crop in a subclass
    files = type(dataset).__getitem__ is SliceImages.__getitem__
    for index, name in enumerate(item_names(dataset)):
        total.update(str(name).encode())
        if files:
            total.update((dataset.root / name).read_bytes())
        else:
            image = dataset[index][0]
            total.update(str((image.dtype, image.shape)).encode() + as_bytes(image))
    return total.hexdigest()[:16]


def _kept(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The rows in a file that the first process has found or written."""
    if (rows := _read(path, shape)) is None:
        raise OutputError(
            f"{path}: cannot be read back; name a folder that all processes share, with space left"
        )
    return rows


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The rows in `path`; None where there is no such file, it is damaged or not complete."""
    try:
        rows = np.load(path, mmap_mode="c")  # mapped; torch wants memory that may be written to
    except (OSError, ValueError, EOFError):
        return None
    if rows.shape != shape or rows.dtype != np.float32 or np.isnan(rows.min(initial=0)):
        return None
    return torch.from_numpy(rows)


def _record(rows: Tensor) -> np.dtype:
    """How a slice stands in the file of a run that is not finished: its rows, and their sum.

    The sum is of the place, too: two runs at once append to one file, each all that it computes.
    """
    return np.dtype([("rows", "<f4", tuple(rows.shape[1:])), ("sum", "<u4")])


def _read_part(path: Path, rows: Tensor) -> int:
    """Put the slices that a killed run has finished into `rows`; cut off what is damaged.

    Returns:
        how many they are. The sum tells rows from the zeros that a crash can leave in a file.
    """
    record = _record(rows)
    if not path.exists():
        return 0
    found = np.fromfile(path, record)[: len(rows)]
    good = [zlib.crc32(one["rows"].tobytes(), i) == one["sum"] for i, one in enumerate(found)]
    done = [*good, False].index(False)
    rows[:done] = torch.from_numpy(found["rows"][:done])
    os.truncate(path, done * record.itemsize)
    return done


def _append(path: Path, rows: Tensor, first: int) -> None:
    records = np.empty(len(rows), _record(rows))
    records["rows"] = rows.numpy()
    records["sum"] = [zlib.crc32(one.tobytes(), i) for i, one in enumerate(records["rows"], first)]
    try:
        with open(path, "ab") as file:
            file.write(records.tobytes())
    except OSError as error:
        raise OutputError(
            f"{path}: ranked boxes cannot be kept ({error.strerror or error}); free some space, "
            "then the same command goes on, or set COVIDMASK_DATA to another folder"
        ) from error
