"""The ranked boxes of every slice, computed once and kept: the detector of "heads" is constant."""

from __future__ import annotations

import hashlib
import inspect
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

import covidmask
from covidmask.datasets.classes import SliceImages
from covidmask.errors import OutputError, TrainingError
from covidmask.files import atomic_path, check_writable
from covidmask.models.classifier import CovidCTMaskNet
from covidmask.models.detector import for_inference
from covidmask.training import loop


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
            ranks them, so that a change in one of them is another file. Of `SliceImages` the bytes
            of the files are hashed; another data set is read once more for its pixels. A run that
            was killed goes on.

    Returns:
        float32 [M,N,columns] on the CPU, in the order of the data set; with `folder` memory-mapped.

    Raises:
        TrainingError: a box holds NaN.
    """
    fabric = fabric or loop.make_fabric()
    shape = (len(dataset), model.config.n_boxes, len(model.config.columns))
    path = started = None
    if folder is not None:
        path = Path(folder) / f"ranked-{_key(model, dataset, fabric)}.npy"
        found = _read(path, shape)
        if fabric.broadcast(found is not None):  # the first process decides
            return _there(found, path)
        check_writable(folder)
        process = f"{fabric.global_rank}of{fabric.world_size}"
        started = path.with_name(f".{path.stem}.{process}.part")
    rows = torch.full((len(loop.share(shape[0], fabric)), *shape[1:]), torch.nan)
    done = _read_part(started, rows) if started else 0
    fast, title = for_inference(model.to(fabric.device).eval()), "ranking boxes"
    for _, _, images in loop.read_batches(dataset, fabric, batch_size, title, progress, done):
        part = rows[done : done + len(images)]
        with fabric.autocast():
            part.copy_(fast.ranked_boxes(images))
        if started:
            _append(started, part, done)
        done += len(images)
    whole = loop.gather(rows, shape[0], fabric)
    if bad := torch.where(whole.flatten(1).isnan().any(1))[0].tolist():
        if started:
            started.unlink(missing_ok=True)
        raise TrainingError(
            f"{loop.item_names(dataset)[bad[0]]}: the detector gives boxes that are not numbers, "
            f"here and on {len(bad) - 1} other slices; look at these slices and at its weights"
        )
    if not started:
        return whole
    if fabric.global_rank == 0:
        with atomic_path(path) as temporary:
            np.save(temporary, whole.numpy())
    fabric.barrier()  # now the file is there for all
    with suppress(OSError):
        started.unlink()
    return _there(_read(path, shape), path)


def _there(rows: Tensor | None, path: Path) -> Tensor:
    if rows is None:
        raise OutputError(f"{path}: cannot be read; name a folder that all processes share")
    return rows


def settings_digest(detector: nn.Module) -> str:
    """A short hash of all but weights that decides what a detector gives, whoever built it.

    That is the plain attributes of its modules, such as thresholds, and of their helpers that are
    no modules, such as the weights of the box coder.
    """
    total = hashlib.sha256()
    for name, part in detector.named_modules():
        for place, owner in (("", part), *sorted(vars(part).items())):
            for key, value in sorted(getattr(owner, "__dict__", {}).items()):
                if key in ("training", "scales") or "hooks" in key:
                    continue  # a forward pass writes `scales`
                with suppress(TypeError, ValueError):  # what is no JSON is no setting
                    setting = json.dumps([name, str(type(part)), place, key, value])
                    total.update(setting.encode())
    return total.hexdigest()[:12]


def _key(model: CovidCTMaskNet, dataset: Dataset, fabric: Fabric) -> str:
    facts = {
        "versions": [covidmask.__version__, torch.__version__, torchvision.__version__],
        "weights": loop.digest(model.detector),
        "detector": settings_digest(model.detector),
        "classifier": asdict(model.config),
        "precision": fabric.strategy.precision.precision,
        "encoder": _text(getattr(model, "encoder", None)),
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
            total.update(str((image.dtype, image.shape)).encode() + loop.as_bytes(image))
    return total.hexdigest()[:16]


def _text(part: Any) -> str:
    """What a row encoder, perhaps of a reader's notebook, is made of: values and source code."""
    if isinstance(part, (tuple, list)):
        return str([_text(one) for one in part])
    if isinstance(part, Tensor):
        return str(loop.as_bytes(part))
    try:
        if isinstance(part, nn.Module):
            return inspect.getsource(type(part)) + settings_digest(part) + loop.digest(part)
        if inspect.isfunction(part):
            inside = [cell.cell_contents for cell in part.__closure__ or ()]
            return inspect.getsource(part) + _text([part.__defaults__, *inside])
        return inspect.getsource(type(part)) + _text([*vars(part).values()])
    except (OSError, TypeError):  # a plain value; or it shows its address, and is never found again
        return repr(part)


def _read(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The rows in `path`; None where there is no such file, it is damaged or not complete."""
    try:
        rows = np.load(path, mmap_mode="c")  # mapped; torch wants memory that may be written to
    except (OSError, ValueError, EOFError):
        return None
    if rows.shape != shape or rows.dtype != np.float32 or np.isnan(rows.min(initial=0)):
        return None
    return torch.from_numpy(rows)


def _records(rows: np.ndarray, first: int) -> np.ndarray:
    """How slices stand in the file of a run that is not finished: their rows, each with a sum.

    The sum knows zeros that a crash can leave, and the place: two runs may append to one file.
    """
    records = np.empty(len(rows), [("rows", "<f4", rows.shape[1:]), ("sum", "<u4")])
    records["rows"] = rows
    records["sum"] = [zlib.crc32(one.tobytes(), i) for i, one in enumerate(records["rows"], first)]
    return records


def _read_part(path: Path, rows: Tensor) -> int:
    """Put the slices that a killed run has finished into `rows`; cut off what is damaged."""
    if not path.exists():
        return 0
    kind = _records(rows[:0].numpy(), 0).dtype
    found = np.fromfile(path, kind)[: len(rows)]
    good = found["sum"] == _records(found["rows"], 0)["sum"]
    done = [*good.tolist(), False].index(False)
    rows[:done] = torch.from_numpy(found["rows"][:done])
    os.truncate(path, done * kind.itemsize)
    return done


def _append(path: Path, rows: Tensor, first: int) -> None:
    try:
        with open(path, "ab") as file:
            file.write(_records(rows.numpy(), first).tobytes())
    except OSError as error:
        raise OutputError(
            f"{path}: ranked boxes cannot be kept ({error.strerror or error}); free some space, "
            "then the same command goes on, or set COVIDMASK_DATA to another folder"
        ) from error
