"""What the preset semiseg reaches on real CT: 5-fold cross-validation on COVID-SemiSeg's 50 slices.

The phantoms serve every fold; what they add is another question, see real_slices.py. A model that
is trained is found again in --runs, by the generator of the phantoms that it saw. Nothing is done
where the file of results is there. Fills chapter 15 and README.md, which show no slice and hold no
weight.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import common
import numpy as np
import torch
from common import origin, table
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import PRESETS
from covidmask.datasets import LesionDataset, SemiSeg, mask_to_targets, write_phantoms
from covidmask.datasets.augmentation import Augmented
from covidmask.datasets.phantom_sets import GENERATOR
from covidmask.files import data_root, phantoms_folder
from covidmask.metrics import CocoAP, bootstrap, dice
from covidmask.metrics.detection import overlap, overlap_means
from covidmask.models.detector import fuse, lesion_mask_rcnn
from covidmask.models.weights import load_segmenter, read_card, save_model
from covidmask.training import segmentation
from covidmask.training.loop import make_fabric

PRESET = PRESETS["semiseg"]
FOLDS, FOLD_SEED = 5, 2020
DATA = data_root()
REGIONS = ("infection", "GGO", "C")
NAMED = {  # four ways to name lesion pixels
    "by_grey": "with names from grey: a found pixel above a limit is consolidation",
    "by_truth": "with the right name for each lesion pixel that was found",
    "outlines": "of the true outlines, names from grey by the same limit",
    "outlines_own": "of the true outlines, names from grey by the best limit of each slice",
}
PHANTOMS = f"phantoms-{GENERATOR}.safetensors"  # weights that saw phantoms alone
OUT = common.RESULTS / "covid_semiseg.json"
TWIN = common.TWINS / "15_real_lesions.py"


def folds(count: int) -> list[list[int]]:
    """The test slices of each fold."""
    order = np.random.default_rng(FOLD_SEED).permutation(count)
    return [sorted(part.tolist()) for part in np.array_split(order, FOLDS)]


def parts(data: Path, fold: int) -> tuple[list[int], LesionDataset, LesionDataset]:
    """The numbers of the test slices of a fold; the training and the test slices."""
    whole = SemiSeg(data, "train", min_area=PRESET.min_area)
    test = folds(len(whole))[fold]
    train = sorted(set(range(len(whole))) - set(test))
    return test, common.part_of(whole, train), common.part_of(whole, test)


def trained(weights: Path, precision: str, method: Callable, model: GeneralizedRCNN, *data) -> dict:
    """Train, unless `weights` are there, and say what it cost; a checkpoint lies beside them."""
    if not weights.exists():
        start = time.perf_counter()
        fabric, checkpoint = make_fabric(precision, "cpu"), weights.with_suffix(".ckpt")
        history = method(model, *data, fabric=fabric, checkpoint=checkpoint, progress=False)
        save_model(model, weights, steps=len(history), seconds=time.perf_counter() - start)
    return read_card(weights)


def phantoms_first(folder: Path, precision: str) -> dict:
    """Pre-train, once, and say what it cost."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    root = write_phantoms(phantoms_folder("semiseg"), PRESET.phantoms, progress=False)
    case = segmentation.pretrain_segmenter, lesion_mask_rcnn(PRESET.detector), PRESET, root
    return trained(folder / PHANTOMS, precision, *case)


def file_of(fold: int) -> str:
    return f"fold-{fold}-{GENERATOR}.safetensors"


def one_fold(fold: int, data: Path, folder: Path, precision: str) -> dict:
    """Train on four fifths, judge the fifth; nothing is chosen by looking at it."""
    torch.set_num_threads(1)
    chosen, train, test = parts(data, fold)
    torch.manual_seed(0)
    weights, model = folder / file_of(fold), load_segmenter(folder / PHANTOMS)
    case = segmentation.train_segmenter, model, Augmented(train, PRESET.augment), PRESET.segmenter
    cost = trained(weights, precision, *case)
    print(f"fold {fold + 1}: trained", flush=True)
    where = {"fold": fold, "training_slices": len(train), "test_slices": chosen}
    return where | cost | judge(load_segmenter(weights), train, test)


def fused(model: GeneralizedRCNN, part: LesionDataset) -> Iterator[tuple[Tensor, dict, tuple]]:
    """Fused maps, target, and image and mask of each slice."""
    options = {"fused": True, "mirror": True, "progress": False}
    for index, found, target in segmentation.predict_lesions(model, part, **options):
        yield found["maps"], target, part.read(index)


