"""Every figure of the book, as functions that take data and an Axes and return the Axes.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; what matters is also
shown by line style, hatching or text. `ax=None` makes a new figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle
from numpy.typing import ArrayLike

from covidmask.config import IMAGE_CLASSES

BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
# of lesion labels 1, 2, ...; they repeat at different numbers, so that 28 classes look different
COLOURS = (SKY_BLUE, ORANGE, GREEN, PURPLE, BLUE, VERMILLION, YELLOW) * 4
LINES = ("-", "--", ":", "-.") * 7
HATCHES = ("", "///", "...", "xxx", "++") * 6
LESION_COLOURS, LESION_LINES, LESION_HATCHES = COLOURS[:2], LINES[:2], HATCHES[:2]  # GGO, C
CLASS_COLOURS, CLASS_LINES = (GREEN, BLUE, VERMILLION), LINES[:3]  # IMAGE_CLASSES
BOX_NUMBERS = ("score", "dx", "dy", "dw", "dh")  # columns of a ranked box


def get_ax(width: float = 5, height: float = 4) -> Axes:
    """One Axes in a new figure; sizes in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def show_slice(image: ArrayLike, ax: Axes | None = None) -> Axes:
    """Draw a slice, float [H, W] or [3, H, W] in 0..1."""
    ax, image = ax or get_ax(), np.asarray(image, dtype=np.float32)
    ax.imshow(image[0] if image.ndim == 3 else image, cmap="gray", vmin=0, vmax=1)
    ax.set(xlabel="x (pixels)", ylabel="y (pixels)")
    return ax


def show_lesions(
    image: ArrayLike,
    lesions: Mapping,
    ax: Axes | None = None,
    *,
    classes: Sequence[str] = ("GGO", "C"),
    score_threshold: float = 0.0,
    mask_threshold: float = 0.5,
) -> Axes:
    """Draw a slice with the boxes and mask outlines of targets or predictions.

    Args:
        image: float [H, W] or [3, H, W] in 0..1.
        lesions: boxes, labels, and where present masks and scores, as in `metrics.detection`.
            Scores are printed; lesions without one above `score_threshold` are left out.
        classes: names of labels 1, 2, ...: the first is drawn solid, the second dashed.
    """
    from covidmask.models.detector import binary_masks

    ax = show_slice(image, ax)
    keys = lesions.keys() & {"boxes", "labels", "scores"}
    found = {key: lesions[key].detach().cpu().numpy() for key in keys}
    if "masks" in lesions:
        found["masks"] = binary_masks(lesions, mask_threshold).cpu().numpy()
    keep = found["scores"] > score_threshold if "scores" in found else slice(None)
    found = {key: value[keep] for key, value in found.items()}
    for i, (x1, y1, x2, y2) in enumerate(found["boxes"]):
        colour, line = (looks[found["labels"][i] - 1] for looks in (COLOURS, LINES))
        # pixel p covers p - 0.5 .. p + 0.5 on the axes, and p .. p + 1 in a box
        corner, look = (x1 - 0.5, y1 - 0.5), {"edgecolor": colour, "ls": line, "lw": 1}
        ax.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, **look))
        if "masks" in found and found["masks"][i].any():
            ax.contour(found["masks"][i], [0.5], colors=[colour], linestyles=[line], linewidths=1.5)
        if "scores" in found:
            ax.text(*corner, f"{found['scores'][i]:.2f}", color=colour, fontsize=7, va="bottom")
    looks = [(COLOURS[k - 1], LINES[k - 1], classes[k - 1]) for k in np.unique(found["labels"])]
    if looks:
        lines = [plt.Line2D([], [], color=c, ls=line, label=name) for c, line, name in looks]
        ax.legend(handles=lines, loc="upper right", fontsize="small")
    return ax


def show_mask(
    mask: ArrayLike, ax: Axes | None = None, *, classes: Sequence[str] = ("GGO", "consolidation")
) -> Axes:
    """Draw a semantic mask, [H, W], codes 0 background, 1 lung, then those of `classes`."""
    ax, mask = ax or get_ax(), np.asarray(mask)
    names = ("background", "lung", *classes)
    colours = (BLACK, "#606060", *COLOURS[: len(classes)])
    hatches = ("", "", *(2 * hatch for hatch in HATCHES[: len(classes)]))
    look = {"vmin": -0.5, "vmax": len(names) - 0.5, "interpolation": "nearest"}
    ax.imshow(mask, ListedColormap(colours), **look)
    handles = []
    for k in np.unique(mask):
        if hatches[k]:
            ax.contourf(mask == k, levels=[0.5, 1.5], colors="none", hatches=[hatches[k]])
        look = {"facecolor": colours[k], "hatch": hatches[k], "edgecolor": BLACK}
        handles.append(Patch(label=names[k], **look))
    ax.legend(handles=handles, loc="upper right", fontsize="small")
    ax.set(xlabel="x (pixels)", ylabel="y (pixels)")
    return ax


