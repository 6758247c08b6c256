"""SEGMENTER_CT: the network of the preset semiseg, trained on drawn chests alone, on real slices.

    python benchmarks/segmenter_ct.py train --out runs/ct.safetensors
    python benchmarks/segmenter_ct.py mean --weights runs/one.safetensors runs/two.safetensors ...
    python benchmarks/segmenter_ct.py judge --weights runs/ct.safetensors --data DIR --half first
    python benchmarks/segmenter_ct.py scans --weights runs/ct.safetensors --data MD
    python benchmarks/segmenter_ct.py classes --weights runs/ct.safetensors --data MD
    python benchmarks/segmenter_ct.py patches --data DIR
    python benchmarks/segmenter_ct.py ship --weights runs/ct.safetensors --data DIR

DIR holds COVID-SemiSeg's TrainingSet: its first 25 slices by number are for choosing, the other
25 are for the report. MD is the sample of COVID-CT-MD with a list slices.csv. Each look at real
slices is written to results/looks.jsonl; none is in the training. A stopped training goes on.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from common import RESULTS, ROOT, environment, interval, part_of
from numpy.random import default_rng
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation
from tqdm import tqdm

from covidmask.config import PRESETS, ClassifierConfig, TrainingConfig
from covidmask.datasets.augmentation import shade, warp
from covidmask.datasets.chest import draw, render, visible_lesions
from covidmask.datasets.lesions import LesionDataset, SemiSeg
from covidmask.datasets.lungs import crop_box, find_lungs
from covidmask.datasets.medical import Slice, hounsfield_to_unit
from covidmask.datasets.patients import draw_positions, make_patient
from covidmask.datasets.scanner import draw_scanner, scan
from covidmask.datasets.scans import LUNG_WINDOW, read_slices
from covidmask.metrics.detection import overlap_means
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import for_inference, fuse, lesion_mask_rcnn
from covidmask.models.weights import SHIPPED, load_segmenter, read_card, save_model
from covidmask.predict import WIDE, lesions_in_lungs
from covidmask.training.classification import s_logits, train_s
from covidmask.training.loop import make_fabric
from covidmask.training.segmentation import evaluate_segmenter, train_segmenter

sys.path.insert(0, str(ROOT))
from tools.shipped_weights import CT, name_bytes  # noqa: E402

PRESET, REGIONS = PRESETS["semiseg"], ("infection", "GGO", "C")
FIRST_SEED = 1_000_000  # of the patients: no other data set shows them
COHORTS = ((2, True, 0.76), (2, False, 0.09), (1, False, 0.07), (0, False, 0.08))  # and shares
TRAINING = TrainingConfig(
    epochs=1, batch_size=4, lr=1e-3, weight_decay=1e-4, warmup=30, cosine=True, average=0.998
)  # fmt: skip


LIMITS = (
    "Trained on drawn chests: it has seen no real lung. On real slices it misses faint and small "
    "lesions and takes vessels, the edge of the diaphragm and muscle beside the lung for lesions; "
    "names of found pixels (GGO or C) are often wrong. It expects lungs cut out. For research and "
    "teaching; not a medical device, not for diagnosis."
)


class DrawnChests(LesionDataset):
    """Slices of ever new patients, cut to the lungs and published as in papers.

    Item `index` is the same in every process. With `different` only so many are drawn, once, and
    kept: later items are other copies of them, turned and shaded anew.
    """

    def __init__(
        self, count: int, first: int = 0, size: int = 256, different: int | None = None
    ) -> None:
        super().__init__("both", PRESET.augment.min_area)
        self.size, self.first, self.different = size, first, different
        self.names = self.patients = [f"{first + index}.png" for index in range(count)]
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = default_rng((FIRST_SEED, self.first + index, 1))
        if not self.different:
            image, mask = self._draw(self.first + index)
        else:
            which = index % self.different
            if which not in self._kept:
                image, mask = self._draw(self.first + which)
                self._kept[which] = np.uint8(np.round(255 * image)), mask
            image, mask = self._kept[which]
            image = np.float32(image) / 255
        image, mask = warp(image, mask, self.size, rng, 0.5)
        return shade(image, rng), mask

    def _draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = default_rng((FIRST_SEED, index))
        which = int(rng.choice(len(COHORTS), p=[share for *_, share in COHORTS]))
        label, severe, _ = COHORTS[which]
        patient = make_patient(FIRST_SEED + index, label, severe=severe)
        patient = replace(patient, scale=1.25 * patient.scale)  # lungs as large as the picture
        scanner = draw_scanner(rng, published=True)
        for position in rng.uniform(0.02, 0.97, 3):  # mostly one that shows a lesion
            if visible_lesions(patient, float(position)):
                break
        image, mask = render(patient, float(position), self.size * 9 // 8, scanner)
        window = []
        for at in np.nonzero(mask):  # the lungs and a little more or less, as pictures are cut
            low, high = rng.uniform(-0.03, 0.06, 2) * len(mask)
            window.append(slice(max(0, int(at.min() - low)), int(at.max() + 1 + high)))
        return image[tuple(window)], mask[tuple(window)]


def half_of(data: Path, which: Literal["first", "second"]) -> LesionDataset:
    """The first or the last 25 slices of COVID-SemiSeg's 50, by number."""
    whole = SemiSeg(data, "train", min_area=PRESET.min_area)
    return part_of(whole, range(25) if which == "first" else range(25, len(whole)))


