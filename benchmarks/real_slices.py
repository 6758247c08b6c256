"""What drawn chests are worth beside real slices: a plain U-Net on 0 to 40 slices of COVID-SemiSeg.

    python benchmarks/real_slices.py beside --data DIR     # drawn chests alone, on 25 real slices
    python benchmarks/real_slices.py curve --data DIR      # five folds of the 50 slices

DIR holds COVID-SemiSeg's TrainingSet. Every network of the curve takes as many steps of eight
slices as every other: on real slices, from random weights (`random`); on drawn chests for the first
half of the steps and real slices for the second (`first`); or with four of either in each step
(`mixed`). Drawn chests alone are its beginning. Each look at real slices is written to
results/looks.jsonl. Nothing is chosen by looking at the test slices of a fold.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import common
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from segmenter_ct import CT, REGIONS, DrawnChests, half_of, log, means
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops.misc import Conv2dNormActivation
from tqdm import tqdm

from covidmask.config import AugmentConfig
from covidmask.datasets.augmentation import Augmented
from covidmask.datasets.lesions import LesionDataset, SemiSeg
from covidmask.metrics.detection import overlap
from covidmask.models.semantic import pixel_loss
from covidmask.models.weights import SHIPPED, read_card

BATCH = 8
SIZES, FOLDS = (5, 10, 20, 40), 5
ARMS = {"random": "real alone", "first": "drawn first", "mixed": "drawn mixed in"}
FIRST = 20_000_000  # of the chests: no other script draws these
CURVE = """**Drawn chests beside real slices.** Suppose you have a few real slices with masks. Do
drawn chests still help? Here such a U-Net learns from some of the 50 slices and is judged on ten
others, in five folds, so that each slice is judged once. There are three ways to train it:

- *real alone*: on real slices in every step;
- *drawn first*: on drawn chests in the first half of the steps, on real slices in the second;
- *drawn mixed in*: on as many drawn as real ones in every step.

