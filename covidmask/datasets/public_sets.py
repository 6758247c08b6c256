"""Real CT: public data sets, made ready for the loaders.

public_sets.json has terms, addresses and checksums. Nothing is half-written, and a second call goes
on where the first stopped. A source, list or slice that is missing or not what it should be is a
`DataError`, a folder that cannot be written an `OutputError`.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path, PurePath, PureWindowsPath

import pooch
import requests
from tqdm import tqdm

from covidmask.config import IMAGE_CLASSES
from covidmask.datasets import classes
from covidmask.datasets.lesions import LesionSlices, split_by_patient
from covidmask.datasets.scans import IMAGE_SUFFIXES
from covidmask.errors import DataError, OutputError
from covidmask.files import SPLITS, check_writable, decoding, one_line, read_lines, room_in, some

TIMEOUT = (10.0, 20.0)  # seconds to connect, and between two packets
RETRIES = 3
MAX_RATIO = 100  # unpacked to packed; pictures hardly shrink, a bomb shrinks a thousandfold
# each data set's terms, and address -> file -> SHA-256 (null: not published) of what it downloads,
# which lands in `below`; archives to unpack; and of images split, name and SHA-256 in one copy
SETS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
Source = str | os.PathLike[str]
Place = Callable[[PurePath], str | None]  # path of a file -> its path in a folder of ours


@contextmanager
def filling(name: str, out: Path) -> Iterator[None]:
    """Fill `out` alone, and leave of a failure only what the next call goes on with.

    Two at once would write into one partial archive, so the second is an `OutputError`. The system
    takes the lock from a process that was killed: nobody has to remove a file.
    """
    data_set, terms, lock = SETS[name], out / "TERMS.txt", out / ".fetch.lock"
    parts = (*data_set["files"].values(), *data_set.get("archives", {}).values())
    paths = [out / data_set["below"] / file for part in parts for file in part]
    ours = {f for p in paths for f in p.parents if out in f.parents or not f.exists()}
    with ExitStack() as stack:
        try:
            import fcntl

            out.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(lock, "a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:  # removed by who had it until just now
                raise BlockingIOError
        except BlockingIOError as error:
            problem = "another `covidmask fetch` is filling this folder"
            raise OutputError(f"{out}: {problem}; wait for it, or choose another --out") from error
        except (ImportError, OSError):
            pass  # Windows and some disks have no locks; what cannot be written is named later
        useless = [lock] if terms.exists() else [lock, terms]
        try:
            yield
            useless = [lock]
        finally:
            for remove in (*(p.unlink for p in useless), *(f.rmdir for f in sorted(ours)[::-1])):
                with suppress(OSError):  # what is not empty stays
                    remove()


def fetch_files(
    name: str, out: Path, source: Source | None = None, sources: Sequence[Source] = ()
) -> dict[str, int]:
    """Write a data set's terms, download its files from the authors or `source`, and count them.

    These are all slices and masks of COVID-SemiSeg, and the lists of the others. That `sources`,
    folders and archives with scans, are there is looked at before anything is written.
    """
    for path in map(Path, sources):
        if not path.is_dir() and not (path.is_file() and path.suffix.lower() == ".zip"):
            problem = "is no archive" if path.exists() else "there is no such file or folder"
            raise DataError(f"{path}: {problem}; name a folder or a .zip with --from")
    data_set, fetched, total = SETS[name], 0, 0
    classes.write_lines(out / "TERMS.txt", data_set["terms"])
    for address, files in data_set["files"].items():
        fetched += len(download(source or address, files, out / data_set["below"]))
        total += len(files)
    return {"files fetched": fetched, "files that were there": total - fetched}


def lay_out_covidx_ct(
    out: Path,
    sources: Sequence[Source],
    lists: Source | None = None,
    seed: int = 0,
    per_class: int = 1000,
    allow_missing: bool = False,
) -> dict[str, int]:
    """Make `out`/slices of COVIDx-CT-1, check it against the lists, and count what these name.

    A file belongs to a slice of the v1 lists by <class>_<patient>_<scan>_<slice> in its name, as on
    Kaggle, or by <patient>/<scan>/<slice> at the end of its path, as in the archives of CNCB.
    `out` keeps what it has, so the parts may come in several calls.
    """
    sources = [_kaggle("hgunraj/covidxct/versions/1") if s == "kaggle" else s for s in sources]
    fetch_files("covidx-ct", out, lists, sources)
    entries = {s: classes.read_split(out / f"lists/{s}_COVIDx_CT-1.txt") for s in SPLITS}
    listed = {Path(entry.name).stem: entry for part in entries.values() for entry in part}
    stems = {}  # what a file may be called -> the name in the lists, without suffix
    for stem, entry in listed.items():
        rest = stem.partition("_")[2]  # patient, scan and slice are unique without the class
        stems |= dict.fromkeys((stem, rest, f"{entry.label}_{rest}"), stem)

    def place(path: PurePath) -> str | None:
        name = path.stem if "_" in path.stem else "_".join((*path.parts[-3:-1], path.stem))
        stem, suffix = stems.get(name), path.suffix.lower()
        return f"slices/{stem}{suffix}" if stem and suffix in IMAGE_SUFFIXES else None

    collect(sources, out, place)
    found = set()
    for file in tqdm(list((out / "slices").glob("*")), "check", unit="slice", disable=None):
        if file.stem in listed and file.suffix in IMAGE_SUFFIXES:
            if _looks_whole(file):
                found.add(listed[file.stem].name)
            else:
                file.unlink()  # our link or copy, so that a whole one can take its place
    there = {split: [e for e in part if e.name in found] for split, part in entries.items()}
    missing = [entry.name for entry in listed.values() if entry.name not in found]
    classes.write_lines(out / "missing.txt", missing)
    if missing and not (allow_missing and found):
        raise DataError(
            f"{out}: of the {len(listed):,} slices of the COVIDx-CT-1 lists, {some(missing)} are "
            "missing or damaged (versions after the first leave out 28); name more folders or "
            "archives with --from, or leave them out with --allow-missing; what was found is kept"
        )
    author = classes.read_split(out / "lists/train_split_classification.txt")
    drawn = [listed[stems[Path(entry.name).stem]] for entry in author]  # with their boxes
    train_all, sample = there["train"], classes.balanced_sample
    parts = {
        "train": [entry for entry in drawn if entry.name in found],
        "val": there["val"],
        "test": there["test"],
        "train_all": train_all,
        f"sample_seed{seed}": sample(train_all, per_class, seed),
        f"sample_seed{seed}_by_patient": sample(train_all, per_class, seed, by_patient=True),
    }
    for name, part in parts.items():
        classes.write_split(out / f"slices/{name}.txt", part)
    return {name: len(part) for name, part in parts.items()}


def _kaggle(name: str) -> str:
    """Download by kagglehub, which keeps a data set in a folder of its own."""
    try:
        import kagglehub

        return kagglehub.dataset_download(name)
    except Exception as error:  # many ways to fail: not installed, login, consent, network, disk
        raise DataError(
            f"--from kaggle: the download fails ({one_line(error)}); `pip install kagglehub`, or "
            f"get https://www.kaggle.com/datasets/{name} yourself and name its folder"
        ) from error


def _looks_whole(path: Path) -> bool:
    """Whether a PNG or JPEG has its last bytes. Decoding 100,000 would take an hour."""
    with suppress(OSError), open(path, "rb") as file:  # the file behind a link may have moved
        file.seek(max(0, os.fstat(file.fileno()).st_size - 1024))
        return (b"IEND" if path.suffix == ".png" else b"\xff\xd9") in file.read()
    return False


def lay_out_cncb_lesions(
    out: Path, sources: Sequence[Source], lists: Source | None = None, seed: int = 0
) -> dict[str, int]:
    """Make the layout of `LesionSlices` of CNCB's masked slices, and count what its lists name.

    Every image and mask of the released lists is read and checked. train_500 and test_150 are a
    draw of ours, by patient, since the paper's own is not published.
    """
    fetch_files("cncb-lesions", out, lists, sources)
    paths = {s: out / f"lists/{s}_split_segmentation.txt" for s in ("train", "test")}
    names = {s: [words[0] for _, words in read_lines(path)] for s, path in paths.items()}
    wanted = {Path(name).stem for part in names.values() for name in part}
    suffixes = {"image": IMAGE_SUFFIXES, "mask": (".png",)}
    seen: dict[str, PurePath] = {}  # image or mask -> its path in the source

    def place(path: PurePath) -> str | None:
        kind, patient = ("", "", *path.parts)[-3:-1]
        kind, suffix = kind.lower().removesuffix("s"), path.suffix.lower()
        if f"{patient}_{path.stem}" not in wanted or suffix not in suffixes.get(kind, ()):
            return None
        key = f"{kind}/{patient}/{path.stem}"
        if (other := seen.setdefault(key, path)) != path:
            raise DataError(f"{out}: {key} is there twice, {other} and {path}; name one's folder")
        return key + suffix

    collect(sources, out, place)
    for split, path in paths.items():
        dataset = LesionSlices(out, path)
        for index in tqdm(range(len(dataset)), f"check {split}", unit="slice", disable=None):
            dataset.read(index)
    patients = [name.rpartition("_")[0] for name in names["train"]]
    divided = split_by_patient(patients, (500 / 650, 150 / 650), seed)
    for name, part in zip(("train_500", "test_150"), divided, strict=True):
        names[name] = [names["train"][index] for index in part]
    for name, part in names.items():
        classes.write_lines(out / f"{name}.txt", part)
    return {name: len(part) for name, part in names.items()}


def lay_out_covid_ct(
    out: Path,
    sources: Sequence[Source] = (),
    address: Source | None = None,
    allow_missing: bool = False,
) -> dict[str, int]:
    """Make `out`/slices of COVID-CT, with the published lists, and count what these name.

    `sources` are folders or archives with the images; without them both archives are downloaded.
    A warning names images that are not, byte for byte, those of the copy whose sums we have.
    """
    names, labels, known = {}, {"NonCOVID": 0, "COVID": 1}, SETS["covid-ct"]["images"]
    try:
        fetch_files("covid-ct", out, address, sources)
    except DataError as error:  # with the images at hand, nobody needs a network
        if not sources or address or not all(map(os.path.exists, sources)):
            raise
        what = "the lists cannot be fetched; those that we have of one copy are taken"
        warnings.warn(f"{what} ({one_line(error):.60}...)", stacklevel=2)
        for split, part in known.items():
            pairs = [(path.split("/")[1], path[3:].split("/")[0]) for path in part]
            names[split] = sorted(pairs, key=lambda pair: labels[pair[1]])
    for split in () if names else SPLITS:
        paths = {kind: out / f"Data-split/{kind}/{split}CT_{kind}.txt" for kind in labels}
        try:
            names[split] = [(w[0], kind) for kind in labels for _, w in read_lines(paths[kind])]
            if odd := [n for n, _ in names[split] if Path(n).suffix.lower() not in IMAGE_SUFFIXES]:
                raise DataError(f"{out}: the list {split} names {some(odd)}, no image; try again")
        except DataError:  # it has no sum: fetch it again the next time
            for path in paths.values():
                path.unlink(missing_ok=True)
            raise
        theirs = {f"CT_{kind}/{name}" for name, kind in names[split]}
        if theirs != set(known[split]):
            what = f"{len(theirs)} images, not the {len(known[split])} of the copy that we know"
            warnings.warn(f"{out}: the list {split} names {what}", stacklevel=2)
    wanted = {Path(name).stem: (name, kind) for part in names.values() for name, kind in part}
    there = {path.stem: path.name for path in (out / "slices").glob("*.*") if _looks_whole(path)}

    def place(path: PurePath) -> str | None:
        # 102.png of another folder is another image; of one stem, the first file is taken
        suffix, kind = path.suffix.lower(), wanted.get(path.stem, ("", ""))[1]
        if suffix not in IMAGE_SUFFIXES or path.parent.name != f"CT_{kind}":
            return None
        name = there.setdefault(path.stem, f"{path.stem}{suffix}")
        return f"slices/{name}" if name == f"{path.stem}{suffix}" else None

    for path in (out / "slices").glob("*.*"):
        if path.suffix in IMAGE_SUFFIXES and path.stem not in there:
            path.unlink()  # our link or copy, so that a whole one can take its place

    whole = all(stem in there for stem in wanted)
    _unpack_all("covid-ct", out, sources, address, place, whole)
    found = {path.stem: path.name for path in (out / "slices").glob("*.*") if _looks_whole(path)}
    missing = [name for stem, (name, _) in wanted.items() if stem not in found]
    if missing and not (allow_missing and len(missing) < len(wanted)):
        raise DataError(
            f"{out}: of the {len(wanted)} images that the lists name, {some(missing)} are missing "
            "or damaged; name a folder or archive that has them with --from, or leave them out "
            "with --allow-missing; what was found is kept"
        )
    sums = {Path(name).stem: sha256 for part in known.values() for name, sha256 in part.items()}
    here = {stem: found[stem] for stem in wanted if stem in found}
    if other := [
        name
        for stem, name in here.items()
        if pooch.file_hash(str(out / "slices" / name)) != sums.get(stem)
    ]:
        what = "not the published bytes (another size or format, or another image)"
        warnings.warn(f"{out}: {some(other)}: {what}", stacklevel=2)
    classes.write_lines(out / "slices/classes.txt", labels)
    for split, part in names.items():
        pairs = [(here.get(Path(name).stem), labels[kind]) for name, kind in part]
        entries = [classes.SliceEntry(name, label, None) for name, label in pairs if name]
        path = out / f"slices/{split}.txt"
        if entries:  # of a copy that has no test images there is no such list
            classes.write_split(path, entries)
        else:
            path.unlink(missing_ok=True)
        names[split] = entries
    return {split: len(part) for split, part in names.items()}


def lay_out_covid_ct_md(
    out: Path, sources: Sequence[Source] = (), address: Source | None = None
) -> dict[str, int]:
    """Make `out`/CLASS/PATIENT of the DICOM files of COVID-CT-MD's sample; count each class."""
    fetch_files("covid-ct-md", out, address, sources)
    kinds = dict(zip(("normal", "cap", "covid-19"), IMAGE_CLASSES, strict=True))
    kinds |= {name.lower(): name for name in IMAGE_CLASSES} | {"common": IMAGE_CLASSES[1]}

    def place(path: PurePath) -> str | None:
        kind, patient = ("", "", *path.parts)[-3:-1]
        name = kinds.get(kind.lower().removesuffix(" subjects"))
        dicom = path.suffix.lower() == ".dcm" and not path.name.startswith(".")
        return f"{name}/{patient}/{path.name}" if name and dicom else None

    listed = out / "files.txt"  # what the archive held: nobody publishes a list
    before = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else [listed]
    lost = sum(not (out / name).is_file() for name in before)
    places = _unpack_all("covid-ct-md", out, sources, address, place, whole=not lost)
    if not sources and places:
        classes.write_lines(listed, sorted({*places, *(before if listed.is_file() else [])}))
    counts = {name: len(list((out / name).glob("*/*.dcm"))) for name in IMAGE_CLASSES}
    if not all(counts.values()):
        none = ", ".join(name for name, count in counts.items() if not count)
        raise DataError(
            f"{out}: there is no DICOM file of {none}; name a folder or archive with "
            "<class> subjects/<patient>/<slice>.dcm in it with --from"
        )
    return counts