def judge(model: GeneralizedRCNN, train: LesionDataset, test: LesionDataset) -> dict:
    """All that is measured of one model; counts of `Overlap` and Dice are per test slice."""
    found = segmentation.evaluate_segmenter(model, test, progress=False)
    limit = grey_limit([train.read(i) for i in range(len(train))])
    mirrored, regions, grey, named = [], CocoAP(), [], {name: [] for name in NAMED}
    for maps, target, (image, truth) in fused(model, test):
        mirrored.append(overlap(maps, truth))
        regions.update([connected_regions(maps)], [target])
        lesions = [image[truth == code] for code in (2, 3)]  # GGO and C; None where there is none
        grey.append([float(np.median(part)) if part.size else None for part in lesions])
        codes = fuse(maps)
        for name, guess in {
            "by_truth": np.where((codes > 1) & (truth > 1), truth, codes),
            "by_grey": name_by_grey(codes > 1, image, limit),
            "outlines": name_by_grey(truth > 1, image, limit),
            "outlines_own": name_by_grey(truth > 1, image, grey_limit([(image, truth)])),
        }.items():
            named[name].append(name_dice(guess, truth))
    known = np.array([overlap(maps, truth) for maps, _, (_, truth) in fused(model, train)])
    return {
        "dice_on_training_slices": mean_dice(known).tolist(),
        "mask_ap50": found["mask_ap50"],
        "regions_ap50": regions.compute()["mask_ap50"],
        "overlap": found["table"].tolist(),
        "overlap_mirrored": mirrored,
        "grey": grey,
        "grey_limit": limit,
        "named": named,
    }


def connected_regions(maps: Tensor) -> dict[str, Tensor]:
    """Instances made of fused maps as the true ones are of a mask; the mean of a map is a score."""
    found = mask_to_targets(fuse(maps), PRESET.detector.lesions, PRESET.min_area)
    scores = [
        maps[label - 1][mask > 0].mean()
        for label, mask in zip(found["labels"], found["masks"], strict=True)
    ]
    return {**found, "scores": torch.tensor(scores)}


def name_by_grey(lesion: np.ndarray, image: np.ndarray, limit: float) -> np.ndarray:
    """Codes of a mask without a network: lesion pixels brighter than `limit` are consolidation."""
    return np.where(lesion, np.where(image > limit, 3, 2), 0)


