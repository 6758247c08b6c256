"""What do ranked boxes lose? COVID-CT, real figures of two classes: five folds, then val once.

    python benchmarks/covid_ct.py --data DIR      # DIR: what `covidmask fetch covid-ct` made

Every row is a logistic regression on numbers that a frozen network gives for an image, from the
paper's vector to whole feature maps. Folds keep the panels of one figure together. The rows were
chosen by the folds; the validation images were opened once, when all of them stood (boxes at random
places, a control, came later), and the test images are not read. Fills
chapter 16, which shows no image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import common
import numpy as np
import torch
import torchvision
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from covidmask import models
from covidmask.config import PRESETS
from covidmask.datasets import open_slices
from covidmask.files import data_root
from covidmask.models.ranked_boxes import Boxes, Columns
from covidmask.models.systems import BoxMaps, ImageClassifier, PooledMaps, _square
from covidmask.training.compare import auc, folds_of, owners

OUT, DATA = common.RESULTS / "covid_ct.json", data_root() / "covid-ct"
TWIN = common.TWINS / "16_real_classes.py"
N, FOLDS, STRENGTH = 64, 5, 0.01  # boxes; folds; C of the logistic regression, for every row
PLACE = ("label", "x1", "y1", "x2", "y2")
WORDS = {
    "scores": "scores of the 64 boxes, in their order",
    "paper": "score and four deltas, in their order (the paper's vector)",
    "spread": "the same, as mean, spread and quantiles over the boxes",
    "place": "and lesion class and place of each box",
    "grey": "and mean, spread, least and most grey in each box",
    "hidden": "what the box head makes of each box: mean and maximum over the boxes",
    "inside": "largest value of each map channel inside each box: the largest over the boxes",
    "elsewhere": "the same inside boxes of these sizes at places drawn at random",
    "light": "mean and greatest grey value of the whole image",
    "maps": "feature maps of the detector: mean and maximum over the image",
    "both": "score, deltas, class and place of the boxes, and those maps",
    "imagenet": "MobileNetV2 of ImageNet, frozen: its pooled features",
}
SHORT = {
    "scores": "scores",
    "paper": "paper's vector",
    "spread": "its mean, spread, ...",
    "place": "+ class and place",
    "grey": "+ grey in the boxes",
    "hidden": "hidden layer",
    "inside": "maps inside boxes",
    "elsewhere": "maps in boxes elsewhere",
    "light": "two greys of the image",
    "maps": "maps of the image",
    "both": "maps and boxes",
    "imagenet": "ImageNet, frozen",
}
MARKS = ("    # rows of covid_ct\n", "    # end of rows\n")
TABLE = {
    "what a logistic regression reads": "{words}",
    "numbers": "{numbers:,}",
    "AUC, folds (95 % over figures)": "{folds[0]:.3f} ({folds[1]:.3f} to {folds[2]:.3f})",
    "AUC, val": "{val[0]:.3f} ({val[1]:.3f} to {val[2]:.3f})",
}


def grey_of(image: Tensor, places: Tensor) -> Tensor:
    """Mean, spread, least and most grey in each box: [3,H,W], [K,4] shares -> [K,4]."""
    height, width = image.shape[1:]
    rows = []
    for x1, y1, x2, y2 in (places * places.new_tensor([width, height] * 2)).round().int().tolist():
        part = image[0, y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
        part = part if part.numel() else image[0]
        rows.append(torch.stack([part.mean(), part.std(correction=0), part.min(), part.max()]))
    return torch.stack(rows)


@torch.no_grad()
def looks(detector, image: Tensor, config) -> tuple[Tensor, Tensor]:
    """The N ranked boxes of an image: rows [N, 14] of named numbers, and hidden [N, box_features].

    `models.ranked_boxes` with the numbers that its rows leave out.
    """
    features, proposals, shapes = models.propose(detector, [image])
    found = models.run_box_head(detector, features, proposals, shapes)
    one = [part[0] for part in (*found, proposals, shapes)]
    ranking = models.rank_boxes(*one, detector.roi_heads.box_coder, config)
    values = models.encoded_rows(one[0][ranking.roi], one[1][ranking.roi], ranking.label)
    height, width = shapes[0]
    place = ranking.box / ranking.box.new_tensor([width, height, width, height])
    boxes = Boxes(values[:, 0], values[:, 1:], ranking.label, place)
    columns = Columns(("score", "dx", "dy", "dw", "dh", *PLACE))
    rows = torch.cat([columns(boxes), grey_of(image, place)], 1)  # [K, 14]
    heads, kept = detector.roi_heads, [proposals[0][ranking.roi]]
    hidden = heads.box_head(heads.box_roi_pool(features, kept, shapes))  # [K, box_features]
    return models.pad_rows(rows, config.n_boxes), models.pad_rows(hidden, config.n_boxes)


class Elsewhere(BoxMaps):
    """Boxes of the same sizes, anywhere in the image: does it matter where the ranked ones lie?"""

    def placed(self, boxes: Tensor, shape: tuple[int, int]) -> Tensor:
        size = boxes[:, 2:] - boxes[:, :2]
        room = boxes.new_tensor(shape[::-1]) - size
        corner = torch.rand(size.shape, generator=self.drawn) * room.clamp(min=0)
        return torch.cat([corner, corner + size], 1)


@torch.no_grad()
def features_of(slices, weights: str) -> dict[str, np.ndarray]:
    """The numbers of each row of the table, [M, F]."""
    detector = models.ShippedWeights.SEGMENTER_CT.load()
    config = replace(PRESETS["semiseg"].classifier, n_boxes=N)
    maps, parts = PooledMaps(detector).eval(), []
    inside, elsewhere = (kind(detector, config).eval() for kind in (BoxMaps, Elsewhere))
    elsewhere.drawn = torch.Generator().manual_seed(0)
    image_net = ImageClassifier("mobilenet_v2", slices.classes, weights=weights).eval()
    body = torchvision.models.MobileNet_V2_Weights[weights].transforms()
    for index in tqdm(range(len(slices)), desc="looking"):
        image = slices[index][0]
        rows, hidden = looks(detector, image, config)
        x = _square([image], 224)
        x = (x - torch.tensor(body.mean)[:, None, None]) / torch.tensor(body.std)[:, None, None]
        pooled = image_net.network.features(x).mean((2, 3))
        light = torch.stack([image.mean(), image.max()])
        both = inside([image])[0], elsewhere([image])[0]
        parts.append((rows, hidden, *both, light, maps([image])[0], pooled[0]))
    parts = (torch.stack(part).numpy() for part in zip(*parts, strict=True))
    rows, hidden, inside, elsewhere, light, maps, pooled = parts

    def spread(columns: int) -> np.ndarray:
        part = rows[..., :columns]
        low, middle, high = np.quantile(part, (0.1, 0.5, 0.9), axis=1)
        return np.concatenate([part.mean(1), part.std(1), low, middle, high], 1)

    return {
        "scores": rows[:, :, 0],
        "paper": rows[:, :, :5].reshape(len(rows), -1),
        "spread": spread(5),
        "place": spread(10),
        "grey": spread(14),
        "hidden": np.concatenate([hidden.mean(1), hidden.max(1)], 1),
        "inside": inside,
        "elsewhere": elsewhere,
        "light": light,
        "maps": maps,
        "both": np.concatenate([spread(10), maps], 1),
        "imagenet": pooled,
    }


def reader() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=5000))


def in_folds(features: np.ndarray, slices) -> np.ndarray:
    """Probabilities [M, 2] of all images, each from the folds that hold it back."""
    labels, shares = np.array(slices.labels), np.zeros((len(slices), 2))
    for train, test in folds_of(slices, FOLDS):
        shares[test] = reader().fit(features[train], labels[train]).predict_proba(features[test])
    return shares


def judged(shares: np.ndarray, slices) -> list[float]:
    """AUC, and its 95 % over figures."""
    labels = np.array(slices.labels)

    def value(drawn: np.ndarray) -> float:
        return auc(labels[drawn], shares[drawn])

    ends = common.interval(value, owners(slices), repeats=1000)
    return [value(np.arange(len(labels))), *ends]


def markdown(result: dict) -> str:
    rows = [row | {"words": WORDS[name]} for name, row in result["rows"].items()]
    made = common.origin(result, "`results/covid_ct.json`")
    text = f"COVID-CT, real: {result['images']} training images, {result['val_images']} of val. "
    return "\n".join([*common.formatted(TABLE, rows), "", text + made])


def measure(
    data: Path = DATA, weights: str = "IMAGENET1K_V1", out: Path = OUT
) -> Iterator[tuple[Path, dict]]:
    train, val = (open_slices(data, part) for part in ("train", "val"))
    settings = {
        "about": "COVID-CT, real figures of two classes: folds of the training list, then val once",
        "images": len(train),
        "figures": len(set(train.patients)),
        "val_images": len(val),
        "boxes": N,
        "strength": STRENGTH,
        "segmenter": models.ShippedWeights.SEGMENTER_CT.value,
        "weights": weights,
    }
    if common.complete(out, settings):
        return
    known, new = (features_of(part, weights) for part in (train, val))
    rows = {}
    for name, x in known.items():
        shares = reader().fit(x, train.labels).predict_proba(new[name])
        folds = judged(in_folds(x, train), train)
        rows[name] = {"numbers": x.shape[1], "folds": folds, "val": judged(shares, val)}
    yield out, settings | {"rows": rows}


def code(result: dict) -> str:
    """The rows as lines of Python, for the figure."""
    lines = []
    for name, row in result["rows"].items():
        numbers = ", ".join(f"{value:.3f}" for value in row["folds"] + row["val"])
        lines.append(f'    "{SHORT[name]}": ({numbers}),\n')
    return "".join(lines)


if __name__ == "__main__":
    common.command(measure, OUT, (TWIN, "covid_ct", markdown))
    common.replace_between(TWIN, MARKS, code(common.read(OUT)))
