"""What the preset semiseg reaches on real CT: 5-fold cross-validation on COVID-SemiSeg's 50 slices.

    python benchmarks/covid_semiseg.py --data DIR     # the folder that holds TrainingSet
    python benchmarks/covid_semiseg.py --table        # only rewrite chapter 9 and the README

Three models for each fold: the preset; the same with half the epochs; and that from random weights,
without phantoms, with as many steps in all. The phantoms serve every fold. A model that is trained
is found again, so the command goes on where it was stopped; judging all of them takes minutes and
is done anew. Writes results/covid_semiseg.json, the table of chapter 9 and a paragraph of the
README, which show and contain no slice and no weight. The models stay in --runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, ROOT, environment, fill, interval, origin, read, save, table
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import PRESETS, TrainingConfig
from covidmask.datasets.augmentation import Augmented
from covidmask.datasets.lesions import LesionDataset, SemiSeg, mask_to_targets
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.files import data_root, phantoms_folder
from covidmask.metrics.detection import CocoAP, dice, overlap, overlap_means
from covidmask.models.detector import fuse, lesion_mask_rcnn
from covidmask.models.weights import load_segmenter, save_model
from covidmask.training.loop import make_fabric
from covidmask.training.segmentation import (
    evaluate_segmenter,
    predict_lesions,
    pretrain_segmenter,
    train_segmenter,
)

PRESET = PRESETS["semiseg"]
FOLDS = 5
FOLD_SEED = 2020
SHORT = replace(PRESET.segmenter, epochs=PRESET.segmenter.epochs // 2)
ARMS = {"whole": "preset", "short": "half its epochs", "random": "half, without phantoms"}
GAINS = {"what the epochs add": ("whole", "short"), "what phantoms add": ("short", "random")}
REGIONS = ("infection", "GGO", "C")
OUT = RESULTS / "covid_semiseg.json"
TWIN = ROOT / "book" / "py" / "09_real_ct.py"


class Part(LesionDataset):
    """Some slices of a data set."""

    def __init__(self, whole: LesionDataset, chosen: list[int]) -> None:
        super().__init__(whole.lesions, whole.min_area)
        self.whole, self.chosen = whole, chosen
        self.names = [whole.names[i] for i in chosen]
        self.patients = [whole.patients[i] for i in chosen]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.whole.read(self.chosen[index])


def folds(count: int) -> list[list[int]]:
    """The test slices of each fold."""
    order = np.random.default_rng(FOLD_SEED).permutation(count)
    return [sorted(part.tolist()) for part in np.array_split(order, FOLDS)]


def trained(method: Callable, model: GeneralizedRCNN, *data, weights: Path, precision: str) -> dict:
    """Train, unless `weights` are there, and say what it cost; a checkpoint lies beside them."""
    note = weights.with_suffix(".json")
    if not note.exists():
        start = time.perf_counter()
        history = method(
            model,
            *data,
            fabric=make_fabric(precision, "cpu"),
            checkpoint=weights.with_suffix(".ckpt"),
            progress=False,
        )
        cost = {"steps": len(history), "seconds": time.perf_counter() - start}
        save_model(model, weights)
        save(note, cost, indent=None)
    return read(note)


def phantoms_first(folder: Path, precision: str) -> dict:
    """Pre-train, once, and say what it cost."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = lesion_mask_rcnn(PRESET.detector)
    root = write_phantoms(phantoms_folder("semiseg"), PRESET.phantoms, progress=False)
    weights = folder / "phantoms.safetensors"
    return trained(pretrain_segmenter, model, PRESET, root, weights=weights, precision=precision)


def parts(data: Path, fold: int) -> tuple[Part, Part]:
    """The training and the test slices of a fold."""
    whole = SemiSeg(data, "train", min_area=PRESET.min_area)
    test = folds(len(whole))[fold]
    return Part(whole, sorted(set(range(len(whole))) - set(test))), Part(whole, test)


