"""Data sets of phantoms on disk, in the layouts of the real data: the same readers serve both."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache, partial
from itertools import count, islice, product
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from covidmask.config import NAME_CLASSES, PhantomConfig
from covidmask.datasets.chest import draw, render, visible_lesions
from covidmask.datasets.patients import draw_positions, make_patient
from covidmask.errors import DataError, OutputError
from covidmask.files import SPLITS, write_text

GENERATOR = 3  # raised whenever the same arguments give other phantoms
MAX_SLICES = 12  # per patient in `write_phantoms`
IN_PROCESS = 300 * 256**2  # pixels: for fewer, starting processes would take longer
MAX_WORKERS = 61  # more processes than that Windows cannot wait for
DAY = 24 * 60 * 60  # seconds: no set takes as long


def _jobs(config: PhantomConfig, seed: int) -> Iterator[tuple[str, str, int, int, int]]:
    """Yield (set, split, patient number, patient seed, label) for every patient of a data set."""
    sets = ("lesions", config.lesion_patients, [2]), ("slices", config.class_patients, [0, 1, 2])
    number = count(1)
    for kind, patients, labels in sets:
        for (split, wanted), label in product(zip(SPLITS, patients, strict=True), labels):
            for n in islice(number, wanted):
                yield kind, split, n, _patient_seed(seed, n), label


def _patient_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])


def phantom_mask(name: str, size: int, seed: int = 0, severe: bool = False) -> np.ndarray:
    """The true mask, see `render`, of a slice that `write_phantoms` wrote without one.

    Args:
        name: such as NCP_412_1_0455.png. size: pixels per side. seed, severe: those of the set.
    """
    from covidmask.datasets.classes import parse_name

    label, number, _, thousandths = parse_name(name)
    patient = _last_patient(_patient_seed(seed, int(number)), label, severe)
    return draw(patient, int(thousandths) / 1000, size)[1]


_last_patient = lru_cache(maxsize=1)(make_patient)  # lists name the slices of a patient in a row


def _write_patient(
    folder: Path, config: PhantomConfig, job: tuple[str, str, int, int, int]
) -> tuple[str, str, list[str]]:
    """Write the slices of one patient; return its set, its split and its lines of the list."""
    kind, split, number, seed, label = job
    patient = make_patient(seed, label, config.severe)
    size, positions = config.size, draw_positions(patient, config.slices_per_patient)
    if kind == "lesions":  # one in ten is swapped for one without a lesion, if there is one
        rng = np.random.default_rng((seed, label, 5))
        anywhere = np.round(rng.uniform(0.02, 0.98, 200), 3).tolist()
        swap = rng.random(len(positions)) < 0.1
        taken = {p for p, swapped in zip(positions, swap, strict=True) if not swapped}
        free = (p for p in dict.fromkeys(anywhere) if p not in taken)  # a position is a file name
        clear = (p for p in free if not visible_lesions(patient, p))
        pairs = zip(positions, swap, strict=True)
        positions = sorted(next(clear, p) if swapped else p for p, swapped in pairs)
    lines = []
    for position in positions:
        image, mask = render(patient, position, size, hospital=config.hospital)
        piece = f"{round(1000 * position):04d}.png"
        if kind == "lesions":
            _save(image, folder / kind / "image" / str(number) / piece)
            _save(mask, folder / kind / "mask" / str(number) / piece)
            lines.append(f"{number}_{piece}\n")
        else:
            name = f"{NAME_CLASSES[label]}_{number}_1_{piece}"
            _save(image, folder / kind / name)
            lines.append(f"{name} {label} 0 0 {size} {size}\n")
    return kind, split, lines


def _save(image: np.ndarray, path: Path, palette: bytes = b"", **options: int) -> None:
    """Write grey values in 0..1, or uint8 codes."""
    codes = image if image.dtype == np.uint8 else np.round(255 * image).astype(np.uint8)
    picture = Image.fromarray(codes)
    if palette:
        picture.putpalette(palette)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


def cores() -> int:
    """How many processes can draw at once here: the cores that this one may use, 61 at most."""
    granted = getattr(os, "sched_getaffinity", None)  # a scheduler may grant fewer than all
    return min(len(granted(0)) if granted else os.cpu_count() or 1, MAX_WORKERS)


def start_worker() -> None:
    """Let this process end as soon as the one that started it is gone, even by kill -9."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, once


