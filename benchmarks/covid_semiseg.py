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
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from marks import commented, fill
from quick_preset import ROOT, environment
from scipy.stats import bootstrap
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import PRESETS, TrainingConfig
from covidmask.datasets.augmentation import Augmented
from covidmask.datasets.lesions import LesionDataset, SemiSeg, mask_to_targets
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.files import atomic_path, data_root, phantoms_folder
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
OUT = ROOT / "results" / "covid_semiseg.json"
TWIN = ROOT / "book" / "py" / "09_real_ct.py"
MARKS = ("# <!-- covid_semiseg -->", "# <!-- /covid_semiseg -->")
README_MARKS = ("<!-- covid_semiseg -->", "<!-- /covid_semiseg -->")


CHOICES = (
    "Settings were chosen on the 40 training slices of fold 1 alone: 30 trained and 10 were looked "
    "at, in two such splits. Twenty-two configurations were looked at, some of them stopped early: "
    "without the semantic branch, with it, it alone without boxes, at 192, 256 and 320 pixels, "
    "with the image joined to its maps, with Dice of each slice, with twice the weight for C, with "
    "no, weaker and stronger changes of grey values, with grey values brought to one scale, with "
    "more weight decay, from phantoms, with phantoms among the real slices, with lesions pasted "
    "into some of the copies, with more steps, and mixtures of these, such as the one in use. "
    "Sixteen pairs of a threshold and a weight of C, and the mirror image with and without two "
    "other scales, were looked at there, too; 0.5, no weight and the mirror image alone were kept. "
    "Anchor sizes were chosen by the lesions of all 50 slices, so no fold is wholly untouched. The "
    "test slices of fold 1 took no part in the other choices; those of the other folds are among "
    "the 40. Since then other thresholds, weights, names from grey values and means of several "
    "models were tried on all folds, to see where the loss lies; nothing was taken from that. The "
    "epochs were doubled because half of them left a model far from perfect on the slices that it "
    "trained on; the first two folds with all epochs were looked at before the other three were "
    "trained."
)


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


def phantoms_first(folder: Path, precision: str) -> dict:
    """Pre-train, once, and say what it cost."""
    note = folder / "phantoms.json"
    if not note.exists():
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = lesion_mask_rcnn(PRESET.detector)
        root = write_phantoms(phantoms_folder("semiseg"), PRESET.phantoms, progress=False)
        start = time.perf_counter()
        history = pretrain_segmenter(
            model,
            PRESET,
            root,
            fabric=make_fabric(precision, "cpu"),
            checkpoint=folder / "phantoms.ckpt",
            progress=False,
        )
        cost = {"steps": len(history), "seconds": time.perf_counter() - start}
        save_model(model, folder / "phantoms.safetensors")
        note.write_text(json.dumps(cost), encoding="utf-8")
    return json.loads(note.read_text())


def parts(data: Path, fold: int) -> tuple[Part, Part]:
    """The training and the test slices of a fold."""
    whole = SemiSeg(data, "train", min_area=PRESET.min_area)
    test = folds(len(whole))[fold]
    return Part(whole, sorted(set(range(len(whole))) - set(test))), Part(whole, test)


def one_fold(arm: str, fold: int, data: Path, folder: Path, precision: str) -> dict:
    """Train on four fifths, judge the fifth; nothing is chosen by looking at it."""
    torch.set_num_threads(1)
    weights, note = folder / f"{arm}-{fold}.safetensors", folder / f"{arm}-{fold}.json"
    train, test = parts(data, fold)
    if not note.exists():
        torch.manual_seed(0)
        if arm == "random":
            model, training = lesion_mask_rcnn(PRESET.detector), longer(SHORT, len(train))
        else:
            model = load_segmenter(folder / "phantoms.safetensors")
            training = PRESET.segmenter if arm == "whole" else SHORT
        start = time.perf_counter()
        history = train_segmenter(
            model,
            Augmented(train, PRESET.augment),
            training,
            fabric=make_fabric(precision, "cpu"),
            checkpoint=folder / f"{arm}-{fold}.ckpt",
            progress=False,
        )
        cost = {"steps": len(history), "seconds": time.perf_counter() - start}
        save_model(model, weights)
        with atomic_path(note) as temporary:
            temporary.write_text(json.dumps(cost), encoding="utf-8")
    model = load_segmenter(weights)
    return {
        "arm": arm,
        "fold": fold,
        "training_slices": len(train),
        "test_slices": test.chosen,
        **json.loads(note.read_text()),
        **judge(model, train, test),
    }


