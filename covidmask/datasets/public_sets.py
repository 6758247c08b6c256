"""Real CT: COVID-SemiSeg, COVIDx-CT-1 and the masked slices of CNCB, made ready for the loaders.

No scan comes with this package. public_sets.json has terms, addresses and checksums;
`covidmask fetch NAME --help` explains what each function makes, and its options.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from covidmask.datasets import classes
from covidmask.datasets.downloads import ARCHIVES, Place, download, extract
from covidmask.datasets.lesions import LesionSlices, SemiSeg, split_by_patient
from covidmask.datasets.scans import IMAGE_SUFFIXES, write_image
from covidmask.errors import DataError
from covidmask.files import SPLITS, atomic_path, one_line, read_lines, some

_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TERMS: dict[str, str] = {name: "\n".join(entry["terms"]) + "\n" for name, entry in _TABLE.items()}
# data set -> address -> file -> SHA-256; of COVIDx-CT-1 and CNCB, the files are their lists
FILES: dict[str, dict[str, dict[str, str]]] = {n: entry["files"] for n, entry in _TABLE.items()}
Source = str | os.PathLike[str]


def fetch_covid_semiseg(out: Path, source: Source | None = None) -> dict[str, int]:
    """Download the 50 + 48 slices of COVID-SemiSeg with their masks; count its files.

    `out` then holds TrainingSet and TestingSet as published, for `SemiSeg`; and lesion_layout/, the
    same slices upright in the layout of `LesionSlices`, with train.txt and test.txt. Each slice
    counts there as a patient, because the set names none.

    Raises:
        DataError: a file cannot be had, or is not the published one.
        OutputError: `out` cannot be written.
    """
    fetched = _begin("covid-semiseg", out, ".", source, ())
    lists = [out / "lesion_layout" / f"{split}.txt" for split in ("train", "test")]
    if fetched or not all(path.is_file() for path in lists):
        for path in lists:
            path.unlink(missing_ok=True)  # they come last, and so mark the layout as complete
        for path in lists:
            dataset = SemiSeg(out, path.stem)
            for index, patient in enumerate(tqdm(dataset.patients, "convert", disable=None)):
                for part, array in zip(("image", "mask"), dataset.read(index), strict=True):
                    write_image(path.parent / part / patient / f"{patient}.png", array)
            _write(path, [f"{patient}_{patient}.png" for patient in dataset.patients])
    total = sum(map(len, FILES["covid-semiseg"].values()))
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
    Kaggle, or by <patient>/<scan>/<slice> at the end of its path, as in the archives of CNCB. Files
    in folders are linked (copied where the disk knows no links); from archives only the listed
    slices are unpacked. `out` keeps what it has, so the parts may come in several calls.

    Raises:
        DataError: a source or a list is not what it should be; slices are missing or damaged.
        OutputError: `out` cannot be written.
    """
    sources = [_kaggle() if name == "kaggle" else name for name in sources]
    _begin("covidx-ct", out, "lists", lists, sources)
    entries = {s: classes.read_split(out / f"lists/{s}_COVIDx_CT-1.txt") for s in SPLITS}
    listed = {Path(entry.name).stem: entry for part in entries.values() for entry in part}
    # patient, scan and slice are unique without the class
    by_key = {classes.parse_name(entry.name)[1:]: stem for stem, entry in listed.items()}

    def place(path: PurePosixPath) -> str | None:
        words, suffix = path.stem.split("_"), path.suffix.lower()
        named = len(words) == 4
        stem = by_key.get(tuple(words[1:]) if named else (*path.parts[-3:-1], path.stem))
        if stem is None or suffix not in IMAGE_SUFFIXES:
            return None
        label = listed[stem].label
        right = not named or words[0] in (classes.NAME_CLASSES[label], str(label))
        return f"slices/{stem}{suffix}" if right else None

    _collect(sources, out, place)
    found = set()
    for file in tqdm(list((out / "slices").glob("*")), "check", unit="slice", disable=None):
        if file.stem in listed and file.suffix in IMAGE_SUFFIXES:
            if _looks_whole(file):
                found.add(listed[file.stem].name)
            else:
                file.unlink()  # our link or copy, so that a whole one can take its place
    there = {split: [e for e in part if e.name in found] for split, part in entries.items()}
    missing = [entry.name for entry in listed.values() if entry.name not in found]
    if missing and not (allow_missing and found):
        raise DataError(
            f"{out}: of the {len(listed):,} slices of the COVIDx-CT-1 lists, {some(missing)} are "
            "missing or damaged (versions after the first leave out 28); name more folders or "
            "archives with --from, or leave them out with --allow-missing; what was found is kept"
        )
    (out / "missing.txt").unlink(missing_ok=True)
    if missing:
        _write(out / "missing.txt", missing)
    author = classes.read_split(out / "lists/train_split_classification.txt")
    stems = [by_key.get(classes.parse_name(entry.name)[1:]) for entry in author]
    drawn = [listed[stem] for stem in stems if stem]  # under their names in v1, with their boxes
    parts = {"train": [entry for entry in drawn if entry.name in found]}
    parts |= {"val": there["val"], "test": there["test"], "train_all": there["train"]}
    for name, by_patient in (("", False), ("_by_patient", True)):
        sample = classes.balanced_sample(there["train"], per_class, seed, by_patient)
        parts[f"sample_seed{seed}{name}"] = sample
    for name, part in parts.items():
        classes.write_split(out / f"slices/{name}.txt", part)
    return {name: len(part) for name, part in parts.items()}