def write_phantoms(
    root: str | Path, config: PhantomConfig, seed: int = 0, workers: int = 1, progress: bool = True
) -> Path:
    """Write a data set of phantoms in the layouts of the real ones, or find it already written.

    `root/lesions` holds COVID-19 patients with masks (CNCB layout); a few slices show no
    lesion, as some slices of positive patients do in the paper's data. `root/slices` holds
    patients of the three classes (COVIDx-CT layout), and each slice of classes 1 and 2 shows a
    lesion. Both have train.txt, val.txt and test.txt, and no patient occurs twice. A slice is
    named by 1000 times its position. The folder appears complete or not at all.

    Args:
        workers: processes that draw; with 1 this one draws, and no other is started. The files do
            not depend on it. A script that asks for more, such as `cores()`, needs the usual
            `if __name__ == "__main__":` guard.

    Raises:
        DataError: `root` holds something else or is the current folder; `config` is out of range.
        OutputError: `root` cannot be written, the disk is full, or a process has ended early.
    """
    slices, numbers = config.slices_per_patient, (*config.lesion_patients, *config.class_patients)
    fits = 32 <= config.size <= 1024 and 1 <= slices <= MAX_SLICES and config.hospital in (0, 1)
    if not (fits and min(*numbers, seed) >= 0):
        raise DataError(
            f"{config}, seed {seed}: size must be 32..1024, slices per patient 1..{MAX_SLICES}, "
            "the hospital 0 or 1, numbers of patients and the seed >= 0"
        )
    note = {"seed": seed, "config": asdict(config)}
    return _write_set(root, note, lambda folder: _fill(folder, config, seed, workers, progress))


def _fill(folder: Path, config: PhantomConfig, seed: int, workers: int, progress: bool) -> None:
    """Write every patient and then the lists.

    Workers import this module, so it must not load torch, which takes each a second and 0.4 GB.
    """
    jobs = list(_jobs(config, seed))
    write = partial(_write_patient, folder, config)
    bar = partial(tqdm, total=len(jobs), desc="phantoms", unit="patient", disable=not progress)
    if workers <= 1 or len(jobs) * config.slices_per_patient * config.size**2 < IN_PROCESS:
        done = list(bar(map(write, jobs)))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, MAX_WORKERS), spawn, start_worker) as pool:
            # workers take over that Ctrl-C is held back; else each would die of it with a traceback
            hold = getattr(signal, "pthread_sigmask", None)  # Windows has none
            before = hold(signal.SIG_BLOCK, {signal.SIGINT}) if hold else ()
            try:
                results = pool.map(write, jobs, chunksize=4)
            finally:
                if hold:
                    hold(signal.SIG_SETMASK, before)
            done = list(bar(results))
    for kind, split in product(("lesions", "slices"), SPLITS):
        lines = [line for k, s, part in done if (k, s) == (kind, split) for line in part]
        write_text(folder / kind / f"{split}.txt", "".join(lines))


