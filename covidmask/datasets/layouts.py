"""Folders that the loaders read, made from what the reader downloaded: linked, not copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from covidmask.datasets.archives import SUFFIXES, extract, is_archive
from covidmask.datasets.classes import (
    NAME_CLASSES,
    SliceEntry,
    balanced_sample,
    parse_name,
    read_split,
    write_split,
)
from covidmask.datasets.downloads import move, partial_folder
from covidmask.datasets.lesions import LesionSlices, split_by_patient
from covidmask.datasets.scans import IMAGE_SUFFIXES
from covidmask.datasets.sources import public_lists, write_lines, write_terms
from covidmask.errors import DataError
from covidmask.files import SPLITS, read_lines, some

Place = Callable[[PurePosixPath], str | None]  # path of a file -> its place below `out`, or None


# ---- COVIDx-CT ------------------------------------------------------------------------------


def lay_out_covidx_ct(
    out: str | Path,
    sources: Sequence[str | Path],
    lists: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    per_class: int = 1000,
    allow_missing: bool = False,
    progress: bool = True,
) -> dict[str, int]:
    """Make `out`/slices of COVIDx-CT-1 from folders and archives, and check it against the lists.

    A file belongs to a slice of the v1 lists by <class>_<patient>_<scan>_<slice> in its name, as on
    Kaggle, or by <patient>/<scan>/<slice> at the end of its path, as in the archives of CNCB. Files
    in folders are linked (copied where the disk knows no links); from archives only the listed
    slices are unpacked. `out` keeps what it has, so the parts may come in several calls.

    `out`/slices then has these lists: train (the author's 3,000 slices), val and test (all of v1),
    train_all (all of v1), and for each seed sample_seed<n> and sample_seed<n>_by_patient.

    Args:
        sources: folders (searched to any depth) and archives.
        lists: folder with copies of the four public lists, compared with their SHA-256; None
            downloads them.
        seeds, per_class: of the samples, see `balanced_sample`.
        allow_missing: leave out slices that are not there, and name them in `out`/missing.txt.

    Returns:
        list -> its number of slices.

    Raises:
        DataError: a source or a list is not what it should be; slices are missing or damaged (what
            was found stays in `out`).
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    _check_sources(sources)
    write_terms(out, "covidx-ct")
    folder = public_lists(out, "covidx-ct", lists, progress)
    entries = {split: read_split(folder / f"{split}_COVIDx_CT-1.txt") for split in SPLITS}
    by_key = {parse_name(e.name)[1:]: e for part in entries.values() for e in part}
    wanted = {key: Path(entry.name).stem for key, entry in by_key.items()}
    slices = out / "slices"

    def place(path: PurePosixPath) -> str | None:
        stem = _listed_slice(path, wanted)
        return None if stem is None else f"slices/{stem}{path.suffix.lower()}"

    _collect(sources, out, place, progress)
    found, damaged = _whole_images(slices, wanted.values(), progress)
    missing = [e.name for part in entries.values() for e in part if Path(e.name).stem not in found]
    if missing and not (allow_missing and found):
        raise DataError(_missing_text(out, entries, missing, damaged))
    if missing:
        write_lines(out / "missing.txt", missing)
    else:
        (out / "missing.txt").unlink(missing_ok=True)
    there = {s: [e for e in entries[s] if Path(e.name).stem in found] for s in SPLITS}
    author = [
        by_key.get(parse_name(e.name)[1:], e)  # under its name in v1, with the box of the body
        for e in read_split(folder / "train_split_classification.txt")
    ]
    result: dict[str, list[SliceEntry]] = {
        "train": [e for e in author if Path(e.name).stem in found],
        "val": there["val"],
        "test": there["test"],
        "train_all": there["train"],
    }
    for seed in seeds:
        for name, by_patient in (("", False), ("_by_patient", True)):
            sample = balanced_sample(there["train"], per_class, seed, by_patient)
            result[f"sample_seed{seed}{name}"] = sample
    for name, part in result.items():
        write_split(slices / f"{name}.txt", part)
    return {name: len(part) for name, part in result.items()}


def _listed_slice(path: PurePosixPath, wanted: Mapping[tuple, str]) -> str | None:
    """The slice of the v1 lists that a file is, by its name or by the end of its path."""
    if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
        return None
    words = path.stem.split("_")
    if len(words) == 4:
        stem = wanted.get(tuple(words[1:]))
        if stem is None:
            return None
        label = NAME_CLASSES.index(stem.partition("_")[0])
        return stem if words[0] in (NAME_CLASSES[label], str(label)) else None
    # patient, scan and slice are unique without the class: whatever the folders above are called
    return wanted.get((*path.parts[-3:-1], path.stem)) if len(path.parts) >= 3 else None


def _whole_images(
    folder: Path, stems: Collection[str], progress: bool
) -> tuple[set[str], list[str]]:
    """The listed slices that are there and complete; the names of the others, which are removed."""
    listed, found, damaged = set(stems), set(), []
    files = list(os.scandir(folder)) if folder.is_dir() else []
    for file in tqdm(files, desc="check", unit="slice", disable=not progress):
        stem, suffix = os.path.splitext(file.name)
        if stem in listed and suffix in IMAGE_SUFFIXES:
            if _looks_whole(file.path):
                found.add(stem)
            else:
                damaged.append(file.name)
                os.unlink(file.path)  # our link or copy
    return found, damaged


def _looks_whole(path: str) -> bool:
    """Whether a PNG or JPEG has its first and last bytes. Decoding 100,000 would take an hour."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(max(0, os.fstat(file.fileno()).st_size - 1024))
            tail = file.read()
    except OSError:  # the file behind a link was moved away
        return False
    png = head == b"\x89PNG\r\n\x1a\n" and b"IEND" in tail
    return png or (head[:3] == b"\xff\xd8\xff" and b"\xff\xd9" in tail)


def _missing_text(
    out: Path, entries: dict[str, list[SliceEntry]], missing: list[str], damaged: list[str]
) -> str:
    absent = set(missing)
    counts = {split: sum(e.name in absent for e in part) for split, part in entries.items()}
    total = sum(map(len, entries.values()))
    return (
        f"{out}: of the {total:,} slices of the COVIDx-CT-1 lists, {some(missing)} are missing "
        f"({', '.join(f'{split} {count:,}' for split, count in counts.items())})"
        + (f", {len(damaged):,} of them because their files are damaged" if damaged else "")
        + "; name more folders or archives with --from (what was found is kept; versions of the "
        "data set after the first leave out 28 slices), or leave them out with --allow-missing"
    )


# ---- masked slices of CNCB ------------------------------------------------------------------


def lay_out_cncb_lesions(
    out: str | Path,
    source: str | Path,
    lists: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, int]:
    """Make the layout of `LesionSlices` from a folder or archive with the masked slices of CNCB.

    The content is recognised, whatever its name: image/<patient>/<slice>.jpg or .png and
    mask/<patient>/<slice>.png at any depth. Files of a folder are linked, those of an archive
    unpacked. Every image and mask of the released lists is read and checked.

    `out` then has the released lists, train.txt (650 slices) and test.txt (100); and
    train_500.txt and test_150.txt, which divide the first 650 as the paper's text counts, by
    patient: a draw of ours, since the paper's own is not published.

    Args:
        lists: folder with copies of the two public lists, compared with their SHA-256; None
            downloads them. seed: of the division into 500 and 150.

    Returns:
        list -> its number of slices.

    Raises:
        DataError: the source is neither folder nor archive, slices are missing, stand there twice
            or are damaged, or a mask holds other codes than 0..3.
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    _check_sources([source])
    write_terms(out, "cncb-lesions")
    folder = public_lists(out, "cncb-lesions", lists, progress)
    names = {
        split: [words[0] for _, words in read_lines(folder / f"{split}_split_segmentation.txt")]
        for split in ("train", "test")
    }
    wanted = {tuple(Path(n).stem.rsplit("_", 1)): n for part in names.values() for n in part}
    seen: dict[str, PurePosixPath] = {}  # slice -> its path in the source

    def place(path: PurePosixPath) -> str | None:
        kind = path.parts[-3].lower().removesuffix("s") if len(path.parts) >= 3 else ""
        suffix = path.suffix.lower()
        if (
            kind not in ("image", "mask")
            or suffix not in IMAGE_SUFFIXES
            or (kind == "mask" and suffix != ".png")
            or (path.parent.name, path.stem) not in wanted
        ):
            return None
        key = f"{kind}/{path.parent.name}/{path.stem}"
        if seen.setdefault(key, path) != path:
            raise DataError(
                f"{source}: holds {key} twice, as {seen[key]} and as {path}; name the folder "
                "above one of them"
            )
        return key + suffix

    _collect([source], out, place, progress)
    missing = [
        f"{kind}/{patient}/{slice}"
        for patient, slice in wanted
        for kind in ("image", "mask")
        if not any((out / kind / patient / f"{slice}{s}").is_file() for s in IMAGE_SUFFIXES)
    ]
    if missing:
        raise DataError(
            f"{source}: of the {len(wanted):,} slices of the released lists, these images or masks "
            f"are missing: {some(missing)}; name a folder or archive with image/<patient>/<slice> "
            "and mask/<patient>/<slice> in it"
        )
    with partial_folder(out) as partial:
        for split, part in names.items():
            write_lines(partial / f"{split}.txt", part)
            dataset = LesionSlices(out, partial / f"{split}.txt")
            for index in tqdm(range(len(dataset)), desc=f"check {split}", disable=not progress):
                dataset.read(index)
    patients = [Path(name).stem.rsplit("_", 1)[0] for name in names["train"]]
    parts = split_by_patient(patients, (500 / 650, 150 / 650), seed)
    for name, part in zip(("train_500", "test_150"), parts, strict=True):
        names[name] = [names["train"][index] for index in part]
    for name, part in names.items():
        write_lines(out / f"{name}.txt", part)
    return {name: len(part) for name, part in names.items()}


# ---- what they share ------------------------------------------------------------------------


def _check_sources(sources: Sequence[str | Path]) -> None:
    for source in map(Path, sources):
        if not source.is_dir() and not (source.is_file() and is_archive(source)):
            problem = "is no archive" if source.exists() else "there is no such file or folder"
            raise DataError(f"{source}: {problem}; name a folder, or {', '.join(SUFFIXES)}")


def _collect(sources: Sequence[str | Path], out: Path, place: Place, progress: bool) -> None:
    """Bring the files that have a place to it: link those of folders, unpack those of archives."""

    def missing(path: PurePosixPath) -> str | None:
        goal = place(path)
        return None if goal is None or (out / goal).exists() else goal

    with partial_folder(out) as partial:
        for source in map(Path, sources):
            bar = tqdm(desc=f"look through {source.name}", unit="file", disable=not progress)
            with bar:
                if source.is_dir():
                    for path in _walk(source.resolve(), out.resolve()):
                        bar.update()
                        if (goal := missing(PurePosixPath(path.as_posix()))) is not None:
                            _link(path, out / goal, partial)
                else:
                    _unpack(source, out, partial, missing, bar)


def _unpack(archive: Path, out: Path, partial: Path, place: Place, bar: tqdm) -> None:
    def counted(path: PurePosixPath) -> str | None:
        bar.update()
        return place(path)

    for goal in extract(archive, partial / "unpacked", counted):
        move(partial / "unpacked" / goal, out / goal)
    shutil.rmtree(partial / "unpacked", ignore_errors=True)


def _walk(folder: Path, leave_out: Path) -> Iterator[Path]:
    """Every file below `folder`, in a fixed order, but none that we wrote."""

    def stop(error: OSError) -> None:
        raise error  # a folder that may not be entered is not left out in silence

    for where, folders, files in os.walk(folder, onerror=stop):
        here = Path(where)
        folders[:] = sorted(name for name in folders if here / name != leave_out)
        yield from (here / name for name in sorted(files))


def _link(source: Path, target: Path, partial: Path) -> None:
    """Link a file; copy it where the disk, or Windows, allows no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a link whose file was moved
    for link in (os.symlink, os.link):
        try:
            return link(source, target)
        except OSError:
            continue
    shutil.copyfile(source, partial / "copy")
    move(partial / "copy", target)
