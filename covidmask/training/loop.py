"""The one training loop. A step depends on the seed, its number and the weights before it alone.

Order of the slices, learning rate and all random draws of a step are computed from its number, so
a run that was killed goes on bit for bit where its last checkpoint stands. That holds on a CPU; a
GPU adds up in any order, so there the rounding differs from run to run.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from covidmask.config import TrainingConfig
from covidmask.datasets.memory import InMemory
from covidmask.errors import CheckpointError, DataError, TrainingError
from covidmask.files import atomic_path, some


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


def make_fabric(
    precision: str = "32-true",
    device: str = "auto",
    find_unused_parameters: bool = False,
    log_dir: str | Path | None = None,
) -> Fabric:
    """Choose the device and join the other processes that `torchrun` started, if any.

    Args:
        precision: Lightning Fabric's names, such as "32-true" or "bf16-mixed".
        device: "auto" is CUDA when present, else CPU; MPS is used only when asked for.
        find_unused_parameters: for models of which some parameter gets no gradient ("full").
        log_dir: folder for TensorBoard, or None.
    """
    # Lightning advises on each new GPU to give up digits for speed; that choice is the reader's
    for name in ("fabric", "pytorch"):  # the one that was imported last speaks for both
        logging.getLogger(f"lightning.{name}.utilities.rank_zero").setLevel(logging.WARNING)
    accelerator = device
    if device == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    loggers = []
    if log_dir is not None:
        from lightning.fabric.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(log_dir, name="", version=""))
    fabric = Fabric(
        accelerator=accelerator,
        devices=local,
        num_nodes=world // local,
        strategy=DDPStrategy(find_unused_parameters=find_unused_parameters)
        if world > 1
        else "auto",
        precision=precision,
        loggers=loggers,
    )
    fabric.launch()
    return fabric


def fit(
    fabric: Fabric,
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    dataset: Dataset,
    losses: Callable[[nn.Module, list], dict[str, Tensor]],
    training: TrainingConfig,
    *,
    names: Sequence[str],
    seed: int = 0,
    checkpoint: str | Path | None = None,
    run: dict[str, Any] | None = None,
    after_epoch: Callable[[int], dict[str, float]] | None = None,
    best: str | None = None,
    part: int | None = None,
    check: Callable[[list, list[str]], None] | None = None,
    workers: int = 0,
    memory: float = 0,
    progress: bool = True,
    title: str = "training",
) -> list[dict[str, float]]:
    """Train `model` in place with Adam. Its convolutions are laid out channels last.

    Args:
        parameters: those to train.
        dataset: its items are given to `losses` as a list. An `endless` one (see `Augmented`) gives
            new items in every epoch.
        losses: (model, items) -> named losses; their sum is minimised.
        names: the name of each item, for the message when a loss is not finite.
        checkpoint: file to write after every epoch, and to go on from when it is there.
        run: settings that a resumed run must share, besides `training`, seed, names of the data
            and the weights of `model` before the first step.
        after_epoch: values to add to the last step of an epoch, such as a validation metric.
        best: name of a value of `after_epoch`; the weights with the highest one are kept. Not
            together with `training.average`, whose weights `after_epoch` does not see.
        part: differentiate so many items of a batch at a time and add up their gradients, which
            is the same step for less memory where a loss is a mean over items that do not touch
            each other (no batch statistics). None is the whole batch at once.
        check: (items, names) -> None looks at the items of a step before they go to a GPU, where a
            look makes it wait.
        workers: processes that read slices; 0 reads in this one.
        memory: MiB for slices that are decoded once, before the first step; see `InMemory`.

    Returns:
        One dict a step: step, epoch, lr, loss and each named loss, averaged over processes; at
        the end of an epoch also what `after_epoch` gave.

    Raises:
        ValueError: both `best` and `training.average`.
        DataError: fewer slices than one batch, or a batch that the processes cannot share.
        TrainingError: the loss, or a weight after an epoch, is not finite, or `best` is NaN after
            the first epoch.
        CheckpointError, OutputError: see `checkpoints`.
    """
    if best is not None and training.average:
        raise ValueError("best weights and average weights: choose one of the two")
    world, rank = fabric.world_size, fabric.global_rank
    size = training.batch_size
    if size < 1 or size % world:
        raise DataError(f"batch size {size}: give a multiple of the number of processes, {world}")
    if len(dataset) < size:
        raise DataError(f"{len(dataset)} slices: less than one batch of {size}; give more slices")
    steps_per_epoch = len(dataset) // size  # the rest of an epoch's order waits for another epoch
    total = steps_per_epoch * training.epochs
    endless = getattr(dataset, "endless", False)
    if memory and not endless:
        dataset = InMemory(dataset, memory, progress=progress and rank == 0)
    run = {
        "training": plain(asdict(training)),
        "seed": seed,
        "slices": len(dataset),
        "data": hashlib.sha256("\n".join(names).encode()).hexdigest()[:12],
        "processes": world,
        **(run or {}),
    }

    parameters = list(parameters)
    model.to(memory_format=torch.channels_last)  # same numbers but for rounding; faster
    optimizer = torch.optim.Adam(parameters, lr=training.lr, weight_decay=training.weight_decay)
    wrapped, optimizer = fabric.setup(model, optimizer)
    run["weights at the start"] = digest(model)  # now the same in all processes
    precision = fabric.strategy.precision  # with 16-mixed it adapts the scale of the loss
    history: list[dict[str, float]] = []
    best_value, best_weights = -math.inf, None
    average = None
    if training.average:
        average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if checkpoint is not None and Path(checkpoint).exists():
        state = load_checkpoint(checkpoint, run)
        if bad := not_finite(state["model"]):
            raise CheckpointError(
                f"{checkpoint}: holds NaN or infinity in {some(bad)}; delete it and start again, "
                "with a lower learning rate"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        precision.load_state_dict(state["precision"])
        history = state["history"]
        best_value, best_weights = state["best_value"], state["best_weights"]
        if average is not None:
            average = to_device(state["average"], fabric.device)

    start = len(history)
    order = [
        [item + epoch * len(dataset) * endless for item in batch]
        for epoch in range(start // steps_per_epoch, training.epochs)
        for batch in epoch_batches(len(dataset), size, epoch, seed)
    ]
    cuda = fabric.device.type == "cuda"
    loader = DataLoader(
        dataset,
        batch_sampler=[batch[rank::world] for batch in order],
        collate_fn=pinnable if cuda else list,
        num_workers=workers,
        pin_memory=cuda,
        persistent_workers=False,
    )
    hidden = not (progress and rank == 0)
    with tqdm(total=total, initial=start, desc=title, disable=hidden) as bar:
        for step, items in enumerate(loader, start):
            torch.manual_seed(step_seed(seed, step, rank))
            lr = learning_rate(training, step, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            batch = [names[i % len(names)] for i in order[step - start]]
            if check is not None:
                check(items, batch[rank::world])
            items = [to_device(item, fabric.device) for item in items]
            report: Any = 0
            for first in range(0, len(items), part or len(items)):
                piece = items[first : first + (part or len(items))]
                last = first + len(piece) == len(items)
                with fabric.no_backward_sync(wrapped, enabled=world > 1 and not last):
                    named = losses(wrapped, piece)
                    loss = sum(named.values())
                    fabric.backward(loss * (len(piece) / len(items)))
                values = torch.stack([loss, *named.values()]).detach()
                report = report + values * (len(piece) / len(items))
            if world > 1:
                report = fabric.all_reduce(report, reduce_op="mean")
            values = dict(zip(["loss", *named], report.tolist(), strict=True))
            if not math.isfinite(values["loss"]):
                raise TrainingError(
                    f"step {step}: the loss is not finite ({values}) on {', '.join(batch)}; "
                    "look at these slices, or lower the learning rate"
                )
            optimizer.step()
            if average is not None:
                follow(average, model, min(training.average, (step + 1) / (step + 10)))
            epoch = step // steps_per_epoch
            history.append({"step": step, "epoch": epoch, "lr": lr, **values})
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            if (step + 1) % steps_per_epoch == 0:
                _share_buffers(model, world)
                if bad := not_finite(model.state_dict()):  # of the last step no loss would tell
                    raise TrainingError(
                        f"step {step}: weights that are not finite: {some(bad)}; lower the "
                        "learning rate, or look for extreme slices"
                    )
                if after_epoch is not None:
                    history[-1].update(after_epoch(epoch))
                if best is not None and history[-1].get(best, -math.inf) > best_value:
                    best_value = history[-1][best]
                    best_weights = {
                        k: v.detach().cpu().clone() for k, v in model.state_dict().items()
                    }
                if best is not None and best_weights is None:
                    raise TrainingError(
                        f"{best} is {history[-1].get(best)} after epoch {epoch}, so no epoch can "
                        "be the best; look at the validation data"
                    )
                if checkpoint is not None and rank == 0:
                    save_checkpoint(
                        checkpoint,
                        {
                            "run": run,
                            "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "precision": precision.state_dict(),
                            "history": history,
                            "best_value": best_value,
                            "best_weights": best_weights,
                            "average": average,
                        },
                    )
            fabric.log_dict({k: v for k, v in history[-1].items() if k != "step"}, step)
    if best is not None and best_weights is not None:  # those of a checkpoint may be unwanted
        model.load_state_dict(best_weights)
    if average is not None:
        model.load_state_dict(average)
        _share_buffers(model, world)
    model.eval()
    return history


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity."""
    return [name for name, value in state.items() if not value.isfinite().all()]