All take equally many steps, so with drawn chests the network meets real slices half as often. In
the first row it has met none. In brackets: the gain over real slices alone, and its 95 % interval
from resampling the slices. (Half of them had been looked at while the chests were improved.)
"""
OUT, BESIDE = common.RESULTS / "real_slices.json", common.RESULTS / "unet_beside.json"
TWIN, README = common.TWINS / "phantoms_made.py", common.ROOT / "README.md"


class UNet(nn.Module):
    """Image [B, 1, H, W] in 0..1 -> logits [B, 3, H, W] of none, GGO, C. It has 0.9 M weights."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 96, 128)) -> None:
        super().__init__()

        def block(channels: int, width: int) -> nn.Sequential:
            pair = Conv2dNormActivation(channels, width), Conv2dNormActivation(width, width)
            return nn.Sequential(*pair)

        self.down = nn.ModuleList(map(block, (1, *widths), widths))
        self.up = nn.ModuleList(block(a + b, a) for a, b in zip(widths, widths[1:], strict=False))
        self.head = nn.Conv2d(widths[0], len(REGIONS), 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            kept.append(x)
        for block, finer in zip(reversed(self.up), reversed(kept[:-1]), strict=True):
            x = block(torch.cat([finer, F.interpolate(x, size=finer.shape[-2:])], 1))
        return self.head(x)


def batches(
    sources: list[LesionDataset], first: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images float32 [8, 1, H, W] and classes int64 [8, H, W], as many from each source."""
    each = BATCH // len(sources)
    for step in range(first, first + steps):
        pairs = [s.read(i) for s in sources for i in range(step * each, (step + 1) * each)]
        images, masks = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        yield images[:, None], (masks.long() - 1).clamp(min=0)


def fit(
    net: UNet, batches: Iterator, steps: int, rate: float = 2e-3, progress: bool = True
) -> UNet:
    """Train by cross-entropy and soft Dice of each slice; return the running mean of it."""
    net.to(memory_format=torch.channels_last)
    mean = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    adam = torch.optim.AdamW(net.train().parameters(), rate, weight_decay=1e-4)
    plan = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=steps, pct_start=0.05)
    for images, truth in tqdm(batches, total=steps, mininterval=10, disable=not progress):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(images.contiguous(memory_format=torch.channels_last)).float()
        loss = pixel_loss(logits, truth)
        adam.zero_grad()
        loss.backward()
        adam.step()
        plan.step()
        mean.update_parameters(net)
    return mean.module


@torch.no_grad()
def counts(net: UNet, slices: LesionDataset, size: int) -> np.ndarray:
    """`overlap` of each slice, float64 [M, 3, 5], of its maps and those of its mirror image."""
    net.eval()
    rows = []
    for image, mask in map(slices.read, range(len(slices))):
        x = F.interpolate(torch.from_numpy(image)[None, None], size=(size, size), mode="bilinear",
                          antialias=True)  # fmt: skip
        maps = (net(x).softmax(1) + net(x.flip(3)).softmax(1).flip(3)) / 2
        maps = F.interpolate(maps[:, 1:], size=mask.shape, mode="bilinear")[0]
        rows.append(overlap(maps, mask))
    return np.array(rows)


@lru_cache
def drawn(different: int, size: int) -> DrawnChests:
    """The same chests for all networks of a process: each is drawn once."""
    return DrawnChests(different, FIRST, size, different)


def beside(
    data: Path,
    half: Literal["first", "second"] = "first",
    steps: int = 1500,
    size: int = 160,
    different: int = 3000,
) -> None:
    """Train on drawn chests alone and judge on one half: a plain U-Net beside SEGMENTER_CT."""
    clock = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    origin = common.environment()
    net = fit(UNet(), batches([drawn(different, size)], 0, steps), steps)
    seconds, slices = time.perf_counter() - clock, half_of(data, half)
    table = counts(net, slices, size)
    result = origin | {
        "generator": common.GENERATOR, "half": half, "steps": steps, "size": size,
        "different": different, "seconds": seconds,
        "dice": means(table, slices.patients),
    }  # fmt: skip
    common.write_text(BESIDE, json.dumps(result, indent=1) + "\n")
    log({"data": f"COVID-SemiSeg, {half} 25", "weights": "a U-Net", "dice": result["dice"]})
    page()


def fold_of(whole: SemiSeg, fold: int) -> tuple[list[int], list[int]]:
    """The ten test slices of a fold, and the others in an order: the first n of it are n slices."""
    order = np.random.default_rng(2020).permutation(len(whole)).tolist()
    test = order[fold::FOLDS]
    rest = [i for i in order if i not in test]
    return sorted(test), np.random.default_rng(fold).permutation(rest).tolist()


def one(
    arm: str, count: int, fold: int, data: Path, start: Path, steps: int, size: int, different: int
) -> dict:
    """Train one network of the curve, and judge it on the ten slices of its fold."""
    torch.manual_seed(0)
    whole = SemiSeg(data, "train", min_area=1)
    test, rest = fold_of(whole, fold)
    real = Augmented(common.part_of(whole, rest[:count]), AugmentConfig(size, 1, 1, paste=0.5))
    net = UNet()
    if arm == "first":
        net.load_state_dict(torch.load(start, weights_only=True))
    sources = [real, drawn(different, size)] if arm == "mixed" else [real]
    left = steps // 2 if arm == "first" else steps
    net = fit(net, batches(sources, 0, left), left, progress=False)
    return {"test": test, "table": counts(net, common.part_of(whole, test), size).tolist()}


def alone(data: Path, start: Path, steps: int, size: int, different: int) -> dict:
    """The beginning of the curve; its half way, which the others start from, is kept in `start`."""
    torch.manual_seed(0)
    chests, net = drawn(different, size), UNet()
    half = fit(net, batches([chests], 0, steps // 2), steps // 2)
    torch.save(half.state_dict(), start)
    torch.manual_seed(0)
    net = fit(UNet(), batches([chests], 0, steps), steps)
    whole = SemiSeg(data, "train", min_area=1)
    return {"test": list(range(len(whole))), "table": counts(net, whole, size).tolist()}


def curve(
    data: Path,
    steps: int = 400,
    size: int = 128,
    different: int = 1600,
    jobs: int = 1,
    out: Path = OUT,
) -> None:
    """Train every network that `out` lacks, `jobs` at a time."""
    start = Path("runs") / f"unet-drawn-{steps // 2}-{size}-{different}.pt"
    start.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    settings = {
        "about": "a U-Net on real slices of COVID-SemiSeg, with drawn chests and without",
        "generator": common.GENERATOR, "steps": steps, "size": size, "different": different,
    }  # fmt: skip
    source, rest = common.environment(), (data, start, steps, size, different)
    parts = {"alone": (alone, *rest)}
    for stage in (parts, {f"{arm} {n} {fold}": (one, arm, n, fold, *rest)
                          for n in SIZES for arm in ARMS for fold in range(FOLDS)}):  # fmt: skip
        if stage is not parts and not start.exists():
            sys.exit(f"{start}: is gone; remove {out}, and begin anew")
        for path, result in common.lacking(out, settings, stage, 1 if stage is parts else jobs):
            common.save(path, source | result)
    log({"data": "COVID-SemiSeg, both halves", "what": "the curve of real_slices.py, five folds"})
    page(out)


def page(out: Path = OUT) -> None:
    """Fill the pages from the results and from the card of SEGMENTER_CT."""
    common.fill(README, "segmenter_ct", readme())
    if beside := common.read(BESIDE):
        common.fill(TWIN, "unet_beside", beside_markdown(beside))
    if result := common.read(out):
        common.fill(TWIN, "real_slices", markdown(result))


def readme() -> str:
    dice = read_card(SHIPPED / CT)["metrics"]
    rows = ((name, dice[f"Dice, {name}"]) for name in REGIONS)
    return (
        "; ".join("{}: {value:.2f} ({low:.2f} to {high:.2f})".format(n, **d) for n, d in rows) + "."
    )


def beside_markdown(result: dict) -> str:
    """SEGMENTER_CT, by its card, and the U-Net."""
    card = read_card(SHIPPED / CT)
    mine = {name: card["metrics"][f"Dice, {name}"] for name in REGIONS}
    rows = [
        [who, *("{value:.3f} ({low:.3f} to {high:.3f})".format(**dice[name]) for name in REGIONS)]
        for who, dice in (("`SEGMENTER_CT`", mine), ("U-Net", result["dice"]))
    ]
    note = f"On the {result['half']} 25 slices by number. " + common.origin(
        result, BESIDE.relative_to(common.ROOT).as_posix()
    )
    head = ["Drawn chests alone", *(f"Dice, {name}" for name in REGIONS)]
    return "\n".join([*common.table(head, rows), "", note])


def of_slices(parts: dict, arm: str, count: int) -> np.ndarray:
    """The rows of all 50 slices, each from the network that did not train on it."""
    chosen = [parts["alone"]] if not count else [parts[f"{arm} {count} {k}"] for k in range(FOLDS)]
    rows = {i: row for part in chosen for i, row in zip(part["test"], part["table"], strict=True)}
    return np.array([rows[i] for i in sorted(rows)])  # [50, 3, 5]


def dices(table: np.ndarray) -> np.ndarray:
    """Dice of each slice and region [50, 3]; where they share no pixel, 0."""
    both, found, true = np.moveaxis(table, 2, 0)[:3]
    return 2 * both / np.maximum(found + true, 1)


def markdown(result: dict) -> str:
    parts, rows = result["parts"], []
    zero = dices(of_slices(parts, "", 0)).mean(0)
    rows.append(["0", "drawn alone", *(f"{value:.3f}" for value in zero)])
    slices = list(map(str, range(len(of_slices(parts, "", 0)))))
    for n in SIZES:
        base = dices(of_slices(parts, "random", n))
        for arm, name in ARMS.items():
            found, cells = dices(of_slices(parts, arm, n)), []
            for k in range(len(REGIONS)):
                cell = f"{found[:, k].mean():.3f}"
                if arm != "random":
                    more, low, high = common.gain(found[:, k], base[:, k], slices)
                    cell += f" ({more:+.3f}, {low:+.3f} to {high:+.3f})"
                cells.append(cell)
            rows.append([str(n), name, *cells])
    head = ["Real slices", "Training", *(f"Dice, {name}" for name in REGIONS)]
    note = common.origin(result, OUT.relative_to(common.ROOT).as_posix())
    return "\n".join([CURVE, *common.table(head, rows), "", note])


if __name__ == "__main__":
    commands = {each.__name__: each for each in (beside, curve, page)}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
