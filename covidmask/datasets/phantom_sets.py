"""Data sets of phantoms on disk, in the layouts of the real data: the same readers serve both."""

from __future__ import annotations

import glob
import json
import multiprocessing
import os
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import count, islice, product
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import covidmask
from covidmask.config import PhantomConfig
from covidmask.datasets import phantoms
from covidmask.datasets.phantoms import draw_positions, make_patient, render
from covidmask.errors import DataError, OutputError
from covidmask.files import SPLITS

GENERATOR = 1  # raised whenever the same arguments give other phantoms
CLASS_NAMES = ("Normal", "CP", "NCP")  # in file names of COVIDx-CT: labels 0, 1, 2
MAX_SLICES = 12  # per patient in `write_phantoms`
IN_PROCESS = 300 * 256**2  # pixels: for fewer, starting processes would take longer
MAX_WORKERS = 61  # more processes than that Windows cannot wait for


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


def phantom_mask(name: str, size: int, seed: int = 0) -> np.ndarray:
    """The true mask, see `render`, of a slice that `write_phantoms` wrote without one.

    Args:
        name: such as NCP_412_1_0455.png. size: pixels per side. seed: that of the data set.
    """
    from covidmask.datasets.classes import parse_name

    label, number, _, thousandths = parse_name(name)
    patient = make_patient(_patient_seed(seed, int(number)), label)
    return render(patient, int(thousandths) / 1000, size)[1]


def _write_patient(
    folder: Path, config: PhantomConfig, job: tuple[str, str, int, int, int]
) -> tuple[str, str, list[str]]:
    """Write the slices of one patient; return its set, its split and its lines of the list."""
    kind, split, number, seed, label = job
    patient = make_patient(seed, label)
    size, positions = config.size, draw_positions(patient, config.slices_per_patient)
    if kind == "lesions":  # one slice in ten is swapped for one without a lesion
        rng = phantoms._rng(seed, label, 5)
        anywhere = rng.permutation(phantoms.POSITIONS).tolist()
        clear = [p for p in anywhere if not phantoms.visible_lesions(patient, p)]
        swap = rng.random(len(positions)) < 0.1
        pairs = zip(positions, swap, strict=True)
        positions = sorted(clear.pop() if clear and swapped else p for p, swapped in pairs)
    lines = []
    for position in positions:
        image, mask = render(patient, position, size)
        piece = f"{round(1000 * position):04d}.png"
        if kind == "lesions":
            _save(_grey(image), folder / kind / "image" / str(number) / piece)
            _save(Image.fromarray(mask), folder / kind / "mask" / str(number) / piece)
            lines.append(f"{number}_{piece}\n")
        else:
            name = f"{CLASS_NAMES[label]}_{number}_1_{piece}"
            _save(_grey(image), folder / kind / name)
            lines.append(f"{name} {label} 0 0 {size} {size}\n")
    return kind, split, lines


def _grey(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(255 * image).astype(np.uint8))


