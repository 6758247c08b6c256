"""The command line. `covidmask --help` lists the commands, and each explains itself.

A command is a dataclass: its fields are the options, and `run` does the work. Fields without a
default are parts of the preset, whose numbers become options such as `--segmenter.epochs`. The
rooms load torch when they are used, so `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from datetime import datetime, timezone
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from tyro.conf import Positional, arg, subcommand

from covidmask import config, datasets, files, metrics, models, training
from covidmask.check import Check
from covidmask.config import PRESETS
from covidmask.errors import CovidmaskError, DataError, OutputError
from covidmask.fetch import Fetch

NOTICE = "For research and teaching only: nothing here may guide the care of a patient."
RANGES = {  # lowest and highest value -> options, and numbers of a preset; others: 0 to 2^31 - 1
    (1, 2**31): "per_class epochs copies batch_size every series n_boxes hidden size image_size "
    "max_size fpn_channels box_features box_batch box_detections rpn_batch rpn_train_proposals "
    "rpn_test_proposals",
    (1e-12, 1e6): "lr anchor_sizes anchor_ratios",
    (0, 1): "score threshold mask_threshold average paste nms rpn_nms box_nms box_score "
    "rpn_positive box_positive rpn_iou box_iou",
    (-1, 1): "classifier.score",
    (-1e6, 1e6): "window",
}
LIMITS = {name: limits for limits, names in RANGES.items() for name in names.split()}
PACKAGES = ("covidmask", "torch", "torchvision")  # whose versions a card has
SHORT = ("--epochs", "--batch-size", "--lr", "--precision")  # for those of the training itself


def _none(means: str, metavar: str | None = None, help: str | None = None) -> Any:
    """An option that is None by default, and what that means."""
    return arg(help_behavior_hint=f"(default: {means})", metavar=metavar, help=help)


SCALE = arg(help="Scale: two CPU cores (quick, semiseg), one small GPU (colab), or the paper's.")
Preset = Annotated[Literal["quick", "colab", "paper", "semiseg"], SCALE]
AUTO = arg(help="auto is CUDA where there is one, else the CPU.")
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], AUTO]
JsonFile = Annotated[Path | None, _none("none", "FILE.json", "Write the numbers here, too.")]
YOURS = "yours in $COVIDMASK_DATA/weights, else the shipped quick ones"
Weights = Annotated[Path | None, _none(YOURS, "FILE", "Weights that `covidmask train` wrote.")]
Regime = Literal["heads", "heads_bn", "full"]
ONE = _none("the only one there is", "{heads,heads_bn,full}", "Which classifier.")
PHANTOMS = "the preset's phantoms in $COVIDMASK_DATA or ./data"


@dataclass(frozen=True, kw_only=True)
class Phantoms:
    """Make synthetic CT slices, laid out exactly like the real data.

    DIR/lesions holds slices with lesion masks, DIR/slices slices of three classes, both with lists
    for training, validation and test. For example: `covidmask phantoms --phantoms.size 64 --out p`
    """

    preset: Preset = "quick"
    out: Annotated[Path | None, _none(PHANTOMS, "DIR", "Folder to make.")] = None
    seed: int = 0  # Another seed gives other patients.
    workers: Annotated[int | None, _none("one for each core", "INT", "Processes that draw.")] = None
    phantoms: config.PhantomConfig

    def run(self) -> None:
        from covidmask.datasets.phantom_sets import cores, write_phantoms

        out, of = self.out or files.phantoms_folder(self.preset), self.phantoms
        state = "were already there" if (out / "phantoms.json").exists() else "written"
        write_phantoms(out, of, self.seed, cores() if self.workers is None else self.workers)
        _say(
            f"Phantoms {state}: {of.slices_per_patient} slices each of {sum(of.lesion_patients)} "
            f"patients with masks, {3 * sum(of.class_patients)} more of three classes, {of.size} "
            f"pixels wide, in {out}"
        )


@dataclass(frozen=True, kw_only=True)
class _OnData:
    preset: Preset = "quick"
    data: Annotated[Path | None, _none(PHANTOMS, "DIR")] = None
    """Folder that holds lesions/ and slices/, or one of the two, or COVID-SemiSeg."""

    @property
    def folder(self) -> Path:
        return self.data or files.phantoms_folder(self.preset)


@dataclass(frozen=True, kw_only=True)
class Stats(_OnData):
    """Count slices, patients and lesions, as in the paper's Figure 1, of any data set."""

    min_area: int = 1  # Lesions of fewer pixels are not counted (released code: of 100 or fewer).
    json: JsonFile = None

    def run(self) -> None:
        root = files.existing_folder(self.folder)
        _check_output("--json", self.json, ".json", root / "phantoms.json")
        found, total = {"lesions": {}, "slices": {}}, 0
        for split in datasets.lesion_splits(root):
            found["lesions"][split] = datasets.open_lesions(root, split, min_area=self.min_area)
        for split in datasets.slice_splits(root):
            found["slices"][split] = datasets.open_slices(root, split)
        for part, opened in found.items():
            for split, dataset in opened.items():
                (patients, whose), classes = _whose(dataset), _numbers(dataset)
                _table(f"{part}, {split}: {whose}", classes)
                total += len(dataset)
                opened[split] = {"slices": len(dataset), "patients": patients, "classes": classes}
        if not total:
            layouts = "a folder with lesions/ or slices/ in it, or COVID-SemiSeg"
            raise DataError(f"{root}: holds no data that can be read; name {layouts}")
        _report(f"Statistics of {total:,} slices in {root}", self.json, found)


