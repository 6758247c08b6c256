"""The three training regimes on the quick preset: heads, heads_bn and full, from one segmenter.

A short pilot picks one rate for each; two regimes run again with a gentler rate for the detector,
and heads with all its epochs, which its fixed ranked boxes make cheap. So that all of it takes half
an hour on two cores, the regimes see every second training slice, in 3 epochs instead of the
preset's 20; the pilot has one seed, and the runs have two. A second call does what the file of
results lacks. Fills chapter 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
from common import QUICK

from covidmask import models, training
from covidmask.config import PRESETS
from covidmask.datasets import LesionSlices
from covidmask.models import REGIMES

OUT = common.RESULTS / "regimes.json"
TWIN = common.TWINS / "08_three_regimes.py"
NAMES = {"heads": "heads", "heads_bn": "heads + BN", "full": "full"}
COLUMNS = {
    "regime (phantoms)": "{name}",
    "epochs; rate": "{epochs}; {rate}",
    "COVID-19": "{sensitivity[2]:.3f} ({ppv[2]:.3f})",
    "common pneumonia": "{sensitivity[1]:.3f} ({ppv[1]:.3f})",
    "control": "{sensitivity[0]:.3f} ({ppv[0]:.3f})",
    "accuracy (95 %)": "{accuracy:.3f} "
    "({accuracy_by_patient[0]:.3f} to {accuracy_by_patient[1]:.3f})",
    "each seed": "{each}",
    "minus heads (95 %)": "{minus_heads[0]:+.3f} ({minus_heads[1]:+.3f} to {minus_heads[2]:+.3f})",
    "minus heads of all epochs (95 %)": "{minus_longer[0]:+.3f} "
    "({minus_longer[1]:+.3f} to {minus_longer[2]:+.3f})",
    "box AP50 after": "{box_ap50:.3f}",
}
RATES = (1e-3, 3e-4, 1e-4)  # what the pilot tries; the preset's own is the first
SHARE = 2  # every second training slice
PILOT_SHARE, PILOT_EPOCHS = 8, 2  # every eighth; the test slices are not read
DETECTOR_SHARE = 0.1  # with two rates: the detector's, as a share of that of S
DETECTOR_DECAY = PRESETS["paper"].classifier_training.weight_decay  # the preset's is made for S


class Run(NamedTuple):
    """One training, as the rows of the results name it."""

    regime: str
    epochs: int
    lr: float
    two_rates: bool = False
    share: int = SHARE  # every such training slice


def rank(data: Path, data_seed: int) -> int:
    """Rank boxes once for all runs of heads, before several processes ask for them."""
    slices, count = common.quick_data(data, data_seed)[0], 0
    segmenter = models.ShippedWeights.SEGMENTER_QUICK.load()
    model = models.covid_ct_mask_net(segmenter, QUICK.classifier)
    for share, split in ((1, "val"), (SHARE, "train"), (PILOT_SHARE, "train")):
        part = common.part_of(slices[split], range(0, len(slices[split]), share))
        count += len(training.cache_ranked_boxes(model, part, folder=data.parent / "ranked"))
    return count


def train(run: Run, seed: int, data: Path, data_seed: int):
    """Train one regime; the epoch with the best validation accuracy stays. Model and its row."""
    slices = common.quick_data(data, data_seed)[0]
    segmenter = models.ShippedWeights.SEGMENTER_QUICK.load()
    settings = replace(QUICK.classifier_training, epochs=run.epochs, lr=run.lr)
    torch.manual_seed(seed)
    model = models.covid_ct_mask_net(segmenter, QUICK.classifier)  # the same S for every regime
    models.set_regime(model, run.regime)
    options: dict = {"validation": slices["val"], "seed": seed, "cache": data.parent / "ranked"}
    if run.two_rates:
        gentle = {"share": DETECTOR_SHARE, "weight_decay": DETECTOR_DECAY}
        gentle["params"] = [p for p in model.detector.parameters() if p.requires_grad]
        options["groups"] = [{"params": list(model.s.parameters())}, gentle]
    part = common.part_of(slices["train"], range(0, len(slices["train"]), run.share))
    history = training.train_classifier(model, part, run.regime, settings, **options)
    accuracy = [step["accuracy"] for step in history if "accuracy" in step]  # of each epoch
    return model, {
        "regime": run.regime,
        "seed": seed,
        "lr": run.lr,
        "detector_lr": DETECTOR_SHARE * run.lr if run.two_rates else None,
        "epochs": run.epochs,
        "parameters": models.count_trainable(model),
        "validation_accuracy_of_epoch": accuracy,
        "best_epoch": int(np.argmax(accuracy)) + 1,
    }


def pilot(*case) -> dict:
    """A row of the pilot, which does not read the test slices."""
    row = train(*case)[1]
    return row | {"validation_accuracy": max(row["validation_accuracy_of_epoch"])}


def one_run(run: Run, seed: int, data: Path, data_seed: int) -> dict:
    """Train and judge: predictions, and what is left of the detector."""
    model, row = train(run, seed, data, data_seed)
    slices, lesions = common.quick_data(data, data_seed)
    row |= common.judge(model, slices["test"], seed=seed)
    return row | {"detection": detection(lesions["test"], model.detector.state_dict())}


def best_rate(rows: list[dict], regime: str) -> float:
    """The rate with the best validation accuracy; of equals, the larger."""
    return max((r["validation_accuracy"], r["lr"]) for r in rows if r["regime"] == regime)[1]


def detection(lesions: LesionSlices, trained: dict) -> dict:
    """COCO's AP on slices with masks of the segmenter with the weights of a trained detector."""
    whole = models.ShippedWeights.SEGMENTER_QUICK.load()
    whole.load_state_dict({**whole.state_dict(), **trained})  # the mask branch is put back
    values = training.evaluate_segmenter(whole, lesions, progress=False)
    return {key: values[key] for key in ("box_ap", "box_ap50", "mask_ap", "mask_ap50")}


