"""A slider over pictures that works in Jupyter, in Colab and in a static page without a network."""

from __future__ import annotations

import io
import uuid
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

import matplotlib.pyplot as plt
from IPython.display import HTML
from matplotlib.figure import Figure

# Pictures are found from the slider itself, not by id, so that a copy of the output works as well.
PAGE = Template(Path(__file__).with_name("slider.html").read_text(encoding="utf-8"))


def frame_slider(
    frames: Sequence[Figure | bytes],
    labels: Sequence[str],
    title: str,
    alt: str | Sequence[str],
    *,
    caption: str = "",
    start: int = 0,
    dpi: int = 100,
) -> HTML:
    """Show one of several precomputed pictures, chosen by a slider; needs no kernel.

    Where scripts are blocked, as in a notebook that is not trusted, the first picture shown stays.

    Args:
        frames: matplotlib figures (drawn at `dpi`, and closed), or the bytes of PNG files.
        labels: what the slider says at each frame, for example "NMS threshold 0.25".
        title: the accessible name of the slider, also shown before it.
        alt: what the pictures show: a text for each, or one text, to which the label is added.
        caption: a sentence under the pictures.
        start: index of the frame shown first.
    """
    labels = [str(label) for label in labels]
    alts = [f"{alt} ({label})" for label in labels] if isinstance(alt, str) else alt
    if not 0 <= start < len(frames):
        raise ValueError(f"start {start}: there are {len(frames)} frames; give the index of one")
    images = ""
    for i, (frame, label, text) in enumerate(zip(frames, labels, alts, strict=True)):
        if not isinstance(frame, bytes):
            buffer = io.BytesIO()
            frame.savefig(buffer, format="png", dpi=dpi)
            plt.close(frame)  # else a notebook shows it once more
            frame = buffer.getvalue()
        style = f"display: {'block' if i == start else 'none'}; max-width: 100%; height: auto;"
        images += (
            f'<img src="data:image/png;base64,{b64encode(frame).decode()}" style="{style}" '
            f'alt="{escape(text)}" data-label="{escape(label)}">\n'
        )
    values = {"name": f"slider-{uuid.uuid4().hex}", "title": escape(title), "start": start}
    values |= {"first": escape(labels[start]), "last": len(frames) - 1, "images": images}
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return HTML(PAGE.substitute(values, caption=caption).rstrip())
