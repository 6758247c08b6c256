"""The three training regimes on the quick preset: heads, heads_bn and full, side by side.

    python benchmarks/regimes.py [--seed 0] [--epochs 8] [--out results/regimes.json]
    python benchmarks/regimes.py --table          fills the chapter from the results file

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

import argparse
import copy
import json
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import RESULTS, ROOT, environment, fill, gain, origin, read, save, table
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import PRESETS, TrainingConfig
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.metrics.classification import patient_bootstrap, report, wilson
from covidmask.models.classifier import (
    REGIMES,
    CovidCTMaskNet,
    count_trainable,
    covid_ct_mask_net,
    set_regime,
)
from covidmask.models.weights import ShippedWeights
from covidmask.training.classification import (
    classification_loss,
    evaluate_classifier,
    train_classifier,
)
from covidmask.training.loop import epoch_batches, learning_rate
from covidmask.training.segmentation import evaluate_segmenter

PRESET = PRESETS["quick"]
OUT = RESULTS / "regimes.json"
TWIN = ROOT / "book" / "py" / "06_three_regimes.py"
NAMES = {"heads": "heads", "heads_bn": "heads + BN", "full": "full"}
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
    model: CovidCTMaskNet,
    slices: SliceImages,
    regime: str,
    training: TrainingConfig,
    validation: SliceImages,
    seed: int,
) -> list[dict]:
    """`train_classifier`, but with a rate and a weight decay of its own for the detector."""
    set_regime(model, regime)
    parts = [
        [p for p in part.parameters() if p.requires_grad] for part in (model.s, model.detector)
    ]
    adam = torch.optim.Adam(
        [
            {"params": parts[0], "share": 1.0},
            {"params": parts[1], "share": DETECTOR_SHARE, "weight_decay": DETECTOR_DECAY},
        ],
        lr=training.lr,
        weight_decay=training.weight_decay,
    )
    size = training.batch_size
    total = training.epochs * (len(slices) // size)
    history, best, weights = [], -1.0, None
    for epoch in range(training.epochs):
        model.train()
        for batch in epoch_batches(len(slices), size, epoch, seed):
            for group in adam.param_groups:
                group["lr"] = group["share"] * learning_rate(training, len(history), total)
            images, labels = zip(*(slices[i] for i in batch), strict=True)
            loss = classification_loss(model(list(images)), torch.tensor(labels))
            adam.zero_grad(set_to_none=True)
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
    for regime in REGIMES:
        for rate in RATES:
            row = train(segmenter, Run(regime, PILOT_EPOCHS, rate), part, slices["val"], seed)[1]
            row["validation_accuracy"] = max(row["validation_accuracy_of_epoch"])
            rows.append(row)
            print(f"pilot {regime} {rate:g}: {row['validation_accuracy']:.3f}", flush=True)
    return rows


def best_rate(rows: list[dict], regime: str) -> float:
    """The rate with the best validation accuracy; of equals, the larger."""
    return max((r["validation_accuracy"], r["lr"]) for r in rows if r["regime"] == regime)[1]


def detection(segmenter: GeneralizedRCNN, lesions: LesionSlices) -> dict:
    """COCO's AP on slices with masks."""
    values = evaluate_segmenter(segmenter, lesions, progress=False)
    return {key: values[key] for key in ("box_ap", "box_ap50", "mask_ap", "mask_ap50")}


def with_masks(model: CovidCTMaskNet, segmenter: GeneralizedRCNN) -> GeneralizedRCNN:
    """The classifier's detector with the mask branch that its copy had lost."""
    detector = copy.deepcopy(model.detector)
    for name in ("mask_roi_pool", "mask_head", "mask_predictor"):
        setattr(detector.roi_heads, name, getattr(segmenter.roi_heads, name))
    return detector


def judge(model: CovidCTMaskNet, test: SliceImages, seed: int) -> dict:
    """Test slices, once."""
    result = evaluate_classifier(model, test, progress=False)
    counts = result["confusion"]
    by_patient = patient_bootstrap(
        result["labels"],
        result["predictions"],
        test.patients,
        lambda c: report(c)["accuracy"],
        seed=seed,
    )
    return {
        "accuracy": result["accuracy"],
        "accuracy_wilson": wilson(int(counts.trace()), len(test)),
        "accuracy_by_patient": by_patient,
        "sensitivity": result["sensitivity"],
        "sensitivity_wilson": [wilson(int(row[k]), int(row.sum())) for k, row in enumerate(counts)],
        "ppv": result["ppv"],
        "confusion": counts.tolist(),
        "predictions": "".join(map(str, result["predictions"].tolist())),  # one digit a slice
    }


