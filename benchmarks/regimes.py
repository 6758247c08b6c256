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
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from marks import commented, fill
from quick_preset import PRESET, ROOT, environment
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from covidmask.config import PRESETS, TrainingConfig
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.files import atomic_path
from covidmask.metrics.classification import patient_bootstrap, report, wilson
from covidmask.models.classifier import REGIMES, CovidCTMaskNet, covid_ct_mask_net, set_regime
from covidmask.models.parameters import count_trainable
from covidmask.models.weights import ShippedWeights
from covidmask.training.classification import (
    classification_loss,
    evaluate_classifier,
    train_classifier,
)
from covidmask.training.loop import epoch_batches, learning_rate
from covidmask.training.segmentation import evaluate_segmenter

RATES = (1e-3, 3e-4, 1e-4)  # what the pilot tries; the preset's own is the first
PILOT_SHARE, PILOT_EPOCHS = 4, 2  # every fourth slice
DETECTOR_SHARE = 0.1  # with two rates: the detector's, as a share of that of S
DETECTOR_DECAY = PRESETS["paper"].classifier_training.weight_decay
TWIN = ROOT / "book" / "py" / "06_three_regimes.py"
MARKS = ("# <!-- regimes -->", "# <!-- /regimes -->")
NAMES = {"heads": "heads", "heads_bn": "heads + BN", "full": "full"}


def every(slices: SliceImages, step: int) -> SliceImages:
    """Every `step`-th slice."""
    part = copy.copy(slices)
    part.names, part.labels, part.patients = (
        values[::step] for values in (slices.names, slices.labels, slices.patients)
    )
    return part


def train(
    segmenter: GeneralizedRCNN,
    regime: str,
    training: TrainingConfig,
    slices: SliceImages,
    validation: SliceImages,
    seed: int,
    two_rates: bool = False,
) -> tuple[CovidCTMaskNet, dict]:
    """Train one regime from the shipped segmenter. Returns the model and what happened."""
    torch.manual_seed(seed)
    model = covid_ct_mask_net(segmenter, PRESET.classifier)  # the same S for every regime
    start = time.perf_counter()
    if two_rates:
        history = train_two_rates(model, regime, training, slices, validation, seed)
    else:
        history = train_classifier(
            model, slices, regime, training, validation=validation, seed=seed, progress=False
        )
    seconds = time.perf_counter() - start
    steps = len(history) // training.epochs
    epochs = [history[i : i + steps] for i in range(0, len(history), steps)]
    accuracy = [epoch[-1]["accuracy"] for epoch in epochs]
    set_regime(model, regime)  # the count below
    return model, {
        "regime": regime,
        "lr": training.lr,
        "detector_lr": DETECTOR_SHARE * training.lr if two_rates else None,
        "epochs": training.epochs,
        "parameters": count_trainable(model),
        "detector_runs": len(slices)
        if regime == "heads"
        else steps * training.batch_size * training.epochs,
        "seconds": seconds,
        "bce_of_epoch": [float(np.mean([step["bce"] for step in epoch])) for epoch in epochs],
        "validation_accuracy_of_epoch": accuracy,
        "best_epoch": int(np.argmax(accuracy)) + 1,
    }


