"""Files from strangers: downloads of known SHA-256, and what archives hold; never half-written."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import pooch
import requests
from tqdm import tqdm

from covidmask.errors import CovidmaskError, DataError
from covidmask.files import check_writable, decoding, one_line

TIMEOUT = (10.0, 20.0)  # seconds to connect, and between two packets
MAX_BYTES = 2**26  # of one file; the largest one here has 2.4 MB
RETRIES = 3
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_RATIO = 100  # unpacked to packed; pictures hardly shrink, a bomb shrinks a thousandfold
_OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|\0")  # for Unix or for Windows

Place = Callable[[PurePosixPath], str | None]  # path of a file -> its path in a folder of ours


def download(base: str | Path, files: Mapping[str, str], out: Path) -> list[str]:
    """Fetch the files that are missing from `out`, or there with another sum; give their names.

    pooch gives a file its name when its sum is right, and tries again when it is not or the
    connection breaks. The first that still fails ends it all, in a `DataError`; those that came
    stay, so another call goes on from there.

    Args:
        base: what stands before each name, such as https://host/folder; or a folder with copies.
        files: name, with / between folders, -> SHA-256 in hexadecimal digits.
    """
    local = os.path.isdir(base) or isinstance(base, Path)
    if not local and "://" not in base:
        raise DataError(f"{base}: there is no such folder; name one, or an address with https://")

    def get(url: str, file: str, _: pooch.Pooch) -> None:
        if local:
            return shutil.copyfile(url, file)
        with requests.get(url, stream=True, timeout=TIMEOUT) as answer, open(file, "wb") as target:
            answer.raise_for_status()
            for piece in answer.iter_content(2**16):
                target.write(piece)
                if target.tell() > MAX_BYTES:  # no ValueError, after which pooch would try again
                    raise CovidmaskError(f"the host sends more than {MAX_BYTES:,} bytes")

    def fetch(name: str) -> None:
        try:
            source.fetch(name, downloader=get)
        except (requests.RequestException, FileNotFoundError, ValueError, CovidmaskError) as error:
            raise DataError(
                f"{source.get_url(name)}: cannot be fetched ({one_line(error)}); check the address "
                "and the network, try again later, or name a folder with copies (see --help)"
            ) from error

    wanted = [
        name
        for name, sha256 in files.items()
        if not (out / name).is_file() or pooch.file_hash(str(out / name)) != sha256
    ]
    for folder in {(out / name).parent for name in wanted}:
        check_writable(folder)
    pooch.get_logger().setLevel("WARNING")  # a bar says more than a line per file
    retries = 0 if local else RETRIES
    source = pooch.Pooch(out, f"{base}".rstrip("/") + "/", files, retry_if_failed=retries)
    with ThreadPoolExecutor(8) as pool:
        list(tqdm(pool.map(fetch, wanted), "fetch", len(wanted), unit="file", disable=None))
    return wanted


def extract(archive: Path, folder: Path, place: Place) -> list[str]:
    """Write the files of a zip or tar archive that have a place to `folder`, and give these places.

    All of them or none: they lie in `folder`/.partial until the whole archive has been read, with
    every member looked at, chosen or not. Of two files with one place, the first is taken.

    Raises:
        DataError: the archive is damaged, encrypted, or no archive; it holds a path with .. or
            from the root, a link or a device, or unpacks to too much; the disk is full.
    """
    unfinished = folder / ".partial"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    limit, total, written = max(MAX_RATIO * archive.stat().st_size, 2**20), 0, []
    remedy = "download it again, or unpack it yourself and name the folder"
    try:
        with decoding(archive, "cannot be unpacked", remedy):
            for name, size, kind, opened in _members(archive):
                total += size  # as the archive states it; no more than that is delivered
                for problem, found in (
                    (f"more than {limit:,} bytes come out, unlike pictures", total > limit),
                    (f"{name!r} leads out of the folder", _OUTSIDE.search(name)),
                    (f"{name!r} is a link or a device", kind not in (stat.S_IFREG, stat.S_IFDIR)),
                ):
                    if found:
                        problem = f"{problem}; this archive is not to be trusted"
                        raise DataError(f"{archive}: {problem}, unless you unpack it yourself")
                goal = place(PurePosixPath(name)) if kind == stat.S_IFREG else None
                if goal and not (unfinished / goal).exists():
                    (unfinished / goal).parent.mkdir(parents=True, exist_ok=True)
                    with opened() as source, open(unfinished / goal, "wb") as target:
                        shutil.copyfileobj(source, target, 2**20)
                    written.append(goal)
            for goal in written:
                (folder / goal).parent.mkdir(parents=True, exist_ok=True)
                os.replace(unfinished / goal, folder / goal)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return written


def _members(archive: Path) -> Iterator[tuple[str, int, int, Callable[[], IO[bytes]]]]:
    """Name, size and kind (S_IFREG, S_IFDIR or another) of each member, and what opens it."""
    if archive.name.lower().endswith(".zip"):
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                # orig_filename is what the archive says; some programs on Windows write a\b
                name = entry.orig_filename.replace("\\", "/")
                kind = stat.S_IFMT(entry.external_attr >> 16) or stat.S_IFREG  # 0: not of Unix
                kind = stat.S_IFDIR if name.endswith("/") else kind
                yield name, entry.file_size, kind, partial(file.open, entry)
        return
    with tarfile.open(archive) as tar:
        for info in tar:
            kind = stat.S_IFREG if info.isfile() else stat.S_IFDIR if info.isdir() else 0
            yield info.name, info.size, kind, partial(tar.extractfile, info)
        # tarfile stops where the tar ends; the checksum of gzip and its kin comes after that
        while tar.fileobj.read(2**20):
            pass
