"""Files that a reader names: whether they can be read, split files, the wording of messages."""

from __future__ import annotations

import stat
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
        if stat.S_ISCHR(Path(path).stat().st_mode):  # /dev/zero never ends
            raise DataError(f"{path}: this is a device; name a text file with one slice per line")
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
    """The message of another library's error without its line breaks, or the name of its type."""
    return " ".join(str(error).split()) or type(error).__name__


def readable(path: str | Path, empty: bool = False) -> Path:
    """`path`, if it is a file that can be opened.

    Raises:
        DataError: it is absent, a folder, a pipe or device (which could block for ever), locked,
            or, unless that is allowed, empty.
    """
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise DataError(f"{path}: this is a folder, not an image; name a file inside it")
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: this is a pipe, socket or device; name a file")
        with open(path, "rb") as file:
            empty = empty or bool(file.read(1))
    except (FileNotFoundError, NotADirectoryError) as error:
        link = "this is a link to a file that is not there" if path.is_symlink() else ""
        raise DataError(f"{path}: {link or 'there is no such file'}; check the path") from error
    except OSError as error:
        raise no_access(path, error) from error
    if not empty:
        raise DataError(f"{path}: the file is empty; copy or download it again")
    return path


def no_access(path: str | Path, error: OSError) -> DataError:
    """The error for a file or folder that the system does not open."""
    return DataError(
        f"{path}: cannot be opened ({error.strerror or one_line(error)}); check the path, its "
        "permissions and those of its folder"
    )
