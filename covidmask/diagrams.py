"""Diagrams as SVG text: our modules with their shapes, and the pieces to draw others.

A picture brings its own light background, so it reads the same on a light and on a dark page. It
is `WIDTH` units wide and its letters are at least `SMALL` units high, so that a telephone still
shows them at a readable size. The same arguments give the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from covidmask.config import IMAGE_CLASSES
from covidmask.plotting import BLUE, CLASS_COLOURS, GREEN, PURPLE, VERMILLION

if TYPE_CHECKING:
    from covidmask.models.classifier import CovidCTMaskNet

Point = tuple[float, float]

WIDTH = 520
SMALL, NORMAL = 16, 17.5  # font sizes
INK, PAPER, LINE = "#1a1a1a", "#fafaf7", "#555555"
HEAD = 9  # length of an arrow's head
FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"


def svg(height: float, title: str, description: str, parts: Sequence[str]) -> str:
    """One picture of `WIDTH` x `height` units; later parts lie over earlier ones.

    Args:
        title, description: what a screen reader says: a name, and the content in a sentence.
    """
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" '
            f'aria-label="{escape(title)}" style="max-width: 100%; height: auto" '
            f'font-family="{FONT}" font-size="{SMALL}" text-anchor="middle" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            f'<rect width="{WIDTH}" height="{height:g}" rx="14" fill="{PAPER}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def words(x: float, y: float, lines: Sequence[str], anchor: str = "middle") -> str:
    """Lines of text at x, the first with its baseline at y and in bold."""
    texts = []
    for i, text in enumerate(lines):
        bold = f' font-size="{NORMAL}" font-weight="bold"' if i == 0 else ""
        place = f'x="{x:g}" y="{y + 22 * i:g}" text-anchor="{anchor}"'
        texts.append(f"<text {place}{bold}>{escape(text)}</text>")
    return "\n".join(texts)


def box(
    x: float, y: float, width: float, height: float, lines: Sequence[str], colour: str = LINE,
    dashed: bool = False,
) -> str:  # fmt: skip
    """A white box, outlined in `colour`, with its upper left corner at x, y and centred lines."""
    dash = ' stroke-dasharray="7 5"' if dashed else ""
    first = y + (height - 22 * (len(lines) - 1)) / 2 + 6
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="#ffffff" '
        f'stroke="{colour}" stroke-width="2.5"{dash}/>\n' + words(x + width / 2, first, lines)
    )


def line(points: Sequence[Point], colour: str = LINE, dashed: bool = False) -> str:
    """A line through the points."""
    dash = ' stroke-dasharray="7 5"' if dashed else ""
    return (
        f'<polyline points="{_join(points)}" fill="none" stroke="{colour}" stroke-width="2.5"'
        f"{dash}/>"
    )


def arrow(points: Sequence[Point], colour: str = LINE, dashed: bool = False) -> str:
    """A line with a head; its last piece is horizontal or vertical."""
    (x0, y0), (x1, y1) = points[-2:]
    dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)  # direction of the last piece
    foot = (x1 - HEAD * dx, y1 - HEAD * dy)
    half = 0.55 * HEAD
    head = [
        (x1, y1),
        (foot[0] + half * dy, foot[1] + half * dx),
        (foot[0] - half * dy, foot[1] - half * dx),
    ]
    shaft = line([*points[:-1], foot], colour, dashed)
    return f'{shaft}<polygon points="{_join(head)}" fill="{colour}"/>'


def panel(y: float, height: float, colour: str) -> str:
    """A tinted band across the picture."""
    return (
        f'<rect x="10" y="{y:g}" width="{WIDTH - 20}" height="{height:g}" rx="12" '
        f'fill="{colour}" fill-opacity="0.12"/>'
    )


def model_diagram(model: CovidCTMaskNet) -> str:
    """The path from a slice to three probabilities, with the shapes of this very model.

    The content of the paper's Figure 3, in our modules: the detector, the ranking, which has no
    weights, and S. The mask branch is dashed, because the segmenter alone has it.

    Returns:
        SVG text.
    """
    detector, s, config = model.detector, model.s, model.detector.config
    roi = detector.roi_heads
    strides = detector.strides
    stride = f"stride{'s' * (len(strides) > 1)} {', '.join(map(str, strides))}"
    side, channels = detector.transform.min_size[-1], detector.backbone.out_channels
    anchors, proposals = detector.rpn.head.cls_logits.out_channels, detector.rpn.post_nms_top_n()
    grid, fc6, fc7 = roi.box_roi_pool.output_size, roi.box_head.fc6, roi.box_head.fc7
    head = (fc6.in_features, fc6.out_features, fc7.out_features)
    n, flat = model.config.n_boxes, s.fc_scores.in_features
    layers = (s.fc_scores, s.fc_scores_2, s.fc_scores_img)
    one, two, three = (f"{layer.in_features} → {layer.out_features}" for layer in layers)
    name = config.backbone.replace("resnet", "ResNet-")
    rows = [  # top, height, colour, lines
        (14, 54, LINE, ["Slice", f"3 × {side} × {side}"]),
        (102, 54, BLUE, [f"{name} and FPN", f"{channels} channels, {stride}"]),
        (176, 54, BLUE, ["RPN", f"{anchors} anchors per cell, P = {proposals}"]),
        (250, 54, BLUE, ["RoIAlign", f"P × {channels} × {grid[0]} × {grid[1]}"]),
        (324, 54, BLUE, ["Box head", " → ".join(map(str, head))]),
        (506, 76, GREEN, ["Softmax, decode, NMS, rank",
                          f"IoU at most {model.config.nms:g} in a class",
                          f"keep the N = {n} best"]),
        (602, 54, GREEN, ["Ranked boxes", f"N × 5 = {n} × {flat // n}"]),
        (690, 36, VERMILLION, [f"Flatten: 5N = {flat}"]),
        (744, 36, VERMILLION, [f"Linear, ReLU: {one}"]),
        (798, 36, VERMILLION, [f"Linear, ReLU: {two}"]),
        (852, 36, VERMILLION, [f"Linear: {three} logits"]),
    ]  # fmt: skip
    x, width = 66, 300
    middle, right = x + width / 2, x + width
    logits, deltas = roi.box_predictor.cls_score, roi.box_predictor.bbox_pred
    parts = [panel(90, 392, BLUE), panel(494, 174, GREEN), panel(680, 220, VERMILLION)]
    for (top, height, *_), (below, *_) in zip(rows, rows[1:], strict=False):
        if top != 324:  # from the box head two arrows start
            parts.append(arrow([(middle, top + height), (middle, below)]))
    parts += [box(x, top, width, height, lines, colour) for top, height, colour, lines in rows]
    for left, wide, lines in (
        (x, 108, ["Logits", f"P × {logits.out_features}"]),
        (x + 124, 176, ["Encoded deltas", f"P × {deltas.out_features}"]),
    ):
        centre = left + wide / 2
        parts += [arrow([(centre, 378), (centre, 406)]), arrow([(centre, 460), (centre, 506)])]
        parts.append(box(left, 406, wide, 54, lines, BLUE))
    parts += [
        arrow([(x, 129), (38, 129), (38, 277), (x, 277)]),
        '<text transform="translate(31 203) rotate(-90)">feature maps</text>',
        arrow([(right, 203), (383, 203), (383, 544), (right, 544)]),
        words(394, 424, ["Proposals", "as boxes,", "to decode"], "start"),
        arrow([(right, 277), (398, 277)], PURPLE, dashed=True),
        box(398, 240, 104, 74, ["Masks", "segmenter", "alone"], PURPLE, dashed=True),
        words(502, 114, ["Detector", "copied from", "the segmenter"], "end"),
        words(502, 602, ["Ranking", "no weights"], "end"),
        words(502, 756, ["Module S", "new, trained", "on slices"], "end"),
    ]
    left = 14
    for label, wide, colour in zip(IMAGE_CLASSES, (108, 212, 136), CLASS_COLOURS, strict=True):
        end = middle if left < middle < left + wide else left + wide / 2
        parts.append(arrow([(middle, 888), (middle, 914), (end, 914), (end, 938)]))
        parts.append(box(left, 938, wide, 54, [label, "sigmoid"], colour))
        left += wide + 18
    description = (
        f"A slice passes through {name} with a feature pyramid, the region proposal network, "
        f"RoIAlign and the box head. Scores and encoded deltas are ranked; the {n} best boxes "
        f"become a vector of {flat} numbers, which module S turns into three logits, each with "
        "a sigmoid. The mask branch is drawn dashed, because the segmenter alone has it."
    )
    return svg(1006, "COVID-CT-Mask-Net with its shapes", description, parts)


def _join(points: Sequence[Point]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
