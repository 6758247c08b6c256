"""Our modules with their shapes: in model.svg, {names} stand for what the model has."""

from __future__ import annotations

from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from covidmask.config import IMAGE_CLASSES
from covidmask.plotting import CLASS_COLOURS

if TYPE_CHECKING:
    from covidmask.models.classifier import CovidCTMaskNet


def model_diagram(model: CovidCTMaskNet) -> str:
    """The path from a slice to the probabilities, as SVG text with the shapes of this very model.

    The content of the paper's Figure 3, in our modules: the detector, the ranking, which has no
    weights, and S. The mask branch is dashed, because the segmenter alone has it.

    Raises:
        ValueError: S is not three linear layers.
    """
    import torch

    layers = [module for module in model.s.modules() if isinstance(module, torch.nn.Linear)]
    if len(layers) != 3:
        raise ValueError(f"the picture shows an S of three linear layers, not {model.s}")
    picture = Path(__file__).with_name("model.svg")
    # an arrow to x = {to} and a box from {x} on, for each class
    one_class = picture.with_name("class.svg").read_text("utf-8")
    detector, classes = model.detector, model.config.classes
    many, widths, x, boxes = len(classes), (108, 212, 136), 14, ""
    if classes != IMAGE_CLASSES:
        widths = [(492 - 18 * (many - 1)) / many] * many
    for name, width, colour in zip(classes, widths, cycle(CLASS_COLOURS), strict=False):
        place = {"x": x, "width": width, "colour": colour, "name": escape(name)}
        end = 216 if x < 216 < x + width else x + width / 2  # straight down where that is the box
        place |= {"middle": x + width / 2, "to": end, "left": end - 4.95, "right": end + 4.95}
        boxes, x = boxes + one_class.format(**place), x + width + 18
    strides = ", ".join(map(str, detector.strides))
    return picture.read_text("utf-8").format(
        model=model,
        roi=detector.roi_heads,
        layers=layers,
        backbone=escape(detector.config.backbone.replace("resnet", "ResNet-")),
        strides=f"stride{'s' * (len(detector.strides) > 1)} {strides}",
        proposals=detector.rpn.post_nms_top_n(),
        columns=len(model.config.columns),
        classes="three" if many == 3 else many,
        boxes=boxes,
    )
