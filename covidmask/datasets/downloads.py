"""Downloading files of known SHA-256: in parallel, resumable, and never half-written."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

from covidmask.errors import DataError, OutputError
from covidmask.files import one_line, some

TIMEOUT = (10.0, 20.0)  # seconds to connect, and between two packets
LIMIT = 120.0  # seconds for one attempt at one file, however steadily a slow host sends
MAX_BYTES = 2**26  # of one file; the largest one here has 2.4 MB
ATTEMPTS = 4
BACKOFF = 0.5  # seconds before the second attempt, doubled before each further one
_CHECK = "check the address, or the network's filter"


def download(
    base_url: str,
    files: Mapping[str, str],
    out: str | Path,
    workers: int = 8,
    progress: bool = True,
) -> list[str]:
    """Fetch the files that are missing from `out`, or there with another sum.

    A file arrives under a temporary name in `out`/.partial, is compared with its sum there, and is
    then renamed. A download that stops for any reason keeps the files that are whole, and the next
    call goes on with the others. Server errors, broken connections and wrong sums are tried again,
    `ATTEMPTS` times in all; the first file that still fails ends the download. Files that the host
    does not have are reported together, when all others are there.

    Args:
        base_url: what stands before each name, such as https://host/folder.
        files: name, with / between folders, -> SHA-256 in hexadecimal digits.
        out: folder to fill; it is made when it is absent.
        workers: downloads at a time.

    Returns:
        the names fetched now, in the order of `files`.

    Raises:
        DataError: a file cannot be had, or its sum stays wrong.
        OutputError: `out` cannot be written.
    """
    import pooch

    out = Path(out)
    pooch.get_logger().setLevel("WARNING")  # a bar says more than a line per file
    with partial_folder(out) as partial:
        wanted = [name for name, sha256 in files.items() if not has_sum(out / name, sha256)]
        if not wanted:
            return []
        registry = {name: f"sha256:{files[name]}" for name in wanted}
        source = pooch.Pooch(path=partial, base_url=base_url.rstrip("/") + "/", registry=registry)
        for name in wanted:  # before the threads, which would race to make them
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
        stop = threading.Event()
        pool = ThreadPoolExecutor(max_workers=max(1, workers))
        try:
            jobs = [pool.submit(_fetch, source, name, out / name, stop) for name in wanted]
            for job in _bar(as_completed(jobs), len(jobs), f"download to {out.name}", progress):
                with suppress(_Stopped):  # because of another one, whose error comes, too
                    job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    absent = [job.result() for job in jobs if job.result() is not None]
    if absent:
        others = f", and so for {len(absent) - 1} more" if len(absent) > 1 else ""
        raise DataError(f"{absent[0]}{others}; {_CHECK}; the files that came are kept")
    return wanted


def copy_checked(folder: str | Path, files: Mapping[str, str], out: str | Path) -> list[str]:
    """Copy `files` from `folder`, instead of downloading them, after the same comparison of sums.

    Returns:
        the names copied now; files that `out` holds already are left alone.

    Raises:
        DataError: a file is missing from `folder` or has another sum.
        OutputError: `out` cannot be written.
    """
    folder, out = Path(folder), Path(out)
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise DataError(f"{folder}: files are missing: {some(absent)}; add them, or download them")
    wrong = [name for name, sha256 in files.items() if not has_sum(folder / name, sha256)]
    if wrong:
        raise DataError(
            f"{folder}: files have another SHA-256 than the published ones: {some(wrong)}; "
            "download them again"
        )
    wanted = [name for name, sha256 in files.items() if not has_sum(out / name, sha256)]
    with partial_folder(out) as partial:
        for name in wanted:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, partial / name)
            move(partial / name, out / name)
    return wanted


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """`out`/.partial, empty, for files that are not whole yet; removed at the end.

    A run that was killed leaves it behind, so the next one empties it first. Two runs must not
    fill one folder at the same time.

    Raises:
        OutputError: no such folder can be made, or the disk is full.
    """
    partial = out / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
    except OSError as error:
        if isinstance(error, OutputError) or _elsewhere(error.filename, out):
            raise  # what could not be read has a name that is not ours
        raise OutputError(
            f"{out}: cannot be written ({error.strerror or error}); choose a folder that you may "
            "write to and that has space left"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _elsewhere(name: str | None, out: Path) -> bool:
    """Whether a path lies beside `out`: neither in it nor above it."""
    if not isinstance(name, str):
        return False
    path, out = Path(os.path.abspath(name)), Path(os.path.abspath(out))
    return not (path.is_relative_to(out) or out.is_relative_to(path))


def move(source: Path, target: Path) -> None:
    """Give a whole file its final name, on the same disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def has_sum(path: Path, sha256: str) -> bool:
    """Whether the file is there and has this SHA-256."""
    import pooch

    return path.is_file() and pooch.file_hash(str(path), "sha256") == sha256.lower()


