"""Pieces of SVG in the style of the book's diagrams, on a light background of their own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH = 520
SMALL, NORMAL = 16, 17.5  # font sizes, so large that a telephone shows readable letters
INK, PAPER, LINE = "#1a1a1a", "#fafaf7", "#555555"
FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"


def svg(height: float, title: str, description: str, parts: Sequence[str]) -> str:
    """One picture; a screen reader says the title and, in a sentence, what it shows."""
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


def words(x: float, y: float, lines: Sequence[str]) -> str:
    """Lines of bold text in the middle of x, the first with its baseline at y."""
    style = f'text-anchor="middle" font-size="{NORMAL}" font-weight="bold"'
    texts = [(y + 22 * i, escape(text)) for i, text in enumerate(lines)]
    return "\n".join(f'<text x="{x:g}" y="{low:g}" {style}>{text}</text>' for low, text in texts)


def line(points: Sequence[tuple[float, float]], colour: str = LINE, dashed: bool = False) -> str:
    """A line through the points."""
    dash = ' stroke-dasharray="7 5"' if dashed else ""
    joined = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2.5"{dash}/>'
