"""Three editions of a chapter, made from its text twin: page, student, instructor.

Tags of the twin's cells say what a cell is for; CONTRIBUTING.md lists them. The student edition is
plain Markdown, without solutions, and is what git holds and Colab opens. The instructor edition has
every cell. The page is the instructor's, folded. A fourth, for tests, also plants wrong answers.
"""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parents[1]
SETUP = (ROOT / "tools" / "setup_cell.py").read_text(encoding="utf-8").strip()
EDITIONS = ("page", "student", "instructor", "test")
ANSWERS = {"solution", "answer", "wrong"}  # tags that a student never gets
STARS = {"*": "★☆☆", "**": "★★☆", "***": "★★★"}

# Runs as a cell of the test edition: `{wrong}` followed by `{check}` has to fail.
PLANTED = """\
# A {what} must not pass the check.
try:
    exec({wrong!r} + "\\n" + {check!r}, dict(globals()))
except (AssertionError, NotImplementedError):
    pass
else:
    raise RuntimeError("a {what} passed the check")"""


def tags(cell: NotebookNode) -> set[str]:
    return set(cell.metadata.get("tags", []))


def edition(twin: NotebookNode, name: str, which: str) -> NotebookNode:
    """Make one of `EDITIONS` from a twin, or from a twin whose cells carry outputs.

    Raises:
        ValueError: a tag stands where it can have no meaning.
    """
    result, cells, wrong = deepcopy(twin), [], []
    check_order(twin, name)
    for cell in result.cells:
        has = tags(cell)
        if cell.cell_type == "markdown":
            if "answer" in has and which == "student":
                continue
            cell.source = markdown(cell.source, has, which)
        elif "starter" in has:
            wrong = [("starter", cell.source)]
            if which != "student":
                continue
        elif "wrong" in has:
            wrong.append(("wrong answer", cell.source))
            continue
        elif "solution" in has and which == "student":
            continue
        cells.append(cell)
        if cell.cell_type == "code":
            if "check" in has and which == "test":
                cells += [planted(what, source, cell.source) for what, source in wrong]
            cells += dress(cell, which)
        if "check" in has:
            wrong = []
    result.cells = cells
    first = next(i for i, cell in enumerate(cells) if cell.cell_type == "code")
    if which != "page":  # a page runs nothing
        cells.insert(first, folded(new_code_cell(SETUP), SETUP.partition("\n")[0]))
    head = cells[0]
    title, _, rest = head.source.partition("\n")
    head.source = f"{title}\n\n{navigation(name, which)}\n{rest}"
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number:03d}"  # random ids would change the file at each run
    return result


def check_order(twin: NotebookNode, name: str) -> None:
    """An exercise is: text, starter, solution, wrong answers, check, answer; some may be absent."""
    order = ("exercise", "starter", "solution", "wrong", "check", "answer")
    last = -1
    for number, cell in enumerate(twin.cells):
        at = [order.index(tag) for tag in tags(cell) if tag in order]
        if not at:
            continue
        if at[0] and at[0] < last:
            raise ValueError(f"{name}, cell {number}: {order[at[0]]!r} after {order[last]!r}")
        last = at[0]


def planted(what: str, wrong: str, check: str) -> NotebookNode:
    return new_code_cell(PLANTED.format(what=what, wrong=wrong, check=check))


def dress(cell: NotebookNode, which: str) -> list[NotebookNode]:
    """Fold a code cell as its tags say; returns cells to put behind it, such as a caption."""
    has, first = tags(cell), cell.source.partition("\n")[0]
    if has & {"fold", "solution", "check"}:
        folded(cell, first)
    if which == "test" and "solution" in has:  # its outputs are not stored, so none is compared
        cell.metadata["tags"] = [t for t in cell.metadata["tags"] if t != "nbval-check-output"]
    if which == "student" and "check" in has:
        cell.outputs, cell.execution_count = [], None
    if "solution" in has and which == "page":
        cell.metadata["tags"] = [*cell.metadata["tags"], "hide-cell"]
        cell.metadata["tags"].remove("hide-input")
    caption = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption")
    if which == "page":
        if "remove-output" in has:  # a live widget is dead there
            cell.metadata["tags"] = [*cell.metadata["tags"], "remove-cell"]
        return []
    return [new_markdown_cell(f"*{plain(caption)}*")] if caption else []


def folded(cell: NotebookNode, first: str) -> NotebookNode:
    """Collapse the code in Colab, JupyterLab and the page, under what its first line says."""
    says = first.removeprefix("# @title").strip()
    if not first.startswith("# @title ") or not says:
        raise ValueError(f"a folded cell begins with '# @title WHAT IT DOES', not {first!r}")
    cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
    cell.metadata["cellView"] = "form"
    cell.metadata["jupyter"] = {"source_hidden": True}
    mystnb = dict(cell.metadata.get("mystnb", {}))
    mystnb |= {"code_prompt_show": says, "code_prompt_hide": says}
    cell.metadata["mystnb"] = nbformat.from_dict(mystnb)
    return cell


def markdown(source: str, has: set[str], which: str) -> str:
    """A Markdown cell as the edition shows it."""
    if "quiz" in has:
        source = quiz(source)
    if "exercise" in has:
        source = exercise(source)
    if "answer" in has:
        source = details("What you may have found", source)
    return source if which == "page" else plain(source)