def _unpack_all(
    name: str,
    out: Path,
    sources: Sequence[Source],
    address: Source | None,
    place: Place,
    whole: bool,
) -> list[str]:
    """Take in `sources`, or, where not all is there, the published archives; see `collect`."""
    fetched = []
    if not sources and not whole:
        for base, archives in SETS[name]["archives"].items():
            download(address or base, dict.fromkeys(archives), out)
            fetched += [out / archive for archive in archives]
    try:
        return collect([*sources, *fetched], out, place)
    finally:  # a damaged one must not be taken for whole the next time
        for path in fetched:
            path.unlink(missing_ok=True)


def download(base: Source, files: Mapping[str, str | None], out: Path) -> list[str]:
    """Fetch the files that are missing from `out`, or there with another sum; give their names.

    pooch gives a file its name when its sum is right, and tries again when it is not or the
    connection breaks. The first that still fails ends it all, in a `DataError`; others stay.

    Args:
        base: what stands before each name, such as https://example.org; or a folder with copies.
        files: name, with / between folders, -> SHA-256 in hexadecimal digits; None: not known, so
            that what is there counts as right. A .zip goes on where the connection broke.
    """
    http, retries = pooch.HTTPDownloader(chunk_size=2**16, timeout=TIMEOUT), RETRIES
    if local := os.path.isdir(base):
        http, retries = (lambda url, file, _: shutil.copyfile(url, file)), 0
    pooch.get_logger().setLevel("WARNING")  # a bar says more than a line per file
    source = pooch.Pooch(out, f"{base}".rstrip("/") + "/", files, retry_if_failed=retries)

    def fetch(name: str) -> None:
        try:
            zipped = name.endswith(".zip") and not local
            part = partial(_go_on, out / f"{name}.part") if zipped else http
            with room_in(out):
                source.fetch(name, downloader=part)
        except OutputError:
            raise
        except (OSError, ValueError) as error:  # those of requests, too
            raise DataError(
                f"{source.get_url(name)}: cannot be fetched ({one_line(error)}); check the "
                "address and network, try later, or name a folder with copies (see --help)"
            ) from error

    wanted = [
        name
        for name, sha256 in files.items()
        if not (out / name).is_file() or (sha256 and pooch.file_hash(str(out / name)) != sha256)
    ]
    for folder in {(out / name).parent for name in wanted}:
        check_writable(folder)  # and make it, before threads of pooch collide in that
    with ThreadPoolExecutor(8) as pool:
        list(tqdm(pool.map(fetch, wanted), "fetch", len(wanted), unit="file", disable=None))
    return wanted