def _write_set(root: str | Path, settings: dict, fill: Callable[[Path], None]) -> Path:
    """Find the set of these settings in `root`, or have `fill` write it: complete or not at all."""
    root, note = Path(root), json.loads(json.dumps({"generator": GENERATOR} | settings))
    home = root.resolve()  # "." has no name
    folder = home.parent / f".{home.name}.{os.getpid()}.tmp"
    try:
        if _found(root, note):
            return root
        if home == Path.cwd():
            raise DataError(
                f"{root}: is the current folder, which cannot be replaced; name a folder in it"
            )
        for left in home.parent.glob(".*.tmp"):  # of runs that were killed
            with suppress(FileNotFoundError):  # another process clears up, too
                old = left == folder or time.time() - left.stat().st_mtime > DAY
                if old and left.name.startswith(f".{home.name}."):
                    shutil.rmtree(left, ignore_errors=True)
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise BrokenProcessPool  # a worker that imports a script without the guard
        fill(folder)
        write_text(folder / "phantoms.json", json.dumps(note, indent=2) + "\n")
        try:
            with suppress(FileNotFoundError):
                home.rmdir()  # it is empty
            os.replace(folder, home)
        except OSError:
            if not _found(root, note):  # else another process was faster
                raise
    except BrokenProcessPool as error:
        raise OutputError(
            f"{root}: a process that draws phantoms has ended early; use workers=1, or put the "
            'call under `if __name__ == "__main__":`, which several processes need'
        ) from error
    except OSError as error:
        raise OutputError(
            f"{root}: phantoms cannot be written ({error.strerror or error}); "
            "choose a folder that you may write to and that has space left"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return root


def _found(root: Path, note: dict) -> bool:
    """Whether `root` holds these very phantoms; False when it is absent or empty."""
    if not root.exists() or root.is_dir() and not any(root.iterdir()):
        return False
    what = "other files"
    with suppress(FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        there = json.loads((root / "phantoms.json").read_text(encoding="utf-8"))
        if there | note == there:
            return True
        same = there.get("generator") == GENERATOR
        by = "made with other settings" if same else "that another version of covidmask drew"
        what = f"phantoms {by}"
    raise DataError(f"{root}: holds {what}; choose another folder, or remove this one yourself")


def write_semiseg_phantoms(
    root: str | Path, size: int, slices: tuple[int, int] = (50, 48), seed: int = 0
) -> Path:
    """Write phantoms of COVID-19 patients in the layout of COVID-SemiSeg, as `write_phantoms` does.

    `SemiSeg` reads them. As in the real set, slices are cropped to the lungs and so differ in size,
    image and mask are stored transposed, and the masks are palette pictures (0 background, 1 GGO,
    2 consolidation) that mark no lung. Unlike there, each slice is of a patient of its own, of whom
    no other data set shows a slice.

    Args:
        size: pixels per side before cropping, 64 to 1024.
        slices: how many for training and for testing.
    """
    if not 64 <= size <= 1024 or min(*slices, seed) < 0:
        raise DataError(
            f"size {size}, slices {slices}, seed {seed}: size must be 64..1024, the others >= 0"
        )
    note = {"layout": "COVID-SemiSeg", "seed": seed, "size": size, "slices": slices}
    return _write_set(root, note, lambda folder: _fill_semiseg(folder, size, slices, seed))


def _fill_semiseg(folder: Path, size: int, slices: tuple[int, int], seed: int) -> None:
    margin = size // 32
    for number, part in enumerate(["Train"] * slices[0] + ["Test"] * slices[1]):
        home = folder / f"{part}ingSet" / f"MultiClassInfection-{part}"
        patient = make_patient(_patient_seed(seed, 1_000_000 + number), 2, severe=True)
        image, mask = render(patient, draw_positions(patient, 1)[0], size)
        ends = [(int(at.min()), int(at.max()) + 1) for at in np.nonzero(mask)]  # lung and lesions
        crop = tuple(slice(max(low - margin, 0), high + margin) for low, high in ends)
        codes = np.array([0, 0, 1, 2], dtype=np.uint8)[mask[crop].T]  # the palette's, without lung
        _save(image[crop].T, home / "Imgs" / f"{number}.jpg", quality=95)
        palette = bytes([0, 0, 0, 128, 0, 0, 0, 128, 0])
        _save(np.ascontiguousarray(codes), home / "GT" / f"{number}.png", palette)
