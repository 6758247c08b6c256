"""Every figure of the book, as functions that take data and an Axes and return the Axes.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; what matters is also
shown by line style, hatching or text. `ax=None` makes a new figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from numpy.typing import ArrayLike

from covidmask.config import IMAGE_CLASSES

BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
LESION_COLOURS = (SKY_BLUE, ORANGE)  # labels 1 (GGO) and 2 (C)
LESION_LINES = ("-", "--")
LESION_HATCHES = ("", "///")
CLASS_COLOURS = (GREEN, BLUE, VERMILLION)  # IMAGE_CLASSES
CLASS_LINES = ("-", "--", ":")
BOX_NUMBERS = ("score", "dx", "dy", "dw", "dh")  # columns of a ranked box


def get_ax(width: float = 5, height: float = 4) -> Axes:
    """One Axes in a new figure; sizes in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def show_slice(image: ArrayLike, ax: Axes | None = None) -> Axes:
    """Draw a slice, float [H, W] or [3, H, W] in 0..1."""
    ax = ax or get_ax()
    ax.imshow(_grey(image), cmap="gray", vmin=0, vmax=1)
    return _pixel_axes(ax)


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
            Scores are printed at their boxes; lesions without a score above `score_threshold`
            are left out.
        classes: names of labels 1, 2, ...: the first is drawn solid, the second dashed.
    """
    ax = show_slice(image, ax)
    boxes, labels, masks, scores = _lesion_arrays(lesions, score_threshold, mask_threshold)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        colour, line = LESION_COLOURS[labels[i] - 1], LESION_LINES[labels[i] - 1]
        # pixel p covers p - 0.5 .. p + 0.5 on the axes, and p .. p + 1 in a box
        corner = (x1 - 0.5, y1 - 0.5)
        ax.add_patch(
            Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=colour, ls=line, lw=1)
        )
        if masks is not None and masks[i].any():
            ax.contour(masks[i], levels=[0.5], colors=[colour], linestyles=[line], linewidths=1.5)
        if scores is not None:
            ax.text(*corner, f"{scores[i]:.2f}", color=colour, fontsize=7, va="bottom")
    present = sorted(set(labels.tolist()))
    handles = [
        plt.Line2D(
            [], [], color=LESION_COLOURS[k - 1], ls=LESION_LINES[k - 1], label=classes[k - 1]
        )
        for k in present
    ]
    if handles:
        ax.legend(handles=handles, loc="upper right", fontsize="small")
    return ax


def show_mask(mask: ArrayLike, ax: Axes | None = None) -> Axes:
    """Draw a semantic mask, [H, W], codes 0 background, 1 lung, 2 GGO, 3 consolidation."""
    from matplotlib.colors import ListedColormap

    ax = ax or get_ax()
    mask = np.asarray(mask)
    colours = (BLACK, "#606060", *LESION_COLOURS)
    ax.imshow(mask, cmap=ListedColormap(colours), vmin=-0.5, vmax=3.5, interpolation="nearest")
    if (mask == 3).any():
        ax.contourf(mask == 3, levels=[0.5, 1.5], colors="none", hatches=[LESION_HATCHES[1] * 2])
    names = ("background", "lung", "GGO", "consolidation")
    handles = [
        Patch(
            facecolor=colours[code],
            hatch=LESION_HATCHES[1] * 2 if code == 3 else "",
            edgecolor=BLACK,
            label=names[code],
        )
        for code in np.unique(mask)
    ]
    ax.legend(handles=handles, loc="upper right", fontsize="small")
    return _pixel_axes(ax)


def count_histogram(
    counts: ArrayLike, ax: Axes | None = None, *, classes: Sequence[str] = ("GGO", "C")
) -> Axes:
    """Fig. 1.1: in how many slices a class occurs 0, 1, 2, ... times.

    Args:
        counts: int [M, C], separate regions of each class in each of M slices.
        classes: C names.
    """
    ax = ax or get_ax()
    counts = np.asarray(counts)
    bins = np.arange(counts.max(initial=0) + 2)
    shares = [100 * np.histogram(column, bins)[0] / len(counts) for column in counts.T]
    _grouped_bars(ax, bins[:-1], shares, classes)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="Regions in a slice (count)", ylabel="Slices (%)")
    ax.legend()
    return ax


def area_histogram(
    fractions: ArrayLike,
    labels: ArrayLike,
    ax: Axes | None = None,
    *,
    classes: Sequence[str] = ("GGO", "C"),
    largest: float | None = None,
    bins: int = 20,
) -> Axes:
    """Fig. 1.2: how large the regions of each class are.

    Args:
        fractions: float [R], 0..1: area of each region, divided by that of its image.
        labels: int [R], 1, 2, ...
        classes: names of the labels.
        largest: right end of the axis in %; larger regions count in the last bin. By default the
            largest region sets it.
    """
    ax = ax or get_ax()
    percent, labels = 100 * np.asarray(fractions, dtype=float), np.asarray(labels)
    largest = largest or float(percent.max(initial=1e-3))
    edges = np.linspace(0, largest, bins + 1)
    shares = []
    for label in range(1, len(classes) + 1):
        group = np.minimum(percent[labels == label], largest)
        shares.append(100 * np.histogram(group, edges)[0] / max(len(group), 1))
    _grouped_bars(ax, (edges[:-1] + edges[1:]) / 2, shares, classes)
    ax.set(xlabel="Area of a region (% of the image)", ylabel="Regions of the class (%)")
    ax.legend()
    return ax


def loss_curves(
    history: Sequence[Mapping[str, float]],
    keys: Sequence[str] = ("loss",),
    ax: Axes | None = None,
    *,
    x: str = "step",
    smooth: int = 1,
    ylabel: str = "Loss (no unit)",
) -> Axes:
    """Draw values of a training history against its steps.

    Args:
        history: one dict per step, as training returns it.
        keys: what to draw; entries without a key (such as a value per epoch) are skipped.
        x: the key on the horizontal axis.
        smooth: each point is the mean of this many entries, itself the last.
    """
    ax = ax or get_ax()
    colours = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY_BLUE, BLACK)
    for i, key in enumerate(keys):
        points = np.array([(entry[x], entry[key]) for entry in history if key in entry])
        if not len(points):
            raise ValueError(f"no entry of the history has {key!r}")
        width = min(smooth, len(points))
        values = np.convolve(points[:, 1], np.full(width, 1 / width), mode="valid")
        ax.plot(
            points[width - 1 :, 0],
            values,
            color=colours[i % len(colours)],
            ls=("-", "--", ":", "-.")[i % 4],
            marker="o" if len(values) < 20 else None,
            label=key,
        )
    ax.set(xlabel=f"{x.capitalize()} (count)", ylabel=ylabel)
    ax.legend()
    return ax


def confusion_matrix(
    confusion: ArrayLike, ax: Axes | None = None, *, classes: Sequence[str] = IMAGE_CLASSES
) -> Axes:
    """Draw counts [C, C] (true classes in rows) with the share of each row in %."""
    import seaborn

    ax = ax or get_ax()
    confusion = np.asarray(confusion)
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    text = [
        [f"{n:,}\n{p:.1f} %" for n, p in zip(*row, strict=True)]
        for row in zip(confusion, share, strict=True)
    ]
    names = [name.replace(" ", "\n") for name in classes]
    seaborn.heatmap(
        share,
        annot=np.array(text),
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=100,
        square=True,
        xticklabels=names,
        yticklabels=names,
        cbar_kws={"label": "Share of the true class (%)"},
        ax=ax,
    )
    ax.tick_params(rotation=0)
    ax.set(xlabel="Predicted class", ylabel="True class")
    return ax


def ranked_box_matrix(rows: ArrayLike, ax: Axes | None = None) -> Axes:
    """Draw the ranked boxes of one slice, float [N, 5], as a heat map with rank on x.

    The numbers differ in scale, so each is divided by its largest magnitude, which is printed.
    """
    ax = ax or get_ax(8, 2.5)
    rows = np.asarray(rows, dtype=float).T  # [5, N]
    largest = np.abs(rows).max(axis=1)
    drawn = ax.imshow(
        rows / np.where(largest > 0, largest, 1)[:, None],
        cmap="PuOr",
        vmin=-1,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, rows.shape[1] + 0.5, len(rows) - 0.5, -0.5),
    )
    ax.set_yticks(
        range(len(rows)),
        [f"{name} / {value:.2g}" for name, value in zip(BOX_NUMBERS, largest, strict=True)],
    )
    ax.set(xlabel="Rank of the box (1 is the best score)", ylabel="Number /\nits largest magnitude")
    ax.figure.colorbar(drawn, ax=ax, label="Ratio (no unit)")
    return ax


def score_by_rank(
    rows: ArrayLike,
    labels: ArrayLike,
    ax: Axes | None = None,
    *,
    quantiles: tuple[float, float] = (0.25, 0.75),
    classes: Sequence[str] = IMAGE_CLASSES,
) -> Axes:
    """Draw the mean score at each rank, one line per image class, with a band of quantiles.

    Args:
        rows: float [M, N, 5], the ranked boxes of M slices.
        labels: int [M], image classes; a class without slices is left out.
    """
    ax = ax or get_ax()
    rows, labels = np.asarray(rows), np.asarray(labels)
    ranks = np.arange(1, rows.shape[1] + 1)
    for i, name in enumerate(classes):
        scores = rows[labels == i, :, 0]  # [slices of the class, N]
        if len(scores):
            low, high = np.quantile(scores, quantiles, axis=0)
            ax.fill_between(ranks, low, high, color=CLASS_COLOURS[i], alpha=0.2, lw=0)
            ax.plot(
                ranks,
                scores.mean(axis=0),
                color=CLASS_COLOURS[i],
                ls=CLASS_LINES[i],
                label=f"{name} ({len(scores)} slices)",
            )
    low, high = (f"{100 * q:g}" for q in quantiles)
    ax.set(
        xlabel="Rank of the box (1 is the best score)",
        ylabel=f"Score: mean, {low} to {high} % quantiles",
        ylim=(0, 1.02),
    )
    ax.legend()
    return ax


def _grey(image: ArrayLike) -> np.ndarray:
    """float32 [H, W] of [H, W] or of [3, H, W] with three equal channels."""
    image = np.asarray(image, dtype=np.float32)
    return image[0] if image.ndim == 3 else image


def _pixel_axes(ax: Axes) -> Axes:
    ax.set(xlabel="x (pixels)", ylabel="y (pixels)")
    return ax


def _grouped_bars(
    ax: Axes, centres: np.ndarray, heights: Sequence[np.ndarray], names: Sequence[str]
) -> None:
    """Bars of several lesion classes side by side at equally spaced centres."""
    width = 0.8 * (centres[1] - centres[0] if len(centres) > 1 else 1) / len(names)
    for i, name in enumerate(names):
        ax.bar(
            centres + (i - (len(names) - 1) / 2) * width,
            heights[i],
            width,
            label=name,
            color=LESION_COLOURS[i],
            hatch=LESION_HATCHES[i],
            edgecolor=BLACK,
            linewidth=0.5,
        )


def _lesion_arrays(
    lesions: Mapping, score_threshold: float, mask_threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """boxes [K, 4], labels [K], masks bool [K, H, W] or None, scores [K] or None."""
    from covidmask.models.detector import binary_masks

    boxes, labels = (lesions[key].detach().cpu().numpy().copy() for key in ("boxes", "labels"))
    masks = binary_masks(lesions, mask_threshold).cpu().numpy() if "masks" in lesions else None
    if "scores" not in lesions:
        return boxes, labels, masks, None
    scores = lesions["scores"].detach().cpu().numpy()
    keep = scores > score_threshold
    return boxes[keep], labels[keep], None if masks is None else masks[keep], scores[keep]