def difference(rows: list[dict], test: SliceImages, seed: int) -> tuple[float, float, float] | None:
    """Accuracy of the last row minus that of the first, see `gain`; None for the first itself."""
    if len(rows) == 1:
        return None
    first, last = (
        np.array(list(row["predictions"]), dtype=int) == test.labels for row in (rows[0], rows[-1])
    )
    return gain(last.astype(float), first.astype(float), test.patients, seed=seed)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def markdown(result: dict) -> str:
    """The table of the chapter."""
    head = ["regime (phantoms)", "epochs", "rate", "COVID-19", "common pneumonia", "control"]
    head += ["accuracy (95 %)", "minus heads (95 %)", "box AP50 after"]
    body = []
    for row in result["regimes"]:
        low, high = row["accuracy_by_patient"]
        rate = f"{row['lr']:g}" + (f" / {row['detector_lr']:g}" if row["detector_lr"] else "")
        shares = list(zip(row["sensitivity"], row["ppv"], strict=True))[::-1]  # COVID-19 first
        more = "-"
        if row["minus_heads"] is not None:
            more = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in row["minus_heads"]))
        body.append(
            [
                *(NAMES[row["regime"]], str(row["epochs"]), rate),
                *(f"{percent(found)} ({percent(right)})" for found, right in shares),
                f"{percent(row['accuracy'])} ({percent(low)} to {percent(high)})",
                *(more, percent(row["detection"]["box_ap50"])),
            ]
        )
    tried = {regime: [] for regime in REGIMES}
    for row in result["pilot"]:
        tried[row["regime"]].append(f"{percent(row['validation_accuracy'])} at {row['lr']:g}")
    pilots = "; ".join(f"{NAMES[regime]} {', '.join(texts)}" for regime, texts in tried.items())
    machine = f"{result['hardware']}, {result['threads']} thread{'s' * (result['threads'] > 1)}"
    lines = [
        *table(head, body),
        "",
        f"Sensitivity (PPV), accuracy and AP in percent, on synthetic phantoms of the preset "
        f"quick: {result['test_slices']} test slices of {result['test_patients']} patients; "
        f"{result['training_slices']:,} training slices, batches of "
        f"{result['training']['batch_size']}, one seed. The intervals draw whole patients, and "
        "*minus heads* is the difference to the first row on the same slices. "
        f"The box AP50 of the shipped segmenter is "
        f"{percent(result['detection_before']['box_ap50'])} on the same "
        f"{result['lesion_test_slices']} lesion slices. The phantoms and the preset were tuned "
        "earlier while looking at results on these very test patients.",
        "",
        "One rate: a short pilot chose it for each regime, by the accuracy on the "
        f"{result['validation_slices']} validation slices after at most {PILOT_EPOCHS} epochs on "
        f"every {PILOT_SHARE}th training slice ({pilots}). "
        "Two rates: the first is that of S, the second that of the detector, whose weight decay "
        f"is then {DETECTOR_DECAY:g}, as in the paper, instead of "
        f"{result['training']['weight_decay']:g}. The validation slices also chose the epoch.",
        "",
        origin(result, "`results/regimes.json`", machine)
        + (f" {result['note']}" if "note" in result else ""),
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the command line, run, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--data", type=Path, default=Path("data/phantoms-quick"))
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="fill the chapter, run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    if arguments.table or arguments.out == OUT:
        fill(TWIN, "regimes", markdown(read(arguments.out)))


def measure(arguments: argparse.Namespace) -> None:
    """Do what an earlier call with the same settings has not done; write after each run."""
    result = {
        "about": "three regimes, quick preset on synthetic phantoms; no figure of real CT",
        **environment(),  # before the runs, so that the commit is that of the code which runs
        "preset": asdict(PRESET),
        "training": asdict(replace(PRESET.classifier_training, epochs=arguments.epochs)),
        "seed": arguments.seed,
        "data_seed": arguments.data_seed,
        "segmenter": dict(
            zip(("file", "sha256"), ShippedWeights.SEGMENTER_QUICK.value, strict=True)
        ),
    }
    root = write_phantoms(arguments.data, PRESET.phantoms, arguments.data_seed)
    slices = {split: SliceImages(root / "slices", split) for split in ("train", "val", "test")}
    lesions = LesionSlices(root / "lesions", "test", min_area=PRESET.min_area)
    segmenter = ShippedWeights.SEGMENTER_QUICK.load()
    result.update(
        training_slices=len(slices["train"]),
        validation_slices=len(slices["val"]),
        test_slices=len(slices["test"]),
        test_patients=len(set(slices["test"].patients)),
        lesion_test_slices=len(lesions),
    )
    old, new = read(arguments.out), json.loads(json.dumps(result))
    same = ("preset", "training", "seed", "data_seed", "segmenter", "training_slices", "torch")
    if any(old.get(key) != new[key] for key in same):
        old = {}
    done = {
        Run(row["regime"], row["epochs"], row["lr"], row["detector_lr"] is not None): row
        for row in old.get("regimes", [])
    }
    result["pilot"] = old.get("pilot") or pilot(segmenter, slices, arguments.seed)
    result["detection_before"] = detection(segmenter, lesions)
    result["regimes"] = []
    rates = {regime: best_rate(result["pilot"], regime) for regime in REGIMES}
    runs = [Run(regime, arguments.epochs, rates[regime]) for regime in REGIMES]
    runs += [Run(regime, arguments.epochs, rates["heads"], True) for regime in REGIMES[1:]]
    runs += [Run("heads", PRESET.classifier_training.epochs, rates["heads"])]
    for run in runs:
        row = done.get(run)
        if row is None:
            parts = slices["train"], slices["val"]
            model, row = train(segmenter, run, *parts, arguments.seed)
            row.update(judge(model, slices["test"], arguments.seed))
            row["detection"] = detection(with_masks(model, segmenter), lesions)
        result["regimes"].append(row)
        if "minus_heads" not in row:
            row["minus_heads"] = difference(result["regimes"], slices["test"], arguments.seed)
        save(arguments.out, result)
        spent = f"{row['accuracy']:.3f}, {row['seconds']:.0f} s"
        print(f"{run.regime}, {run.epochs} epochs: {spent}", flush=True)
    print(f"{markdown(result)}\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