def train_two_rates(
    model: CovidCTMaskNet,
    regime: str,
    training: TrainingConfig,
    slices: SliceImages,
    validation: SliceImages,
    seed: int,
) -> list[dict]:
    """`train_classifier`, but with a rate and a weight decay of its own for the detector."""
    trained = set_regime(model, regime)
    own = {id(parameter) for parameter in model.s.parameters()}
    groups = [
        {"params": [p for p in trained if id(p) in own], "share": 1.0},
        {
            "params": [p for p in trained if id(p) not in own],
            "share": DETECTOR_SHARE,
            "weight_decay": DETECTOR_DECAY,
        },
    ]
    adam = torch.optim.Adam(groups, lr=training.lr, weight_decay=training.weight_decay)
    size = training.batch_size
    total = training.epochs * (len(slices) // size)
    history, best, weights = [], -1.0, None
    model.train()
    for epoch in range(training.epochs):
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
        model.train()
        history[-1]["accuracy"] = accuracy
        if accuracy > best:
            best, weights = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    model.eval()
    return history


def pilot(segmenter: GeneralizedRCNN, slices: dict[str, SliceImages], seed: int) -> list[dict]:
    """Try each rate in each regime, on few slices; the test slices are not read."""
    part = every(slices["train"], PILOT_SHARE)
    rows = []
    for regime in REGIMES:
        for rate in RATES:
            training = replace(PRESET.classifier_training, epochs=PILOT_EPOCHS, lr=rate)
            row = train(segmenter, regime, training, part, slices["val"], seed)[1]
            row["validation_accuracy"] = max(row["validation_accuracy_of_epoch"])
            rows.append(row)
            print(f"pilot {regime} {rate:g}: {row['validation_accuracy']:.3f}", flush=True)
    return rows


def best_rate(rows: list[dict], regime: str) -> float:
    """The rate with the best validation accuracy; of equals, the larger."""
    return max((row["validation_accuracy"], row["lr"]) for row in rows if row["regime"] == regime)[
        1
    ]


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
        "sensitivity_wilson": [wilson(int(counts[k, k]), int(counts[k].sum())) for k in range(3)],
        "ppv": result["ppv"],
        "confusion": counts.tolist(),
        "predictions": "".join(map(str, result["predictions"].tolist())),  # one digit a slice
    }


def difference(rows: list[dict], test: SliceImages, seed: int) -> tuple[float, float, float] | None:
    """Accuracy of the last row minus that of the first, on the same slices, and its 95 % interval.

    Patients are drawn with replacement. None for the first row itself.
    """
    if len(rows) == 1:
        return None
    labels = np.array(test.labels)
    base, right = (
        (np.array(list(row["predictions"]), dtype=int) == labels).astype(float)
        for row in (rows[0], rows[-1])
    )
    names, owner = np.unique(np.asarray(test.patients), return_inverse=True)
    gain, size = np.bincount(owner, right - base), np.bincount(owner)
    draws = np.random.default_rng(seed).integers(len(names), size=(1000, len(names)))
    low, high = np.quantile(gain[draws].sum(1) / size[draws].sum(1), [0.025, 0.975])
    return float((right - base).mean()), float(low), float(high)