def train(
    out: Path,
    steps: int = 3000,
    precision: str = "bf16-mixed",
    workers: int = 0,
    start: Path | None = None,
    first: int = 0,
    size: int = 256,
) -> None:
    """Train on drawn chests from random weights, or from `start`, beginning with chest `first`.

    Smaller slices, of `size` pixels a side, are seen in less time: good for the first steps.
    """
    clock = time.perf_counter()
    torch.manual_seed(0)
    model = lesion_mask_rcnn(PRESET.detector) if start is None else load_segmenter(start)
    model.transform.min_size = (size,)
    before = {} if start is None else read_card(start)
    origin = environment()
    fabric = make_fabric(precision, "cpu" if not torch.cuda.is_available() else "auto")
    chests = DrawnChests(steps * TRAINING.batch_size, first, size)
    checkpoint = out.with_suffix(".ckpt")
    options = {"fabric": fabric, "checkpoint": checkpoint, "workers": workers, "memory": None}
    train_segmenter(model, chests, TRAINING, **options)
    card = {**origin, "steps": steps, "crop": "lungs", "seconds": time.perf_counter() - clock}
    if before:
        card["before"] = {key: before[key] for key in ("command", "commit", "steps", "seconds")}
    save_model(model, out, half=True, **card)


def mean(weights: tuple[Path, Path], out: Path) -> None:
    """The mean of the weights after the first and after the second training, as one network."""
    first, second = map(load_segmenter, weights)
    kept, state = first.state_dict(), second.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = (value + kept[name]) / 2
    second.load_state_dict(state)
    card = read_card(weights[1])
    card["command"] += f"`, then `{environment()['command']}"  # the page sets it as code
    save_model(second, out, half=True, **card)


def judge(weights: Path, data: Path, half: Literal["first", "second"] = "first") -> None:
    """Mean Dice of infection, GGO and C over one half, fused maps with the mirrored slice."""
    slices = half_of(data, half)
    found = evaluate_segmenter(load_segmenter(weights), slices, mirror=True, progress=False)
    dice = {name: round(value["dice"], 4) for name, value in found["overlap"].items()}
    log({"data": f"COVID-SemiSeg, {half} 25", "weights": weights.name, "dice": dice})