@dataclass(frozen=True, kw_only=True)
class _TrainOptions(_OnData):
    split: str = "train"  # Which list to train on: train, val, test, or the path to a list.
    out: Annotated[Path | None, _none("$COVIDMASK_DATA/weights/...", "FILE.safetensors")] = None
    """Weights file to write."""
    checkpoint: Annotated[Path | None, _none("the weights file with suffix .ckpt", "FILE")] = None
    """Written after each epoch: after a crash the same command goes on. Removed at the end."""
    seed: int = 0  # Decides initial weights, order of slices and all draws.
    workers: int = 0  # Processes that read slices; 0 is the training's own. 2 or more with a GPU.
    memory: int = 2048  # MiB for slices that are decoded once; the rest is in every epoch.
    device: Device = "auto"
    log_dir: Annotated[Path | None, _none("none", "DIR", "For TensorBoard, if installed.")] = None

    def changed(self) -> dict[str, Any]:
        """What differs from the preset, by option."""
        preset = {"weights_backbone": None} | dict(_values(PRESETS[self.preset]))
        return {n: value for n, value in _values(self) if n in preset and value != preset[n]}

    def _train(
        self, model, names, train: Callable, settings, *read, regime=None, validated=False, **card
    ) -> None:
        """Train once all outputs can be written; write the weights with their card; say so."""
        kind = "classifier" if regime else "segmenter"
        out = self.out or files.weights_file(kind, self.preset, regime)
        _check_output("--out", out, ".safetensors", self.split, *read)
        checkpoint = self.checkpoint or out.with_suffix(".ckpt")
        _check_output("--checkpoint", checkpoint, "", out, self.split, *read)
        if checkpoint.exists():
            _say(f"Going on from {checkpoint}")
        device = _device(self.device)
        fabric = training.make_fabric(settings.precision, device, regime == "full", self.log_dir)
        options = {"seed": self.seed, "workers": self.workers, "memory": self.memory}
        history = train(model, checkpoint=checkpoint, fabric=fabric, **options)
        last = [values for values in history if values["epoch"] == history[-1]["epoch"]]
        means = {name: sum(values[name] for values in last) / len(last) for name in last[0]}
        best = max((v["accuracy"] for v in history if validated and "accuracy" in v), default=None)
        kept = "" if best is None else f", best accuracy on val {best:.3f} (kept)"
        if regime:
            card |= {"regime": regime, "validation_accuracy": best}
        card |= {
            "command": f"covidmask train {kind}",
            "preset": self.preset,
            "changed": self.changed(),
            "training": settings,
            "data": Path(os.path.realpath(self.folder)).name,
            "split": Path(self.split).name,
            "seed": self.seed,
            "steps": len(history),
            "last_epoch": {n: v for n, v in means.items() if n not in ("step", "epoch", "lr")},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        card |= {name: sys.modules[name].__version__ for name in PACKAGES}
        if _rank() == 0:
            card = {name: asdict(v) if is_dataclass(v) else v for name, v in card.items()}
            models.save_model(model, out, **card)
            for path in (checkpoint, checkpoint.with_suffix(".phantoms.ckpt")):
                path.unlink(missing_ok=True)
        _say(
            f"{kind.capitalize()}{f' ({regime})' if regime else ''} trained on {len(set(names)):,} "
            f"slices: epochs {last[0]['epoch'] + 1}, steps {len(history):,}, mean loss of the last "
            f"epoch {means['loss']:.4f}{kept}; weights in {out}"
        )


@dataclass(frozen=True, kw_only=True)
class TrainSegmenter(_TrainOptions):
    """Train Mask R-CNN to find lesions: the first half of the method.

    The preset semiseg trains on phantoms first, then on random copies of DIR's slices. --epochs,
    --batch-size, --lr and --precision are short for --segmenter.epochs and so on. For example:
    `covidmask train segmenter --preset semiseg --data data/covid-semiseg`
    """

    weights_backbone: Annotated[str | None, _none("random weights", "NAME")] = None
    """Start from torchvision's weights of this name, such as IMAGENET1K_V1 (downloaded)."""
    phantoms_first: Annotated[bool, arg(name="pretraining")] = True  # Where the preset says so.
    min_area: int  # Lesions of fewer pixels are no instances.
    segmenter: config.TrainingConfig
    detector: config.DetectorConfig
    augment: config.AugmentConfig | None
    pretraining: config.TrainingConfig | None
    phantoms: config.PhantomConfig | None

    def run(self) -> None:
        import torch

        from covidmask.datasets.augmentation import Augmented
        from covidmask.training.segmentation import pretrain_segmenter

        lesions, first = self.detector.lesions, self.pretraining if self.phantoms_first else None
        dataset = datasets.open_lesions(self.folder, self.split, lesions, self.min_area)
        if self.augment:
            dataset = Augmented(dataset, self.augment, self.seed)
        torch.manual_seed(self.seed)
        model = models.lesion_mask_rcnn(self.detector, self.weights_backbone)

        def train(model: Any, checkpoint: Path, **options: Any) -> list[dict]:
            if first:  # this command has all that it reads of a preset
                own = options | {"checkpoint": checkpoint.with_suffix(".phantoms.ckpt")}
                pretrain_segmenter(model, self, files.phantoms_folder(self.preset), **own)
            options |= {"checkpoint": checkpoint}
            return training.train_segmenter(model, dataset, self.segmenter, **options)

        card = {name: getattr(self, name) for name in ("augment", "min_area", "weights_backbone")}
        self._train(model, dataset.names, train, self.segmenter, pretraining=first, **card)


@dataclass(frozen=True, kw_only=True)
class TrainClassifier(_TrainOptions):
    """Train COVID-CT-Mask-Net on a trained segmenter: the second half of the method.

    --epochs, --batch-size, --lr and --precision are short for --classifier-training.epochs and so
    on. For example: `covidmask train classifier --preset quick --regime heads`
    """

    segmenter: Weights = None
    regime: Regime = "heads"
    """What trains: heads (S alone, fast), heads_bn (S and batch norm), full (everything)."""
    validation: bool = True  # Keep the epoch that is best on val.txt where that is, else the last.
    classifier: config.ClassifierConfig
    classifier_training: config.TrainingConfig

    def run(self) -> None:
        import torch

        dataset, val = datasets.open_slices(self.folder, self.split, require_classes=True), None
        if self.validation and "val" in datasets.slice_splits(self.folder):
            val = datasets.open_slices(self.folder, "val")
        settings, how = self.classifier, self.classifier_training
        if settings.classes == PRESETS[self.preset].classifier.classes:
            settings = replace(settings, classes=tuple(dataset.classes))
        weights = _weights("segmenter", self.preset, self.segmenter)
        segmenter = models.load_segmenter(weights)
        torch.manual_seed(self.seed)
        model = models.covid_ct_mask_net(segmenter, settings)

        def train(model: Any, **options: Any) -> list[dict]:
            options |= {"cache": files.data_root() / "ranked", "validation": val}
            return training.train_classifier(model, dataset, self.regime, how, **options)

        card = {"regime": self.regime, "validated": val is not None}
        self._train(model, dataset.names, train, how, weights, **card)


@dataclass(frozen=True, kw_only=True)
class _EvaluateOptions(_OnData):
    weights: Weights = None
    split: str = "test"  # Which list to judge on: train, val, test, or the path to a list.
    batch_size: int = 8  # Slices at a time. It changes speed and memory, not the result.
    device: Device = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """bf16-mixed is faster on recent GPUs and CPUs, and changes the probabilities a little."""
    json: JsonFile = None

    def _prepare(self, kind: str, regime: str | None = None) -> tuple[Path, dict[str, Any]]:
        """Weights file and what both evaluations take."""
        note = files.existing_folder(self.folder) / "phantoms.json"
        weights = _weights(kind, self.preset, self.weights, regime)
        _check_output("--json", self.json, ".json", weights, self.split, note)
        fabric = training.make_fabric(self.precision, _device(self.device))
        return weights, {"fabric": fabric, "batch_size": self.batch_size}


@dataclass(frozen=True, kw_only=True)
class EvaluateSegmenter(_EvaluateOptions):
    """Judge a segmenter: Dice, COCO's average precision (AP), and that of the released code."""

    score: float = 0.75
    """The released code's AP and Dice take detections that score above it; COCO's AP takes all."""
    mask_threshold: float = 0.5
    """Pixels of a detection whose probability is above are its mask (released code: 0.622)."""
    nms: Annotated[float | None, _none("as in training", "FLOAT")] = None
    """Of two boxes of a class with a larger IoU the better one stays (released scripts: 0.5)."""
    threshold: float = 0.5  # Pixels whose probability in the fused detections is above are lesion.
    mirror: bool = False  # Fuse detections with those of the mirror image: twice the time.
    min_area: Annotated[int | None, _none("as in training", "INT")] = None
    """Lesions of fewer pixels are left out of the truth."""

    def run(self) -> None:
        weights, options = self._prepare("segmenter")
        model, area = models.load_segmenter(weights), self.min_area
        area = models.read_card(weights).get("min_area", 1) if area is None else area
        dataset = datasets.open_lesions(self.folder, self.split, model.config.lesions, area)
        if self.nms is not None:
            model.roi_heads.nms_thresh = self.nms
        names = ("score", "mask_threshold", "threshold", "mirror")
        chosen = {name: getattr(self, name) for name in names}
        result = training.evaluate_segmenter(model, dataset, **chosen, **options)
        del result["table"]
        measured = {name: value for name, value in result.items() if isinstance(value, float)}
        author = f"the released code's own AP (author_) and mean Dice above {self.score:g}"
        _table(f"COCO's AP (mask_, box_); {author}", {"value": measured})
        _table(f"Fused detections above {self.threshold:g}: means of slices", result["overlap"])
        (patients, whose), ap50 = _whose(dataset), f"mask AP50 {result['mask_ap50']:.3f}"
        result |= {"patients": patients, "split": self.split, "min_area": area} | chosen
        result |= {"nms": model.roi_heads.nms_thresh}
        _report(f"Segmenter {weights} judged on {whose}: {ap50}", self.json, result)


@dataclass(frozen=True, kw_only=True)
class EvaluateClassifier(_EvaluateOptions):
    """Judge a classifier: confusion matrix, sensitivity, PPV and accuracy with 95 % intervals."""

    regime: Annotated[Regime | None, ONE] = None

    def run(self) -> None:
        from covidmask.models.systems import load_system

        dataset = datasets.open_slices(self.folder, self.split)
        weights, options = self._prepare("classifier", self.regime)
        model = load_system(weights)
        classes = getattr(model, "config", model).classes
        found = training.evaluate_classifier(model, dataset, **options)
        counts, (patients, whose) = found["confusion"], _whose(dataset)
        right, sums = counts.diagonal(), {"sensitivity": counts.sum(1), "ppv": counts.sum(0)}
        wilsons = {name: list(map(metrics.wilson, right, each)) for name, each in sums.items()}
        wilsons["accuracy"] = metrics.wilson(right.sum(), found["n"])
        owners = [f"{c} {p}" for c, p in zip(dataset.labels, dataset.patients, strict=True)]
        both, accuracy = (found["labels"], found["predictions"]), lambda c: c.trace() / c.sum()
        by_patient = metrics.patient_bootstrap(*both, owners, accuracy, classes=len(classes))

        def by_class(values: Iterable) -> dict[str, Any]:
            return dict(zip(classes, values, strict=True))

        rows = "Confusion matrix in slices (rows: true class, columns: predicted class)"
        _table(rows, by_class(map(by_class, counts.T)))
        cells = {name: map(_interval, found[name], wilsons[name]) for name in sums}
        _table("With intervals of 95 %", {name: by_class(each) for name, each in cells.items()})
        _say(
            f"Accuracy {_interval(found['accuracy'], wilsons['accuracy'])}\n"
            f"A slice is not a patient: there are {whose}. These intervals (Wilson) take slices as "
            "independent and are too narrow; drawing whole patients, accuracy is "
            f"{_interval(found['accuracy'], by_patient)}."
        )
        names = ("accuracy", "sensitivity", "ppv", "support", "n")
        result = {name: found[name] for name in names} | {"confusion": counts.tolist()}
        result |= {"wilson": wilsons, "accuracy_by_patient": by_patient}
        result |= {"patients": patients, "split": self.split}
        done = f"Classifier {weights} judged on {whose}: accuracy {found['accuracy']:.3f}"
        _report(done, self.json, result)


@dataclass(frozen=True, kw_only=True)
class Compare(_OnData):
    """Train several classifiers of slices under one budget, and put them side by side (Table 3).

    Systems are heads, heads_bn and full (the three regimes of COVID-CT-Mask-Net), scores (S reads
    scores alone), mask and faster (a detector trained here, with and without masks), maps, inside
    and areas (a linear layer on the same detector's feature maps, on what of them lies in the
    ranked boxes, or on counts and areas of its lesions), unet and fcn (segment, then classify),
    jcs (both at once), covnet (reads up to 16 slices of a patient together), and any classifier of
    torchvision's, or of timm's as timm/NAME; jcs+resnet50 or covnet+resnet18 names a backbone,
    resnet18+lungs is given the lungs,
    too. A second call does what OUT lacks. Example:
    `covidmask compare --data data/covid-ct --systems heads maps mobilenet_v2 --out compare.json`
    """

    systems: tuple[str, ...] = ("heads", "maps", "areas", "resnet18")
    """In the order of the table."""
    seeds: tuple[int, ...] = (0,)  # Each system is trained once with each.
    predictions: Annotated[tuple[str, ...], _none("none", "[NAME=FILE.csv [...]]")] = ()
    """Rows made elsewhere, of all slices judged: columns file and class, or file and each class."""
    out: Annotated[Path, arg(metavar="FILE.json")] = Path("compare.json")
    """The table; FILE.csv and FILE.txt lie beside it."""
    train: str = "train"  # List to train on.
    split: str = "test"  # List to judge on.
    folds: int = 0
    """Instead of --split: cross-validation in the training list, no patient in two folds."""
    per_class: Annotated[int | None, _none("all", "INT", "Training slices of each class.")] = None
    weights: Weights = None  # Of the segmenter.
    size: int = 224  # Pixels per side, of ordinary classifiers and of unet and fcn.
    weights_backbone: Annotated[str | None, _none("random weights", "NAME")] = None
    """Ordinary classifiers start from weights of this name, such as IMAGENET1K_V1 (downloaded)."""
    keep: Annotated[Path | None, _none("none", "DIR", "Folder for the weights of each.")] = None
    device: Device = "auto"
    budget: config.TrainingConfig = config.TrainingConfig(
        epochs=10, batch_size=16, lr=1e-3, weight_decay=1e-4, cosine=True
    )
    segmenter: config.TrainingConfig
    detector: config.DetectorConfig
    classifier: config.ClassifierConfig
    classifier_training: config.TrainingConfig

    def run(self) -> None:
        from covidmask.training import compare, loop

        root = self.folder
        if not ((self.systems or self.predictions) and self.seeds):
            raise CovidmaskError("--systems, --seeds: name one of each, or leave them out")
        if self.keep and self.folds:
            raise CovidmaskError("--keep: with --folds there are several models of each system")
        compare.check_systems(self.systems)
        train = datasets.open_slices(root, self.train, require_classes=True)
        parts = [(train, None if self.folds else datasets.open_slices(root, self.split))]
        if shared := {} if self.folds else {*train.names} & {*parts[0][1].names}:
            both = f"{files.some(sorted(shared))} are in both lists"
            raise DataError(f"--train {self.train}, --split {self.split}: {both}; divide them")
        if self.folds:
            pairs = compare.folds_of(train, self.folds)
            parts = [tuple(compare.part_of(train, part) for part in pair) for pair in pairs]
        rows, judged = {}, reduce(compare.together, (part for _, part in parts))
        for word in self.predictions:
            name, _, file = word.partition("=")
            if not (name and file) or f"{name} -" in rows:
                raise CovidmaskError(f"--predictions {word}: write NAME=FILE.csv, each name once")
            rows[f"{name} -"] = compare.row_of_file(Path(file), judged)
        lesions = dict.fromkeys(("train", "test"))
        for split in set(lesions) & set(datasets.lesion_splits(root)):
            area = PRESETS[self.preset].min_area
            lesions[split] = datasets.open_lesions(root, split, self.detector.lesions, area)
        weights = _weights("segmenter", self.preset, self.weights)
        detector = models.load_segmenter(weights)
        _check_output("--out", self.out, ".json", weights, self.train, self.split)
        names = "size", "detector", "classifier"
        precision = self.budget.precision  # one for all, or the seconds say nothing
        how = (self.segmenter, self.classifier_training)
        budget = compare.Budget(
            self.budget, *(replace(part, precision=precision) for part in how),
            weights=self.weights_backbone, **{name: getattr(self, name) for name in names},
        )  # fmt: skip
        facts = asdict(budget) | {"train": self.train, "split": self.split, "folds": self.folds}
        facts |= {"per_class": self.per_class, "data": Path(os.path.realpath(root)).name}
        listed = [part.names + part.labels for pair in parts for part in pair]
        listed += [part and part.names for part in lesions.values()]
        facts |= {
            "segmenter": loop.digest(detector.state_dict().values()),
            "lists": sha256(json.dumps(listed).encode()).hexdigest()[:12],
        }
        if self.keep:
            files.check_writable(self.keep)
        fabric = training.make_fabric(self.budget.precision, _device(self.device))
        options = {"budget": budget, "detector": detector, "lesions": lesions["train"]}
        drawn = dict.fromkeys(self.seeds, parts)
        for seed in self.seeds if self.per_class else ():
            drawn[seed] = [(compare.few(t, self.per_class, seed), judged) for t, judged in parts]
        table = compare.Table(self.out, facts)
        for name, row in rows.items():
            table.add(name, row)
        for seed, system in ((seed, system) for seed in self.seeds for system in self.systems):
            if (name := f"{system} {seed}") not in table.rows:
                file = f"{system.replace('/', '-')}-{seed}.safetensors"
                more = {"seed": seed, "fabric": fabric, "keep": self.keep and self.keep / file}
                same = {f"{system} {other}" for other in self.seeds} & {*table.rows}
                if same and system in compare.SEEDLESS and not (self.per_class or self.keep):
                    _say(f"{name}: the row of {min(same)}, since no seed changes it")
                    row = table.rows[min(same)]
                else:
                    row = compare.row_of(system, drawn[seed], lesions["test"], **options, **more)
                table.add(name, row)
        _say(table.text())
        _say(f"{len(table.rows)} rows in {self.out}. {NOTICE}")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Draw the lesions of CT slices and give the probabilities of three classes.

    Reads PNG, JPEG, TIFF, DICOM (files, or folders that hold a series) and NIfTI; no patient tag
    and no name of a DICOM or NIfTI file reaches an output. The shipped weights have seen synthetic
    slices only. Without weights of yours, scans get lesions of the network for CT, which looks at
    the lungs alone, and no probabilities. For example: `covidmask predict scan/ --out out`
    """

    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE|DIR [...]")]
    """Slices, volumes and folders to look at."""
    out: Annotated[Path, arg(metavar="DIR")]  # For ..._lesions.png, predictions.csv, summary.csv.
    slices: Annotated[str | None, _none("32 of a volume", "all|20-80|3,17,40-45")] = None
    """Which slices of each volume, from 1, nearest the feet where positions are known."""
    every: Annotated[int | None, _none("take each", "INT", "5: every fifth of --slices.")] = None
    series: Annotated[int | None, _none("a folder may hold one", "INT")] = None
    """Which DICOM series of a folder with several; the message that asks for it counts them."""
    window: Annotated[tuple[float, float], arg(metavar="LEVEL WIDTH")] = (-600.0, 1500.0)
    """Hounsfield units that become black to white, for DICOM and NIfTI; these are for the lung."""
    preset: Preset = "quick"
    segmenter: Weights = None
    classifier: Weights = None
    regime: Annotated[Regime | None, ONE] = None
    score: float = 0.5  # Boxes that score above it are drawn and counted, 0 to 1.
    threshold: float = 0.5  # Pixels whose probability in the fused detections is above are lesion.
    device: Device = "auto"

    def run(self) -> None:
        from covidmask.models.weights import ShippedWeights
        from covidmask.predict import predict

        if not self.images:
            raise CovidmaskError("no image is named; run `covidmask predict IMAGE ... --help`")
        _say(NOTICE)
        segmenter = _weights("segmenter", self.preset, self.segmenter)
        classifier = _weights("classifier", self.preset, self.classifier, self.regime)
        names = ("score", "series", "slices", "every", "window", "threshold")
        options = {name: getattr(self, name) for name in names} | {"device": _device(self.device)}
        # what you name or have trained comes first, for scans as for pictures
        shipped = [ShippedWeights.SEGMENTER_QUICK.path, ShippedWeights.CLASSIFIER_QUICK.path]
        named = self.segmenter or self.classifier or self.regime
        if not named and [segmenter, classifier] == shipped:
            options["ct"] = ShippedWeights.SEGMENTER_CT.path
            _say(f"For scans, DICOM and NIfTI: trained on drawn chests, {options['ct']}")
        rows = predict(self.images, segmenter, classifier, self.out, **options)
        _say(f"{len(rows)} slices done: pictures, summary.csv and predictions.csv in {self.out}")


@dataclass(frozen=True)
class Convert:
    """Turn a .pth file of the paper's author into .safetensors, running nothing from it."""

    author: Annotated[Positional[Path], arg(metavar="AUTHOR.pth")]  # Segmenter or classifier.
    out: Annotated[Positional[Path], arg(metavar="OUT.safetensors")]  # File to write.

    def run(self) -> None:
        _check_output("OUT", self.out, ".safetensors", self.author)
        model = models.load_author_checkpoint(self.author)
        card = {"command": "covidmask convert", "source": self.author.name}
        models.save_model(model, self.out, **card, min_area=PRESETS["paper"].min_area)
        for part in dict.fromkeys((getattr(model, "detector", model), model)):
            _say(part.config)
        _say(f"{self.author} converted; weights in {self.out}")


def _commands(preset: config.Preset, **kinds: Any) -> Any:
    """What tyro reads: a choice of commands, with the numbers of a preset as defaults."""
    choice = []
    for name, kind in kinds.items():
        details: dict[str, Any] = {}
        if isinstance(kind, tuple):
            details["description"], kind = kind[0], _commands(preset, **kind[1])
        elif kind in (Phantoms, TrainSegmenter, TrainClassifier, Compare):
            parts = {f.name: getattr(preset, f.name) for f in fields(kind) if f.default is MISSING}
            if kind is TrainSegmenter and not preset.pretraining:  # then it draws no phantoms
                parts["phantoms"] = None
            details["default"] = kind(**parts)
        choice.append(Annotated[kind, subcommand(name, **details)])
    return Union[tuple(choice)]  # noqa: UP007


TRAIN = {"segmenter": TrainSegmenter, "classifier": TrainClassifier}
JUDGE = {"segmenter": EvaluateSegmenter, "classifier": EvaluateClassifier}
COMMANDS = {
    "phantoms": Phantoms,
    "fetch": Fetch,
    "stats": Stats,
    "train": ("Train the segmenter, then the classifier on it.", TRAIN),
    "evaluate": ("Judge a trained model on slices that it has not seen.", JUDGE),
    "compare": Compare,
    "predict": Predict,
    "check": Check,
    "convert": Convert,
}


def _parse(argv: Sequence[str]) -> Any:
    """The command that `argv` describes; SystemExit where tyro has answered, as with --help."""
    trained = {("train", "segmenter"): "segmenter", ("train", "classifier"): "classifier-training"}
    part, preset, words = trained.get(tuple(argv[:2])), "quick", []
    for before, word in zip(("covidmask", *argv), argv, strict=False):
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            what = name if equals else before
            raise CovidmaskError(f"{what}: its value is empty; leave it out, or give one")
        if "--preset" in (name, before):
            preset = value or word
        if part and name.replace("_", "-") in SHORT:
            name = f"--{part}.{name[2:]}"
        words.append(name + equals + value)
    command = tyro.cli(
        _commands(PRESETS.get(preset, PRESETS["quick"]), **COMMANDS),
        prog="covidmask",
        description=f"From CT slices to ranked boxes to three classes. {NOTICE}",
        args=words,
        config=(tyro.conf.AvoidSubcommands,),
    )
    for name, value in _values(command):
        low, high = LIMITS.get(name) or LIMITS.get(name.split(".")[-1], (0, 2**31 - 1))
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not low <= number <= high:
                option = f"--{name.replace('_', '-')} {number}"
                raise CovidmaskError(f"{option}: must be at least {low:,} and at most {high:,}")
    return command


def _values(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of every option of a command, or number of a preset."""
    for field in fields(settings):
        name, value = prefix + field.name, getattr(settings, field.name)
        yield from _values(value, f"{name}.") if is_dataclass(value) else [(name, value)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0; 2 for a usage error, bad input or output that cannot be written; 130 when interrupted; 141
    when nobody reads the output any longer, as after `| head -1`.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with suppress(AttributeError):  # a notebook's stream
            getattr(sys, name).reconfigure(errors="backslashreplace")  # names in other scripts
    status, message, command = 2, None, None
    try:
        command = _parse(sys.argv[1:] if argv is None else argv)
        together = isinstance(command, (_TrainOptions, _EvaluateOptions))  # the rest needs one only
        status = (command.run() or 0) if _rank() == 0 or together else 0
        sys.stdout.flush()
    except SystemExit as stop:
        status = int(stop.code or 0)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except Exception as error:
        if isinstance(error, BrokenPipeError) or isinstance(error.__cause__, BrokenPipeError):
            status = 141
        elif (message := _message(error, command)) is None:
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


def _message(error: Exception, command: Any) -> str | None:
    """One sentence for the reader; None where the fault is in covidmask itself."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(lines)
    if lines[0].startswith("Caught "):  # a DataLoader's worker puts its traceback first
        text = lines[-1].removeprefix(f"covidmask.errors.{type(error).__name__}: ")
    if isinstance(error, (CovidmaskError, ModuleNotFoundError)):
        return f"error: {text}"
    if isinstance(error, OSError) and error.errno:  # no name: output goes to a full disk
        where = error.filename or "the output or an open file"
        return f"error: {where}: {error.strerror or text}; check path, permissions and disk"
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        advice = "lower --batch-size or --memory, or take smaller images"
        return f"error: there is not enough memory ({text}); {advice}"
    changed = command.changed() if isinstance(command, _TrainOptions) else {}
    kinds = (ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError, OSError)
    if changed and isinstance(error, kinds):
        options = " ".join(f"--{n.replace('_', '-')} {value}" for n, value in changed.items())
        return f"error: {options}: cannot be built or trained ({text}); check them and the network"
    return None


def _rank() -> int:
    """Number of this process among those of `torchrun`."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def _say(text: object) -> None:
    if _rank() == 0:
        print(text, flush=True)


def _table(title: str, columns: dict[str, dict[str, Any]]) -> None:
    """Print a title, and below it a column of named values for each entry."""
    from pandas import DataFrame, Series

    # as objects, so that counts beside fractions stay whole
    table = DataFrame({name: Series(values, dtype=object) for name, values in columns.items()})
    _say(f"{title}\n{table.to_string(float_format='{:.3f}'.format, na_rep='n/a')}")


def _report(sentence: str, path: Path | None, values: dict[str, Any]) -> None:
    """Write the numbers to the file of --json, and end with a sentence."""
    if path is not None and _rank() == 0:
        # JSON has no NaN: null stands for it
        plain = json.loads(json.dumps(values), parse_constant=lambda name: None)
        files.write_text(path, json.dumps(plain, indent=2) + "\n")
    _say(sentence + ("" if path is None else f"; numbers in {path}"))


def _check_output(option: str, path: Path | None, suffix: str, *others: str | Path) -> None:
    """Before the work, not after it: `path` can be written, and is no other file of the command."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is a folder or device; name a file with {option}")
    if suffix and path.suffix != suffix:  # so that no list or image is overwritten
        raise OutputError(f"{path}: is written to by {option}; let its name end in {suffix}")
    for other in others:
        if files.same_file(path, other):
            raise OutputError(f"{path}: {option} and {other} are one file; name another one")
    if _rank() == 0:
        files.check_writable(path.parent)


def _weights(kind: str, preset: str, named: Path | None, regime: str | None = None) -> Path:
    """The file of `find_weights`, after a line that says whose it is."""
    from covidmask.models.weights import find_weights

    path, whose = find_weights(kind, preset, named, regime)
    _say(f"{kind.capitalize()}: {whose}, {path}")
    return path


def _device(name: str) -> str:
    """`name`, if this machine has one, with auto resolved."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name, True):
        raise CovidmaskError(f"--device {name}: there is none on this machine; use --device cpu")
    return ("cuda" if there["cuda"] else "cpu") if name == "auto" else name


def _whose(dataset: Any) -> tuple[int | None, str]:
    """The patients of a data set, if known: each class numbers its own in COVIDx-CT."""
    owners = zip(getattr(dataset, "labels", dataset.patients), dataset.patients, strict=True)
    count = len(set(owners)) if getattr(dataset, "patients_known", True) else None
    return count, f"{len(dataset):,} slices of {count or 'unknown'} patients"


def _numbers(dataset: Any) -> dict[str, dict[str, Any]]:
    """Slices and patients of each class; or regions of each lesion class, as in Figure 1."""
    from pandas import DataFrame, Series

    if hasattr(dataset, "labels"):
        columns = datasets.class_statistics(dataset)._asdict()
        return DataFrame(columns).set_index("classes").to_dict("index")
    found = datasets.lesion_statistics(dataset)
    areas = Series(found.region_fractions).groupby(found.region_labels).mean()
    columns = {
        "regions": found.counts.sum(0),
        "slices_with": (found.counts > 0).sum(0),
        "share_of_slices_with_fewer_than_5_regions": found.share_of_slices_below(5),
        # below 0.02 of the image (GGO) and 0.01 (consolidation), as in the paper
        "share_of_small_regions": found.share_of_regions_below(0.02, 0.01),
        "mean_area_fraction": areas.reindex([1, 2]).to_numpy(),
    }
    return DataFrame(columns, index=found.classes).to_dict("index")


def _interval(value: float, ends: tuple[float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(value, *ends)