def judge(model: GeneralizedRCNN, train: Part, test: Part) -> dict:
    """All that is measured of one model; counts of `Overlap` and Dice are per test slice."""
    found = evaluate_segmenter(model, test, progress=False)
    limit = grey_limit([train.read(i) for i in range(len(train))])
    mirrored, regions = [], CocoAP()
    named: dict[str, list] = {"by_truth": [], "by_grey": [], "outlines": [], "outlines_own": []}
    for index, prediction, target in predict_lesions(
        model, test, fused=True, mirror=True, progress=False
    ):
        image, truth = test.read(index)
        mirrored.append(overlap(prediction["maps"], truth))
        regions.update([connected_regions(prediction["maps"])], [target])
        codes = fuse(prediction["maps"])
        lesion = codes > 1
        named["by_truth"].append(name_dice(np.where(lesion & (truth > 1), truth, codes), truth))
        named["by_grey"].append(name_dice(name_by_grey(lesion, image, limit), truth))
        named["outlines"].append(name_dice(name_by_grey(truth > 1, image, limit), truth))
        own = grey_limit([(image, truth)])
        named["outlines_own"].append(name_dice(name_by_grey(truth > 1, image, own), truth))
    known = [
        overlap(prediction["maps"], train.read(index)[1])
        for index, prediction, _ in predict_lesions(
            model, train, fused=True, mirror=True, progress=False
        )
    ]
    return {
        "dice_on_training_slices": [
            overlap_means(part)["dice"] for part in np.array(known).swapaxes(0, 1)
        ],
        "mask_ap50": found["mask_ap50"],
        "mask_ap": found["mask_ap"],
        "regions_ap50": regions.compute()["mask_ap50"],
        "overlap": found["table"].tolist(),
        "overlap_mirrored": mirrored,
        "grey": [true_grey(*test.read(i)) for i in range(len(test))],
        "grey_limit": limit,
        "named": named,
    }


def averaged(fold: int, data: Path, folder: Path) -> list:
    """Counts of `Overlap` for the mean of the maps of all three models of a fold."""
    torch.set_num_threads(1)
    test = parts(data, fold)[1]
    maps = [0.0] * len(test)
    for arm in ARMS:
        model = load_segmenter(folder / f"{arm}-{fold}.safetensors")
        for index, prediction, _ in predict_lesions(
            model, test, fused=True, mirror=True, progress=False
        ):
            maps[index] += prediction["maps"] / len(ARMS)
    return [overlap(mean, test.read(index)[1]) for index, mean in enumerate(maps)]


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
    everything = np.arange(slices)
    spread = bootstrap(
        (everything,), value, vectorized=False, method="percentile", n_resamples=2000, rng=0
    )
    return [value(everything), *spread.confidence_interval]


def mean_dice(part: np.ndarray, name: str = "dice") -> Callable[[np.ndarray], float]:
    """A Dice of `overlap_means` as a function of the slices that count; part [50, 5]."""
    return lambda indices: overlap_means(part[indices])[name]


def tables(rows: list[dict], key: str = "overlap_mirrored") -> np.ndarray:
    """All folds of one arm, [50, regions, 5]: each slice once, by a model that never saw it."""
    return np.concatenate([np.array(row[key]) for row in rows])


def summary(rows: list[dict], key: str) -> dict:
    """Means over all slices of one arm, with intervals."""
    table, result = tables(rows, key), {}
    for i, region in enumerate(REGIONS):
        part = table[:, i]
        result[region] = {
            **overlap_means(part),
            "dice_interval": with_interval(mean_dice(part), len(part))[1:],
            "dice_present_interval": with_interval(mean_dice(part, "dice_present"), len(part))[1:],
        }
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


def gains(more: list[dict], less: list[dict]) -> dict[str, list[float]]:
    """What an arm adds to the mean Dice of each region: value, and a 95 % interval over slices."""
    first, second = tables(more), tables(less)
    result = {}
    for i, region in enumerate(REGIONS):
        one, other = mean_dice(first[:, i]), mean_dice(second[:, i])
        result[region] = with_interval(
            lambda indices, one=one, other=other: one(indices) - other(indices), len(first)
        )
    return result