def one_fold(arm: str, fold: int, data: Path, folder: Path, precision: str) -> dict:
    """Train on four fifths, judge the fifth; nothing is chosen by looking at it."""
    torch.set_num_threads(1)
    train, test = parts(data, fold)
    torch.manual_seed(0)
    if arm == "random":
        model, training = lesion_mask_rcnn(PRESET.detector), longer(SHORT, len(train))
    else:
        model = load_segmenter(folder / "phantoms.safetensors")
        training = PRESET.segmenter if arm == "whole" else SHORT
    weights = folder / f"{arm}-{fold}.safetensors"
    slices = Augmented(train, PRESET.augment)
    cost = trained(train_segmenter, model, slices, training, weights=weights, precision=precision)
    return {
        "arm": arm,
        "fold": fold,
        "training_slices": len(train),
        "test_slices": test.chosen,
        **cost,
        **judge(load_segmenter(weights), train, test),
    }


def fused(model: GeneralizedRCNN, part: Part) -> Iterator[tuple[Tensor, dict, tuple]]:
    """Fused maps, target, and image and mask of each slice."""
    for index, found, target in predict_lesions(
        model, part, fused=True, mirror=True, progress=False
    ):
        yield found["maps"], target, part.read(index)


def judge(model: GeneralizedRCNN, train: Part, test: Part) -> dict:
    """All that is measured of one model; counts of `Overlap` and Dice are per test slice."""
    found = evaluate_segmenter(model, test, progress=False)
    limit = grey_limit([train.read(i) for i in range(len(train))])
    mirrored, regions, grey = [], CocoAP(), []
    named: dict[str, list] = {"by_truth": [], "by_grey": [], "outlines": [], "outlines_own": []}
    for maps, target, (image, truth) in fused(model, test):
        mirrored.append(overlap(maps, truth))
        regions.update([connected_regions(maps)], [target])
        grey.append(true_grey(image, truth))
        codes = fuse(maps)
        own = grey_limit([(image, truth)])
        for name, guess in {
            "by_truth": np.where((codes > 1) & (truth > 1), truth, codes),
            "by_grey": name_by_grey(codes > 1, image, limit),
            "outlines": name_by_grey(truth > 1, image, limit),
            "outlines_own": name_by_grey(truth > 1, image, own),
        }.items():
            named[name].append(name_dice(guess, truth))
    known = np.array([overlap(maps, truth) for maps, _, (_, truth) in fused(model, train)])
    return {
        "dice_on_training_slices": dices(known),
        "mask_ap50": found["mask_ap50"],
        "mask_ap": found["mask_ap"],
        "regions_ap50": regions.compute()["mask_ap50"],
        "overlap": found["table"].tolist(),
        "overlap_mirrored": mirrored,
        "grey": grey,
        "grey_limit": limit,
        "named": named,
    }


def averaged(fold: int, data: Path, folder: Path) -> list:
    """Counts of `Overlap` for the mean of the maps of all three models of a fold."""
    torch.set_num_threads(1)
    test = parts(data, fold)[1]
    models = [load_segmenter(folder / f"{arm}-{fold}.safetensors") for arm in ARMS]
    return [
        overlap(sum(maps / len(ARMS) for maps, *_ in same), same[0][2][1])
        for same in zip(*(fused(model, test) for model in models), strict=True)
    ]


def connected_regions(maps: Tensor) -> dict[str, Tensor]:
    """Instances made of fused maps as the true ones are of a mask; the mean of a map is a score."""
    found = mask_to_targets(fuse(maps), PRESET.detector.lesions, PRESET.min_area)
    scores = [
        maps[label - 1][mask > 0].mean()
        for label, mask in zip(found["labels"], found["masks"], strict=True)
    ]
    return {**found, "scores": torch.tensor(scores)}


def true_grey(image: np.ndarray, truth: np.ndarray) -> list[float | None]:
    """Median grey value of GGO and of C in one slice; None where it has none."""
    parts = [image[truth == code] for code in (2, 3)]
    return [float(np.median(part)) if part.size else None for part in parts]