def _kaggle() -> Path:
    """COVIDx-CT-1 by kagglehub, which keeps it in a folder of its own."""
    try:
        import kagglehub

        return Path(kagglehub.dataset_download("hgunraj/covidxct/versions/1"))
    except Exception as error:  # many ways to fail: not installed, login, consent, network, disk
        raise DataError(
            f"--from kaggle: the download fails ({one_line(error)}); `pip install kagglehub`, or "
            "get https://www.kaggle.com/datasets/hgunraj/covidxct yourself and name its folder"
        ) from error


def _looks_whole(path: Path) -> bool:
    """Whether a PNG or JPEG has its first and last bytes. Decoding 100,000 would take an hour."""
    head = tail = b""
    with suppress(OSError), open(path, "rb") as file:  # the file behind a link may have moved
        head = file.read(8)
        file.seek(max(0, os.fstat(file.fileno()).st_size - 1024))
        tail = file.read()
    png = head == b"\x89PNG\r\n\x1a\n" and b"IEND" in tail
    return png or (head[:3] == b"\xff\xd8\xff" and b"\xff\xd9" in tail)


def lay_out_cncb_lesions(
    out: Path, sources: Sequence[Source], lists: Source | None = None, seed: int = 0
) -> dict[str, int]:
    """Make the layout of `LesionSlices` of CNCB's masked slices, and count what its lists name.

    Files of a folder are linked, those of an archive unpacked. Every image and mask of the released
    lists is read and checked. train_500 and test_150 are a draw of ours, by patient, since the
    paper's own is not published.

    Raises:
        DataError: the source is neither folder nor archive, slices are missing, stand there twice
            or are damaged, or a mask holds other codes than 0..3.
        OutputError: `out` cannot be written.
    """
    _begin("cncb-lesions", out, "lists", lists, sources)
    names = {
        split: [words[0] for _, words in read_lines(out / f"lists/{split}_split_segmentation.txt")]
        for split in ("train", "test")
    }
    wanted = {tuple(Path(n).stem.rsplit("_", 1)) for part in names.values() for n in part}
    suffixes = {"image": IMAGE_SUFFIXES, "mask": (".png",)}
    seen: dict[str, PurePosixPath] = {}  # image or mask -> its path in the source

    def place(path: PurePosixPath) -> str | None:
        kind = path.parts[-3].lower().removesuffix("s") if len(path.parts) >= 3 else ""
        suffix = path.suffix.lower()
        if suffix not in suffixes.get(kind, ()) or (path.parent.name, path.stem) not in wanted:
            return None
        key = f"{kind}/{path.parent.name}/{path.stem}"
        if (other := seen.setdefault(key, path)) != path:
            raise DataError(
                f"{out}: {key} comes twice, as {other} and as {path}; name the folder above one"
            )
        return key + suffix

    _collect(sources, out, place)
    for split in names:
        dataset = LesionSlices(out, out / f"lists/{split}_split_segmentation.txt")
        for index in tqdm(range(len(dataset)), f"check {split}", unit="slice", disable=None):
            dataset.read(index)
    patients = [name.rpartition("_")[0] for name in names["train"]]
    divided = split_by_patient(patients, (500 / 650, 150 / 650), seed)
    for name, part in zip(("train_500", "test_150"), divided, strict=True):
        names[name] = [names["train"][index] for index in part]
    for name, part in names.items():
        _write(out / f"{name}.txt", part)
    return {name: len(part) for name, part in names.items()}


def _begin(name: str, out: Path, below: str, base: Source | None, sources: Sequence) -> int:
    """Look at the sources, write the terms, and bring the files of a data set to `out`/`below`."""
    for path in (Path(source).expanduser() for source in sources):
        if not path.is_dir() and not (path.is_file() and path.name.lower().endswith(ARCHIVES)):
            problem = "is no archive" if path.exists() else "there is no such file or folder"
            raise DataError(f"{path}: {problem}; name a folder, or {', '.join(ARCHIVES)}")
    _write(out / "TERMS.txt", TERMS[name].splitlines())
    return sum(len(download(base or url, f, out / below)) for url, f in FILES[name].items())


def _write(path: Path, lines: Sequence[str]) -> None:
    with atomic_path(path) as temporary:
        text = "".join(f"{line}\n" for line in lines)
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _collect(sources: Sequence[Source], out: Path, place: Place) -> None:
    """Bring the files that have a place below `out` to it: linked, or unpacked from archives."""

    def new_place(path: PurePosixPath) -> str | None:
        bar.update()
        goal = place(path)
        return None if goal is None or (out / goal).exists() else goal

    def stop(error: OSError) -> None:
        raise error  # a folder that may not be entered is not left out in silence

    with tqdm(desc="look", unit="file", disable=None) as bar:
        for source in (Path(source).expanduser() for source in sources):
            if source.is_file():
                extract(source, out, new_place)
                continue
            for where, folders, files in os.walk(source.resolve(), onerror=stop):
                folders[:] = sorted(f for f in folders if Path(where, f) != out.resolve())
                for path in (Path(where, file) for file in sorted(files)):
                    if goal := new_place(PurePosixPath(path.as_posix())):
                        _link(path, out / goal)


def _link(source: Path, target: Path) -> None:
    """Link a file; copy it where the disk, or Windows, allows no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a link whose file was moved
    for link in (os.symlink, os.link):
        with suppress(OSError):
            return link(source, target)
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