def _go_on(part: Path, url: str, file: str, _: pooch.Pooch) -> None:
    """A downloader for pooch that keeps what came in `part`, and asks for the rest another time."""
    there = part.stat().st_size if part.exists() else 0
    ask = {"Range": f"bytes={there}-"} if there else {}
    with requests.get(url, stream=True, timeout=TIMEOUT, headers=ask) as answer:
        if answer.status_code == 416:  # no more than we have
            part.unlink()
        answer.raise_for_status()
        with open(part, "ab" if answer.status_code == 206 else "wb") as kept:
            for chunk in answer.iter_content(2**16):
                kept.write(chunk)
    if not zipfile.is_zipfile(part):
        part.unlink()
        raise ValueError("what came is no whole zip archive")
    os.replace(part, file)


def collect(sources: Sequence[Source], out: Path, place: Place) -> list[str]:
    """Bring the files that have a place below `out` to it: linked, or unpacked from zip archives.

    All those of a source or none: they lie in `out`/.partial until the whole of it has been seen.
    Of two files with one place, the first is taken. Gives the places.

    Raises:
        DataError: an archive is damaged, encrypted, or no zip; it holds a path with .. or from the
            root, a link or a device, or unpacks to too much; the disk is full.
    """
    unfinished, places = out / ".partial", []
    try:
        for source in map(Path, sources):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            first = len(places)
            with decoding(source, "cannot be taken in", "check or unpack it"), room_in(out):
                for path, bring in tqdm(_files(source, out), "look", unit="file", disable=None):
                    goal = place(path)
                    if goal and not any((top / goal).exists() for top in (out, unfinished)):
                        (unfinished / goal).parent.mkdir(parents=True, exist_ok=True)
                        bring(unfinished / goal)
                        places.append(goal)
                for goal in places[first:]:
                    (out / goal).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(unfinished / goal, out / goal)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return places


