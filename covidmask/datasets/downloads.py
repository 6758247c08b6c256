"""Files from strangers: downloads of known SHA-256, and what archives hold; never half-written."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import stat
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import pooch
import requests
from tqdm import tqdm

from covidmask.errors import DataError, OutputError
from covidmask.files import one_line

TIMEOUT = (10.0, 20.0)  # seconds to connect, and between two packets
LIMIT = 120.0  # seconds for one attempt at one file, however steadily a slow host sends
MAX_BYTES = 2**26  # of one file; the largest one here has 2.4 MB
RETRIES = 3
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_UNPACKED = 200 * 2**30  # bytes of everything an archive holds
MAX_RATIO = 100  # unpacked to packed; pictures hardly shrink, a bomb shrinks a thousandfold
_OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0")  # for Unix or for Windows

Place = Callable[[PurePosixPath], str | None]  # path of a file -> its path in a folder of ours


class _Refused(Exception):
    """Another attempt would not help."""


def download(base: str | Path, files: Mapping[str, str], out: Path, workers: int = 8) -> list[str]:
    """Fetch the files that are missing from `out`, or there with another sum; give their names.

    A file gets its name when its sum is right, and stays, so another call goes on where this one
    stopped. Server errors, broken connections and wrong sums are tried again. The first file that
    still fails ends it all, in a `DataError`; those that the host does not have are counted.

    Args:
        base: what stands before each name, such as https://host/folder; or a folder with copies.
        files: name, with / between folders, -> SHA-256 in hexadecimal digits.
        workers: downloads at a time, 1 to 64.
    """
    if not 1 <= workers <= 64:
        raise DataError(f"--workers {workers}: must be 1 to 64")
    local = os.path.isdir(base) or isinstance(base, Path)
    remedy = (
        "check the address and the network, try again later, or name a folder with copies (see "
        "--help); the files that came are kept"
    )
    stop = threading.Event()

    def get(url: str, file: str, _: pooch.Pooch) -> None:
        end = time.monotonic() + LIMIT
        if local:
            return shutil.copyfile(url, file)
        if stop.is_set():
            raise _Refused
        try:
            answer = requests.get(url, stream=True, timeout=TIMEOUT)
        except (requests.TooManyRedirects, ValueError) as error:  # ValueError: no address at all
            raise _Refused(error) from error
        with answer, open(file, "wb") as target:
            if (status := answer.status_code) >= 400:
                kind = requests.HTTPError if status >= 500 or status in (408, 429) else _Refused
                kind = FileNotFoundError if status in (404, 410) else kind
                raise kind(f"the host answers {status}, {answer.reason}")
            announced = int(answer.headers.get("Content-Length", 0))
            for piece in answer.iter_content(64):  # so little, to see the clock when bytes drip
                target.write(piece)
                if stop.is_set() or max(announced, target.tell()) > MAX_BYTES:
                    raise _Refused(f"the host sends more than {MAX_BYTES:,} bytes")
                if time.monotonic() > end:
                    raise requests.Timeout(f"too slow: not done after {LIMIT:g} s")

    def fetch(name: str) -> str | None:
        """One file; the complaint if the host does not have it."""
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)  # pooch's threads would race
            return move(Path(source.fetch(name, downloader=get)), out / name)
        except FileNotFoundError as error:
            return f"{source.get_url(name)}: cannot be fetched ({one_line(error)})"
        except (requests.RequestException, ValueError, _Refused) as error:
            if stop.is_set():  # because of another one, whose error tells more
                return None
            stop.set()  # here and not in the main thread, so that no other file is begun
            cause = (*error.args, error)[0]  # our text, or urllib3's error
            if isinstance(error, ValueError):  # from pooch
                cause = "what arrives has another SHA-256 than the published file"
            problem = one_line(getattr(cause, "reason", cause))
            text = f"{source.get_url(name)}: cannot be fetched ({problem}); {remedy}"
            raise DataError(text) from error

    with partial_folder(out) as folder, ThreadPoolExecutor(workers) as pool:
        wanted = [
            name
            for name, sha256 in files.items()
            if not (out / name).is_file() or pooch.file_hash(str(out / name)) != sha256
        ]
        pooch.get_logger().setLevel("WARNING")  # a bar says more than a line per file
        retries = 0 if local else RETRIES
        source = pooch.Pooch(folder, f"{base}".rstrip("/") + "/", files, retry_if_failed=retries)
        jobs = tqdm(pool.map(fetch, wanted), "fetch", len(wanted), unit="file", disable=None)
        try:
            absent = [complaint for complaint in jobs if complaint]
        finally:
            stop.set()
    if absent:
        others = f", and so for {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(f"{absent[0]}{others}; {remedy}")
    return wanted


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """`out`/.partial, empty, for files that are not whole yet; removed at the end.

    A run that was killed leaves it behind, so the next one empties it first. Two runs must not
    fill one folder at the same time. Raises `OutputError` where `out` cannot be written.
    """
    folder = out / ".partial"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        path, ours = (Path(os.path.abspath(str(p))) for p in (error.filename or out, out))
        beside = not (path.is_relative_to(ours) or ours.is_relative_to(path))
        if isinstance(error, OutputError) or beside:  # beside: a source that cannot be read
            raise
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error}); choose a folder that you may "
            "write to and that has space left"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move(source: Path, target: Path) -> None:
    """Give a whole file its final name, on the same disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def extract(archive: Path, folder: Path, place: Place) -> list[str]:
    """Write the files of a zip or tar archive that have a place to it, and give these places.

    Every member is looked at, chosen or not; links are left out. Of two files with one place, the
    first is taken.

    Raises:
        DataError: the archive is damaged, encrypted, or no archive; it holds a path with .. or
            from the root, a link to the outside, or a device; it unpacks to too much.
        OSError: `folder` cannot be written.
    """
    if not hasattr(tarfile, "data_filter"):
        raise DataError(
            f"{archive}: this Python is too old to unpack safely; update it (3.10.12, 3.11.4 or "
            "later), or unpack the archive yourself and name the folder"
        )
    limit = min(MAX_UNPACKED, max(MAX_RATIO * archive.stat().st_size, 2**20))
    total, written = 0, []
    try:
        for info, opened in _members(archive):
            total += info.size  # as the archive states it; no more than that is delivered
            if total > limit:
                raise tarfile.FilterError(f"more than {limit:,} bytes come out, unlike pictures")
            if _OUTSIDE.search(info.name) or "\0" in info.linkname:
                raise tarfile.FilterError(f"{info.name!r} leads out of the folder")
            if not info.isfile():
                tarfile.data_filter(info, str(folder))  # links to the outside, devices
            elif (goal := place(PurePosixPath(info.name))) and not (folder / goal).exists():
                (folder / goal).parent.mkdir(parents=True, exist_ok=True)
                with opened() as source, open(folder / goal, "wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
                written.append(goal)
    except tarfile.FilterError as error:
        raise DataError(f"{archive}: {error}; this archive is not to be trusted") from error
    except (
        *(OSError, EOFError, RuntimeError, UnicodeDecodeError),  # RuntimeError: zip with a password
        *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError),
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:  # without: from gzip and bz2
            raise
        raise DataError(
            f"{archive}: is damaged, truncated or locked ({one_line(error)}); download it again, "
            "or unpack it yourself and name the folder"
        ) from error
    return written


def _members(archive: Path) -> Iterator[tuple[tarfile.TarInfo, Callable[[], IO[bytes]]]]:
    """The members, described as tarfile does, and what opens them."""
    if not archive.name.lower().endswith(".zip"):
        with tarfile.open(archive) as tar:
            for info in tar:
                yield info, partial(tar.extractfile, info)
            # tarfile stops where the tar ends; the checksum of gzip and its kin comes after that
            rest = tarfile.TarInfo()
            rest.type = tarfile.DIRTYPE
            while chunk := tar.fileobj.read(2**20):
                rest.size = len(chunk)
                yield rest, tar.fileobj
        return
    with zipfile.ZipFile(archive) as file:
        for entry in file.infolist():
            # orig_filename is what the archive says; some programs on Windows write a\b
            info = tarfile.TarInfo(entry.orig_filename.replace("\\", "/"))
            info.size = entry.file_size
            kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 if it was not made on Unix
            if info.name.endswith("/"):
                info.type = tarfile.DIRTYPE
            elif kind == stat.S_IFLNK:
                info.type = tarfile.SYMTYPE
                link = file.read(entry) if entry.file_size < 4096 else b"/"
                info.linkname = link.decode("utf-8", "replace")
            elif kind not in (0, stat.S_IFREG):
                info.type = tarfile.FIFOTYPE
            yield info, partial(file.open, entry)