def name_by_grey(lesion: np.ndarray, image: np.ndarray, limit: float) -> np.ndarray:
    """Codes of a mask without a network: lesion pixels brighter than `limit` are consolidation."""
    return np.where(lesion, np.where(image > limit, 3, 2), 0)


def grey_limit(slices: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The limit of `name_by_grey` that names the true lesions of some slices best."""
    limits = np.arange(0, 100, 2) / 100
    means = [
        np.mean([name_dice(name_by_grey(mask > 1, image, limit), mask) for image, mask in slices])
        for limit in limits
    ]
    return float(limits[np.argmax(means)])


def name_dice(codes: np.ndarray, truth: np.ndarray) -> list[float]:
    """Dice of GGO and of C in one slice; 0 where both are empty, as in `overlap_means`."""
    return [float(np.nan_to_num(dice(codes == code, truth == code))) for code in (2, 3)]


def longer(training: TrainingConfig, slices: int) -> TrainingConfig:
    """`training` with the steps of the pre-training added, so that random weights cost as much."""
    before = PRESET.pretraining
    phantoms = PRESET.phantoms.lesion_patients[0] * PRESET.phantoms.slices_per_patient
    steps = phantoms // before.batch_size * before.epochs
    in_an_epoch = slices * PRESET.augment.copies // training.batch_size
    return replace(training, epochs=training.epochs + round(steps / in_an_epoch))


def with_interval(value: Callable[[np.ndarray], float], slices: int) -> list[float]:
    """`value` of all slices, given by their indices, and a 95 % interval over slices."""
    each = [f"{i:03}" for i in range(slices)]  # there are no patient ids
    return [value(np.arange(slices)), *interval(value, each, repeats=2000)]


def mean_dice(part: np.ndarray, name: str = "dice") -> Callable[[np.ndarray], float]:
    """A Dice of `overlap_means` as a function of the slices that count; part [50, 5]."""
    return lambda indices: overlap_means(part[indices])[name]


def dices(table: np.ndarray) -> list[float]:
    """Mean Dice of each region; table [slices, regions, 5]."""
    return [overlap_means(part)["dice"] for part in table.swapaxes(0, 1)]


def tables(rows: list[dict], key: str = "overlap_mirrored") -> np.ndarray:
    """All folds of one arm, [50, regions, 5]: each slice once, by a model that never saw it."""
    return np.concatenate([np.array(row[key]) for row in rows])


def summary(rows: list[dict], key: str) -> dict:
    """Means over all slices of one arm, with intervals."""
    result = {}
    for region, part in zip(REGIONS, tables(rows, key).swapaxes(0, 1), strict=True):
        result[region] = overlap_means(part)
        for name in ("dice", "dice_present"):
            limits = with_interval(mean_dice(part, name), len(part))[1:]
            result[region][f"{name}_interval"] = limits
    return result


def gains(more: list[dict], less: list[dict]) -> dict[str, list[float]]:
    """What an arm adds to the mean Dice of each region: value, and a 95 % interval over slices."""
    result = {}
    for i, region in enumerate(REGIONS):
        one, other = (mean_dice(tables(rows)[:, i]) for rows in (more, less))

        def added(indices: np.ndarray, one: Callable = one, other: Callable = other) -> float:
            return one(indices) - other(indices)

        result[region] = with_interval(added, len(tables(more)))
    return result


def wrong_names(table: np.ndarray) -> float:
    """Of the pixels that are lesion in truth and prediction: the share with the other class."""
    right_place, ggo, c = table[:, :, 0].sum(0)  # table [50, regions, 5]
    return float(1 - (ggo + c) / right_place)


def dice_by_size(part: np.ndarray, limits: tuple[float, ...]) -> list[tuple[int, float]]:
    """Slices, and their mean Dice, where the region covers up to each limit of the picture."""
    shares = part[:, 2] / part[:, 3]  # part [50, 5], rows of `Overlap`
    result, low = [], 0.0
    for high in limits:
        chosen = part[(shares > low) & (shares <= high)]
        result.append((len(chosen), overlap_means(chosen)["dice"]))
        low = high
    return result


def slashed(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in values)


def markdown(result: dict) -> str:
    """The table of chapter 9."""
    columns = [result[arm] for arm in ARMS]
    folds = [column["folds"] for column in columns]
    both = [tables(rows) for rows in folds]
    body = []

    def row(title: str, cells: list[str], added: Sequence[str] = ("",) * len(GAINS)) -> None:
        body.append([title, *cells, *added])

    for name in ("dice", "dice_present"):
        for region in REGIONS:
            values = [column["all_mirrored"][region] for column in columns]
            some = f"the {values[0]['present']} slices that have it"
            low_high = "{:.2f} ({:.2f} to {:.2f})"
            cells = [low_high.format(v[name], *v[f"{name}_interval"]) for v in values]
            if name == "dice":
                gain = [result["gain"][arm][region] for arm in GAINS]
                added = ["{:+.2f} ({:+.2f} to {:+.2f})".format(*limits) for limits in gain]
                row(f"mean Dice, {region}, all slices", cells, added)
            else:
                row(f"mean Dice, {region}, {some}", cells)
    regions = " / ".join(REGIONS)
    plain = [slashed([column["all"][r]["dice"] for r in REGIONS]) for column in columns]
    row(f"the same without the mirror image, all slices: {regions}", plain)
    alone = [slashed(dices(tables(rows[:1]))) for rows in folds]
    row(f"fold 1 alone, all its slices: {regions}", alone)
    known = [np.mean([one["dice_on_training_slices"] for one in rows], 0) for rows in folds]
    title = f"on the slices that a model trained on, mean of folds: {regions}"
    row(title, [slashed(values) for values in known])
    sizes = [dice_by_size(table[:, 2], (0.01, 0.05, 1.0)) for table in both]
    counts = " / ".join(str(count) for count, _ in sizes[0])
    row(
        f"mean Dice, C, where it covers at most 1 % / 1 to 5 % / more of the slice "
        f"({counts} slices)",
        [slashed([value for _, value in size]) for size in sizes],
    )
    title = "of the lesion pixels that were found: share with the wrong of the two names"
    row(title, [f"{wrong_names(table):.2f}" for table in both])
    mean = slashed(dices(np.array(result["averaged"])))
    row(f"mean Dice of the mean of the three models: {regions}", [mean] * len(columns))
    for name, title in {
        "by_grey": "with names from grey: a found pixel above a limit is consolidation",
        "by_truth": "with the right name for each lesion pixel that was found",
        "outlines": "of the true outlines, names from grey by the same limit",
        "outlines_own": "of the true outlines, names from grey by the best limit of each slice",
    }.items():
        named = [np.concatenate([one["named"][name] for one in rows]) for rows in folds]
        row(f"mean Dice, GGO / C {title}", [slashed(values.mean(0)) for values in named])
    grey = [one for fold in folds[0] for one in fold["grey"]]  # the same for all
    ranges = [[one[i] for one in grey if one[i] is not None] for i in range(2)]
    row(
        "median grey value (0 to 1) of the true lesion in a slice, lowest to highest: GGO / C",
        [" / ".join(f"{min(values):.2f} to {max(values):.2f}" for values in ranges)] * len(columns),
    )
    for name, title in {
        "sensitivity": "mean sensitivity",
        "specificity": "mean specificity",
        "mae": "mean absolute error",
    }.items():
        values = [column["all_mirrored"]["infection"][name] for column in columns]
        row(f"{title}, infection", [f"{value:.2f}" for value in values])
    for name, title in {
        "mask_ap50": "mask AP50, mean of folds (lowest to highest)",
        "regions_ap50": "the same of the connected regions of the fused mask",
    }.items():
        ap50 = [[one[name] for one in rows] for rows in folds]
        row(title, [f"{np.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in ap50])
    costs = []
    for arm, rows in zip(ARMS, folds, strict=True):
        before = {"steps": 0, "seconds": 0} if arm == "random" else result["pretraining"]
        seconds = np.mean([one["seconds"] for one in rows]) + before["seconds"]
        costs.append(f"{rows[0]['steps'] + before['steps']:,} steps, {seconds / 60:.0f} minutes")
    row("one training", costs)
    machine = f"{result['hardware']}, two trainings at a time with one thread each"
    made = origin(result, "`results/covid_semiseg.json`", machine)
    note = "In brackets: 95 % intervals from resampling slices."
    head = ["50 real slices, five folds", *ARMS.values(), *GAINS]
    last = f"{made} {note} {result['choices']} {result['note']}".rstrip()
    return "\n".join([*table(head, body), "", last])


def sentences(result: dict) -> str:
    """What the README says."""
    values = [result["whole"]["all_mirrored"][region] for region in REGIONS]
    found = ", ".join(
        f"{region} {value['dice']:.2f} ({value['dice_interval'][0]:.2f} to "
        f"{value['dice_interval'][1]:.2f})"
        for region, value in zip(REGIONS, values, strict=True)
    )
    file = "results/covid_semiseg.json"
    return (
        f"Preset `semiseg`, five folds of the 50 training slices of COVID-SemiSeg, mean Dice and "
        f"95 % interval over slices: {found}. A slice without consolidation counts 0 there, as in "
        f"the published tables; over those that have it, C is {values[2]['dice_present']:.2f}. "
        "There are no patient ids, so folds may share patients, and settings were chosen on four "
        "fifths of these slices. All of it: [chapter 9](book/09_real_ct.ipynb).\n\n"
        + origin(result, f"[{file}]({file})", result["hardware"])
    )


def show(result: dict) -> None:
    """Fill chapter 9 and the README."""
    fill(TWIN, "covid_semiseg", markdown(result))
    fill(ROOT / "README.md", "covid_semiseg", sentences(result))


def main() -> None:
    """Read the command line, train, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=data_root() / "covid-semiseg")
    parser.add_argument("--runs", type=Path, default=data_root() / "semiseg-folds")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--note", default="", help="a sentence on how the run went")
    parser.add_argument("--table", action="store_true", help="fill the pages, train nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    if arguments.out == OUT:
        show(read(OUT))


def measure(arguments: argparse.Namespace) -> None:
    """Train and judge all arms of all folds, and write the results."""
    source = environment()  # first, so that the commit is that of the code which runs
    shared = (arguments.data, arguments.runs, arguments.precision)
    by_arm = {arm: [] for arm in ARMS}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        first = pool.submit(phantoms_first, *shared[1:]).result()
        waiting = {
            pool.submit(one_fold, arm, fold, *shared): arm for arm in ARMS for fold in range(FOLDS)
        }
        for done in as_completed(waiting):
            by_arm[waiting[done]].append(done.result())
            print(f"{waiting[done]}, fold {done.result()['fold'] + 1}: done", flush=True)
        means = [pool.submit(averaged, fold, *shared[:2]) for fold in range(FOLDS)]
        together = [row for mean in means for row in mean.result()]
    for rows in by_arm.values():
        rows.sort(key=lambda row: row["fold"])
    result = {
        "about": "cross-validation on the 50 training slices of COVID-SemiSeg, real CT of "
        "COVID-19 patients; no patient ids, so folds may share patients",
        **source,
        "command": f"python benchmarks/covid_semiseg.py --data DIR --precision "
        f"{arguments.precision}",
        "preset": asdict(PRESET),
        "fold_seed": FOLD_SEED,
        "choices": read(OUT)["choices"],  # how the settings came about; edit it there
        "note": arguments.note,
        "pretraining": first,
        "averaged": together,
        "gain": {name: gains(*(by_arm[arm] for arm in pair)) for name, pair in GAINS.items()},
    }
    for arm, rows in by_arm.items():
        plain, mirrored = (summary(rows, key) for key in ("overlap", "overlap_mirrored"))
        result[arm] = {"all": plain, "all_mirrored": mirrored, "folds": rows}
    save(arguments.out, result, indent=None)
    print(markdown(result))


if __name__ == "__main__":
    main()
