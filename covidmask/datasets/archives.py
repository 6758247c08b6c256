"""Taking files out of zip and tar archives that strangers made."""

from __future__ import annotations

import io
import lzma
import posixpath
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from covidmask.errors import DataError
from covidmask.files import one_line

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_BYTES = 200 * 2**30  # of everything an archive holds
MAX_RATIO = 100  # unpacked to packed; pictures hardly shrink, a bomb shrinks a thousandfold
_SMALL = 2**20  # bytes below which the ratio says nothing
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    UnicodeDecodeError,
)


@dataclass(frozen=True)
class _Member:
    name: str
    size: int  # as the archive states it; zipfile and tarfile deliver no more than that
    kind: str  # file | folder | link | device | rest
    target: str  # of a link, from the top of the archive
    open: Callable[[], IO[bytes]]


def is_archive(path: str | Path) -> bool:
    """Whether the name ends as that of a zip or tar archive."""
    return Path(path).name.lower().endswith(SUFFIXES)


def extract(
    archive: str | Path,
    folder: str | Path,
    place: Callable[[PurePosixPath], str | None],
    max_bytes: int = MAX_BYTES,
    max_ratio: float = MAX_RATIO,
) -> list[str]:
    """Write chosen members of an archive into an empty folder, under names of our own.

    Every member is looked at, chosen or not. Links are left out, and no name of the archive
    becomes a name on disk.

    Args:
        archive: .zip, .tar, .tar.gz, .tgz, .tar.bz2 or .tar.xz.
        folder: where to write; what it holds after an error is of no use.
        place: gives for the path of a member its path below `folder`, or None to leave it out.
        max_bytes: what all members may hold together.
        max_ratio: what they may hold together, as a multiple of the size of the archive.

    Returns:
        the paths written, below `folder`. Of two members with one path, the first is taken.

    Raises:
        DataError: the archive is missing, damaged, encrypted, or no archive; it holds a path with
            .. or from the root, a link to the outside, or a device; it unpacks to too much.
        OSError: `folder` cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise DataError(f"{archive}: there is no such file; check the path")
    packed = archive.stat().st_size
    total, written = 0, []
    try:
        for member in _members(archive):
            _check_member(member, archive)
            total += member.size
            if total > max_bytes:
                raise DataError(
                    f"{archive}: unpacks to more than {max_bytes:,} bytes; check where it is from"
                )
            if total > max(max_ratio * packed, _SMALL):
                raise DataError(
                    f"{archive}: unpacks to more than {max_ratio:g} times its size, as no archive "
                    "of pictures does; check where it is from"
                )
            goal = place(PurePosixPath(member.name)) if member.kind == "file" else None
            if goal is None or (folder / goal).exists():
                continue
            (folder / goal).parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, open(folder / goal, "wb") as target:
                shutil.copyfileobj(source, target, 2**20)
            written.append(goal)
    except _BROKEN as error:
        raise _damaged(archive, error) from error
    except (RuntimeError, NotImplementedError) as error:  # zipfile: a password, an odd method
        raise DataError(
            f"{archive}: cannot be unpacked ({one_line(error)}); unpack it yourself and name the "
            "folder"
        ) from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2 raise plain OSErrors for damaged data
            raise _damaged(archive, error) from error
        raise
    return written


def _members(archive: Path) -> Iterator[_Member]:
    if archive.name.lower().endswith(".zip"):
        yield from _zip_members(archive)
    else:
        yield from _tar_members(archive)


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            mode = info.external_attr >> 16  # of archives made on Unix, else 0
            # orig_filename is what the archive says; filename is cut at a null byte
            name = info.orig_filename.replace("\\", "/")  # some programs on Windows write a\b
            kind, target = "file", ""
            if name.endswith("/"):
                kind = "folder"
            elif stat.S_ISLNK(mode):
                kind = "link"
                link = file.read(info).decode("utf-8", "replace") if info.file_size < 4096 else "/"
                target = posixpath.join(posixpath.dirname(name), link)
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                kind = "device"
            yield _Member(name, info.file_size, kind, target, lambda info=info: file.open(info))


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive) as file:
        for info in file:
            kind = "device"
            if info.isfile():
                kind = "file"
            elif info.isdir():
                kind = "folder"
            elif info.issym() or info.islnk():
                kind = "link"
            # a symbolic link counts from its own folder, a hard link from the top of the archive
            target = posixpath.join(posixpath.dirname(info.name), info.linkname)
            target = info.linkname if info.islnk() else target
            yield _Member(
                info.name, info.size, kind, target, lambda info=info: file.extractfile(info)
            )
        # tarfile stops where the tar ends; the checksum of gzip and its kin comes after that
        while rest := file.fileobj.read(2**20):
            yield _Member("rest of the archive", len(rest), "rest", "", io.BytesIO)


def _check_member(member: _Member, archive: Path) -> None:
    name = member.name
    if _leaves(name):
        raise DataError(
            f"{archive}: holds the path {name!r}, which leads out of the folder; this archive is "
            "not to be trusted"
        )
    if member.kind == "link" and _leaves(posixpath.normpath(member.target)):
        raise DataError(
            f"{archive}: holds the link {name!r} to {member.target!r}, which leads out of the "
            "folder; this archive is not to be trusted"
        )
    if member.kind == "device":
        raise DataError(
            f"{archive}: holds {name!r}, which is a device and no file; this archive is not to be "
            "trusted"
        )


def _leaves(name: str) -> bool:
    """Whether a path, as Unix or as Windows reads it, is absolute or climbs with `..`."""
    parts = re.split(r"[/\\]", name)
    return parts[0] == "" or ".." in parts or bool(re.match("[A-Za-z]:", name)) or "\0" in name


def _damaged(archive: Path, error: Exception) -> DataError:
    return DataError(
        f"{archive}: the archive is damaged or truncated ({one_line(error)}); download it again"
    )
