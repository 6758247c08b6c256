"""The command line. `covidmask --help` lists the commands, and each explains itself.

A command is a dataclass: its fields are the options, and `run` does the work. torch is imported
inside `run`, so that `--help` answers at once. Under `torchrun` the first process alone prints and
writes.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from covidmask import datasets, models
from covidmask.config import IMAGE_CLASSES, LESION_CLASSES, PRESETS, TrainingConfig
from covidmask.errors import CheckpointError, CovidmaskError, DataError, OutputError
from covidmask.fetch import Fetch
from covidmask.files import (
    atomic_path,
    check_writable,
    data_root,
    existing_folder,
    phantoms_folder,
    ranked_folder,
    same_file,
    weights_file,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import nn

    from covidmask.datasets.classes import SliceImages
    from covidmask.datasets.lesions import LesionDataset

NOTICE = (
    "For research and teaching only. This is no medical device; nothing here may guide the care "
    "of a patient."
)


def _default(text: str, metavar: str | None = None) -> Any:
    """An option that is None by default, with words that say what None means."""
    return arg(help_behavior_hint=f"(default: {text})", metavar=metavar)


PresetName = Literal["quick", "colab", "paper", "semiseg"]
Device = Literal["auto", "cpu", "cuda", "mps"]
DataFolder = Annotated[
    Path | None, _default("the preset's phantoms in $COVIDMASK_DATA or ./data", "DIR")
]
JsonFile = Annotated[Path | None, _default("none", "FILE.json")]
RegimeName = Literal["heads", "heads_bn", "full"]
Whose = Annotated[
    Path | None, _default("yours in $COVIDMASK_DATA/weights, else the shipped quick ones", "FILE")
]
WhichRegime = Annotated[
    RegimeName | None, _default("the only one there is", "{heads,heads_bn,full}")
]

RANGES = {  # option of any command -> its lowest and highest value
    "seed": (0, 2**31 - 1),
    "epochs": (1, 10_000),
    "batch_size": (1, 2**20),
    "lr": (1e-12, 1000),
    "workers": (0, 256),
    "memory": (0, 2**24),
    "score": (0, 1),
    "threshold": (0, 1),
    "min_area": (0, 2**26),
    "every": (1, 10**6),
    "series": (1, 10**6),
    "window": (-1e6, 1e6),
}


# ---- data -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Phantoms:
    """Make synthetic CT slices, laid out exactly like the real data.

    DIR/lesions holds slices with lesion masks, DIR/slices holds slices of three classes, and both
    have lists for training, validation and test. No patient is in two of them. Running it again
    with the same options finds the folder and does nothing.

    For example: `covidmask phantoms --preset quick`
    """

    preset: PresetName = "quick"
    """How many patients, and how large their slices are."""
    out: DataFolder = None
    """Folder to make."""
    seed: int = 0
    """Another seed gives other patients."""
    workers: Annotated[int | None, _default("one for each core", "INT")] = None
    """Processes that draw slices. The files do not depend on it."""

    def run(self) -> None:
        from covidmask.datasets.phantom_sets import cores, write_phantoms

        out = self.out or phantoms_folder(self.preset)
        old = (out / "phantoms.json").exists()
        config = PRESETS[self.preset].phantoms
        workers = cores() if self.workers is None else self.workers
        write_phantoms(out, config, self.seed, workers)
        slices = config.slices_per_patient
        counts = (
            f"{slices * sum(config.lesion_patients):,} slices with masks, "
            f"{3 * slices * sum(config.class_patients):,} of three classes, "
            f"{config.size} x {config.size} pixels"
        )
        _say(f"Phantoms {'were already there' if old else 'written'}: {counts}, in {out}")


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Count slices, patients and lesions (the numbers of the paper's Figure 1).

    Reads phantoms, CNCB lesion masks, COVIDx-CT slices and COVID-SemiSeg. For example:
    `covidmask stats --data data/phantoms-quick`
    """

    preset: PresetName = "quick"
    """Whose phantoms to read when --data is not given."""
    data: DataFolder = None
    """Folder that holds lesions/ and slices/, or one of the two, or COVID-SemiSeg."""
    min_area: int = 1
    """Lesions of fewer pixels are not counted. The released code drops those up to 100."""
    json: JsonFile = None
    """Write the numbers to this file, too."""

    def run(self) -> None:
        root = existing_folder(self.data or phantoms_folder(self.preset))
        _prepare_json(self.json, root / "phantoms.json")
        found: dict[str, dict] = {
            "lesions": {
                split: _lesion_numbers(
                    datasets.open_lesions(root, split, min_area=self.min_area), split
                )
                for split in datasets.lesion_splits(root)
            },
            "slices": {
                split: _class_numbers(datasets.open_slices(root, split), split)
                for split in datasets.slice_splits(root)
            },
        }
        if not found["lesions"] and not found["slices"]:
            raise DataError(
                f"{root}: holds no data that can be read; name a folder with lesions/ or slices/ "
                "in it, or COVID-SemiSeg"
            )
        _write_json(self.json, found)
        total = sum(split["slices"] for part in found.values() for split in part.values())
        _say(f"Statistics of {total:,} slices in {root}{_also(self.json)}")


