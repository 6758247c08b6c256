"""The one training loop. A step's slices, learning rate and random draws are computed from its
number and the seed, so a killed run goes on bit for bit from its last checkpoint (not on a GPU,
which adds up in any order).
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from covidmask.config import TrainingConfig
from covidmask.datasets.memory import InMemory
from covidmask.errors import CheckpointError, DataError, TrainingError
from covidmask.files import atomic_path, one_line, some
from covidmask.models.detector import check_images, to_model


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that a crash leaves the old file or the new."""
    content = io.BytesIO()  # torch, writing to a file, turns Ctrl-C into a RuntimeError
    torch.save(state, content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: str | Path, run: dict[str, Any]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote for the same `run`: settings that must not be mixed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state["run"])
    except (PermissionError, MemoryError):
        raise  # the file may be whole
    except Exception as error:  # a damaged file can fail anywhere in the reader
        reason = f"truncated, or holds more than plain data ({one_line(error).split('.')[0]})"
        raise CheckpointError(f"{path}: {reason}; delete it, or name another checkpoint") from error
    changed = [f"{k} was {saved.get(k)!r}, is {v!r}" for k, v in run.items() if saved.get(k) != v]
    if changed:
        changed = f"{path}: belongs to another run ({', '.join(changed)})"
        raise CheckpointError(f"{changed}; take the same settings, or name another checkpoint")
    return state


