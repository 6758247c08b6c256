"""Results in text: what stands between two marks of a file is replaced, the rest stays."""

from __future__ import annotations

from pathlib import Path

from covidmask.files import atomic_path


def commented(text: str) -> str:
    """Markdown as it stands in the twin of a notebook."""
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def fill(path: Path, marks: tuple[str, str], content: str) -> None:
    """Put `content` between two marks, each a line of its own."""
    start, end = (f"{mark}\n" for mark in marks)
    before, rest = path.read_text(encoding="utf-8").split(start)
    with atomic_path(path) as temporary:
        text = f"{before}{start}{content}\n{end}{rest.split(end)[1]}"
        temporary.write_text(text, encoding="utf-8", newline="\n")