def exercise(source: str) -> str:
    """`Kind: write a function, **` becomes stars; a paragraph that begins with `Hint:`, a fold."""
    source = re.sub(
        r"^Kind: (.+), (\*+)$", lambda m: f"*{m[1].capitalize()}* {STARS[m[2]]}", source, flags=re.M
    )
    return re.sub(
        r"^Hint: (.+?)(?=\n\n|\Z)", lambda m: details("Hint", m[1]), source, flags=re.M | re.S
    )


def in_view(cell: NotebookNode) -> bool:
    """Whether a reader of the page sees the code of a cell."""
    hidden = {"fold", "remove-output", "starter", "solution", "wrong", "check"}
    return cell.cell_type == "code" and not tags(cell) & hidden


def counts(twin: NotebookNode) -> dict[str, int]:
    """What a chapter asks of its reader."""
    seen = [cell.source.splitlines() for cell in twin.cells if in_view(cell)]
    code = [line for c in twin.cells if c.cell_type == "code" for line in c.source.splitlines()]
    text = [c.source for c in twin.cells if c.cell_type == "markdown"]
    exercises = [cell.source for cell in twin.cells if "exercise" in tags(cell)]
    kinds = {kind for source in exercises for kind in re.findall(r"^Kind: (.+), \*", source, re.M)}
    quizzes = "\n".join(cell.source for cell in twin.cells if "quiz" in tags(cell))
    return {
        "cells": len(seen),
        "lines": sum(map(len, seen)),
        "longest cell": max(map(len, seen), default=0),
        "widest line": max((len(line) for lines in seen for line in lines), default=0),
        "widest folded": max(map(len, code), default=0),
        "words": sum(len(source.split()) for source in text),
        "exercises": len(exercises),
        "checked": sum("check" in tags(cell) for cell in twin.cells),
        "kinds": len(kinds),
        "questions": len(re.findall(r"^\*\*\d+\. ", quizzes, re.M)),
    }


def details(summary: str, body: str) -> str:
    """A fold that needs no script: it works in Jupyter, Colab, GitHub and the page."""
    return f"<details><summary>{summary}</summary>\n\n{body.strip()}\n\n</details>"


def quiz(source: str) -> str:
    """Options `- [ ] text :: why` (with x: the right one) become folds that say which is right."""

    def option(match: re.Match) -> str:
        mark = "✔ Yes." if match[1] == "x" else "✘ No."
        text, _, why = " ".join(match[2].split()).partition(" :: ")
        if not why:
            raise ValueError(f"an option of a quiz lacks ' :: why': {text!r}")
        return f"<details><summary>{text}</summary>\n\n{mark} {why}\n\n</details>\n"

    return re.sub(r"^- \[([ x])\] (.+?)(?=\n- \[|\n\n|\Z)", option, source, flags=re.M | re.S)


def plain(source: str) -> str:
    """MyST's marks as Markdown that any reader of notebooks shows."""
    source = re.sub(r"\{cite:([pt])\}`([^`]+)`", lambda m: citation(*m.groups()), source)
    return re.sub(
        r"^(`{3,})\{admonition\} (.+)\n(?::\w+: .*\n)*((?:.*\n)*?)\1$",
        lambda m: quoted(f"**{m[2]}.** {m[3].strip()}"),
        source,
        flags=re.M,
    )


def quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


@cache
def bibliography() -> dict:
    return parse_file(ROOT / "book" / "references.bib").entries


def citation(kind: str, keys: str) -> str:
    """`[He et al., 2017](https://doi.org/...)`; `t` leaves the year in brackets."""
    found = []
    for key in map(str.strip, keys.split(",")):
        work = bibliography()[key]
        names = [
            " ".join([*p.prelast_names, *p.last_names]).strip("{}") for p in work.persons["author"]
        ]
        who = {1: names[0], 2: " and ".join(names[:2])}.get(len(names), f"{names[0]} et al.")
        year, doi = work.fields["year"], work.fields.get("doi")
        text = f"{who}, {year}" if kind == "p" else f"{who} ({year})"
        url = f"https://doi.org/{doi}" if doi else work.fields.get("url")
        found.append(f"[{text}]({url or 'references.md'})")
    return f"({'; '.join(found)})" if kind == "p" else ", ".join(found)


@cache
def contents() -> list[tuple[str, list[str]]]:
    """Parts of the book that hold notebooks: [(caption, [names])]."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    parts = []
    for part in toc["parts"]:
        names = [Path(page["file"]).name for page in part["chapters"]]
        names = [name for name in names if (ROOT / "book" / "py" / f"{name}.py").exists()]
        parts += [(part["caption"], names)] if names else []
    return parts


@cache
def repository() -> str:
    settings = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    return settings["repository"]["url"]


def navigation(name: str, which: str) -> str:
    """Where the reader is, and, outside Colab, the way to it."""
    parts = []
    for caption, names in contents():
        links = []
        for other in names:
            number = other.partition("_")[0]
            short = str(int(number)) if number.isdigit() else other.replace("_", " ")
            links.append(f"**{short}**" if other == name else f"[{short}]({other}.ipynb)")
        parts.append(f"{caption} {' '.join(links)}")
    here = "You are here: " + " · ".join(parts)
    address, file = repository(), f"book/{name}.ipynb"
    colab = f"https://colab.research.google.com/{address.removeprefix('https://')}/blob/main/{file}"
    colab = colab.replace("github.com/", "github/", 1)
    badges = f"[Open in Colab]({colab}) · [Download this notebook]({address}/raw/main/{file})"
    return f"{here}\n\n{badges}"