class _Stopped(Exception):
    """Another file failed, or the reader pressed Ctrl-C."""


def _fetch(source, name: str, target: Path, stop: threading.Event) -> str | None:
    try:
        return _fetch_one(source, name, target, stop)
    except BaseException:
        stop.set()  # here and not in the main thread, so that no other file is begun
        raise


def _fetch_one(source, name: str, target: Path, stop: threading.Event) -> str | None:
    """One file, with further attempts where they can help; what the host says if it has none."""
    import pooch
    import requests

    url = source.get_url(name)
    for attempt in range(1, ATTEMPTS + 1):
        if stop.is_set():
            raise _Stopped
        try:
            # pieces of 64 bytes, so that the clock is looked at even when they drip
            get = pooch.HTTPDownloader(_Watch(url, stop), chunk_size=64, timeout=TIMEOUT)
            move(Path(source.fetch(name, downloader=get)), target)
            return None
        except requests.HTTPError as error:
            status = error.response.status_code
            problem = f"the host answers {status} ({error.response.reason})"
            if status in (404, 410):
                return f"{url}: {problem}"
            if status < 500 and status not in (408, 429):
                raise DataError(f"{url}: {problem}; {_CHECK}") from error
        except requests.RequestException as error:
            if isinstance(error, (ValueError, requests.TooManyRedirects)):  # InvalidURL and its kin
                raise DataError(f"{url}: {one_line(error)}; check the address") from error
            cause = error.args[0] if error.args else error  # of urllib3, which says where and why
            problem = f"the connection fails ({one_line(getattr(cause, 'reason', cause))})"
        except TimeoutError as error:
            problem = f"the host is too slow ({error})"
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            problem = "what arrives has another SHA-256 than the published file"  # pooch compared
        if attempt < ATTEMPTS:
            stop.wait(BACKOFF * 2 ** (attempt - 1))
    raise DataError(f"{url}: {problem}, {ATTEMPTS} times; try again later, what is whole is kept")


class _Watch:
    """Stands where pooch expects a progress bar, and ends a download that goes on and on."""

    def __init__(self, url: str, stop: threading.Event) -> None:
        self.url = url
        self.stop = stop
        self.total = 0  # pooch writes the announced length here
        self.received = 0
        self.end = time.monotonic() + LIMIT

    def update(self, count: int) -> None:
        self.received += count
        if self.stop.is_set():
            raise _Stopped
        if time.monotonic() > self.end:
            raise TimeoutError(f"not done after {LIMIT:g} s")
        if max(self.received, self.total) > MAX_BYTES:
            raise DataError(f"{self.url}: sends more than {MAX_BYTES:,} bytes; check the address")

    def reset(self) -> None:
        self.received = 0

    def close(self) -> None:
        pass


def _bar(items, total: int, text: str, progress: bool):
    from tqdm import tqdm

    return tqdm(items, total=total, desc=text, unit="file", disable=not progress)