def scans(weights: Path, data: Path) -> None:
    """Share of the lung called lesion in COVID-CT-MD's sample, and how it ranks slices.

    `data` holds slices.csv (path, class, patient, infected_slice) and the files that it names.
    """
    detector = for_inference(load_segmenter(weights))
    patients: dict[str, list] = {}
    for row in tqdm(table_of(data)):
        found, lungs = lesions_in_lungs(detector, hounsfield(data / row["path"]))
        called = int(((fuse(found["maps"], 0.5) > 0) & lungs).sum())
        patients.setdefault(f"{row['class']}, {row['patient']}", []).append(
            (called, int(lungs.sum()), row["infected_slice"])
        )
    result = {}
    for name, slices in patients.items():
        called, lung = (np.array([one[k] for one in slices], float) for k in (0, 1))
        truth = np.array([one[2] == "1" for one in slices])
        share = called / np.maximum(lung, 1)
        result[name] = {"lesion share of the lung": round(float(called.sum() / lung.sum()), 4)}
        if truth.any() and not truth.all():
            result[name]["AUC of infected slices"] = round(float(roc_auc_score(truth, share)), 3)
    log({"data": "COVID-CT-MD sample", "weights": weights.name, "patients": result})


def classes(weights: Path, data: Path, patients: int = 150, n_boxes: int = 64) -> None:
    """Would a CLASSIFIER_CT be right? S on drawn patients, asked about the real ones of `data`.

    Half of those with COVID-19 are severe, and each patient shows two slices with lesions
    (controls: any), as scanned, cut to the lungs that are found. Of each real patient: the mean
    sigmoid of each class over the slices that show lungs.
    """
    torch.manual_seed(0)
    config = ClassifierConfig(n_boxes=n_boxes, hidden=256)
    model = covid_ct_mask_net(load_segmenter(weights), config).eval()

    @torch.no_grad()
    def rows(slices: Iterator[tuple[np.ndarray, int]]) -> tuple[Tensor, list]:
        found, owners = [], []
        for hu, owner in tqdm(slices):
            lungs = find_lungs(hu)
            if lungs.any():
                grey = hounsfield_to_unit(hu[crop_box(lungs)], LUNG_WINDOW)
                found.append(model.ranked_boxes([torch.from_numpy(grey).repeat(3, 1, 1)]))
                owners.append(owner)
        return torch.cat(found), owners

    def drawn() -> Iterator[tuple[np.ndarray, int]]:
        for number, label in product(range(patients), range(3)):
            seed = 30_000_000 + number
            patient = make_patient(seed, label, severe=label > 0 and number % 2 == 0)
            scanner, rng = draw_scanner(default_rng(seed)), default_rng((seed, label))
            for position in draw_positions(patient, 2):
                yield scan(draw(patient, position, 320)[0], scanner, rng, 0.0), label

    def real() -> Iterator[tuple[np.ndarray, str]]:
        for row in table_of(data):
            yield hounsfield(data / row["path"]), f"{row['class']}, {row['patient']}"

    x, labels = rows(drawn())
    held = torch.arange(len(x)) >= len(x) * 5 // 6  # other patients
    y = torch.tensor(labels)
    training = replace(PRESETS["quick"].classifier_training, epochs=30)
    train_s(model.s, x[~held], y[~held], training, progress=False)
    found, owners = rows(real())
    with torch.no_grad():
        right = float((s_logits(model.s, x[held]).argmax(1) == y[held]).float().mean())
        sigmoids = s_logits(model.s, found).sigmoid().numpy()
    means = {
        name: dict(zip(config.classes, sigmoids[np.array(owners) == name].mean(0).round(3).tolist(),
                       strict=True))
        for name in dict.fromkeys(owners)
    }  # fmt: skip
    log({"data": "COVID-CT-MD sample", "weights": f"{weights.name}, S on {len(x)} drawn slices",
         "accuracy on other drawn slices": round(right, 3), "mean sigmoids": means})  # fmt: skip