def pilots(result: dict) -> list[dict]:
    return [part for name, part in result["parts"].items() if name.startswith("pilot")]


def summary(result: dict) -> list[dict]:
    """A row for each run, the mean of its seeds, with intervals from resampling patients.

    Differences are to heads of as many epochs (the first row) and of all (the last), on the same
    slices.
    """

    def run_of(row: dict) -> tuple:
        longer, gentle = row["epochs"] != result["epochs"], bool(row["detector_lr"])
        return longer, gentle, REGIMES.index(row["regime"])

    def right(rows: list[dict]) -> np.ndarray:  # [M], the share of the seeds
        return np.mean([np.array(list(row["predictions"])) == labels for row in rows], axis=0)

    labels, patients = np.array(list(result["test_labels"])), result["test_patients"].split()
    rows = [part for name, part in result["parts"].items() if name.startswith("run")]
    rows = sorted(rows, key=lambda row: (run_of(row), row["seed"]))
    runs = [list(same) for _, same in groupby(rows, run_of)]
    heads = [run for run in runs if run[0]["regime"] == "heads"]
    base = {"minus_heads": heads[0], "minus_longer": heads[-1]}
    table = []
    for run in runs:
        one, keys = right(run), ("accuracy", "sensitivity", "ppv")
        table.append(
            {key: run[0][key] for key in ("regime", "epochs", "lr", "detector_lr")}
            | {key: np.mean([row[key] for row in run], axis=0).tolist() for key in keys}
            | {"seeds": run, "box_ap50": np.mean([row["detection"]["box_ap50"] for row in run])}
            | {"accuracy_by_patient": common.interval(lambda i, one=one: one[i].mean(), patients)}
            | {key: common.gain(one, right(rows), patients) for key, rows in base.items()}
        )
    return table


