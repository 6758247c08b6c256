"""Files and folders: where data lie, lists, and writing so that no reader meets half a file."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from covidmask.errors import CovidmaskError, DataError, OutputError

SPLITS = ("train", "val", "test")
PACKAGES = "pydicom nibabel python-gdcm"  # the extra `medical`, by the names that pip knows
MIN_SIDE = 8  # a slice with a shorter side is a broken file
LOCKED = "cannot be opened", "check the path and who may read it"
LONGEST = 64  # times the shorter side: of a longer strip nothing would be left after resizing
MAX_PIXELS = 2**26  # 8192 x 8192: beyond it a file is no CT slice, perhaps a decompression bomb


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it when the block ends well, else remove it.

    Raises `OutputError` where the folder cannot be made or written, or the disk is full.
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
        problem = f"{path}: cannot be written ({error.strerror or error})"
        raise OutputError(f"{problem}; choose a folder with space that you may write to") from error
    finally:
        with suppress(OSError):  # it is gone where all went well
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 by `atomic_path`, the same bytes on every system."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def room_in(folder: str | Path) -> Iterator[None]:
    """Make a full disk an `OutputError` that names `folder`: no source is to blame for it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        problem = f"{folder}: cannot be written ({os.strerror(error.errno)})"
        raise OutputError(f"{problem}; make room on its disk, or choose another --out") from error


def is_there(path: str | Path) -> bool:
    """Whether there is such a file; a folder that may not be entered is an error, not a no."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path)
        return True
    return False


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths, there or not, lead to one file, be it by a symbolic or a hard link."""
    with suppress(OSError):  # one may not be there
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def check_writable(folder: str | Path) -> None:
    """Make `folder` if needed and prove, as `atomic_path`, that a file can be written there."""
    probe = Path(folder) / f".write_check.{os.getpid()}"  # a name that no other process uses
    with atomic_path(probe) as temporary:
        temporary.write_bytes(b"covidmask")
    probe.unlink()


def split_path(root: str | Path, split: str | Path) -> Path:
    """`root`/<split>.txt for train, val and test, else `split` itself, the path to a list."""
    return Path(root) / f"{split}.txt" if str(split) in SPLITS else Path(split)


def read_lines(path: str | Path) -> list[tuple[int, list[str]]]:
    """The lines that are not blank: their number from 1, and their words.

    Raises `DataError`: the file is missing, no text, empty, or its first words are not unique.
    """
    with decoding(path, "the split file cannot be read or is no text", "name another one"):
        text = readable(path).read_text("utf-8-sig")  # Windows writes a byte order mark
    lines = [(n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: the split file is empty; list one slice per line")
    first: dict[str, int] = {}
    for number, (name, *_) in lines:
        if (other := first.setdefault(name, number)) != number:
            raise DataError(f"{path}, line {number}: {name} stands in line {other} too; remove one")
    return lines


def some(names: list[str]) -> str:
    """A count and the first names, for messages about many files."""
    return f"{len(names):,} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def one_line(error: Exception) -> str:
    """The message of another library's error without its line breaks, or the name of its type."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def decoding(path: str | Path, problem: str, remedy: str) -> Iterator[None]:
    """Make one `DataError` of whatever a decoder raises: on broken bytes, each has its own ways."""
    try:
        yield
    except CovidmaskError:
        raise
    except ModuleNotFoundError as error:
        raise DataError(
            f"{path}: needs {error.name}, which is not installed; run `pip install {PACKAGES}`"
        ) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path}: {problem} ({reason}); {remedy}") from error


def readable(path: str | Path) -> Path:
    """`path`, if it is a file that can be opened; else `DataError`."""
    with decoding(path, *LOCKED):
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe could block for ever
            raise DataError(f"{path}: this is a folder, pipe or device; name a file")
        open(path, "rb").close()
    return Path(path)


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


def existing_folder(root: str | Path) -> Path:
    """`root`, if it is there; else `DataError`."""
    if not Path(root).is_dir():
        raise DataError(
            f"{root}: there is no such data folder; name yours with --data, or make phantoms with "
            "`covidmask phantoms --preset NAME`"
        )
    return Path(root)


def listed_splits(folder: Path) -> list[str]:
    return [split for split in SPLITS if (folder / f"{split}.txt").is_file()]


def check_size(width: int, height: int, path: str | Path) -> None:
    """Raise `DataError` where an image is too small, too large or too thin to be a slice."""
    short, long = sorted((width, height))
    if short < MIN_SIDE or short * long > MAX_PIXELS or long > LONGEST * short:
        raise DataError(
            f"{path}: the image has {width} x {height} pixels, not from {MIN_SIDE} x {MIN_SIDE} to "
            f"{MAX_PIXELS:,} in all, or is too thin a strip; resize it, or check that it is a slice"
        )


def check_finite(low: float, high: float, path: str | Path) -> None:
    """Raise `DataError` where the least or the largest value of an image is NaN or infinite."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(f"{path}: the image holds NaN or infinite values; export it again")