def markdown(result: dict) -> str:
    """The table of chapter 9."""
    columns = [result[arm] for arm in ARMS]
    lines = [
        f"| 50 real slices, five folds | {' | '.join(ARMS.values())} | {' | '.join(GAINS)} |",
        "|" + "---|" * (1 + len(ARMS) + len(GAINS)),
    ]

    def row(title: str, cells: list[str], last: Sequence[str] = ("",) * len(GAINS)) -> None:
        lines.append(f"| {' | '.join([title, *cells, *last])} |")

    for name in ("dice", "dice_present"):
        for region in REGIONS:
            values = [column["all_mirrored"][region] for column in columns]
            some = f"the {values[0]['present']} slices that have it"
            text = "all slices" if name == "dice" else some
            added = [
                "{:+.2f} ({:+.2f} to {:+.2f})".format(*result["gain"][arm][region]) for arm in GAINS
            ]
            row(
                f"mean Dice, {region}, {text}",
                [
                    f"{value[name]:.2f} ({value[f'{name}_interval'][0]:.2f} to "
                    f"{value[f'{name}_interval'][1]:.2f})"
                    for value in values
                ],
                added if name == "dice" else [""] * len(GAINS),
            )
    regions = " / ".join(REGIONS)
    plain = [" / ".join(f"{c['all'][r]['dice']:.2f}" for r in REGIONS) for c in columns]
    row(f"the same without the mirror image, all slices: {regions}", plain)
    alone = []
    for column in columns:
        table = tables(column["folds"][:1])
        alone.append(" / ".join(f"{overlap_means(table[:, i])['dice']:.2f}" for i in range(3)))
    row(f"fold 1 alone, all its slices: {regions}", alone)
    known = [np.mean([f["dice_on_training_slices"] for f in c["folds"]], 0) for c in columns]
    row(
        f"on the slices that a model trained on, mean of folds: {regions}",
        [" / ".join(f"{value:.2f}" for value in values) for values in known],
    )
    both = [tables(column["folds"]) for column in columns]
    sizes = [dice_by_size(table[:, 2], (0.01, 0.05, 1.0)) for table in both]
    counts = " / ".join(str(count) for count, _ in sizes[0])
    row(
        f"mean Dice, C, where it covers at most 1 % / 1 to 5 % / more of the slice "
        f"({counts} slices)",
        [" / ".join(f"{value:.2f}" for _, value in size) for size in sizes],
    )
    row(
        "of the lesion pixels that were found: share with the wrong of the two names",
        [f"{wrong_names(table):.2f}" for table in both],
    )
    table = np.array(result["averaged"])
    mean = " / ".join(f"{overlap_means(table[:, i])['dice']:.2f}" for i in range(3))
    row(f"mean Dice of the mean of the three models: {regions}", [mean] * len(columns))
    titles = {
        "by_grey": "with names from grey: a found pixel above a limit is consolidation",
        "by_truth": "with the right name for each lesion pixel that was found",
        "outlines": "of the true outlines, names from grey by the same limit",
        "outlines_own": "of the true outlines, names from grey by the best limit of each slice",
    }
    for name, title in titles.items():
        dices = [np.concatenate([one["named"][name] for one in c["folds"]]) for c in columns]
        cells = [" / ".join(f"{v:.2f}" for v in d.mean(0)) for d in dices]
        row(f"mean Dice, GGO / C {title}", cells)
    grey = [one for fold in columns[0]["folds"] for one in fold["grey"]]  # the same for all
    ranges = [[one[i] for one in grey if one[i] is not None] for i in range(2)]
    row(
        "median grey value (0 to 1) of the true lesion in a slice, lowest to highest: GGO / C",
        [" / ".join(f"{min(values):.2f} to {max(values):.2f}" for values in ranges)] * len(columns),
    )
    for name in ("sensitivity", "specificity", "mae"):
        title = {"mae": "mean absolute error"}.get(name, f"mean {name}")
        values = [column["all_mirrored"]["infection"][name] for column in columns]
        row(f"{title}, infection", [f"{value:.2f}" for value in values])
    for name, title in (
        ("mask_ap50", "mask AP50, mean of folds (lowest to highest)"),
        ("regions_ap50", "the same of the connected regions of the fused mask"),
    ):
        ap50 = [[one[name] for one in column["folds"]] for column in columns]
        row(title, [f"{np.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in ap50])
    first, costs = result["pretraining"], []
    for arm, column in zip(ARMS, columns, strict=True):
        before = {"steps": 0, "seconds": 0} if arm == "random" else first
        steps = column["folds"][0]["steps"] + before["steps"]
        seconds = np.mean([one["seconds"] for one in column["folds"]]) + before["seconds"]
        costs.append(f"{steps:,} steps, {seconds / 60:.0f} minutes")
    row("one training", costs)
    lines += [
        "",
        f"Command: `{result['command']}`; {result['hardware']}, two trainings at a time with one "
        f"thread each; torch {result['torch']}; {result['date']}; commit {result['commit']}; all "
        "numbers in `results/covid_semiseg.json`. In brackets: 95 % intervals from resampling "
        f"slices. {result['choices']} {result['note']}".rstrip(),
    ]
    return "\n".join(lines)


def sentences(result: dict) -> str:
    """What the README says."""
    values = [result["whole"]["all_mirrored"][region] for region in REGIONS]
    found = ", ".join(
        f"{region} {value['dice']:.2f} ({value['dice_interval'][0]:.2f} to "
        f"{value['dice_interval'][1]:.2f})"
        for region, value in zip(REGIONS, values, strict=True)
    )
    return (
        f"Preset `semiseg`, five folds of the 50 training slices of COVID-SemiSeg, mean Dice and "
        f"95 % interval over slices: {found}. A slice without consolidation counts 0 there, as in "
        f"the published tables; over those that have it, C is {values[2]['dice_present']:.2f}. "
        "There are no patient ids, so folds may share patients, and settings were chosen on four "
        "fifths of these slices. All of it: [chapter 9](book/09_real_ct.ipynb).\n\n"
        f"Command: `{result['command']}`; {result['hardware']}; torch {result['torch']}; "
        f"{result['date']}; commit {result['commit']}; all numbers in "
        "[results/covid_semiseg.json](results/covid_semiseg.json)."
    )


def write(result: dict) -> None:
    """Fill chapter 9 and the README."""
    fill(TWIN, MARKS, commented(markdown(result)))
    fill(ROOT / "README.md", README_MARKS, sentences(result))


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
        origin = environment()  # first, so that the commit is that of the code which runs
        arguments.runs.mkdir(parents=True, exist_ok=True)
        by_arm = {arm: [] for arm in ARMS}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
            phantoms = pool.submit(phantoms_first, arguments.runs, arguments.precision)
            shared = (arguments.data, arguments.runs, arguments.precision)
            waiting = {}
            first = phantoms.result()
            for arm in ARMS:
                for fold in range(FOLDS):
                    waiting[pool.submit(one_fold, arm, fold, *shared)] = arm
            for done in as_completed(waiting):
                by_arm[waiting[done]].append(done.result())
                print(f"{waiting[done]}, fold {done.result()['fold'] + 1}: done", flush=True)
            means = [pool.submit(averaged, f, arguments.data, arguments.runs) for f in range(FOLDS)]
            together = [row for mean in means for row in mean.result()]
        for rows in by_arm.values():
            rows.sort(key=lambda row: row["fold"])
        result = {
            "about": "cross-validation on the 50 training slices of COVID-SemiSeg, real CT of "
            "COVID-19 patients; no patient ids, so folds may share patients",
            **origin,
            "command": f"python benchmarks/covid_semiseg.py --data DIR --precision "
            f"{arguments.precision}",
            "preset": asdict(PRESET),
            "fold_seed": FOLD_SEED,
            "choices": CHOICES,
            "note": arguments.note,
            "pretraining": first,
            "averaged": together,
            "gain": {name: gains(*(by_arm[arm] for arm in pair)) for name, pair in GAINS.items()},
            **{
                arm: {
                    "all": summary(rows, "overlap"),
                    "all_mirrored": summary(rows, "overlap_mirrored"),
                    "folds": rows,
                }
                for arm, rows in by_arm.items()
            },
        }
        with atomic_path(arguments.out) as temporary:
            temporary.write_text(json.dumps(result) + "\n", encoding="utf-8", newline="\n")
        print(markdown(result))
    if arguments.out == OUT:
        write(json.loads(OUT.read_text()))


if __name__ == "__main__":
    main()