def table_of(data: Path) -> list[dict[str, str]]:
    with open(data / "slices.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hounsfield(path: Path) -> np.ndarray:
    return (next(read_slices([Slice(path)], WIDE)) - 0.5) * WIDE[1] + WIDE[0]


def patches(data: Path, each: int = 40, epochs: int = 12) -> None:
    """Can a small network tell drawn from real lung? Accuracy on patches of other slices, 64 px.

    Of the first 25 real slices and 25 drawn ones, all 256 pixels high, patches that are mostly
    lung; five folds of slices. 0.5 is chance, and the lower, the better are the drawn ones.
    """
    drawn = DrawnChests(25, first=10_000_000)
    rng, stacks = default_rng(0), []
    for image in (half.read(i)[0] for half in (half_of(data, "first"), drawn) for i in range(25)):
        picture = F.interpolate(torch.from_numpy(image)[None, None], scale_factor=256 / len(image))
        windows = picture[0, 0].unfold(0, 64, 4).unfold(1, 64, 4).reshape(-1, 64, 64)
        windows = windows[(windows.mean((1, 2)) < 0.45) & (windows.amin((1, 2)) > 0)]
        stacks.append(windows[torch.from_numpy(rng.permutation(len(windows))[:each])])
    right = []
    for fold in tqdm(range(5)):
        torch.manual_seed(fold)
        widths = (1, 16, 32, 64)
        blocks = [Conv2dNormActivation(a, b, stride=2) for a, b in pairwise(widths)]
        net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1))
        parts = [[i for i in range(50) if (i % 5 == fold) == held] for held in (False, True)]
        (x, y), (seen, truth) = (
            (torch.cat([stacks[i] for i in part])[:, None],
             torch.cat([torch.full((len(stacks[i]), 1), float(i >= 25)) for i in part]))
            for part in parts
        )  # fmt: skip
        adam = torch.optim.AdamW(net.parameters(), 2e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(32):
                loss = F.binary_cross_entropy_with_logits(net(x[batch]), y[batch])
                adam.zero_grad()
                loss.backward()
                adam.step()
        with torch.no_grad():
            hits = (net.eval()(seen) > 0) == (truth > 0)
        right.append(float(np.mean([float(hits[truth == kind].float().mean()) for kind in (0, 1)])))
    log({"data": "COVID-SemiSeg, first 25", "drawn or real, balanced accuracy of folds": right})


def means(table: np.ndarray, patients: list[str]) -> dict[str, dict[str, float]]:
    """Mean Dice over slices of each region, and its 95 %."""

    def dice(chosen: np.ndarray) -> list[float]:
        return [overlap_means(table[chosen, k])["dice"] for k in range(len(REGIONS))]

    rows = zip(dice(np.arange(len(table))), *interval(dice, patients, repeats=1000), strict=True)
    rows = (dict(zip(("value", "low", "high"), row, strict=True)) for row in rows)
    return dict(zip(REGIONS, rows, strict=True))


def ship(
    weights: Path, data: Path, half: Literal["first", "second"] = "second", out: Path = SHIPPED
) -> None:
    """Judge on one half, and put the file with its card among the shipped ones."""
    slices, model = half_of(data, half), load_segmenter(weights)
    looks = (RESULTS / "looks.jsonl").read_text(encoding="utf-8").splitlines()
    before = sum(f"{half} 25" in look or "both halves" in look for look in looks)
    table = evaluate_segmenter(model, slices, mirror=True, progress=False)["table"]
    found = {f"Dice, {name}": dice for name, dice in means(table, slices.patients).items()}
    log({"data": f"COVID-SemiSeg, {half} 25", "weights": weights.name, "dice": found})
    card = read_card(weights) | {
        "seed": 0,
        "data": "drawn chests (`covidmask.datasets.chest`, synthetic), no real slice",
        "test_data": f"the {half} 25 by number of the 50 training slices of COVID-SemiSeg, real, "
        f"of patients with COVID-19, earlier looks at them: {before} (results/looks.jsonl)",
        "limits": LIMITS,
        "metrics": {"slices": len(slices), "patients": "an unknown number of", **found},
        "preset": json.loads(json.dumps(asdict(PRESET))),
    }
    save_model(model, out / CT, half=True, **card)
    name_bytes(out)


def log(look: dict) -> None:
    """Keep a look at real slices, and show it."""
    look = {"date": time.strftime("%F %T")} | look
    with open(RESULTS / "looks.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(look) + "\n")
    print(json.dumps(look, indent=1))


if __name__ == "__main__":
    commands = {each.__name__: each for each in (train, mean, judge, scans, classes, patches, ship)}
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
