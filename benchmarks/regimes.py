"""The three training regimes on the quick preset: heads, heads_bn and full, from one segmenter.

A short pilot picks one rate for each; two regimes run again with a gentler rate for the detector,
and heads with all its epochs. A second call goes on behind the last run. Fills chapter 6.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
from common import QUICK
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask import models, training
from covidmask.config import PRESETS, TrainingConfig
from covidmask.datasets import LesionSlices, SliceImages
from covidmask.models import REGIMES

OUT = common.RESULTS / "regimes.json"
TWIN = common.TWINS / "06_three_regimes.py"
NAMES = {"heads": "heads", "heads_bn": "heads + BN", "full": "full"}
COLUMNS = {
    "regime (phantoms)": "{name}",
    "epochs": "{epochs}",
    "rate": "{rate}",
    "COVID-19": "{sensitivity[2]:.3f} ({ppv[2]:.3f})",
    "common pneumonia": "{sensitivity[1]:.3f} ({ppv[1]:.3f})",
    "control": "{sensitivity[0]:.3f} ({ppv[0]:.3f})",
    "accuracy (95 %)": "{accuracy:.3f} "
    "({accuracy_by_patient[0]:.3f} to {accuracy_by_patient[1]:.3f})",
    "minus heads (95 %)": "{more[0]:+.3f} ({more[1]:+.3f} to {more[2]:+.3f})",
    "box AP50 after": "{detection[box_ap50]:.3f}",
}
RATES = (1e-3, 3e-4, 1e-4)  # what the pilot tries; the preset's own is the first
PILOT_SHARE, PILOT_EPOCHS = 4, 2  # every fourth training slice; the test slices are not read
DETECTOR_SHARE = 0.1  # with two rates: the detector's, as a share of that of S
DETECTOR_DECAY = PRESETS["paper"].classifier_training.weight_decay  # the preset's is made for S


class Run(NamedTuple):
    """One training, as the rows of the results name it."""

    regime: str
    epochs: int
    lr: float
    two_rates: bool = False


def train(segmenter: GeneralizedRCNN, run: Run, slices, validation, seed: int):
    """Train one regime; the epoch with the best validation accuracy stays. Model and its row."""
    settings = replace(QUICK.classifier_training, epochs=run.epochs, lr=run.lr)
    torch.manual_seed(seed)
    model = models.covid_ct_mask_net(segmenter, QUICK.classifier)  # the same S for every regime
    method = (
        train_two_rates if run.two_rates else partial(training.train_classifier, progress=False)
    )
    history = method(model, slices, run.regime, settings, validation=validation, seed=seed)
    accuracy = [step["accuracy"] for step in history if "accuracy" in step]  # of each epoch
    models.set_regime(model, run.regime)  # the count below
    return model, {
        "regime": run.regime,
        "lr": run.lr,
        "detector_lr": DETECTOR_SHARE * run.lr if run.two_rates else None,
        "epochs": run.epochs,
        "parameters": models.count_trainable(model),
        "validation_accuracy_of_epoch": accuracy,
        "best_epoch": int(np.argmax(accuracy)) + 1,
    }


def train_two_rates(
    model, slices, regime: str, settings: TrainingConfig, *, validation, seed: int
) -> list[dict]:
    """`train_classifier`, but with a rate and a weight decay of its own for the detector."""
    models.set_regime(model, regime)
    groups = [{"params": model.s.parameters(), "share": 1.0}]
    trained = [p for p in model.detector.parameters() if p.requires_grad]
    groups += [{"params": trained, "share": DETECTOR_SHARE, "weight_decay": DETECTOR_DECAY}]
    adam = torch.optim.Adam(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    size, history, best = settings.batch_size, [], -1.0
    total = settings.epochs * (len(slices) // size)
    for epoch in range(settings.epochs):
        model.train()
        for batch in training.epoch_batches(len(slices), size, epoch, seed):
            for group in adam.param_groups:
                group["lr"] = group["share"] * training.learning_rate(settings, len(history), total)
            images, labels = zip(*(slices[i] for i in batch), strict=True)
            loss = training.classification_loss(model(list(images)), torch.tensor(labels))
            adam.zero_grad()
            loss.backward()
            adam.step()
            history.append({"bce": loss.item()})
        accuracy = training.evaluate_classifier(model, validation, progress=False)["accuracy"]
        history[-1]["accuracy"] = accuracy
        if accuracy > best:
            best, weights = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    model.eval()
    return history


def pilot(segmenter: GeneralizedRCNN, slices: dict[str, SliceImages], seed: int) -> list[dict]:
    """Try each rate in each regime, on few slices."""
    part = common.part_of(slices["train"], range(0, len(slices["train"]), PILOT_SHARE))
    rows = []
    for regime, rate in product(REGIMES, RATES):
        row = train(segmenter, Run(regime, PILOT_EPOCHS, rate), part, slices["val"], seed)[1]
        rows.append(row | {"validation_accuracy": max(row["validation_accuracy_of_epoch"])})
        print(f"pilot {regime} {rate:g}: {rows[-1]['validation_accuracy']:.3f}", flush=True)
    return rows


def best_rate(rows: list[dict], regime: str) -> float:
    """The rate with the best validation accuracy; of equals, the larger."""
    return max((r["validation_accuracy"], r["lr"]) for r in rows if r["regime"] == regime)[1]


def detection(segmenter: GeneralizedRCNN, lesions: LesionSlices, trained: dict) -> dict:
    """COCO's AP on slices with masks of the segmenter with the weights of a trained detector."""
    whole = copy.deepcopy(segmenter)
    whole.load_state_dict({**segmenter.state_dict(), **trained})  # the mask branch is put back
    values = training.evaluate_segmenter(whole, lesions, progress=False)
    return {key: values[key] for key in ("box_ap", "box_ap50", "mask_ap", "mask_ap50")}