def _save(picture: Image.Image, path: Path, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


def cores() -> int:
    """How many processes can draw at once here: the cores that this one may use, 61 at most."""
    if hasattr(os, "sched_getaffinity"):  # a scheduler or a container may grant fewer than all
        return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    return min(os.cpu_count() or 1, MAX_WORKERS)  # macOS, Windows


def _end_with_parent() -> None:
    """Let this worker end as soon as the process that started it is gone, killed or not."""
    sentinel = multiprocessing.parent_process().sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, once


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Keep Ctrl-C from processes that start, which would die of it with tracebacks of their own."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_phantoms(
    root: str | Path, config: PhantomConfig, seed: int = 0, workers: int = 1, progress: bool = True
) -> Path:
    """Write a data set of phantoms in the layouts of the real ones, or find it already written.

    `root/lesions` holds COVID-19 patients with masks (CNCB layout); about one slice in ten shows
    no lesion, as some slices of positive patients do in the paper's data. `root/slices` holds
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
    numbers = (*config.lesion_patients, *config.class_patients, seed)
    if not (32 <= config.size <= 1024 and 1 <= config.slices_per_patient <= MAX_SLICES):
        raise DataError(f"{config}: size must be 32..1024, slices per patient 1..{MAX_SLICES}")
    if min(numbers) < 0:
        raise DataError(f"{config}, seed {seed}: numbers of patients and the seed must be >= 0")
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
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, MAX_WORKERS), context, _end_with_parent) as pool:
            with _interrupts_later():
                results = pool.map(write, jobs, chunksize=4)
            done = list(bar(results))
    for kind in ("lesions", "slices"):
        for split in SPLITS:
            lines = [line for k, s, part in done if (k, s) == (kind, split) for line in part]
            _write_text(folder / kind / f"{split}.txt", "".join(lines))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system


def _write_set(root: str | Path, settings: dict, fill: Callable[[Path], None]) -> Path:
    """Find the set of these settings in `root`, or have `fill` write it: complete or not at all."""
    root, note = Path(root), json.loads(json.dumps({"generator": GENERATOR} | settings))
    try:
        if _found(root, note):
            return root
        home = Path(os.path.realpath(root))  # "." has no name
        if home == Path.cwd():
            raise DataError(
                f"{root}: is the current folder, which cannot be replaced; name a folder in it"
            )
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            # a worker that is still importing a script without the guard: it must leave no folder
            raise BrokenProcessPool
        prefix = f".{home.name}.{platform.node()}."  # on a shared disk other hosts have theirs
        for left in home.parent.glob(f"{glob.escape(prefix)}*.tmp"):
            number = left.name.removeprefix(prefix).removesuffix(".tmp")
            if number.isdecimal() and (int(number) == os.getpid() or not _runs(int(number))):
                shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
        folder = home.with_name(f"{prefix}{os.getpid()}.tmp")
        try:
            fill(folder)
            text = json.dumps(note | {"package": covidmask.__version__}, indent=2)
            _write_text(folder / "phantoms.json", text + "\n")
            try:
                with suppress(FileNotFoundError):
                    home.rmdir()  # it is empty
                os.replace(folder, home)
            except OSError:
                if not _found(root, note):  # else another process was faster
                    raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
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
    return root


def _runs(number: int) -> bool:
    """Whether there is a process of this number; on Windows, where none can ask, True."""
    if os.name != "nt":  # there os.kill would end it
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):  # another user's; no number of a process
            pass
    return True


def _found(root: Path, note: dict) -> bool:
    """Whether `root` holds these very phantoms; False when it is absent or empty."""
    if root.is_file():
        raise DataError(f"{root}: is a file; choose another folder for the phantoms")
    if not root.exists() or not any(root.iterdir()):
        return False
    try:
        there = json.loads((root / "phantoms.json").read_text(encoding="utf-8"))
        there.pop("package", None)
        problem = "holds phantoms made with other settings"
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        there, problem = None, "holds other files"
    if there != note:
        raise DataError(f"{root}: {problem}; choose another folder, or remove this one yourself")
    return True


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
        slices: how many for training and for testing. seed: another one gives other patients.
    """
    if not 64 <= size <= 1024 or len(slices) != 2 or min(*slices, seed) < 0:
        raise DataError(
            f"size {size}, slices {slices}, seed {seed}: size must be 64..1024, slices two numbers "
            "and they and the seed >= 0"
        )
    note = {"layout": "COVID-SemiSeg", "seed": seed, "size": size, "slices": slices}
    return _write_set(root, note, lambda folder: _fill_semiseg(folder, size, slices, seed))


def _fill_semiseg(folder: Path, size: int, slices: tuple[int, int], seed: int) -> None:
    margin = size // 32
    for number, part in enumerate(["Train"] * slices[0] + ["Test"] * slices[1]):
        home = folder / f"{part}ingSet" / f"MultiClassInfection-{part}"
        patient = make_patient(_patient_seed(seed, 1_000_000 + number), 2)
        image, mask = render(patient, draw_positions(patient, 1)[0], size)
        ends = [(int(at.min()), int(at.max()) + 1) for at in np.nonzero(mask)]  # lung and lesions
        crop = tuple(slice(max(low - margin, 0), high + margin) for low, high in ends)
        _save(_grey(image[crop].T), home / "Imgs" / f"{number}.jpg", quality=95)
        codes = np.array([0, 0, 1, 2], dtype=np.uint8)[mask[crop]]  # the palette's, without lung
        palette = Image.fromarray(np.ascontiguousarray(codes.T))
        palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        _save(palette, home / "GT" / f"{number}.png")
