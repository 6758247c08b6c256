"""Slides of a chapter for reveal.js, from its twin and its stored outputs; they open offline.

A section becomes a slide with its first sentences, and below it one for each figure and for the
code that is short enough to be read from the back row. The whole text stands in the speaker's notes
(key S). Questions of the quiz ask first, and answer on the next key.
"""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbformat import NotebookNode

from tools.editions import in_view, plain, tags

ROOT = Path(__file__).resolve().parents[1]
CODE_LINES, WORDS = 14, 45  # what fits a slide
DOLLARS = {True: "\\[{}\\]", False: "\\({}\\)"}

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="reveal/reveal.css">
<link rel="stylesheet" href="reveal/slides.css">
</head>
<body>
<div class="reveal"><div class="slides">
{slides}
</div></div>
<script src="reveal/reveal.js"></script>
<script src="reveal/notes.js"></script>
<script>
MathJax = {{ options: {{ enableMenu: false }} }};
Reveal.initialize({{ hash: true, slideNumber: true, width: 1200, height: 720,
  plugins: [RevealNotes] }});
</script>
<script src="mathjax/tex-mml-chtml.js"></script>
</body>
</html>
"""


def rendered(source: str) -> str:
    """Markdown -> HTML, formulas left to MathJax, links to other chapters as text."""
    parser = MarkdownIt("commonmark").enable("table").use(
        dollarmath_plugin,
        renderer=lambda tex, options: DOLLARS[options["display_mode"]].format(html.escape(tex)),
    )  # fmt: skip
    text = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", plain(source))
    return parser.render(text)


def opening(text: str) -> str:
    """The first sentences of a section, at most `WORDS` words, but at least one; or its list."""
    blocks = [b for b in re.split(r"\n\s*\n", text.strip()) if b and not b.startswith(("|", "```"))]
    if not blocks:
        return ""
    sentences = re.split(r"(?<=[.?!:])\s+(?=[A-Z$*`\[])", " ".join(blocks[0].split()))
    if blocks[0].startswith(("- ", "1. ")):
        return blocks[0]
    kept = sentences[:1]
    for sentence in sentences[1:]:
        if len(" ".join([*kept, sentence]).split()) > WORDS:
            break
        kept.append(sentence)
    if len(kept) == len(sentences) and kept[-1][-1:] not in ".?!:":  # a formula ends it
        return "\n\n".join(blocks[:2])
    questions = [s for s in sentences[len(kept) :] if s.rstrip("*").endswith("?")]
    lists = [b for b in blocks[1:3] if b.startswith(("- ", "1. "))]
    return "\n\n".join([" ".join(kept), *questions[:1], *lists[:1]])


def section(*parts: str, notes: str = "") -> str:
    aside = f'<aside class="notes">{rendered(notes)}</aside>' if notes.strip() else ""
    return f"<section>{''.join(parts)}{aside}</section>"


def questions(source: str) -> list[str]:
    """A slide for each question of a quiz, its answers shown one by one."""
    slides = []
    for question in re.split(r"(?m)^(?=\*\*\d+\. )", source)[1:]:
        text, *options = re.split(r"(?m)^- (?=\[[ x]\])", question)
        lines = []
        for option in options:
            what, _, why = " ".join(option[3:].split()).partition(" :: ")
            mark = "✔" if option.startswith("[x]") else "✘"
            shown = rendered(what).strip()
            lines.append(f'<li>{shown}<div class="fragment why">{mark} {rendered(why)}</div></li>')
        slides.append(section(rendered(text), f"<ol type='a'>{''.join(lines)}</ol>"))
    return slides


def figures(cell: NotebookNode) -> list[str]:
    options, shown = cell.metadata.get("mystnb", {}), []
    caption = options.get("figure", {}).get("caption", "")
    alt = html.escape(options.get("image", {}).get("alt", ""), quote=True)
    for output in cell.outputs:
        if image := output.get("data", {}).get("image/png"):
            picture = f'<img alt="{alt}" src="data:image/png;base64,{image.strip()}">'
            shown.append(section(f"<figure>{picture}</figure>", rendered(caption)))
    return shown


def slides(twin: NotebookNode) -> str:
    """The page of slides of a twin whose cells carry outputs."""
    stacks: list[list[str]] = []
    title, exercises, code_shown = "", [], False
    for cell in twin.cells:
        has = tags(cell)
        if cell.cell_type == "markdown" and "quiz" in has:
            stacks.append([section("<h2>Quiz</h2>"), *questions(cell.source)])
        elif "exercise" in has:
            exercises.append(re.search(r"^### Exercise \d+ · (.+)$", cell.source, re.M)[1])
        elif cell.cell_type == "markdown" and "answer" not in has:
            head, *rest = re.split(r"(?m)^(?=##? )", cell.source)
            if head.strip() and stacks:
                stacks[-1][0] = stacks[-1][0].replace(
                    "</aside>", rendered(head) + "</aside>", 1
                )  # goes on with the section
            for part in rest:
                heading, _, text = part.partition("\n")
                level = 1 if heading.startswith("# ") else 2
                name = heading.lstrip("# ").strip()
                if level == 1:
                    title, text = name, text.split("**After it you can**")[0]
                if name in ("Exercises", "Further reading"):
                    continue
                code_shown = False
                shown = rendered(opening(text))
                top = f"<h{level}>{rendered(name)[3:-5]}</h{level}>"
                stacks.append([section(top, shown, notes=text or name)])
        elif cell.cell_type == "code" and stacks and not has & {"solution", "check", "wrong"}:
            short = len(cell.source.splitlines()) <= CODE_LINES
            later = len(stacks) > 1 and "parameters" not in has  # not what sets a chapter up
            if in_view(cell) and short and later and not code_shown:
                code = html.escape(cell.source)
                stacks[-1].append(section(f"<pre><code>{code}</code></pre>"))
                code_shown = True
            stacks[-1] += figures(cell)
    if exercises:
        items = "".join(f"<li>{html.escape(name)}</li>" for name in exercises)
        stacks.append([section("<h2>Exercises</h2>", f"<ol>{items}</ol>")])
    body = "\n".join(f"<section>{''.join(stack)}</section>" for stack in stacks)
    return PAGE.format(title=html.escape(title), slides=body)


def copy_parts(out: Path) -> None:
    """Put reveal.js and MathJax beside the slides."""
    for source, name in (
        (ROOT / "tools/reveal", "reveal"),
        (ROOT / "book/_extra/mathjax", "mathjax"),
    ):
        shutil.copytree(source, out / name, dirs_exist_ok=True)
