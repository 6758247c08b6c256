"""Draw which chapter needs which.

python tools/chapter_graph.py          writes book/_static/chapters.svg
"""

from __future__ import annotations

from pathlib import Path

from covidmask.diagrams import WIDTH, arrow, box, line, svg, words
from covidmask.plotting import BLUE, GREEN, PURPLE, VERMILLION

TARGET = Path(__file__).resolve().parents[1] / "book" / "_static" / "chapters.svg"
CHAPTERS = (  # 1 to 8: title, content
    ("Data", "slices, masks, labels"),
    ("Mask R-CNN", "anchors, RPN, RoIAlign"),
    ("Segmenter", "finds GGO, consolidation"),
    ("Ranked boxes", "from boxes to a vector"),
    ("COVID-CT-Mask-Net", "detector and module S"),
    ("Three regimes", "which weights train"),
    ("Evaluation", "sensitivity, PPV, intervals"),
    ("What makes it work?", "ablations"),
)
DESCRIPTION = (
    "Chapter 0, the whole path, needs nothing before it. Chapters 1 to 8 (data, Mask R-CNN, "
    "segmenter, ranked boxes, COVID-CT-Mask-Net, three regimes, evaluation, ablations) each need "
    "the one before. Chapter 9, real CT, needs chapters 1 and 3, and for its classification part "
    "chapters 4 and 5. The page Paper v code needs chapters 3 to 7."
)
LEFT, WIDE, HIGH = 52, 280, 54  # boxes of chapters 1 to 8
FIRST, STEP = 104, 78


def chapter_graph() -> str:
    """The picture as SVG text."""
    top = {number: FIRST + STEP * (number - 1) for number in range(1, len(CHAPTERS) + 2)}
    mid = {number: y + HIGH / 2 for number, y in top.items()}
    right, centre = LEFT + WIDE, LEFT + WIDE / 2
    parts = [box(LEFT, 16, WIDTH - LEFT - 16, HIGH, ["0  The whole path", "start here"], GREEN)]

    for number, lines in enumerate(CHAPTERS, 1):
        parts.append(box(LEFT, top[number], WIDE, HIGH, [f"{number}  {lines[0]}", lines[1]], BLUE))
        if number < len(CHAPTERS):
            parts.append(arrow([(centre, top[number] + HIGH), (centre, top[number + 1])]))

    x, wide = right + 44, WIDTH - right - 60  # chapter 9 stands beside 3 to 5
    lines = ["9  Real CT", "public data,", "your DICOM"]
    parts += [
        arrow([(right, mid[1]), (x + wide / 2, mid[1]), (x + wide / 2, top[3])], VERMILLION),
        arrow([(right, mid[3]), (x, mid[3])], VERMILLION),
        *(arrow([(right, mid[i]), (x, mid[i])], VERMILLION, dashed=True) for i in (4, 5)),
        box(x, top[3], wide, 2 * STEP + HIGH, lines, VERMILLION),
        words(x + wide / 2, top[6] + 10, ["Dashed:", "to classify"]),
    ]

    last, rail = len(CHAPTERS) + 1, LEFT - 24  # the page that compares stands below
    parts += [
        *(line([(LEFT, mid[i]), (rail, mid[i])], PURPLE) for i in range(3, 8)),
        arrow([(rail, mid[3]), (rail, mid[last]), (LEFT, mid[last])], PURPLE),
        box(LEFT, top[last], WIDTH - LEFT - 16, HIGH, ["Paper v code", "needs 3 to 7"], PURPLE),
    ]
    return svg(top[last] + HIGH + 16, "Which chapter needs which", DESCRIPTION, parts)


if __name__ == "__main__":
    TARGET.write_text(chapter_graph(), encoding="utf-8", newline="\n")