def difference(rows: list[dict], test: SliceImages, seed: int) -> list[float] | None:
    """Accuracy of the last row minus that of the first, see `gain`; None for the first itself."""
    right = [np.array(list(row["predictions"]), dtype=int) == test.labels for row in rows]
    return common.gain(right[-1], right[0], test.patients, seed=seed) if len(rows) > 1 else None


def markdown(result: dict) -> str:
    """The tables of the chapter: the runs, and the pilot."""
    rows = [
        {
            **row,
            "name": NAMES[row["regime"]],
            "rate": " / ".join(f"{row[key]:g}" for key in ("lr", "detector_lr") if row[key]),
            "more": row["minus_heads"] or (0, 0, 0),
        }
        for row in result["regimes"]
    ]
    tried = {(row["regime"], row["lr"]): row["validation_accuracy"] for row in result["pilot"]}
    pilots = common.table(
        ["pilot: validation accuracy", *(f"at {rate:g}" for rate in RATES)],
        [[name, *(f"{tried[key, rate]:.3f}" for rate in RATES)] for key, name in NAMES.items()],
    )
    made = common.origin(result, "`results/regimes.json`")
    return "\n".join([*common.formatted(COLUMNS, rows), "", *pilots, "", made])


def measure(
    seed: int = 0,
    epochs: int = 8,
    data: Path = common.QUICK_DATA,
    data_seed: int = 0,
    out: Path = OUT,
) -> Iterator[tuple[Path, dict]]:
    """Do what an earlier call with the same settings has not done."""
    segmenter = models.ShippedWeights.SEGMENTER_QUICK.load()
    file, digest = models.ShippedWeights.SEGMENTER_QUICK.value
    slices, lesions = common.quick_data(data, data_seed)
    result = {
        "about": "three regimes, quick preset on synthetic phantoms; no figure of real CT",
        "preset": asdict(QUICK),
        "training": asdict(replace(QUICK.classifier_training, epochs=epochs)),
        "seed": seed,
        "data_seed": data_seed,
        "segmenter": {"file": file, "sha256": digest},
        "training_slices": len(slices["train"]),
        "validation_slices": len(slices["val"]),
        "test_slices": len(slices["test"]),
        "test_patients": len(set(slices["test"].patients)),
        "lesion_test_slices": len(lesions["test"]),
    }
    old, new = common.read(out), json.loads(json.dumps(result | {"torch": torch.__version__}))
    if any(old.get(key) != value for key, value in new.items()):
        old = {}
    result["pilot"] = old.get("pilot") or pilot(segmenter, slices, seed)
    result["detection_before"] = detection(segmenter, lesions["test"], {})
    result["regimes"] = rows = old.get("regimes", [])
    yield out, result
    rates = {regime: best_rate(result["pilot"], regime) for regime in REGIMES}
    runs = [Run(regime, epochs, rates[regime]) for regime in REGIMES]
    runs += [Run(regime, epochs, rates["heads"], True) for regime in REGIMES[1:]]
    runs += [Run("heads", QUICK.classifier_training.epochs, rates["heads"])]
    for run in runs[len(rows) :]:
        model, row = train(segmenter, run, slices["train"], slices["val"], seed)
        rows.append(row | common.judge(model, slices["test"], seed=seed))
        rows[-1]["detection"] = detection(segmenter, lesions["test"], model.detector.state_dict())
        rows[-1]["minus_heads"] = difference(rows, slices["test"], seed)
        yield out, result
        print(f"{run}: {rows[-1]['accuracy']:.3f}", flush=True)


if __name__ == "__main__":
    common.command(measure, OUT, (TWIN, "regimes", markdown))