def make_fabric(
    precision: str = "32-true",
    device: str = "auto",
    find_unused_parameters: bool = False,
    log_dir: str | Path | None = None,
) -> Fabric:
    """Choose the device ("auto": CUDA or CPU) and join the processes that `torchrun` started.

    `find_unused_parameters`: some get no gradient ("full"). `log_dir`: folder for TensorBoard.
    """
    # Lightning advises on each new GPU to give up digits for speed; that choice is the reader's
    for name in ("fabric", "pytorch"):  # the one that was imported last speaks for both
        logging.getLogger(f"lightning.{name}.utilities.rank_zero").setLevel(logging.WARNING)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    ddp = DDPStrategy(find_unused_parameters=find_unused_parameters) if world > 1 else "auto"
    loggers = TensorBoardLogger(log_dir, name="", version="") if log_dir else []
    where = {"accelerator": device, "devices": local, "num_nodes": world // local}
    fabric = Fabric(**where, strategy=ddp, precision=precision, loggers=loggers)
    fabric.launch()
    return fabric


def fit(
    model: nn.Module,
    dataset: Dataset,
    losses: Callable[[nn.Module, list], dict[str, Tensor]],
    training: TrainingConfig,
    *,
    fabric: Fabric | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    run: dict[str, Any] | None = None,
    accuracy: Callable[[], float] | None = None,
    images: bool = True,
    singly: bool = False,
    workers: int = 0,
    memory: float = 0,
    progress: bool = True,
    title: str = "training",
    groups: list[dict[str, Any]] | None = None,
) -> list[dict[str, float]]:
    """Train what requires a gradient in `model`, in place, with Adam; it ends in eval mode.

    Args:
        dataset: an `endless` one (see `Augmented`) gives new items in every epoch.
        losses: (model, list of items) -> named losses; their sum is minimised.
        checkpoint: file to write after every epoch, and to go on from when it is there.
        run: settings that a resumed run must share, besides those of `fit` that matter.
        accuracy: judges `model` after each epoch; the weights with the highest value are kept. Not
            together with `training.average`, whose weights it does not see.
        images: items begin with an image, which is looked at before it goes to a GPU.
        singly: add up gradients of one item at a time, where no item depends on another.
        workers: processes that read slices; 0 reads in this one.
        memory: MiB for slices that are decoded once, before the first step; see `InMemory`.
        groups: what Adam trains, where not all of it alike: `params`, and as they may differ,
            `weight_decay` and `share`, the part of the rate that they get.

    Returns:
        One dict a step: step, epoch, lr, loss and each named loss, averaged over processes; at
        the end of an epoch also the `accuracy`.

    Raises:
        DataError: a batch size larger than the data, or that the processes cannot share.
        TrainingError: the loss, or a weight after an epoch, is not finite, or the accuracy is NaN.
        CheckpointError: `checkpoint` is damaged, or of another run.
    """
    if accuracy and training.average:
        raise ValueError("best weights and average weights: choose one of the two")
    fabric = fabric or make_fabric(training.precision)
    world, rank, size = fabric.world_size, fabric.global_rank, training.batch_size
    hidden = not (progress and rank == 0)
    if not 0 < size <= len(dataset) or size % world:
        wanted = f"a multiple of the number of processes, {world}, up to {len(dataset)} slices"
        raise DataError(f"batch size {size}: give {wanted}")
    steps_per_epoch = len(dataset) // size  # the rest of an epoch's order waits for another epoch
    total = steps_per_epoch * training.epochs
    names, endless = item_names(dataset), getattr(dataset, "endless", False)
    if memory and not endless:
        dataset = InMemory(dataset, memory, progress=not hidden)

    model.train().to(memory_format=torch.channels_last)  # same numbers but for rounding; faster
    alike = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    rates = {"lr": training.lr, "weight_decay": training.weight_decay}
    optimizer = torch.optim.Adam(groups or alike, **rates)
    wrapped, optimizer = fabric.setup(model, optimizer)
    run = {
        "training": asdict(training),
        "seed": seed,
        "slices": len(dataset),
        "data": hashlib.sha256("\n".join(names).encode()).hexdigest()[:12],
        "processes": world,
        "groups": groups and [{k: v for k, v in g.items() if k != "params"} for g in groups],
        **(run or {}),
        "weights at the start": digest(model.state_dict().values()),  # now the same in all
    }
    # with 16-mixed the precision adapts the scale of the loss
    parts = {"model": model, "optimizer": optimizer, "precision": fabric.strategy.precision}
    state = {"history": [], "best": -math.inf, "best_weights": None, "average": None}
    if training.average:
        state["average"] = copy.deepcopy(model.state_dict())
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_checkpoint(checkpoint, run)
        if bad := not_finite(saved["model"]):
            remedy = "delete it and start again, with a lower learning rate"
            raise CheckpointError(f"{checkpoint}: holds NaN or infinity in {some(bad)}; {remedy}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        state = fabric.to_device({name: saved[name] for name in state})
    history, average = state["history"], state["average"]

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
    )
    with tqdm(loader, title, total, initial=start, disable=hidden) as bar:
        for step, items in enumerate(bar, start):
            torch.manual_seed(step_seed(seed, step, rank))
            lr = learning_rate(training, step, total)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("share", 1)
            optimizer.zero_grad(set_to_none=True)
            batch = [names[i % len(names)] for i in order[step - start]]
            if images:
                check_images([image for image, *_ in items], names=batch[rank::world])
            items = fabric.to_device(items)
            pieces = [[item] for item in items] if singly else [items]
            values: Any = 0
            for left, piece in enumerate(pieces, 1 - len(pieces)):
                with fabric.no_backward_sync(wrapped, enabled=world > 1 and left < 0):
                    named = losses(wrapped, piece)
                    loss = sum(named.values())
                    fabric.backward(loss * (1 / len(pieces)))
                values += torch.stack([loss, *named.values()]).detach() * (1 / len(pieces))
            values = (joined(values, fabric) / world).tolist()
            values = dict(zip(["loss", *named], values, strict=True))
            if not math.isfinite(values["loss"]):
                bad = f"step {step}: the loss is not finite ({values}) on {', '.join(batch)}"
                raise TrainingError(f"{bad}; look at these slices, or lower the learning rate")
            optimizer.step()
            if average:  # of weights and batch-norm statistics; counters are copied
                decay = min(training.average, (step + 1) / (step + 10))
                for name, value in model.state_dict().items():
                    floats = value.is_floating_point()
                    average[name].lerp_(value, 1 - decay) if floats else average[name].copy_(value)
            epoch = step // steps_per_epoch
            history.append({"step": step, "epoch": epoch, "lr": lr, **values})
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            if (step + 1) % steps_per_epoch == 0:
                share_buffers(model, world)
                if bad := not_finite(model.state_dict()):  # of the last step no loss would tell
                    bad = f"step {step}: weights that are not finite: {some(bad)}"
                    raise TrainingError(f"{bad}; lower the learning rate, or look at the slices")
                if accuracy:
                    model.eval()
                    history[-1]["accuracy"] = value = accuracy()
                    model.train()
                    if math.isnan(value):
                        bad = f"accuracy is nan after epoch {epoch}"
                        raise TrainingError(f"{bad}; look at the validation data")
                    if value > state["best"]:
                        state["best"] = value
                        state["best_weights"] = copy.deepcopy(model.state_dict())
                if checkpoint is not None and rank == 0:
                    states = {name: part.state_dict() for name, part in parts.items()}
                    save_checkpoint(checkpoint, {**states, **state, "run": run})
            fabric.log_dict({k: v for k, v in history[-1].items() if k != "step"}, step)
    final = state["best_weights"] if accuracy else average  # best ones of before may be unwanted
    if final:
        model.load_state_dict(final)
        share_buffers(model, world)
    model.eval()
    return history


def joined(rows: Tensor, fabric: Fabric) -> Tensor:
    """The sum over all processes, each of which fills in its own rows; zeros elsewhere."""
    return fabric.all_reduce(rows, reduce_op="sum").cpu() if fabric.world_size > 1 else rows


def share_buffers(model: nn.Module, world: int) -> None:
    """Batch-norm statistics differ between processes until those of the first are sent round."""
    for buffer in model.buffers() if world > 1 else ():
        torch.distributed.broadcast(buffer, 0)


def not_finite(state: dict[str, Tensor]) -> list[str]:
    return [name for name, value in state.items() if not value.isfinite().all()]


def digest(tensors: Iterable[Tensor]) -> str:
    """A short hash of the elements in order, whatever their type, device and layout."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:12]


def pinnable(items: list) -> list:  # memory of an image repeated by `expand` cannot be pinned
    return apply_to_collection(items, Tensor, Tensor.contiguous)


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


def read_batches(
    dataset: Dataset, fabric: Fabric, size: int, title: str, progress: bool = True, done: int = 0
) -> Iterator[tuple[list[int], list, list[Tensor]]]:
    """Each item once, those of this process: (indices, items, their images on the device)."""
    rank, names = fabric.global_rank, item_names(dataset)
    indices, hidden = range(len(dataset))[rank :: fabric.world_size], not (progress and rank == 0)
    with tqdm(total=len(indices), initial=done, desc=title, disable=hidden) as bar:
        for start in range(done, len(indices), size):
            part = list(indices[start : start + size])
            items = [dataset[i] for i in part]
            images = [image for image, *_ in items]
            yield part, items, to_model(images, fabric.device, [names[i] for i in part])
            bar.update(len(part))