def earlier(path: Path, result: dict) -> dict:
    """What an earlier call with the same settings has done: its pilot, and its rows by run."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = ("preset", "training", "seed", "data_seed", "segmenter", "training_slices", "torch")
    new = json.loads(json.dumps(result))
    if any(old.get(key) != new[key] for key in same):
        return {"pilot": None, "regimes": {}}
    rows = {
        (row["regime"], row["epochs"], row["detector_lr"] is not None, row["lr"]): row
        for row in old.get("regimes", [])
    }
    return {"pilot": old.get("pilot"), "regimes": rows}


def save(path: Path, result: dict) -> None:
    with atomic_path(path) as temporary:
        text = json.dumps(result, indent=1) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def markdown(result: dict) -> str:
    """The table of the chapter."""
    lines = [
        "| regime (phantoms) | epochs | rate | COVID-19 | common pneumonia | control "
        "| accuracy (95 %) | minus heads (95 %) | box AP50 after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["regimes"]:
        low, high = row["accuracy_by_patient"]
        rate = f"{row['lr']:g}"
        if row["detector_lr"]:
            rate += f" / {row['detector_lr']:g}"
        cells = [NAMES[row["regime"]], str(row["epochs"]), rate]
        cells += [f"{percent(row['sensitivity'][k])} ({percent(row['ppv'][k])})" for k in (2, 1, 0)]
        cells += [f"{percent(row['accuracy'])} ({percent(low)} to {percent(high)})"]
        if row["minus_heads"] is None:
            cells += ["-"]
        else:
            gain, low, high = row["minus_heads"]
            cells += [f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"]
        cells += [percent(row["detection"]["box_ap50"])]
        lines.append(f"| {' | '.join(cells)} |")
    box_ap50 = percent(result["detection_before"]["box_ap50"])
    pilot_lines = []
    for regime in REGIMES:
        tried = ", ".join(
            f"{percent(row['validation_accuracy'])} at {row['lr']:g}"
            for row in result["pilot"]
            if row["regime"] == regime
        )
        pilot_lines.append(f"{NAMES[regime]} {tried}")
    lines += [
        "",
        f"Sensitivity (PPV), accuracy and AP in percent, on synthetic phantoms of the preset "
        f"quick: {result['test_slices']} test slices of {result['test_patients']} patients; "
        f"{result['training_slices']:,} training slices, batches of "
        f"{result['training']['batch_size']}, one seed. The intervals draw whole patients, and "
        "*minus heads* is the difference to the first row on the same slices. "
        f"The box AP50 of the shipped segmenter is {box_ap50} on the same "
        f"{result['lesion_test_slices']} lesion slices. The phantoms and the preset were tuned "
        "earlier while looking at results on these very test patients.",
        "",
        "One rate: a short pilot chose it for each regime, by the accuracy on the "
        f"{result['validation_slices']} validation slices after at most {PILOT_EPOCHS} epochs on "
        f"every {PILOT_SHARE}th training slice ({'; '.join(pilot_lines)}). "
        "Two rates: the first is that of S, the second that of the detector, whose weight decay "
        f"is then {DETECTOR_DECAY:g}, as in the paper, instead of "
        f"{result['training']['weight_decay']:g}. The validation slices also chose the epoch.",
        "",
        f"Command: `{result['command']}`; {result['hardware']}, {result['threads']} "
        f"thread{'s' if result['threads'] > 1 else ''}; torch {result['torch']}; "
        f"{result['date']}; commit {result['commit']}; all numbers in `results/regimes.json`."
        + (f" {result['note']}" if "note" in result else ""),
    ]
    return "\n".join(lines)


def fill_twin(path: Path, text: str) -> None:
    """Put `text` between the two marks of the chapter."""
    fill(path, MARKS, commented(text))


def main() -> None:
    """Read the command line, run, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--data", type=Path, default=Path("data/phantoms-quick"))
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "regimes.json")
    parser.add_argument("--table", action="store_true", help="fill the chapter, run nothing")
    arguments = parser.parse_args()
    if arguments.table:
        fill_twin(TWIN, markdown(json.loads(arguments.out.read_text())))
        return
    result = {
        "about": "three regimes, quick preset on synthetic phantoms; no figure of real CT",
        **environment(),  # before the runs, so that the commit is that of the code which runs
        "command": " ".join(["python", "benchmarks/regimes.py", *sys.argv[1:]]),
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
    done = earlier(arguments.out, result)
    result["pilot"] = done["pilot"] or pilot(segmenter, slices, arguments.seed)
    result["detection_before"] = detection(segmenter, lesions)
    result["regimes"] = []
    full_length = PRESET.classifier_training.epochs
    runs = [(regime, arguments.epochs, False) for regime in REGIMES]
    runs += [(regime, arguments.epochs, True) for regime in REGIMES[1:]]
    runs += [("heads", full_length, False)]
    for regime, epochs, two_rates in runs:
        rate = best_rate(result["pilot"], "heads" if two_rates else regime)
        row = done["regimes"].get((regime, epochs, two_rates, rate))
        if row is None:
            training = replace(PRESET.classifier_training, epochs=epochs, lr=rate)
            model, row = train(
                segmenter,
                regime,
                training,
                slices["train"],
                slices["val"],
                arguments.seed,
                two_rates,
            )
            row.update(judge(model, slices["test"], arguments.seed))
            row["detection"] = detection(with_masks(model, segmenter), lesions)
        result["regimes"].append(row)
        if "minus_heads" not in row:
            row["minus_heads"] = difference(result["regimes"], slices["test"], arguments.seed)
        save(arguments.out, result)
        print(
            f"{regime}, {epochs} epochs: {row['accuracy']:.3f}, {row['seconds']:.0f} s", flush=True
        )
    print(markdown(result))
    if arguments.out == ROOT / "results" / "regimes.json":
        fill_twin(TWIN, markdown(result))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