def markdown(result: dict) -> str:
    """The tables of the chapter: the runs, and the pilot."""
    rows = [
        {
            **row,
            "name": NAMES[row["regime"]],
            "rate": " / ".join(f"{row[key]:g}" for key in ("lr", "detector_lr") if row[key]),
            "each": " / ".join(f"{seed['accuracy']:.3f}" for seed in row["seeds"]),
        }
        for row in summary(result)
    ]
    tried = {(row["regime"], row["lr"]): row["validation_accuracy"] for row in pilots(result)}
    pilot_rows = common.table(
        ["pilot: validation accuracy", *(f"at {rate:g}" for rate in RATES)],
        [[name, *(f"{tried[key, rate]:.3f}" for rate in RATES)] for key, name in NAMES.items()],
    )
    patients, seeds = set(result["test_patients"].split()), rows[0]["seeds"]
    share, tries, *_ = result["pilot"]
    text = (
        f"Means of {len(seeds)} seed(s): {result['training_slices']:,} training, "
        f"{result['validation_slices']} validation and {len(result['test_labels'])} test slices, "
        f"these of {len(patients)} patients, {result['lesion_test_slices']} lesion slices for the "
        f"box AP50. The pilot: one seed, every {share}th training slice, {tries} epochs at most."
    )
    made = common.origin(result, "`results/regimes.json`")
    return "\n".join([*common.formatted(COLUMNS, rows), "", *pilot_rows, "", text, "", made])


def measure(
    seeds: tuple[int, ...] = (0, 1),
    epochs: int = 3,
    data: Path = common.QUICK_DATA,
    data_seed: int = 0,
    jobs: int = 2,
    out: Path = OUT,
) -> Iterator[tuple[Path, dict]]:
    """Do what an earlier call with the same settings has not done, in `jobs` processes."""
    slices, lesions = common.quick_data(data, data_seed)
    settings = {
        "about": "three regimes, quick preset on synthetic phantoms; no figure of real CT",
        "generator": common.GENERATOR,
        "preset": asdict(QUICK),
        "epochs": epochs,
        "pilot": [PILOT_SHARE, PILOT_EPOCHS, *RATES],
        "two_rates": [DETECTOR_SHARE, DETECTOR_DECAY],
        "data_seed": data_seed,
        "segmenter": models.ShippedWeights.SEGMENTER_QUICK.value,
        "training_slices": len(range(0, len(slices["train"]), SHARE)),
        "validation_slices": len(slices["val"]),
        "test_labels": "".join(map(str, slices["test"].labels)),
        "test_patients": " ".join(slices["test"].patients),
        "lesion_test_slices": len(lesions["test"]),
    }
    where = data, data_seed
    yield from common.lacking(out, settings, {"ranked slices": (rank, *where)})
    tried = [Run(*case, share=PILOT_SHARE) for case in product(REGIMES, (PILOT_EPOCHS,), RATES)]
    parts = {f"pilot {run.regime} {run.lr:g}": (pilot, run, 0, *where) for run in tried}
    yield from common.lacking(out, settings, parts, jobs)
    rates = {regime: best_rate(pilots(common.read(out)), regime) for regime in REGIMES}
    runs = [Run(regime, epochs, rates["heads"], True) for regime in REGIMES[:0:-1]]
    runs += [Run(regime, epochs, rates[regime]) for regime in REGIMES[::-1]]  # the longest first
    runs += [Run("heads", QUICK.classifier_training.epochs, rates["heads"])]
    parts = {"before": (detection, lesions["test"], {})}
    parts |= {
        f"run {run.regime}{' gentle' * run.two_rates}, {run.epochs} epochs, seed {seed}": case
        for run, seed in product(runs, seeds)
        for case in [(one_run, run, seed, *where)]
    }
    yield from common.lacking(out, settings, parts, jobs)


if __name__ == "__main__":
    common.command(measure, OUT, (TWIN, "regimes", markdown))