def loss_curves(
    history: Sequence[Mapping[str, float]],
    keys: Sequence[str] = ("loss",),
    ax: Axes | None = None,
    *,
    smooth: int = 1,
    ylabel: str = "Loss (no unit)",
) -> Axes:
    """Draw values of a training history (one dict per step) against its steps.

    Args:
        keys: what to draw; entries without a key (such as a value per epoch) are skipped.
        smooth: each point is the mean of this many entries, itself the last.
    """
    import pandas

    ax, table = ax or get_ax(), pandas.DataFrame(history).set_index("step")
    colours = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY_BLUE, BLACK) * 4
    for key, colour, line in zip(keys, colours, LINES, strict=False):
        values = table[key].dropna()
        values = values.rolling(min(smooth, len(values))).mean().dropna()
        marker = "o" if len(values) < 20 else None
        ax.plot(values.index, values, color=colour, ls=line, marker=marker, label=key)
    ax.set(xlabel="Step (count)", ylabel=ylabel)
    ax.legend()
    return ax


def confusion_matrix(
    confusion: ArrayLike, ax: Axes | None = None, *, classes: Sequence[str] = IMAGE_CLASSES
) -> Axes:
    """Draw counts [C, C] (true classes in rows) with the share of each row in %."""
    import seaborn

    ax, confusion = ax or get_ax(), np.asarray(confusion)
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    pairs = zip(confusion.flat, share.flat, strict=True)
    text = np.reshape([f"{n:,}\n{p:.1f} %" for n, p in pairs], share.shape)
    names = [name.replace(" ", "\n") for name in classes]
    bar = {"label": "Share of the true class (%)"}
    look = {"cmap": "Blues", "vmin": 0, "vmax": 100, "square": True, "cbar_kws": bar, "ax": ax}
    seaborn.heatmap(share, annot=text, fmt="", xticklabels=names, yticklabels=names, **look)
    ax.tick_params(rotation=0)
    ax.set(xlabel="Predicted class", ylabel="True class")
    return ax


def ranked_box_matrix(
    rows: ArrayLike, ax: Axes | None = None, *, columns: Sequence[str] = BOX_NUMBERS
) -> Axes:
    """Draw the ranked boxes of one slice, float [N, columns], as a heat map with rank on x.

    The numbers differ in scale, so each is divided by its largest magnitude, which is printed.
    """
    ax = ax or get_ax(8, 2.5)
    rows = np.asarray(rows, dtype=float).T  # [columns, N]
    largest = np.abs(rows).max(axis=1)
    ratio = rows / np.where(largest > 0, largest, 1)[:, None]
    place = {"aspect": "auto", "extent": (0.5, rows.shape[1] + 0.5, len(rows) - 0.5, -0.5)}
    drawn = ax.imshow(ratio, cmap="PuOr", vmin=-1, vmax=1, interpolation="nearest", **place)
    names = [f"{name} / {value:.2g}" for name, value in zip(columns, largest, strict=True)]
    ax.set_yticks(range(len(rows)), names)
    ax.set(xlabel="Rank of the box (1 is the best score)", ylabel="Number /\nits largest magnitude")
    ax.figure.colorbar(drawn, ax=ax, label="Ratio (no unit)")
    return ax


def score_by_rank(
    rows: ArrayLike, labels: ArrayLike, ax: Axes | None = None, *, classes=IMAGE_CLASSES
) -> Axes:
    """Draw the mean score at each rank, one line per image class, in a band of its middle half.

    Args:
        rows: float [M, N, 5], the ranked boxes of M slices; the score is the first column.
        labels: int [M], image classes; a class without slices is left out.
    """
    ax, rows, labels = ax or get_ax(), np.asarray(rows), np.asarray(labels)
    ranks = np.arange(1, rows.shape[1] + 1)
    colours = (*CLASS_COLOURS, ORANGE, PURPLE, SKY_BLUE, BLACK) * 4
    for i, name in enumerate(classes):
        scores, colour = rows[labels == i, :, 0], colours[i]  # [slices of the class, N]
        if len(scores):
            low, high = np.quantile(scores, (0.25, 0.75), axis=0)
            ax.fill_between(ranks, low, high, color=colour, alpha=0.2, lw=0)
            label = f"{name} ({len(scores)} slices)"
            ax.plot(ranks, scores.mean(axis=0), color=colour, ls=LINES[i], label=label)
    ax.set(xlabel="Rank of the box (1 is the best score)", ylim=(0, 1.02))
    ax.set_ylabel("Score: mean, 25 to 75 % quantiles")
    ax.legend()
    return ax