# ---- training -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _TrainOptions:
    preset: PresetName = "quick"
    """Settings to start from: quick (two CPU cores), colab (one small GPU), paper (the paper's),
    semiseg (COVID-SemiSeg, on two CPU cores)."""
    data: DataFolder = None
    """Folder of phantoms or real data in the same layout."""
    split: str = "train"
    """Which list to train on: train, val, test, or the path to a list."""
    out: Annotated[Path | None, _default("$COVIDMASK_DATA/weights/...", "FILE.safetensors")] = None
    """Weights file to write."""
    checkpoint: Annotated[Path | None, _default("the weights file with suffix .ckpt", "FILE")] = (
        None
    )
    """Written after each epoch: after a crash the same command goes on. Removed at the end."""
    seed: int = 0
    """Decides initial weights, order of slices and all draws."""
    epochs: Annotated[int | None, _default("the preset's", "INT")] = None
    """Passes over the training slices."""
    batch_size: Annotated[int | None, _default("the preset's", "INT")] = None
    """Slices per step, over all processes together."""
    lr: Annotated[float | None, _default("the preset's", "FLOAT")] = None
    """Learning rate of Adam."""
    workers: int = 0
    """Processes that read slices; 0 reads in the training process. Use 2 or more with a GPU."""
    memory: int = 2048
    """MiB for slices that are decoded once and kept; the rest is decoded in every epoch."""
    device: Device = "auto"
    """auto is CUDA where there is one, else the CPU."""
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed"] | None,
        _default("the preset's", "{32-true,bf16-mixed,16-mixed}"),
    ] = None
    """Numbers to compute with; bf16-mixed is faster on recent GPUs."""
    log_dir: Annotated[Path | None, _default("none", "DIR")] = None
    """Folder for TensorBoard. Needs `pip install tensorboard`."""

    def _training(self, preset: TrainingConfig) -> TrainingConfig:
        """The preset's numbers with those of the command line put in."""
        names = ("epochs", "batch_size", "lr", "precision")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(preset, **given)

    def _outputs(self, default: Path, *inputs: str | Path) -> tuple[Path, Path]:
        """Weights and checkpoint file; both can be written, which is tried before training."""
        out = self.out or default
        _check_output(out, self.split, *inputs)
        checkpoint = self.checkpoint or out.with_suffix(".ckpt")
        _check_no_input("--checkpoint", checkpoint, out, self.split, *inputs)
        if checkpoint.exists() and not checkpoint.is_file():
            raise OutputError(f"{checkpoint}: is a folder or device; name a file with --checkpoint")
        if _rank() == 0:
            check_writable(out.parent)
            check_writable(checkpoint.parent)
        if checkpoint.exists():
            _say(f"Going on from {checkpoint}")
        return out, checkpoint

    def _fabric(self, training: TrainingConfig, find_unused_parameters: bool = False) -> Fabric:
        import importlib.util

        from covidmask.training.loop import make_fabric

        if self.log_dir is not None:
            if not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
                raise CovidmaskError(
                    "--log-dir: TensorBoard is not installed; run `pip install tensorboard`"
                )
            if _rank() == 0:
                check_writable(self.log_dir)
        return make_fabric(
            training.precision, _device(self.device), find_unused_parameters, self.log_dir
        )

    def _finish(
        self,
        model: nn.Module,
        history: list[dict],
        out: Path,
        checkpoint: Path,
        command: str,
        **card: Any,
    ) -> None:
        """Write the weights with their card, then remove the checkpoint."""
        import torch
        import torchvision

        import covidmask
        from covidmask.models.weights import save_model

        if _rank() == 0:
            last = [values for values in history if values["epoch"] == history[-1]["epoch"]]
            names = [name for name in last[0] if name not in ("step", "epoch", "lr")]
            card |= {
                "command": f"covidmask {command}",
                "preset": self.preset,
                "data": Path(os.path.realpath(self.data or phantoms_folder(self.preset))).name,
                "split": Path(self.split).name,
                "seed": self.seed,
                "steps": len(history),
                "last_epoch": {n: sum(values[n] for values in last) / len(last) for n in names},
                "covidmask": covidmask.__version__,
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            save_model(model, out, **card)
            checkpoint.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class TrainSegmenter(_TrainOptions):
    """Train Mask R-CNN to find lesions: the first half of the method.

    DIR holds lesions/, or is such a folder (image/ and mask/), or is COVID-SemiSeg. The preset
    semiseg draws phantoms, trains on them first and then on random copies of DIR's slices. For
    example: `covidmask train segmenter --preset quick`, or
    `covidmask train segmenter --preset semiseg --data data/covid-semiseg`
    """

    weights_backbone: Annotated[str | None, _default("random weights", "NAME")] = None
    """Start from torchvision's weights of this name, such as IMAGENET1K_V1 (downloaded)."""
    pretraining: bool = True
    """Train on phantoms first, where the preset says so."""

    def run(self) -> None:
        import torch

        from covidmask.datasets.augmentation import Augmented
        from covidmask.models.detector import lesion_mask_rcnn
        from covidmask.training.segmentation import pretrain_segmenter, train_segmenter

        preset = PRESETS[self.preset]
        training = self._training(preset.segmenter)
        data = self.data or phantoms_folder(self.preset)
        dataset = datasets.open_lesions(data, self.split, preset.detector.lesions, preset.min_area)
        if preset.augment:
            dataset = Augmented(dataset, preset.augment, self.seed)
        out, checkpoint = self._outputs(weights_file("segmenter", self.preset))
        fabric = self._fabric(training)
        torch.manual_seed(self.seed)
        try:
            model = lesion_mask_rcnn(preset.detector, self.weights_backbone)
        except (KeyError, ValueError, OSError) as error:  # unknown to torchvision, or no network
            raise CheckpointError(
                f"--weights-backbone {self.weights_backbone}: no such weights of "
                f"{preset.detector.backbone} could be had ({_one_line(error)}); check the name "
                "and the network"
            ) from error
        before = checkpoint.with_suffix(".phantoms.ckpt")
        pretraining = preset.pretraining if self.pretraining else None
        if pretraining:
            pretrain_segmenter(
                model,
                preset,
                phantoms_folder(self.preset),
                fabric=fabric,
                seed=self.seed,
                checkpoint=before,
                workers=self.workers,
            )
        history = train_segmenter(
            model,
            dataset,
            training,
            fabric=fabric,
            seed=self.seed,
            checkpoint=checkpoint,
            workers=self.workers,
            memory=self.memory,
        )
        self._finish(
            model,
            history,
            out,
            checkpoint,
            "train segmenter",
            training=asdict(training),
            pretraining=pretraining and asdict(pretraining),
            augment=preset.augment and asdict(preset.augment),
            min_area=preset.min_area,
            weights_backbone=self.weights_backbone,
        )
        if _rank() == 0:
            before.unlink(missing_ok=True)
        _say(f"Segmenter trained {_training_summary(history, dataset)}; weights in {out}")


@dataclass(frozen=True, kw_only=True)
class TrainClassifier(_TrainOptions):
    """Train COVID-CT-Mask-Net on a trained segmenter: the second half of the method.

    DIR holds slices/, or is such a folder, with lists train.txt and val.txt. For example:
    `covidmask train classifier --preset quick --regime heads`
    """

    segmenter: Whose = None
    """Weights that `covidmask train segmenter` wrote."""
    regime: RegimeName = "heads"
    """What trains: heads (S alone, fast), heads_bn (S and batch norm), full (everything)."""
    validation: bool = True
    """Keep the epoch that is best on val.txt, if there is one; else the last."""

    def run(self) -> None:
        import torch

        from covidmask.models.classifier import covid_ct_mask_net
        from covidmask.models.weights import load_segmenter
        from covidmask.training.classification import train_classifier

        preset = PRESETS[self.preset]
        training = self._training(preset.classifier_training)
        data = self.data or phantoms_folder(self.preset)
        dataset = datasets.open_slices(data, self.split, require_classes=True)
        held_out = None
        if self.validation and "val" in datasets.slice_splits(data):
            held_out = datasets.open_slices(data, "val")
        settings = preset.classifier
        if _classes(dataset) != _classes(settings):
            settings = replace(settings, classes=_classes(dataset))
        weights = _weights("segmenter", self.preset, self.segmenter)
        segmenter = load_segmenter(weights)
        out, checkpoint = self._outputs(
            weights_file("classifier", self.preset, self.regime), weights
        )
        fabric = self._fabric(training, find_unused_parameters=self.regime == "full")
        torch.manual_seed(self.seed)
        model = covid_ct_mask_net(segmenter, settings)
        history = train_classifier(
            model,
            dataset,
            self.regime,
            training,
            validation=held_out,
            fabric=fabric,
            seed=self.seed,
            checkpoint=checkpoint,
            cache=ranked_folder(),
            workers=self.workers,
            memory=self.memory,
        )
        judged = [values["accuracy"] for values in history if "accuracy" in values]
        best = max(judged, default=None) if held_out is not None else None
        self._finish(
            model,
            history,
            out,
            checkpoint,
            "train classifier",
            training=asdict(training),
            regime=self.regime,
            validation_accuracy=best,
        )
        kept = "" if best is None else f", best accuracy on val {best:.3f} (kept)"
        _say(
            f"Classifier ({self.regime}) trained {_training_summary(history, dataset)}{kept}; "
            f"weights in {out}"
        )


@dataclass(frozen=True)
class Train:
    """Train the segmenter, then the classifier on it."""

    model: (
        Annotated[TrainSegmenter, subcommand("segmenter")]
        | Annotated[TrainClassifier, subcommand("classifier")]
    )

    def run(self) -> None:
        self.model.run()


# ---- evaluation -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _EvaluateOptions:
    preset: PresetName = "quick"
    """Whose weights and phantoms to use when --weights or --data is not given."""
    weights: Whose = None
    """Weights that `covidmask train` wrote."""
    data: DataFolder = None
    """Folder of phantoms or real data in the same layout."""
    split: str = "test"
    """Which list to judge on: train, val, test, or the path to a list."""
    batch_size: int = 8
    """Slices at a time. It changes speed and memory, not the result."""
    device: Device = "auto"
    """auto is CUDA where there is one, else the CPU."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed is faster on recent GPUs and CPUs, and changes the probabilities a little."""
    json: JsonFile = None
    """Write the numbers to this file, too."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSegmenter(_EvaluateOptions):
    """Judge a segmenter: average precision (AP) of masks and boxes, and Dice.

    Prints COCO's AP, and the AP of the paper's released code under its own name: the two are
    different measures. For example: `covidmask evaluate segmenter --preset quick`
    """

    score: float = 0.75
    """The released code's AP and Dice take detections that score above it; COCO's AP takes all."""
    threshold: float = 0.5
    """Pixels whose probability in the fused detections is above it are lesion."""
    mirror: bool = False
    """Fuse the detections of each slice with those of its mirror image: twice the time."""
    min_area: Annotated[int | None, _default("as in training", "INT")] = None
    """Lesions of fewer pixels are left out of the truth."""

    def run(self) -> None:
        from covidmask.models.weights import load_segmenter, read_card
        from covidmask.training.loop import make_fabric
        from covidmask.training.segmentation import evaluate_segmenter

        data = existing_folder(self.data or phantoms_folder(self.preset))
        weights = _weights("segmenter", self.preset, self.weights)
        model = load_segmenter(weights)
        given = self.min_area
        min_area = read_card(weights).get("min_area", 1) if given is None else given
        dataset = datasets.open_lesions(data, self.split, model.config.lesions, min_area)
        _prepare_json(self.json, weights, self.split, data / "phantoms.json")
        fabric = make_fabric(self.precision, _device(self.device))
        result = evaluate_segmenter(
            model,
            dataset,
            fabric=fabric,
            batch_size=self.batch_size,
            score=self.score,
            threshold=self.threshold,
            mirror=self.mirror,
        )
        del result["table"]
        patients = _patients(dataset)
        for name in ("mask", "box"):
            ap, ap50, ap75 = (_number(result[f"{name}_{ap}"]) for ap in ("ap", "ap50", "ap75"))
            _say(f"COCO AP, {name:<8} AP {ap}   AP50 {ap50}   AP75 {ap75}")
        for lesion in LESION_CLASSES[model.config.lesions]:
            _say(
                f"  {lesion}: mask AP50 {_number(result[f'mask_ap50_{lesion}'])}, "
                f"mean Dice {_number(result[f'dice_{lesion}'])} (slices with {lesion} in the "
                "truth or the detections)"
            )
        _say(
            f"Released code's own AP of masks (per image, scores above {self.score:g}): "
            f"mean {_number(result['author_ap'])}   @.5 {_number(result['author_ap50'])}   "
            f"@.75 {_number(result['author_ap75'])}"
        )
        _say(
            f"Fused detections above {self.threshold:g}{', mirrored too' * self.mirror}. Means "
            "over all slices; where prediction and truth share no pixel a slice counts 0, as in "
            "the published tables of COVID-SemiSeg (error: of probabilities):"
        )
        for region, values in result["overlap"].items():
            dice, sensitivity, specificity, mae = (
                _number(values[name]) for name in ("dice", "sensitivity", "specificity", "mae")
            )
            _say(
                f"  {region:<9} Dice {dice}   sensitivity {sensitivity}   specificity "
                f"{specificity}   mean absolute error {mae}   Dice on the {values['present']} "
                f"slices that have it {_number(values['dice_present'])}"
            )
        chosen = {"split": self.split, "min_area": min_area, "score": self.score}
        chosen |= {"threshold": self.threshold, "mirror": self.mirror}
        result |= {"patients": patients, **chosen}
        _write_json(self.json, result)
        _say(
            f"Segmenter {weights} judged on {_slices(dataset)}: "
            f"mask AP50 {_number(result['mask_ap50'])}{_also(self.json)}"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateClassifier(_EvaluateOptions):
    """Judge a classifier: confusion matrix, sensitivity, PPV and accuracy with 95 % intervals.

    For example: `covidmask evaluate classifier --preset quick --split test`
    """

    regime: WhichRegime = None
    """Which of your classifiers of the preset."""

    def run(self) -> None:
        from covidmask.metrics.classification import patient_bootstrap, report, wilson
        from covidmask.models.weights import load_classifier
        from covidmask.training.classification import evaluate_classifier
        from covidmask.training.loop import make_fabric

        data = existing_folder(self.data or phantoms_folder(self.preset))
        dataset = datasets.open_slices(data, self.split)
        weights = _weights("classifier", self.preset, self.weights, self.regime)
        model = load_classifier(weights)
        classes = _classes(model.config)
        if _classes(dataset) != classes:
            raise DataError(
                f"{data}: has the classes {', '.join(_classes(dataset))}, and {weights} those of "
                f"other data, {', '.join(classes)}; judge it on slices of its own classes"
            )
        _prepare_json(self.json, weights, self.split, data / "phantoms.json")
        fabric = make_fabric(self.precision, _device(self.device))
        result = evaluate_classifier(model, dataset, fabric=fabric, batch_size=self.batch_size)
        counts = result["confusion"]
        right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        intervals = {
            "sensitivity": [wilson(k, n) for k, n in zip(right, true, strict=True)],
            "ppv": [wilson(k, n) for k, n in zip(right, predicted, strict=True)],
            "accuracy": wilson(right.sum(), result["n"]),
        }
        # classes number their patients on their own in COVIDx-CT
        patients_of = list(zip(dataset.labels, dataset.patients, strict=True))
        by_patient = patient_bootstrap(
            result["labels"],
            result["predictions"],
            [f"{c} {patient}" for c, patient in patients_of],
            lambda drawn: report(drawn)["accuracy"],
            classes=len(classes),
        )
        patients = len(set(patients_of))
        _say("Confusion matrix in slices (rows: true class, columns: predicted class)")
        _say(f"{'':<18}" + "".join(f"{name:>18}" for name in classes))
        for name, row in zip(classes, counts, strict=True):
            _say(f"{name:<18}" + "".join(f"{count:>18,}" for count in row))
        _say(f"{'':<18}{'sensitivity (95 %)':>24}{'PPV (95 %)':>24}")
        for i, name in enumerate(classes):
            cells = (_interval(result[key][i], intervals[key][i]) for key in ("sensitivity", "ppv"))
            _say(f"{name:<18}" + "".join(f"{cell:>24}" for cell in cells))
        _say(f"Accuracy {_interval(result['accuracy'], intervals['accuracy'])}")
        _say(
            f"A slice is not a patient: {result['n']:,} slices come from {patients:,} patients, "
            "and slices of one patient are alike. The intervals above (Wilson) take slices as "
            "independent and are too narrow; drawing whole patients, accuracy is "
            f"{_interval(result['accuracy'], by_patient)}."
        )
        _write_json(
            self.json,
            {
                "confusion": counts.tolist(),
                **{key: result[key] for key in ("accuracy", "sensitivity", "ppv", "support", "n")},
                "wilson": intervals,
                "accuracy_by_patient": by_patient,
                "patients": patients,
                "split": self.split,
            },
        )
        _say(
            f"Classifier {weights} judged on {result['n']:,} slices of {patients:,} patients: "
            f"accuracy {result['accuracy']:.3f}{_also(self.json)}"
        )


@dataclass(frozen=True)
class Evaluate:
    """Judge a trained model on slices that it has not seen."""

    model: (
        Annotated[EvaluateSegmenter, subcommand("segmenter")]
        | Annotated[EvaluateClassifier, subcommand("classifier")]
    )

    def run(self) -> None:
        self.model.run()


# ---- use ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Draw the lesions of CT slices and give the probabilities of three classes.

    Reads PNG, JPEG and TIFF (8 or 16 bits), DICOM (files, or folders that hold a series) and
    NIfTI. No patient tag and no name of a DICOM or NIfTI file reaches an output. Without weights
    that you name or have trained, it takes the small ones that come with the package, which have
    seen synthetic slices only. For example:
    `covidmask predict scan/ --segmenter seg.safetensors --classifier cls.safetensors --out out`
    """

    images: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="IMAGE|DIR [...]", help_behavior_hint="")
    ]
    """Slices, volumes and folders to look at."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder for pictures (..._lesions.png), predictions.csv and summary.csv."""
    slices: Annotated[
        str | None, _default("32 of a volume, evenly spaced", "all|20-80|3,17,40-45")
    ] = None
    """Which slices of each volume, from 1, nearest the feet where positions are known."""
    every: Annotated[int | None, _default("take each", "INT")] = None
    """5 takes every fifth of --slices, or of all slices where --slices is not given."""
    series: Annotated[int | None, _default("a folder may hold one", "INT")] = None
    """Which DICOM series of a folder with several; the message that asks for it counts them."""
    window: Annotated[
        tuple[float, float] | None, _default("-600 1500, for the lung", "LEVEL WIDTH")
    ] = None
    """Hounsfield units that become black to white, for DICOM and NIfTI."""
    preset: PresetName = "quick"
    """Whose weights to take where none are named."""
    segmenter: Whose = None
    """Weights that `covidmask train segmenter` wrote."""
    classifier: Whose = None
    """Weights that `covidmask train classifier` wrote."""
    regime: WhichRegime = None
    """Which of your classifiers of the preset."""
    score: float = 0.5
    """Boxes that score above it are drawn and counted, 0 to 1."""
    threshold: float = 0.5
    """Pixels whose probability in the fused detections is above it are lesion, as in evaluate."""
    device: Device = "auto"
    """auto is CUDA where there is one, else the CPU."""

    def run(self) -> None:
        from covidmask.datasets.scans import LUNG_WINDOW
        from covidmask.predict import predict

        if not self.images:
            raise CovidmaskError("no image is named; run `covidmask predict IMAGE ... --help`")
        window = self.window or LUNG_WINDOW
        if window[1] <= 0:
            raise CovidmaskError(
                f"--window {window[0]:g} {window[1]:g}: level and width must be numbers, the width "
                "above 0; try -600 1500"
            )
        if self.out.is_file():
            raise OutputError(f"{self.out}: is a file; name a folder with --out")
        _say(NOTICE)
        segmenter = _weights("segmenter", self.preset, self.segmenter)
        classifier = _weights("classifier", self.preset, self.classifier, self.regime)
        rows = predict(
            self.images,
            segmenter,
            classifier,
            self.out,
            self.score,
            _device(self.device),
            series=self.series,
            slices=self.slices,
            every=self.every,
            window=window,
            threshold=self.threshold,
        )
        _say(
            f"{len(rows)} {'slice' if len(rows) == 1 else 'slices'} done: pictures and summary.csv "
            f"in {self.out}, probabilities in {self.out / 'predictions.csv'}"
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """Look over this machine: Python, packages, device and folders, one line each.

    [OK] is fine, [FAIL] must be mended (the exit status is then 2), [--] is optional.
    """

    def run(self) -> int:
        from covidmask.check import check

        return check(data_root(), weights_file("segmenter", "quick").parent)


@dataclass(frozen=True)
class Convert:
    """Turn a .pth file of the paper's author into .safetensors, running nothing from it.

    For example: `covidmask convert released.pth released.safetensors`
    """

    author: Annotated[Positional[Path], arg(metavar="AUTHOR.pth")]
    """A file of the released repository, of a segmenter or a classifier."""
    out: Annotated[Positional[Path], arg(metavar="OUT.safetensors")]
    """File to write."""

    def run(self) -> None:
        from covidmask.models.author_checkpoints import load_author_checkpoint
        from covidmask.models.classifier import CovidCTMaskNet
        from covidmask.models.weights import save_model

        _check_output(self.out, self.author)
        model = load_author_checkpoint(self.author)
        is_classifier = isinstance(model, CovidCTMaskNet)
        detector = model.detector.config if is_classifier else model.config
        card = {"command": "covidmask convert", "source": self.author.name}
        save_model(model, self.out, **card, min_area=PRESETS["paper"].min_area)
        _say(f"Backbone {detector.backbone}, cut {detector.cut}")
        _say(
            f"Lesion classes {len(LESION_CLASSES[detector.lesions])} "
            f"({', '.join(LESION_CLASSES[detector.lesions])})"
        )
        _say(
            f"Anchor sizes {', '.join(f'{s:g}' for s in detector.anchor_sizes)} pixels, ratios "
            f"{', '.join(f'{r:g}' for r in detector.anchor_ratios)}"
        )
        if is_classifier:
            _say(f"N {model.config.n_boxes} ranked boxes, S {model.config.hidden} wide")
        kind = "Classifier" if is_classifier else "Segmenter"
        _say(f"{kind} of {self.author} converted; weights in {self.out}")


Command = (
    Annotated[Phantoms, subcommand("phantoms")]
    | Annotated[Fetch, subcommand("fetch")]
    | Annotated[Stats, subcommand("stats")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Predict, subcommand("predict")]
    | Annotated[Check, subcommand("check")]
    | Annotated[Convert, subcommand("convert")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 for a usage error, bad input or output that cannot be written; 130 when interrupted;
        141 when nobody reads the output any longer, as after `| head -1`.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with suppress(AttributeError):  # a notebook's stream
            getattr(sys, name).reconfigure(errors="backslashreplace")  # names in other scripts
    status, message = 2, None
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except Exception as error:
        if isinstance(error, BrokenPipeError) or isinstance(error.__cause__, BrokenPipeError):
            status = 141
        elif (message := _message(error)) is None:
            raise
    with suppress(OSError):
        if message:
            print(f"covidmask: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # Python would try again when it ends, and complain
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _run(argv: Sequence[str]) -> int:
    for before, word in zip(("covidmask", *argv), argv, strict=False):
        name, equals, value = word.partition("=")
        if not word or "\0" in word or (name.startswith("--") and equals and not value):
            raise CovidmaskError(
                f"{name if equals else before}: its value is empty or no text; leave the option "
                'out, or give it a value ("." is the working folder)'
            )
    try:
        command = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="covidmask",
            description="COVID-CT-Mask-Net, from CT slices to ranked boxes to three classes. "
            f"{NOTICE} Each command has a --help of its own.",
            args=argv,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        )
    except SystemExit as stop:  # --help, or an option that does not parse
        return int(stop.code or 0)
    if _rank() > 0 and not isinstance(command, (Train, Evaluate)):
        return 0  # one process is enough for the others
    _check_numbers(command)
    return command.run() or 0


def _message(error: Exception) -> str | None:
    """One sentence for the reader; None where the fault is in covidmask itself."""
    text = _one_line(error)
    if isinstance(error, CovidmaskError):
        return f"error: {text}"
    if isinstance(error, OSError):  # without a name where output is sent to a full disk
        where = error.filename or "the output or an open file"
        return f"error: {where}: {error.strerror or text}; check path, permissions and disk"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return (
            f"error: there is not enough memory ({text}); lower --batch-size or --memory, or take "
            "smaller images"
        )
    return None


# ---- small helpers --------------------------------------------------------------------------


def _rank() -> int:
    """Number of this process among those of `torchrun`."""
    rank = os.environ.get("RANK") or "0"
    if not rank.isdecimal():
        raise CovidmaskError(f"RANK={rank}: is no number of a process; unset it, or use torchrun")
    return int(rank)


def _say(text: str) -> None:
    if _rank() == 0:
        print(text, flush=True)


def _one_line(error: BaseException) -> str:
    """The message. A DataLoader's worker puts its traceback first, the message last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if not lines[0].startswith("Caught "):
        return " ".join(lines)
    start, _, rest = lines[-1].partition(": ")
    return rest if start.startswith("covidmask.errors.") else lines[-1]


def _check_numbers(command: Any) -> None:
    """Refuse numbers that no option can have, NaN and infinity among them."""
    for field in fields(command):
        value = getattr(command, field.name)
        if is_dataclass(value):
            _check_numbers(value)
        low, high = RANGES.get(field.name, (-(2**63), 2**63))
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not low <= number <= high:
                raise CovidmaskError(
                    f"--{field.name.replace('_', '-')} {number}: must be at least {low:,} and at "
                    f"most {high:,}"
                )


def _check_output(path: Path, *inputs: str | Path) -> None:
    if path.suffix != ".safetensors" or path.is_dir():
        raise OutputError(
            f"{path}: weights are written to a file; let its name end in .safetensors"
        )
    _check_no_input("the output", path, *inputs)


def _check_no_input(what: str, path: Path, *others: str | Path) -> None:
    """Nothing is written over a file that the same command reads, or writes for another use."""
    for other in others:
        if same_file(path, other):
            raise OutputError(f"{path}: {what} and {other} are one file; name another one")


def _classes(of: Any) -> tuple[str, ...]:
    """The image classes of a model's configuration or of a data set."""
    return tuple(getattr(of, "classes", IMAGE_CLASSES))


def _weights(kind: str, preset: str, named: Path | None, regime: str | None = None) -> Path:
    """The file of `find_weights`, after a line that says whose it is."""
    path, whose = models.find_weights(kind, preset, named, regime)
    _say(f"{kind.capitalize()}: {whose}, {path}")
    return path


def _device(name: str) -> str:
    """`name`, with auto resolved.

    Raises:
        CovidmaskError: this machine has none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if (name == "cuda" and not torch.cuda.is_available()) or (
        name == "mps" and not torch.backends.mps.is_available()
    ):
        raise CovidmaskError(f"--device {name}: there is none on this machine; use --device cpu")
    return name


def _training_summary(history: list[dict], dataset) -> str:
    from covidmask.datasets.augmentation import Augmented

    last = [values["loss"] for values in history if values["epoch"] == history[-1]["epoch"]]
    slices = f"{len(dataset):,} slices"
    if isinstance(dataset, Augmented):
        slices = (
            f"{len(dataset.dataset):,} slices ({dataset.config.copies} random copies of each in an "
            "epoch)"
        )
    return (
        f"on {slices}: epochs {history[-1]['epoch'] + 1}, steps {len(history):,}, "
        f"mean loss of the last epoch {sum(last) / len(last):.4f}"
    )


def _patients(dataset: LesionDataset) -> int | None:
    return len(set(dataset.patients)) if dataset.patients_known else None


def _slices(dataset: LesionDataset) -> str:
    patients = _patients(dataset)
    whose = "unknown patients" if patients is None else f"{patients:,} patients"
    return f"{len(dataset):,} slices of {whose}"


def _lesion_numbers(dataset: LesionDataset, split: str) -> dict[str, Any]:
    """Print and return the numbers of Figure 1 for one list."""
    from covidmask.datasets.lesions import lesion_statistics

    patients = _patients(dataset)
    _say(f"lesions, {split}: {_slices(dataset)}")
    found = lesion_statistics(dataset)
    limits = (0.02, 0.01)  # GGO, consolidation, as in the paper
    few, small = found.share_of_slices_below(5), found.share_of_regions_below(*limits)
    numbers: dict[str, Any] = {"slices": len(dataset), "patients": patients, "classes": {}}
    for i, (name, limit) in enumerate(zip(found.classes, limits, strict=True)):
        counts = found.counts[:, i]
        areas = found.region_fractions[found.region_labels == i + 1]
        numbers["classes"][name] = {
            "regions": int(counts.sum()),
            "slices_with": int((counts > 0).sum()),
            "share_of_slices_with_fewer_than_5_regions": float(few[i]),
            f"share_of_regions_below_{limit:g}_of_the_image": float(small[i]),
            "mean_area_fraction": float(areas.mean()) if areas.size else math.nan,
        }
        _say(
            f"  {name:<4} {counts.sum():>6,} regions in {(counts > 0).sum():,} slices; "
            f"{_percent(few[i])} of slices have fewer than 5; "
            f"{_percent(small[i])} of regions are below {limit:.0%} of the image"
        )
    return numbers


def _class_numbers(dataset: SliceImages, split: str) -> dict[str, Any]:
    from covidmask.datasets.classes import class_statistics

    found = class_statistics(dataset)
    _say(f"slices, {split}: {len(dataset):,} slices of {found.patients.sum():,} patients")
    classes = {}
    for name, slices, patients in zip(found.classes, found.slices, found.patients, strict=True):
        classes[name] = {"slices": int(slices), "patients": int(patients)}
        _say(f"  {name:<18} {slices:>6,} slices of {patients:,} patients")
    return {"slices": len(dataset), "patients": int(found.patients.sum()), "classes": classes}


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"


def _percent(fraction: float) -> str:
    return "n/a" if math.isnan(fraction) else f"{100 * fraction:.1f} %"


def _interval(value: float, ends: tuple[float, float]) -> str:
    return f"{_number(value)} [{_number(ends[0])}, {_number(ends[1])}]"


def _also(path: Path | None) -> str:
    return "" if path is None else f"; numbers in {path}"


def _prepare_json(path: Path | None, *inputs: str | Path) -> None:
    """Find out before the work, not after it, whether the file can be written."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file with --json")
    if path.suffix != ".json":  # so that no list, image or weights file is overwritten
        raise OutputError(f"{path}: numbers are written to a file; let its name end in .json")
    _check_no_input("--json", path, *inputs)
    if _rank() == 0:
        check_writable(path.parent)


def _write_json(path: Path | None, values: dict[str, Any]) -> None:
    if path is None or _rank() > 0:
        return
    with atomic_path(path) as temporary:
        text = json.dumps(_json_values(values), indent=2) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _json_values(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, dict):
        return {key: _json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
