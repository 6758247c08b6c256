"""Files and folders: where data lie, lists, and writing so that no reader meets half a file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from covidmask.errors import DataError, OutputError

if TYPE_CHECKING:
    pass

SPLITS = ("train", "val", "test")
_SPLITS = ("train", "val", "test")
MIN_SIDE = 8  # a slice with a shorter side is a broken file
MAX_PIXELS = 2**26  # 8192 x 8192: beyond it a file is no CT slice, perhaps a decompression bomb


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well.

    The temporary name keeps the suffix of `path`, because libraries choose a format by it.
    When the block fails, the temporary file is removed and `path` is as it was before.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    # not the whole stem: a name as long as the system allows must not grow too long
    temporary = path.with_name(f".{path.stem[:32]}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:  # Windows syncs a file that may be written only
            os.fsync(file.fileno())  # the data reaches the disk before the name does
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # a file may stand where a folder should
            temporary.unlink()
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "choose a folder that you may write to and that has space left"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_there(path: str | Path) -> bool:
    """Whether there is such a file; a folder that may not be entered is an error, not a no."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths, there or not, lead to one file, be it by a symbolic or a hard link."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def check_writable(folder: str | Path) -> Path:
    """Make `folder` if needed and prove that a file can be written there, before long work starts.

    Raises:
        OutputError: as `atomic_path`.
    """
    probe = Path(folder) / f".write_check.{os.getpid()}"  # a name that no other process uses
    with atomic_path(probe) as temporary:
        temporary.write_bytes(b"covidmask")
    probe.unlink()
    return Path(folder)


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


def data_root() -> Path:
    """$COVIDMASK_DATA, or ./data."""
    return Path(os.environ.get("COVIDMASK_DATA") or "data")


def phantoms_folder(preset: str) -> Path:
    """The phantoms of a preset."""
    return data_root() / f"phantoms-{preset}"


def weights_file(kind: str, preset: str, regime: str | None = None) -> Path:
    """Where training writes, unless told otherwise; a classifier's name has its regime."""
    name = "-".join(part for part in (kind, preset, regime) if part)
    return data_root() / "weights" / f"{name}.safetensors"


def ranked_folder() -> Path:
    """Where training keeps the ranked boxes of slices; it may be deleted at any time."""
    return data_root() / "ranked"


def existing_folder(root: str | Path) -> Path:
    """`root`, if it is there.

    Raises:
        DataError: it is not.
    """
    root = Path(root)
    if root.is_file():
        raise DataError(f"{root}: is a file; name the folder that holds the data with --data")
    if not root.is_dir():
        raise DataError(
            f"{root}: there is no such data folder; make it with `covidmask phantoms --preset "
            "NAME`, or name yours with --data"
        )
    return root


def listed_splits(folder: Path) -> list[str]:
    return [split for split in _SPLITS if (folder / f"{split}.txt").is_file()]


def check_size(width: int, height: int, path: str | Path) -> None:
    """Raise `DataError` where an image is too small, or too large, to be a slice."""
    if min(width, height) < MIN_SIDE:
        raise DataError(
            f"{path}: the image has {width} x {height} pixels, at least {MIN_SIDE} x {MIN_SIDE} "
            "are needed; check that this is a CT slice"
        )
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: the image has {width} x {height} pixels, more than {MAX_PIXELS:,}; reduce "
            "it or check that this is a CT slice"
        )
