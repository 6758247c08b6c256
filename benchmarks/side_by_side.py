"""Every system of `covidmask compare`, side by side: on phantoms, or on COVID-CT.

    python benchmarks/side_by_side.py phantoms
    python benchmarks/side_by_side.py covid-ct --data DIR     # what `covidmask fetch covid-ct` made

A network that trains on images sees LOOKS slices, some of them many times where there are few: the
budget does not grow with the data. Three seeds, each with its own draw of training slices. Nothing
was tuned for a system. On COVID-CT all of train is learned, and val is judged once. What a file of
results has is left alone. `page` fills chapter 10.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import common
import torch
import tyro

from covidmask import datasets, models
from covidmask.config import PRESETS, TrainingConfig
from covidmask.files import data_root
from covidmask.training import compare
from covidmask.training.loop import make_fabric

SEEDS, SIZES, MIDDLE = (0, 1, 2), (30, 100, 300, 1000), 300  # training slices of each class
IMAGENET = "IMAGENET1K_V1"
CURVE = ("scores", "heads", "areas", "maps", "resnet18", f"mobilenet_v2 {IMAGENET}")
TABLE = (
    *CURVE, "heads_bn", "full", "faster", "unet", "fcn", "mobilenet_v3_small", "densenet169+lungs",
)  # fmt: skip
REAL = (*CURVE, "mobilenet_v2")
OUT = {name: common.RESULTS / f"side_by_side_{name}.json" for name in ("phantoms", "covid_ct")}
DATA, TWIN = data_root(), common.TWINS / "10_side_by_side.py"
LOOKS, S_LOOKS = 9_000, 60_000  # S looks at 160 numbers, which costs next to nothing


@cache
def quick() -> dict:
    """Slices with a class and with masks of the preset quick, and its shipped detector."""
    slices, lesions = common.quick_data(common.QUICK_DATA)
    return {
        "train": slices["train"],
        "test": slices["test"],
        "lesions": lesions["train"],
        "lesions_test": lesions["test"],
        "detector": models.ShippedWeights.SEGMENTER_QUICK.load(),
    }


@cache
def covid_ct(data: Path) -> dict:
    """COVID-CT's lists, and the detector that has seen drawn chests alone."""
    train, val = (datasets.open_slices(data, part) for part in ("train", "val"))
    return {"train": train, "test": val, "detector": models.ShippedWeights.SEGMENTER_CT.load()}


def budget(preset, slices: int, size: int, weights: str | None) -> compare.Budget:
    """As many looks whether there are few slices or many."""
    network = TrainingConfig(10, 16, 1e-3, weight_decay=1e-4, cosine=True)
    if weights:
        network = replace(network, lr=5e-3)  # times `gentle`
    return compare.Budget(
        training=replace(network, epochs=max(1, round(LOOKS / slices))),
        lesion_training=preset.segmenter,
        s_training=replace(preset.classifier_training, epochs=max(1, round(S_LOOKS / slices))),
        detector=preset.detector,
        classifier=preset.classifier,
        size=size,
        weights=weights,
    )


def row(system: str, seed: int, preset, pairs: list, there: dict, size: int) -> dict:
    """One row of the table, without the probabilities of each slice."""
    name, _, weights = system.partition(" ")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few slices: a class may be missing from a resample
        found = compare.row_of(
            name, pairs, there.get("lesions_test"), seed=seed, progress=False,
            budget=budget(preset, len(pairs[0][0]), size, weights or None),
            detector=there["detector"], lesions=there.get("lesions"),
            fabric=make_fabric("32-true", "cpu"),
        )  # fmt: skip
    return {key: value for key, value in found.items() if key != "probabilities"}


def of_phantoms(system: str, per_class: int, seed: int) -> dict:
    there = quick()
    few = compare.few(there["train"], per_class, seed)
    pairs = [(few, there["test"])]
    return row(system, seed, common.QUICK, pairs, there, common.QUICK.phantoms.size)


def of_covid_ct(system: str, seed: int, data: Path) -> dict:
    there = covid_ct(data)
    return row(system, seed, PRESETS["semiseg"], [(there["train"], there["test"])], there, 192)


def settings(preset, about: str) -> dict:
    facts = {"about": about, "looks": LOOKS, "s_looks": S_LOOKS, "generator": common.GENERATOR}
    return facts | {name: asdict(preset)[name] for name in ("segmenter", "classifier_training")}


def phantoms(jobs: int = 1, systems: tuple[str, ...] = (), out: Path = OUT["phantoms"]) -> None:
    """The table at 300 slices of each class, and the curve over 30 to 1,000.

    Args:
        systems: only these; a network of ImageNet is "NAME WEIGHTS" (a download).
    """
    cases = [(name, MIDDLE) for name in TABLE]
    cases += [(name, size) for name in CURVE for size in SIZES if size != MIDDLE]
    chosen = [case for case in cases if not systems or case[0] in systems]
    parts = {f"{name}, {size}, {s}": (of_phantoms, name, size, s) for s in SEEDS
             for name, size in chosen}  # fmt: skip
    about = "phantoms of the preset quick, three classes; test patients that no detector saw"
    run(out, settings(common.QUICK, about), parts, jobs)


def covid_ct_val(
    data: Path = DATA / "covid-ct", jobs: int = 1, out: Path = OUT["covid_ct"]
) -> None:
    """The 118 images of val, by networks that learned the 425 of train."""
    parts = {f"{name}, {s}": (of_covid_ct, name, s, data) for s in SEEDS for name in REAL}
    about = "COVID-CT, real figures of two classes: 425 to train, val judged once, 192 pixels"
    run(out, settings(PRESETS["semiseg"], about), parts, jobs)


def run(out: Path, facts: dict, parts: dict, jobs: int) -> None:
    torch.set_num_threads(1)
    source = common.environment()
    for path, result in common.lacking(out, facts, parts, jobs):
        common.save(path, source | result)


if __name__ == "__main__":
    commands = {"phantoms": phantoms, "covid-ct": covid_ct_val}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
