"""Every system of `covidmask compare`, side by side: on phantoms, or on COVID-CT.

    python benchmarks/side_by_side.py phantoms
    python benchmarks/side_by_side.py covid-ct --data DIR     # what `covidmask fetch covid-ct` made

A network that trains on images sees LOOKS slices, some of them many times where there are few: the
budget does not grow with the data. Three seeds, each with its own draw of training slices. Nothing
was tuned for a system. On COVID-CT all of train is learned, and val is judged once. What a file of
results has is left alone. `page` fills chapters 12 and 16.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import common
import numpy as np
import torch
import tyro

from covidmask import datasets, models
from covidmask.config import PRESETS, TrainingConfig
from covidmask.files import data_root
from covidmask.training import compare
from covidmask.training.loop import make_fabric

SEEDS, SIZES, MIDDLE = (0, 1, 2), (30, 100, 300, 1000), 300  # training slices of each class
IMAGENET = "IMAGENET1K_V1"
CURVE = ("scores", "heads", "areas", "maps", "inside", "resnet18", f"mobilenet_v2 {IMAGENET}")
TABLE = (
    *CURVE, "heads_bn", "full", "mask", "faster", "unet", "fcn", "jcs", "covnet+resnet18",
    "mobilenet_v3_small", "densenet169+lungs",
)  # fmt: skip
REAL = (*CURVE, "mobilenet_v2")
OUT = {name: common.RESULTS / f"side_by_side_{name}.json" for name in ("phantoms", "covid_ct")}
DATA, CHAPTERS = data_root(), {"phantoms": "12_side_by_side", "covid_ct": "16_real_classes"}
TWIN = {name: common.TWINS / f"{chapter}.py" for name, chapter in CHAPTERS.items()}
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
    network = TrainingConfig(10, min(16, slices), 1e-3, weight_decay=1e-4, cosine=True)
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


def phantoms(
    jobs: int = 1, systems: tuple[str, ...] = (), curve: bool = True, out: Path = OUT["phantoms"]
) -> None:
    """The table at 300 slices of each class, and the curve over 30 to 1,000.

    Args:
        systems: only these; a network of ImageNet is "NAME WEIGHTS" (a download).
        curve: without it the table alone.
    """
    cases = [(name, MIDDLE) for name in TABLE]
    cases += [(name, size) for name in CURVE for size in SIZES if curve and size != MIDDLE]
    chosen = [case for case in cases if not systems or case[0] in systems]
    parts = {f"{name}, {size}, {s}": (of_phantoms, name, size, s) for s in SEEDS
             for name, size in chosen}  # fmt: skip
    about = "phantoms of the preset quick, three classes; test patients that no detector saw"
    run(out, settings(common.QUICK, about), parts, jobs)


def covid_ct_val(
    data: Path = DATA / "covid-ct", jobs: int = 1, systems: tuple[str, ...] = REAL,
    out: Path = OUT["covid_ct"],
) -> None:  # fmt: skip
    """The 118 images of val, by networks that learned the 425 of train."""
    parts = {f"{name}, {s}": (of_covid_ct, name, s, data) for s in SEEDS for name in systems}
    about = "COVID-CT, real figures of two classes: 425 to train, val judged once, 192 pixels"
    run(out, settings(PRESETS["semiseg"], about), parts, jobs)


def run(out: Path, facts: dict, parts: dict, jobs: int) -> None:
    torch.set_num_threads(1)
    source = common.environment()
    for path, result in common.lacking(out, facts, parts, jobs):
        common.save(path, source | result)


def rows_of(result: dict) -> dict[tuple[str, str], list[dict]]:
    """{(system, what it learned from): rows of its seeds}, of the keys "system, size, seed"."""
    found: dict = {}
    for key in sorted(result["parts"], key=lambda key: int(key.rsplit(", ", 1)[1])):
        *of, _ = key.split(", ")
        found.setdefault((of[0], of[-1]), []).append(result["parts"][key])
    return found


def spread(values: list[float]) -> str:
    """Mean of the seeds, and from the lowest to the highest."""
    if len(values) == 1:
        return f"{values[0]:.3f} (one seed)"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def right(rows: list[dict]) -> np.ndarray:
    """Share of the seeds that have a test slice of the phantoms right, [M].

    These slices are sorted by class, as many of each, and those of a patient follow one another.
    """
    labels = 3 * np.arange(rows[0]["n"]) // rows[0]["n"]
    found = [np.array(list(map(int, row["predictions"]))) == labels for row in rows]
    for row, ours in zip(rows, found, strict=True):
        assert ours.mean() == row["accuracy"], "the test slices lie in another order"
    return np.mean(found, axis=0)


def ahead(rows: list[dict], base: list[dict]) -> str:
    """Accuracy above that of `base` on the same slices and seeds, and its 95 % over patients."""
    seeds, n = min(len(rows), len(base)), base[0]["n"]
    patients = np.arange(n) // (n // base[0]["scans"])
    found = common.gain(right(rows[:seeds]), right(base[:seeds]), patients)
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*found)


def line(system: str, rows: list[dict], base: list[dict] | None) -> dict[str, str]:
    """The cells of one system."""
    name, _, weights = system.partition(" ")
    row = rows[0]
    cells = {
        "system": f"`{name}`" + (", from ImageNet" if weights else ""),
        "accuracy": spread([row["accuracy"] for row in rows]),
        **({"above `heads`, 95 % by patient": ahead(rows, base)} if base else {}),
        "AUC": spread([row["auc"] for row in rows]),
        "AUC, 95 % by patient, first seed": "{:.3f} to {:.3f}".format(*row["auc_interval"]),
        "trained": f"{row['trained']:,}",
        "minutes": f"{np.mean([row['seconds'] for row in rows]) / 60:.1f}",
    }
    if "scans" in row:
        cells["accuracy, patients"] = f"{np.mean([row['scan_accuracy'] for row in rows]):.3f}"
    if "dice" in row:
        cells["Dice, infection"] = f"{np.mean([row['dice']['infection'] for row in rows]):.3f}"
    return cells


def markdown(result: dict, key: str, about: str) -> str:
    """The table of the systems that learned from `key`, the best first."""
    rows = {name: found for (name, size), found in rows_of(result).items() if size in (key, name)}
    best = sorted(rows, key=lambda name: -np.mean([row["auc"] for row in rows[name]]))
    base = rows.get("heads") if key else None  # COVID-CT's file does not say whose an image is
    lines = [line(name, rows[name], base if name != "heads" else None) for name in best]
    head = list(dict.fromkeys(title for cells in lines for title in cells))
    body = [[cells.get(title, "") for title in head] for cells in lines]
    file = f"`results/{OUT[result['name']].name}`"
    return "\n".join([*common.table(head, body), "", f"{about} {common.origin(result, file)}"])


def curve_lines(result: dict) -> str:
    """Lines of Python: what was trained; accuracy of each seed, by system and size; intervals."""
    lines = ["trained = {  # system: parameters trained, mean accuracy"]
    for (name, size), rows in rows_of(result).items():
        if size == str(MIDDLE):
            mean = np.mean([row["accuracy"] for row in rows])
            lines.append(f'    "{name}": ({rows[0]["trained"]}, {mean:.3f}),')
    if {size for _, size in rows_of(result)} == {str(MIDDLE)}:
        return "\n".join([*lines, "}", ""])
    lines += ["}", "curve = {"]
    for name in CURVE:
        sizes = {size: rows for (who, size), rows in rows_of(result).items() if who == name}
        if not sizes:
            continue
        lines.append(f'    "{name}": {{')
        for size in sorted(sizes, key=int):
            values = ", ".join(f"{row['accuracy']:.3f}" for row in sizes[size])
            lines.append(f"        {size}: [{values}],")
        lines.append("    },")
    lines += ["}", "interval = {  # the same: 95 % over patients, of the first seed"]
    for (name, size), rows in sorted(rows_of(result).items(), key=lambda item: int(item[0][1])):
        if name in CURVE:
            ends = ", ".join(f"{end:.3f}" for end in rows[0]["accuracy_interval"])
            lines.append(f'    ("{name}", {size}): ({ends}),')
    return "\n".join([*lines, "}", ""])


PAGES = {
    "phantoms": (str(MIDDLE), "Phantoms, 300 training slices of each class, mean of the seeds and "
                 "their range. Minutes are those of a core."),
    "covid_ct": ("", "COVID-CT, real: the 118 images of val, learned from the 425 of train; "
                 "as patients count source figures."),
}  # fmt: skip


def page() -> None:
    """Fill chapters 12 and 16 from the files of results."""
    for name, (key, about) in PAGES.items():
        if result := common.read(OUT[name]):
            text = markdown(result | {"name": name}, key, about)
            common.fill(TWIN[name], f"side_by_side_{name}", text)
    if result := common.read(OUT["phantoms"]):
        marks = "# curve\n", "# end of curve\n"
        common.replace_between(TWIN["phantoms"], marks, curve_lines(result))


if __name__ == "__main__":
    commands = {"phantoms": phantoms, "covid-ct": covid_ct_val, "page": page}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
