"""Split files, which name one slice per line, and the wording of messages about them."""

from __future__ import annotations

from pathlib import Path

from covidmask.errors import DataError

SPLITS = ("train", "val", "test")


def split_path(root: str | Path, split: str | Path) -> Path:
    """`root`/<split>.txt for train, val and test, else `split` itself, the path to a list."""
    return Path(root) / f"{split}.txt" if str(split) in SPLITS else Path(split)


def read_lines(path: str | Path) -> list[tuple[int, list[str]]]:
    """The lines that are not blank: their number from 1, and their words.

    Raises:
        DataError: the file is missing, no text, empty, or names the same slice (its first word)
            twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows writes a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise DataError(
            f"{path}: the split file cannot be read ({reason}); name a text file with one slice "
            "per line"
        ) from error
    lines = [(n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: the split file is empty; list one slice per line")
    first: dict[str, int] = {}
    for number, words in lines:
        if words[0] in first:
            raise DataError(
                f"{path}, line {number}: {words[0]} stands in line {first[words[0]]} already; "
                "remove one of them"
            )
        first[words[0]] = number
    return lines


def some(names: list[str]) -> str:
    """A count and the first names, for messages about many files."""
    return f"{len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def one_line(error: Exception) -> str:
    """The message of another library's error, without its line breaks."""
    return " ".join(str(error).split())