def grey_limit(slices: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The limit of `name_by_grey` that names the true lesions of some slices best."""

    def named(limit: float) -> float:
        pairs = ((name_by_grey(mask > 1, image, limit), mask) for image, mask in slices)
        return np.mean([name_dice(*pair) for pair in pairs])

    return float(max(np.arange(0, 100, 2) / 100, key=named))


def name_dice(codes: np.ndarray, truth: np.ndarray) -> list[float]:
    """Dice of GGO and of C in one slice; 0 where both are empty, as in `overlap_means`."""
    return [float(np.nan_to_num(dice(codes == code, truth == code))) for code in (2, 3)]


def tables(rows: list[dict], key: str = "overlap_mirrored") -> np.ndarray:
    """All folds, [50, regions, 5]: each slice once, by a model that never saw it."""
    return np.concatenate([np.array(row[key]) for row in rows])


def mean_dice(table: np.ndarray, name: str = "dice") -> np.ndarray:
    """A Dice of `overlap_means` of each region; table [slices, regions, 5]."""
    return np.array([overlap_means(part)[name] for part in table.swapaxes(0, 1)])


def summary(rows: list[dict]) -> dict:
    """Means over all slices, with 95 % intervals over slices: there are no patients."""
    table = tables(rows)
    result = {name: overlap_means(table[:, i]) for i, name in enumerate(REGIONS)}
    for name in ("dice", "dice_present"):
        limits = bootstrap(len(table), lambda i, name=name: mean_dice(table[i], name), repeats=2000)
        for region, low_high in zip(REGIONS, limits.T.tolist(), strict=True):
            result[region][f"{name}_interval"] = low_high
    return result


def wrong_names(table: np.ndarray) -> float:
    """Of the pixels that are lesion in truth and prediction: the share with the other class."""
    right_place, ggo, c = table[:, :, 0].sum(0)  # table [50, regions, 5]
    return float(1 - (ggo + c) / right_place)


def slashed(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def cells(result: dict) -> dict[str, str]:
    """What chapter 15 says, by title."""
    rows, cells, each = result["folds"], {}, " / ".join(REGIONS)
    spread, means = "{:.2f} ({:.2f} to {:.2f})", result["all_mirrored"]
    for key, slices in (("dice", "all slices"), ("dice_present", "the {} that have it")):
        for name, v in means.items():
            title = f"mean Dice, {name}, {slices.format(v['present'])}"
            cells[title] = spread.format(v[key], *v[f"{key}_interval"])
    known = np.mean([row["dice_on_training_slices"] for row in rows], 0)
    for title, dices in {
        "the same without the mirror image, all slices": mean_dice(tables(rows, "overlap")),
        "fold 1 alone, all its slices": mean_dice(tables(rows[:1])),
        "on the slices that a model trained on, mean of folds": known,
    }.items():
        cells[f"{title}: {each}"] = slashed(dices)
    title = "of the lesion pixels that were found: share with the wrong of the two names"
    cells[title] = f"{wrong_names(tables(rows)):.2f}"
    for name, title in NAMED.items():
        dices = np.concatenate([row["named"][name] for row in rows]).mean(0)
        cells[f"mean Dice, GGO / C {title}"] = slashed(dices)
    grey = [one for row in rows for one in row["grey"]]
    values = [[one[i] for one in grey if one[i] is not None] for i in range(2)]
    title = "median grey value (0 to 1) of the true lesion in a slice, lowest to highest: GGO / C"
    cells[title] = " / ".join(f"{min(v):.2f} to {max(v):.2f}" for v in values)
    measures = [means["infection"][name] for name in ("sensitivity", "specificity", "mae")]
    cells["mean sensitivity / specificity / absolute error, infection"] = slashed(measures)
    for name, title in (
        ("mask_ap50", "mask AP50, mean of folds (lowest to highest)"),
        ("regions_ap50", "the same of the connected regions of the fused mask"),
    ):
        values = [row[name] for row in rows]
        cells[title] = spread.format(np.mean(values), min(values), max(values))
    before = result["pretraining"]
    minutes = (np.mean([row["seconds"] for row in rows]) + before["seconds"]) / 60
    cells["one training"] = f"{rows[0]['steps'] + before['steps']:,} steps, {minutes:.0f} minutes"
    return cells


def markdown(result: dict) -> str:
    """The table of chapter 15."""
    lines = table(["50 real slices, five folds", "preset semiseg"], [*cells(result).items()])
    machine = f"{result['hardware']}, two trainings at a time with one thread each"
    return "\n".join([*lines, "", origin(result, "`results/covid_semiseg.json`", machine)])


def readme(result: dict) -> str:
    """What the README says."""
    found = result["all_mirrored"]
    line = "{0}: {1[dice]:.2f} ({1[dice_interval][0]:.2f} to {1[dice_interval][1]:.2f})"
    text = "; ".join(line.format(name, values) for name, values in found.items())
    text += f"; C over the slices that have it: {found['C']['dice_present']:.2f}.\n\n"
    file = "[results/covid_semiseg.json](results/covid_semiseg.json)"
    return text + origin(result | {"note": ""}, file, result["hardware"])


def measure(
    data: Path = DATA / "covid-semiseg",
    runs: Path = DATA / "semiseg-folds",
    jobs: int = 2,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    out: Path = OUT,
    note: str = "",
) -> Iterator[tuple[Path, dict]]:
    """Train and judge all folds.

    Args:
        jobs: trainings at a time.
        note: a sentence on how the run went.
    """
    settings = {"generator": GENERATOR, "preset": asdict(PRESET), "fold_seed": FOLD_SEED}
    settings["precision"] = precision
    if common.complete(out, settings):
        return
    each, shared = range(FOLDS), {"data": data, "folder": runs}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        first = pool.submit(phantoms_first, runs, precision).result()
        rows = list(pool.map(partial(one_fold, precision=precision, **shared), each))
    result = {
        "about": "cross-validation on the 50 training slices of COVID-SemiSeg, real CT of "
        "COVID-19 patients; no patient ids, so folds may share patients",
        "command": f"python benchmarks/covid_semiseg.py --data DIR --precision {precision}",
        **settings,
        "note": note,
        "pretraining": first,
        "all_mirrored": summary(rows),
        "folds": rows,
    }
    yield out, result


if __name__ == "__main__":
    pages = (TWIN, markdown), (common.ROOT / "README.md", readme)
    common.command(measure, OUT, *((p, "covid_semiseg", f) for p, f in pages), indent=None)
