"""What do ranked boxes lose? COVID-CT's training images, two classes, in five folds.

    python benchmarks/covid_ct.py --data DIR      # DIR: what `covidmask fetch covid-ct` made

Every row is a logistic regression on numbers that a frozen network gives for an image, from the
paper's vector to whole feature maps. Folds keep the panels of one figure together. Nothing is
chosen here, and neither val nor test images are read. Fills chapter 9, which shows no image.
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
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from covidmask import models
from covidmask.config import PRESETS
from covidmask.datasets import open_slices
from covidmask.files import data_root
from covidmask.metrics import bootstrap
from covidmask.models.ranked_boxes import Boxes, Columns
from covidmask.models.systems import ImageClassifier, PooledMaps, _square
from covidmask.training.compare import auc, folds_of

OUT, DATA = common.RESULTS / "covid_ct.json", data_root() / "covid-ct"
TWIN = common.TWINS / "09_real_ct.py"
N, FOLDS, STRENGTH = 64, 5, 0.01  # boxes; folds; C of the logistic regression, for every row
PLACE = ("label", "x1", "y1", "x2", "y2")
WORDS = {
    "scores": "scores of the 64 boxes, in their order",
    "paper": "score and four deltas, in their order (the paper's vector)",
    "spread": "the same, as mean, spread and quantiles over the boxes",
    "place": "and lesion class and place of each box",
    "grey": "and mean, spread, least and most grey in each box",
    "hidden": "what the box head makes of each box: mean and maximum over the boxes",
    "maps": "feature maps of the detector: mean and maximum over the image",
    "imagenet": "MobileNetV2 of ImageNet, frozen: its pooled features",
}
TABLE = {
    "what a logistic regression reads": "{words}",
    "numbers": "{numbers:,}",
    "AUC (95 % over figures)": "{auc:.3f} ({auc_by_figure[0]:.3f} to {auc_by_figure[1]:.3f})",
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


@torch.no_grad()
def features_of(slices, weights: str) -> dict[str, np.ndarray]:
    """The numbers of each row of the table, [M, F]."""
    detector = models.ShippedWeights.SEGMENTER_CT.load()
    config = replace(PRESETS["semiseg"].classifier, n_boxes=N)
    maps, parts = PooledMaps(models.ShippedWeights.SEGMENTER_CT.load()).eval(), []
    image_net = ImageClassifier("mobilenet_v2", slices.classes, weights=weights).eval()
    body = torchvision.models.MobileNet_V2_Weights[weights].transforms()
    for index in tqdm(range(len(slices)), desc="looking"):
        image = slices[index][0]
        rows, hidden = looks(detector, image, config)
        x = _square([image], 224)
        x = (x - torch.tensor(body.mean)[:, None, None]) / torch.tensor(body.std)[:, None, None]
        pooled = image_net.network.features(x).mean((2, 3))
        parts.append((rows, hidden, maps([image])[0], pooled[0]))
    rows, hidden, maps, pooled = (torch.stack(part).numpy() for part in zip(*parts, strict=True))

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
        "maps": maps,
        "imagenet": pooled,
    }


def judge(features: np.ndarray, slices) -> dict:
    """AUC of all images, each by the fold that did not train on it; 95 % over figures."""
    labels, shares = np.array(slices.labels), np.zeros((len(slices), 2))
    for train, test in folds_of(slices, FOLDS):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=5000))
        model.fit(features[train], labels[train])
        shares[test] = model.predict_proba(features[test])
    owner = np.unique(slices.patients, return_inverse=True)[1]
    of_figure = [np.flatnonzero(owner == figure) for figure in range(owner.max() + 1)]

    def drawn(figures: np.ndarray) -> float:
        chosen = np.concatenate([of_figure[figure] for figure in figures])
        return auc(labels[chosen], shares[chosen])

    ends = bootstrap(len(of_figure), drawn, repeats=1000).tolist()
    return {"numbers": features.shape[1], "auc": auc(labels, shares), "auc_by_figure": ends}


def markdown(result: dict) -> str:
    rows = [row | {"words": WORDS[name]} for name, row in result["rows"].items()]
    made = common.origin(result, "`results/covid_ct.json`")
    text = f"COVID-CT, {result['images']} training images, {FOLDS} folds, real. "
    return "\n".join([*common.formatted(TABLE, rows), "", text + made])


def measure(
    data: Path = DATA, weights: str = "IMAGENET1K_V1", out: Path = OUT
) -> Iterator[tuple[Path, dict]]:
    slices = open_slices(data, "train")
    settings = {
        "about": "COVID-CT's training images, real figures of two classes, in five folds",
        "images": len(slices),
        "figures": len(set(slices.patients)),
        "boxes": N,
        "strength": STRENGTH,
        "segmenter": models.ShippedWeights.SEGMENTER_CT.value,
        "weights": weights,
    }
    if not common.complete(out, settings):
        found = features_of(slices, weights)
        yield out, settings | {"rows": {name: judge(x, slices) for name, x in found.items()}}


if __name__ == "__main__":
    common.command(measure, OUT, (TWIN, "covid_ct", markdown))
