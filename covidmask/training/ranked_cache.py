"""The ranked boxes of every slice, computed once and kept: the detector of "heads" is constant."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import covidmask
from covidmask.errors import OutputError, TrainingError
from covidmask.files import atomic_path, check_writable
from covidmask.models.classifier import CovidCTMaskNet
from covidmask.models.inference import for_inference
from covidmask.training.loop import digest, gather, make_fabric, share


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
            detector's weights, the configuration, the precision and the bytes of the slices, so
            that a change in one of them is another file. A run that was killed goes on.

    Returns:
        float32 [M,N,5] on the CPU, in the order of the data set; with `folder` memory-mapped.

    Raises:
        OutputError: `folder` cannot be written.
        TrainingError: a box holds NaN.
    """
    fabric = fabric or make_fabric()
    shape = (len(dataset), model.config.n_boxes, 5)
    path = None if folder is None else Path(folder) / f"ranked-{_key(model, dataset, fabric)}.npy"
    if path is not None and fabric.broadcast(_read(path, shape) is not None):  # the first decides
        return _kept(path, shape)
    indices = share(len(dataset), fabric)
    started = None
    if path is None:
        rows = torch.full((len(indices), *shape[1:]), torch.nan)
    else:
        check_writable(path.parent)
        part = f".{path.stem}.{fabric.global_rank}of{fabric.world_size}.npy"
        started = path.with_name(part)
        rows = _open_part(started, (len(indices), *shape[1:]))
    fast = for_inference(model.to(fabric.device).eval())
    todo = _incomplete(rows)
    hidden = not (progress and fabric.global_rank == 0)
    done = len(indices) - len(todo)
    with tqdm(total=len(indices), initial=done, desc=title, disable=hidden) as bar:
        for start in range(0, len(todo), batch_size):
            places = todo[start : start + batch_size]
            images = [dataset[indices[i]][0].to(fabric.device) for i in places]
            with fabric.autocast():
                rows[places] = fast.ranked_boxes(images).cpu()
            bar.update(len(images))
    whole = gather(rows, len(dataset), fabric)
    if bad := _incomplete(whole):
        names = getattr(dataset, "names", range(len(dataset)))
        raise TrainingError(
            f"slice {names[bad[0]]}: the detector gives boxes that are not numbers, here and on "
            f"{len(bad) - 1} other slices; look at these slices and at the detector's weights"
        )
    if path is None:
        return whole
    if fabric.global_rank == 0:
        with atomic_path(path) as temporary:
            np.save(temporary, whole.numpy())
    del rows, whole  # Windows removes no file that is mapped
    with suppress(OSError):
        started.unlink()
    fabric.barrier()  # now the file is there for all
    return _kept(path, shape)


def _key(model: CovidCTMaskNet, dataset: Dataset, fabric: Fabric) -> str:
    facts = {
        "covidmask": covidmask.__version__,
        "weights": digest(model.detector),
        "detector": asdict(model.detector.config),
        "classifier": asdict(model.config),
        "precision": fabric.strategy.precision.precision,
    }
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in dataset.names:
        total.update(name.encode())
        total.update((dataset.root / name).read_bytes())
    return total.hexdigest()[:16]


def _incomplete(rows: Tensor) -> list[int]:
    """The slices of which a number is missing."""
    return torch.where(rows.flatten(1).isnan().any(1))[0].tolist()


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


def _open_part(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Rows that are written to disk as they come; those that are still missing are NaN."""
    try:
        rows = np.lib.format.open_memmap(path, mode="r+")
        if rows.shape == shape and rows.dtype == np.float32:
            return torch.from_numpy(rows)
    except (OSError, ValueError, EOFError):
        pass  # there is none, or it is damaged: start anew
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    rows[:] = np.nan
    return torch.from_numpy(rows)