def _files(source: Path, out: Path) -> Iterator[tuple[PurePath, Callable[[Path], object]]]:
    """The path of each file of a folder or archive, and what brings it to another place."""
    if source.is_dir():
        for where, folders, files in os.walk(source.resolve()):
            folders[:] = sorted(f for f in folders if Path(where, f) != out.resolve())
            for path in (Path(where, file) for file in sorted(files)):
                if path.is_file():  # reading a pipe would block for ever
                    yield path, partial(_link, path)
        return
    limit = max(MAX_RATIO * source.stat().st_size, 2**20)
    with zipfile.ZipFile(source) as archive:
        for entry in archive.infolist():
            name = entry.orig_filename  # as the archive says it, with / or, on Windows, \
            path = PureWindowsPath(name)
            limit -= entry.file_size  # no more than it states is delivered
            kind = stat.S_IFMT(entry.external_attr >> 16)  # 0: not made on Unix
            odd = kind not in (0, stat.S_IFREG, stat.S_IFDIR)
            if odd or limit < 0 or path.anchor or ".." in path.parts:
                raise DataError(
                    f"{source}: {name!r} leads out of the folder, is a link or a device, or "
                    "unpacks to too much for pictures; unpack it yourself if you trust it"
                )
            if not name.endswith(("/", "\\")):
                yield path, partial(_unpack, archive, entry)


def _link(source: Path, target: Path) -> None:
    for link in (os.symlink, os.link):
        with suppress(OSError):  # the disk, or Windows, allows no links
            return link(source, target)
    shutil.copyfile(source, target)


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    with archive.open(entry) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 2**20)