def digest(module: nn.Module) -> str:
    """A short hash of all weights and buffers."""
    total = hashlib.sha256()
    for tensor in module.state_dict().values():
        total.update(as_bytes(tensor))
    return total.hexdigest()[:12]


def as_bytes(tensor: Tensor) -> bytes:
    """The elements in order, of any type, device and layout."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def item_names(dataset: Dataset) -> Sequence[str]:
    """What messages call the items: the names of the data set, or numbers where it has none."""
    return getattr(dataset, "names", None) or [f"item {i}" for i in range(len(dataset))]


def epoch_batches(n: int, size: int, epoch: int, seed: int) -> list[list[int]]:
    """The slices of each step of one epoch, over all processes; n % size of them sit it out."""
    generator = torch.Generator().manual_seed(step_seed(seed, epoch, -1))
    order = torch.randperm(n, generator=generator).tolist()
    return [order[start : start + size] for start in range(0, n - size + 1, size)]


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for each step and process (and, at rank -1, for each epoch's order)."""
    return ((seed + 1) * 1_000_003 + step) * 1_009 + rank + 1


def learning_rate(training: TrainingConfig, step: int, total: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 0."""
    if step < training.warmup:
        return training.lr * (step + 1) / training.warmup
    if not training.cosine:
        return training.lr
    progress = (step - training.warmup) / max(total - training.warmup, 1)
    return training.lr * 0.5 * (1 + math.cos(math.pi * progress))


def follow(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the running average of weights and batch-norm statistics towards those of `model`."""
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def share(n: int, fabric: Fabric) -> range:
    """The items of `range(n)` that this process evaluates: each item belongs to one process."""
    return range(fabric.global_rank, n, fabric.world_size)


def gather(part: Tensor, n: int, fabric: Fabric) -> Tensor:
    """Put the rows that each process computed for its `share` back into one [n, ...] tensor."""
    if fabric.world_size == 1:
        return part
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, part)
    whole = part.new_empty(n, *part.shape[1:])
    for rank, rows in enumerate(parts):
        whole[rank :: fabric.world_size] = rows
    return whole


def _share_buffers(model: nn.Module, world: int) -> None:
    """Batch-norm statistics differ between processes until those of the first are sent round."""
    if world > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def to_device(item: Any, device: torch.device) -> Any:
    """The tensors of `item`, which may hold them in dicts, tuples and lists, on `device`."""
    # never without blocking from a GPU: the CPU would read the copy before it is there
    return _each(item, lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))


def pinnable(items: list) -> list:
    """A batch whose memory can be pinned; that of an image repeated by `expand` cannot."""
    return [_each(item, Tensor.contiguous) for item in items]


def _each(item: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(item, Tensor):
        return change(item)
    if isinstance(item, dict):
        return {key: _each(value, change) for key, value in item.items()}
    if isinstance(item, (tuple, list)):
        return type(item)(_each(value, change) for value in item)
    return item


def plain(value: Any) -> Any:
    """Tuples become lists, as they do in a file."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value
