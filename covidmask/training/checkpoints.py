"""Checkpoints of a training run: written whole or not at all, read as plain data only."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from covidmask.errors import CheckpointError
from covidmask.files import atomic_path


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that a crash leaves the old file or the new one.

    Raises:
        OutputError: no permission or a full disk.
    """
    content = io.BytesIO()  # torch, writing to a file, turns Ctrl-C into a RuntimeError
    torch.save(state, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: str | Path, run: dict[str, Any]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote for the same run.

    Args:
        run: the settings that must be the same, else resuming would mix two runs.

    Raises:
        CheckpointError: truncated, with foreign classes, or of a run with other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than plain data and is not read; "
            "delete it and start again, or name another checkpoint"
        ) from error
    except (PermissionError, MemoryError):
        raise  # the file may be whole
    except Exception as error:  # a damaged file can fail anywhere in the reader
        reason = (str(error) or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"{path}: truncated or damaged ({reason}); "
            "delete it and start again, or name another checkpoint"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("run"), dict):
        raise CheckpointError(
            f"{path}: not a checkpoint of a covidmask training; name another file"
        )
    saved = state["run"]
    changed = [key for key in run if saved.get(key) != run[key]]
    if changed:
        details = ", ".join(f"{key} was {saved.get(key)!r}, is {run[key]!r}" for key in changed)
        raise CheckpointError(
            f"{path}: belongs to another run ({details}); "
            "resume with the same settings, or name another checkpoint"
        )
    return state
