"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from covidmask.errors import OutputError


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
