"""The three training regimes on the quick preset: heads, heads_bn and full, side by side.

    python benchmarks/regimes.py [--seed 0] [--epochs 8] [--out results/regimes.json]
    python benchmarks/regimes.py --page           fills the chapter from the results file

All runs start from the shipped segmenter and from the same random S, see the same slices in the
same order, and keep the epoch with the best accuracy on the validation slices. Each run looks at
the test slices once, after training. Part 2 was added when the results of part 1 were known.

1. One learning rate for the whole network, as in the paper. No rate fits all regimes, so each
   takes the one that does best in a short pilot: every fourth training slice, 2 epochs, judged on
   the validation slices.
2. Two rates: S as before; the detector's parameters a tenth of the rate of S, and the weight decay
   of the paper instead of the preset's, which is made for S.
3. "heads" with the preset's full number of epochs.

Then the mask branch of the segmenter is put back on each trained detector, and the AP on lesion
slices says what is left of it. Each run is written when it is done, and a second call goes on
behind the last one. All data are synthetic.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
import tyro
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import PRESETS, TrainingConfig
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.models.classifier import (
    REGIMES,
    CovidCTMaskNet,
    count_trainable,
    covid_ct_mask_net,
    set_regime,
)
from covidmask.models.weights import ShippedWeights
from covidmask.training import classification_loss, evaluate_classifier, train_classifier
from covidmask.training.loop import epoch_batches, learning_rate
from covidmask.training.segmentation import evaluate_segmenter

PRESET = PRESETS["quick"]
OUT = common.RESULTS / "regimes.json"
TWIN = common.ROOT / "book" / "py" / "06_three_regimes.py"
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
PILOT_SHARE, PILOT_EPOCHS = 4, 2  # every fourth slice
DETECTOR_SHARE = 0.1  # with two rates: the detector's, as a share of that of S
DETECTOR_DECAY = PRESETS["paper"].classifier_training.weight_decay


class Run(NamedTuple):
    """One training, as the rows of the results name it."""

    regime: str
    epochs: int
    lr: float
    two_rates: bool = False


def train(
    segmenter: GeneralizedRCNN, run: Run, slices: SliceImages, validation: SliceImages, seed: int
) -> tuple[CovidCTMaskNet, dict]:
    """Train one regime from the shipped segmenter. Returns the model and what happened."""
    regime, epochs, lr, two_rates = run
    training = replace(PRESET.classifier_training, epochs=epochs, lr=lr)
    torch.manual_seed(seed)
    model = covid_ct_mask_net(segmenter, PRESET.classifier)  # the same S for every regime
    method = train_two_rates if two_rates else partial(train_classifier, progress=False)
    start = time.perf_counter()
    history = method(model, slices, regime, training, validation=validation, seed=seed)
    seconds = time.perf_counter() - start
    steps = len(history) // epochs
    parts = [history[i : i + steps] for i in range(0, len(history), steps)]  # one for each epoch
    accuracy = [part[-1]["accuracy"] for part in parts]
    set_regime(model, regime)  # the count below
    return model, {
        "regime": regime,
        "lr": lr,
        "detector_lr": DETECTOR_SHARE * lr if two_rates else None,
        "epochs": epochs,
        "parameters": count_trainable(model),
        "detector_runs": len(slices) if regime == "heads" else len(history) * training.batch_size,
        "seconds": seconds,
        "bce_of_epoch": [float(np.mean([step["bce"] for step in part])) for part in parts],
        "validation_accuracy_of_epoch": accuracy,
        "best_epoch": int(np.argmax(accuracy)) + 1,
    }


def train_two_rates(
    model: CovidCTMaskNet, slices, regime: str, training: TrainingConfig, *, validation, seed: int
) -> list[dict]:
    """`train_classifier`, but with a rate and a weight decay of its own for the detector."""
    set_regime(model, regime)
    groups = [{"params": model.s.parameters(), "share": 1.0}]
    trained = [p for p in model.detector.parameters() if p.requires_grad]
    groups += [{"params": trained, "share": DETECTOR_SHARE, "weight_decay": DETECTOR_DECAY}]
    adam = torch.optim.Adam(groups, lr=training.lr, weight_decay=training.weight_decay)
    size = training.batch_size
    total = training.epochs * (len(slices) // size)
    history, best = [], -1.0
    for epoch in range(training.epochs):
        model.train()
        for batch in epoch_batches(len(slices), size, epoch, seed):
            for group in adam.param_groups:
                group["lr"] = group["share"] * learning_rate(training, len(history), total)
            images, labels = zip(*(slices[i] for i in batch), strict=True)
            loss = classification_loss(model(list(images)), torch.tensor(labels))
            adam.zero_grad()
            loss.backward()
            adam.step()
            history.append({"bce": loss.item()})
        accuracy = evaluate_classifier(model, validation, progress=False)["accuracy"]
        history[-1]["accuracy"] = accuracy
        if accuracy > best:
            best, weights = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    model.eval()
    return history


def pilot(segmenter: GeneralizedRCNN, slices: dict[str, SliceImages], seed: int) -> list[dict]:
    """Try each rate in each regime, on few slices; the test slices are not read."""
    part = copy.copy(slices["train"])
    for name in ("names", "labels", "patients"):
        setattr(part, name, getattr(part, name)[::PILOT_SHARE])
    rows = []
    for regime, rate in product(REGIMES, RATES):
        row = train(segmenter, Run(regime, PILOT_EPOCHS, rate), part, slices["val"], seed)[1]
        rows.append(row | {"validation_accuracy": max(row["validation_accuracy_of_epoch"])})
        print(f"pilot {regime} {rate:g}: {rows[-1]['validation_accuracy']:.3f}", flush=True)
    return rows


def best_rate(rows: list[dict], regime: str) -> float:
    """The rate with the best validation accuracy; of equals, the larger."""
    return max((r["validation_accuracy"], r["lr"]) for r in rows if r["regime"] == regime)[1]


def detection(
    segmenter: GeneralizedRCNN, lesions: LesionSlices, model: CovidCTMaskNet | None = None
) -> dict:
    """COCO's AP on slices with masks; the detector of `model` gets the segmenter's mask branch."""
    if model is not None:
        whole = copy.deepcopy(segmenter)
        whole.load_state_dict({**segmenter.state_dict(), **model.detector.state_dict()})
        segmenter = whole
    values = evaluate_segmenter(segmenter, lesions, progress=False)
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
    tried: dict[str, list] = {}
    for row in result["pilot"]:
        cells = tried.setdefault(row["regime"], [NAMES[row["regime"]]])
        cells.append(f"{row['validation_accuracy']:.3f}")
    pilots = common.table(
        ["pilot: validation accuracy", *(f"at {r:g}" for r in RATES)], tried.values()
    )
    made = common.origin(result, "`results/regimes.json`")
    return "\n".join([*common.formatted(COLUMNS, rows), "", *pilots, "", made])


def main(
    seed: int = 0,
    epochs: int = 8,
    data: Path = Path("data/phantoms-quick"),
    data_seed: int = 0,
    out: Path = OUT,
    page: bool = False,
) -> None:
    """Do what an earlier call with the same settings has not done; write after each run."""
    if page:
        return common.fill(TWIN, "regimes", markdown(common.read(out)))
    segmenter = ShippedWeights.SEGMENTER_QUICK.load()
    file, digest = ShippedWeights.SEGMENTER_QUICK.value
    result = {
        "about": "three regimes, quick preset on synthetic phantoms; no figure of real CT",
        **common.environment(),  # first, so that the commit is that of the code which runs
        "preset": asdict(PRESET),
        "training": asdict(replace(PRESET.classifier_training, epochs=epochs)),
        "seed": seed,
        "data_seed": data_seed,
        "segmenter": {"file": file, "sha256": digest},
    }
    root = write_phantoms(data, PRESET.phantoms, data_seed)
    slices = {split: SliceImages(root / "slices", split) for split in ("train", "val", "test")}
    lesions = LesionSlices(root / "lesions", "test", min_area=PRESET.min_area)
    result |= {
        "training_slices": len(slices["train"]),
        "validation_slices": len(slices["val"]),
        "test_slices": len(slices["test"]),
        "test_patients": len(set(slices["test"].patients)),
        "lesion_test_slices": len(lesions),
    }
    old, new = common.read(out), json.loads(json.dumps(result))
    same = ("preset", "training", "seed", "data_seed", "segmenter", "training_slices", "torch")
    if any(old.get(key) != new[key] for key in same):
        old = {}
    done = {
        Run(row["regime"], row["epochs"], row["lr"], row["detector_lr"] is not None): row
        for row in old.get("regimes", [])
    }
    result["pilot"] = old.get("pilot") or pilot(segmenter, slices, seed)
    result["detection_before"] = detection(segmenter, lesions)
    result["regimes"] = []
    rates = {regime: best_rate(result["pilot"], regime) for regime in REGIMES}
    runs = [Run(regime, epochs, rates[regime]) for regime in REGIMES]
    runs += [Run(regime, epochs, rates["heads"], True) for regime in REGIMES[1:]]
    runs += [Run("heads", PRESET.classifier_training.epochs, rates["heads"])]
    for run in runs:
        row = done.get(run)
        if row is None:
            model, row = train(segmenter, run, slices["train"], slices["val"], seed)
            row |= common.judge(model, slices["test"], seed=seed)
            row["detection"] = detection(segmenter, lesions, model)
        result["regimes"].append(row)
        row.setdefault("minus_heads", difference(result["regimes"], slices["test"], seed))
        common.save(out, result)
        print(f"{run}: {row['accuracy']:.3f}, {row['seconds']:.0f} s", flush=True)
    if out == OUT:
        common.fill(TWIN, "regimes", markdown(common.read(out)))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
