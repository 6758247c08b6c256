"""The phantoms: deterministic, plausible, with the statistics of Fig. 1, and safely written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from covidmask.config import PRESETS, PhantomConfig
from covidmask.datasets import phantom_sets
from covidmask.datasets.chest import HEIGHT, MIN_AREA, draw, render, visible_lesions
from covidmask.datasets.lesions import mask_to_targets
from covidmask.datasets.patients import (
    FRIEND,
    draw_positions,
    make_patient,
    make_slice,
    old_friend,
)
from covidmask.datasets.phantom_sets import phantom_mask, write_phantoms
from covidmask.errors import DataError, OutputError

SMALL = PhantomConfig(
    size=48, slices_per_patient=2, lesion_patients=(3, 1, 2), class_patients=(2, 1, 1)
)
quick = settings(deadline=None, max_examples=20)
seeds, labels = st.integers(0, 2**64 - 1), st.integers(0, 2)


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


def component_areas(mask: np.ndarray, code: int) -> np.ndarray:
    components, _ = ndimage.label(mask == code, np.ones((3, 3)))
    return np.bincount(components.ravel())[1:]


@pytest.fixture(scope="module")
def covid_masks() -> list[np.ndarray]:
    """Three slices of each of 40 COVID-19 patients, 256 x 256."""
    masks = []
    for seed in range(40):
        patient = make_patient(seed, 2)
        masks += [render(patient, p, 256)[1] for p in draw_positions(patient, 3)]
    return masks


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", SMALL, progress=False)


# One slice


@quick
@given(seed=seeds, label=labels, position=st.floats(0, 1), size=st.integers(32, 160))
def test_values_codes_and_determinism(seed, label, position, size):
    image, mask = make_slice(seed, label, size, position)
    assert image.shape == mask.shape == (size, size)
    assert image.dtype == np.float32 and mask.dtype == np.uint8
    assert image.min() >= 0 and image.max() <= 1
    assert set(np.unique(mask)) <= ({0, 1} if label == 0 else {0, 1, 2, 3})
    assert digest(image, mask) == digest(*make_slice(seed, label, size, position))


@quick
@given(seed=seeds, which=st.sampled_from([(1, False), (2, False), (2, True)]))
def test_a_drawn_position_shows_a_lesion(seed, which):
    patient = make_patient(seed, *which)
    for position in draw_positions(patient, 3):
        # the position was chosen on a coarse drawing, where a small lesion has other pixels
        assert (draw(patient, position, 128)[1] >= 2).mean() > 0.5 * MIN_AREA


@quick
@given(seed=seeds)
def test_a_control_has_no_lesion(seed):
    assert make_patient(seed, 0).lesions == ()
    assert make_slice(seed, 0, 64)[1].max() == 1


@quick
@given(seed=seeds, label=labels)
def test_the_anatomy_is_the_same_at_every_size(seed, label):
    patient = make_patient(seed, label)
    position = draw_positions(patient, 1)[0]
    (small, small_mask), (large, large_mask) = (render(patient, position, n) for n in (128, 256))
    for code in range(4):
        assert (small_mask == code).mean() == pytest.approx((large_mask == code).mean(), abs=0.004)
    halved = large.reshape(128, 2, 128, 2).mean((1, 3))
    assert np.corrcoef(small.ravel(), halved.ravel())[0, 1] > 0.95  # noise of a low dose


def test_lesions_are_denser_than_the_lung_around_them_and_lung_than_air():
    values = {code: [] for code in range(4)}
    for seed in range(20):
        image, mask = make_slice(seed, 2, 128)
        for code in (1, 2, 3):
            values[code].append(image[mask == code])
    lung, ggo, solid = (np.median(np.concatenate(values[code])) for code in (1, 2, 3))
    assert lung < ggo - 0.1 and ggo < solid - 0.15
    # Intensity alone does not find GGO: a fair share of healthy lung is as dense.
    assert np.mean(np.concatenate(values[1]) > ggo) > 0.03


def test_lungs_change_from_apex_to_base():
    patient = make_patient(3, 0)
    apex, middle, base = ((render(patient, p, 128)[1] == 1).mean() for p in (0.0, 0.5, 1.0))
    assert apex < 0.5 * middle and base < 0.5 * middle and base > 0


# Statistics


def test_figure_1_of_the_paper(covid_masks):
    pixels = 256 * 256
    for code, limit in ((2, 0.02), (3, 0.01)):
        areas = [component_areas(mask, code) for mask in covid_masks]
        assert np.mean([len(a) < 5 for a in areas]) >= 0.8
        assert np.mean(np.concatenate(areas) < limit * pixels) >= 0.8


def test_few_tiny_instances(covid_masks):
    areas = np.concatenate([component_areas(m, c) for m in covid_masks for c in (2, 3)])
    assert np.mean(areas < 0.5 * MIN_AREA * 256 * 256) < 0.08  # rough outlines fray
    assert np.mean(areas >= 2 * MIN_AREA * 256 * 256) > 0.8


def test_lesions_below_the_smallest_area_are_not_drawn():
    patient = make_patient(1, 2)
    lesion = patient.lesions[0]
    ends = (lesion.centre[2] + 0.999 * lesion.radii[2]) / HEIGHT
    assert lesion in visible_lesions(patient, lesion.centre[2] / HEIGHT)
    assert lesion not in visible_lesions(patient, min(ends, 1.0))


def test_positions_do_not_tell_the_class():
    drawn = [
        np.array([draw_positions(make_patient(seed, label), 1)[0] for seed in range(120)])
        for label in range(3)
    ]
    for positions in drawn:
        assert positions.min() >= 0.1 and positions.max() <= 0.9
        assert abs(positions.mean() - drawn[0].mean()) < 0.09
        assert abs(positions.std() - drawn[0].std()) < 0.06


def test_look_alikes_do_not_tell_the_class():
    def rates(label):
        patients = [make_patient(seed, label) for seed in range(40)]
        return np.mean([(p.dependent > 0, len(p.tubes) / 1e4, p.fluid[0] > 0) for p in patients], 0)

    assert np.abs(rates(0) - rates(2)).max() < 0.2
    assert np.abs(rates(1) - rates(2)).max() < 0.2


# Writing


def test_layout(written):
    note = json.loads((written / "phantoms.json").read_text(encoding="utf-8"))
    assert note["seed"] == 0 and note["config"]["lesion_patients"] == [3, 1, 2]
    for split, patients in (("train", 3), ("val", 1), ("test", 2)):
        lines = (written / f"lesions/{split}.txt").read_text(encoding="utf-8").split()
        assert len(lines) == 2 * patients
        for line in lines:
            patient, piece = line.rsplit("_", 1)
            with Image.open(written / "lesions/image" / patient / piece) as picture:
                assert picture.mode == "L" and picture.size == (48, 48)
            with Image.open(written / "lesions/mask" / patient / piece) as picture:
                assert np.asarray(picture).max() <= 3
    names = set()
    for split, patients in (("train", 2), ("val", 1), ("test", 1)):
        lines = (written / f"slices/{split}.txt").read_text(encoding="utf-8").splitlines()
        assert len(lines) == 3 * 2 * patients
        for line in lines:
            name, label, *box = line.split()
            assert name.split("_")[0] == ("Normal", "CP", "NCP")[int(label)]
            assert len(Path(name).stem.split("_")) == 4 and len(Path(name).stem[-4:]) == 4
            assert box == ["0", "0", "48", "48"]
            names.add(name)
    assert names == {path.name for path in (written / "slices").glob("*.png")}
    assert sorted(path.name for path in written.parent.iterdir()) == ["set"]


def test_no_patient_occurs_twice(written):
    groups = []
    for split in ("train", "val", "test"):
        lesions = (written / f"lesions/{split}.txt").read_text(encoding="utf-8").split()
        groups.append({line.rsplit("_", 1)[0] for line in lesions})
        slices = (written / f"slices/{split}.txt").read_text(encoding="utf-8").splitlines()
        groups.append({line.split("_")[1] for line in slices})
    assert sum(map(len, groups)) == len(set.union(*groups)) == 6 + 12
    drawn = [job[3:] for job in phantom_sets._jobs(PhantomConfig(48, 2, (99, 9, 9), (99, 9, 9)), 0)]
    assert len(set(drawn)) == len(drawn)


def test_some_lesion_slices_are_empty(tmp_path):
    config = PhantomConfig(32, 8, (20, 0, 0), (0, 0, 0))
    write_phantoms(tmp_path / "set", config, progress=False)
    empty = [np.asarray(Image.open(p)).max() < 2 for p in tmp_path.rglob("mask/*/*.png")]
    assert len(empty) == 160 and 0.05 < np.mean(empty) < 0.18


def test_a_second_call_does_nothing(written, monkeypatch):
    monkeypatch.setattr(phantom_sets, "_fill", lambda *_: pytest.fail("written again"))
    assert write_phantoms(written, SMALL, progress=False) == written


def test_the_number_of_processes_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom_sets, "IN_PROCESS", 0)
    hashes = []
    for workers in (1, 2):
        root = write_phantoms(tmp_path / str(workers), SMALL, 1, workers, progress=False)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        hashes.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"config": PhantomConfig(48, 3, (1, 1, 1), (1, 1, 1))}]
)
def test_other_settings_are_refused(written, change):
    before = digest(
        *[np.frombuffer(p.read_bytes(), np.uint8) for p in sorted(written.rglob("*.png"))]
    )
    with pytest.raises(DataError, match="other settings.*choose another folder"):
        write_phantoms(written, **({"config": SMALL, "progress": False} | change))
    after = digest(
        *[np.frombuffer(p.read_bytes(), np.uint8) for p in sorted(written.rglob("*.png"))]
    )
    assert before == after


def test_a_set_of_an_older_version_is_refused(written, monkeypatch):
    monkeypatch.setattr(phantom_sets, "GENERATOR", phantom_sets.GENERATOR + 1)
    words = "phantoms that another version of covidmask drew; choose another folder, or remove"
    with pytest.raises(DataError, match=words):
        write_phantoms(written, SMALL, progress=False)


def test_another_hospital_has_the_same_masks_and_severe_patients_have_others(written, tmp_path):
    def pictures(root, kind):
        return [np.asarray(Image.open(p)) for p in sorted(root.glob(f"lesions/{kind}/*/*.png"))]

    hospital, severe = (
        write_phantoms(tmp_path / name, replace(SMALL, **{name: 1}), progress=False)
        for name in ("hospital", "severe")
    )
    assert np.array_equal(pictures(written, "mask"), pictures(hospital, "mask"))
    assert not np.array_equal(pictures(written, "image"), pictures(hospital, "image"))
    assert np.sum(np.array(pictures(severe, "mask")) > 1) > np.sum(
        np.array(pictures(written, "mask")) > 1
    )
    name = next(path.name for path in severe.glob("slices/NCP_*.png"))
    assert (phantom_mask(name, SMALL.size, severe=True) >= 2).any()
    assert json.loads((hospital / "phantoms.json").read_text())["config"]["hospital"] == 1


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="other files"):
        write_phantoms(tmp_path, SMALL, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(DataError, match="notes.txt: holds other files"):
        write_phantoms(tmp_path / "notes.txt", SMALL, progress=False)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_nothing_half_written_is_left(tmp_path, monkeypatch, number):
    save, calls = Image.Image.save, []

    def fail_later(self, *args, **kwargs):
        calls.append(args)
        if len(calls) > 5:
            raise OSError(number, "cannot write")
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", fail_later)
    with pytest.raises(OutputError, match="cannot be written.*space left"):
        write_phantoms(tmp_path / "set", SMALL, progress=False)
    assert list(tmp_path.iterdir()) == []


def semiseg(root):
    return phantom_sets.write_semiseg_phantoms(root, 64, (1, 1))


@pytest.mark.parametrize("name", ["_fill", "_fill_semiseg"])
def test_another_process_may_be_faster(tmp_path, monkeypatch, name):
    """It finishes the same set while this one draws: nothing is wrong, and nothing is left."""
    root, fill = tmp_path / "set", getattr(phantom_sets, name)

    def write():
        return semiseg(root) if name == "_fill_semiseg" else write_phantoms(root, SMALL, 0, 1)

    def slower(*arguments):
        fill(*arguments)
        monkeypatch.undo()
        monkeypatch.setattr(phantom_sets.os, "getpid", lambda: 0)
        assert write() == root
        monkeypatch.undo()

    monkeypatch.setattr(phantom_sets, name, slower)
    assert write() == root
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def script(folder, *lines):
    """Arguments for `subprocess` that run these lines as a script in `folder`."""
    text = ["import covidmask.datasets.phantom_sets as sets", *lines]
    (folder / "script.py").write_text("\n".join(text), encoding="utf-8")
    home = str(Path(phantom_sets.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": home}
    return {"args": [sys.executable, "script.py"], "cwd": folder, "env": environment, "text": True}


DRAW = "sets.write_phantoms('set', sets.PhantomConfig(64, 12, (%d, 0, 0), (9, 0, 0)), %s)"


def test_a_plain_script_starts_no_process(tmp_path):
    lines = ("print('once')", "sets.IN_PROCESS = 0", DRAW % (9, "progress=False"))
    done = subprocess.run(**script(tmp_path, *lines), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once\n", "")
    assert (tmp_path / "set" / "phantoms.json").exists()


def test_a_plain_script_that_asks_for_processes_hears_what_they_need(tmp_path):
    lines = ("sets.IN_PROCESS = 0", DRAW % (9, "workers=2, progress=False"))
    done = subprocess.run(**script(tmp_path, *lines), capture_output=True)
    assert done.returncode and "OutputError: set: a process that draws" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_processes_that_draw_do_not_load_torch():
    code = "import sys, covidmask.datasets.phantom_sets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="a killed run's folder stays on Windows")
def test_a_killed_run_takes_its_processes_along_and_a_later_one_removes_its_folder(tmp_path):
    lines = ("if __name__ == '__main__':", "    " + DRAW % (9999, "workers=2, progress=False"))
    process = subprocess.Popen(**script(tmp_path, *lines), stdout=subprocess.PIPE)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".set.*.tmp/lesions/image/*")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=5)  # ends when every process that holds the pipe has ended
    (left,) = tmp_path.glob(".set.*.tmp")
    (tmp_path / ".set.1.tmp").mkdir()  # of one that runs
    now = time.time()
    os.utime(left, (now, now - 90_000))
    write_phantoms(tmp_path / "set", SMALL, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"script.py", "set", ".set.1.tmp"}


def test_a_folder_left_by_a_process_of_the_same_number_is_cleared(tmp_path):
    left = tmp_path / f".set.{os.getpid()}.tmp"
    left.mkdir()
    (left / "stale.png").touch()
    write_phantoms(tmp_path / "set", SMALL, progress=False)
    assert not (tmp_path / "set" / "stale.png").exists() and not left.exists()


def test_lists_have_the_same_bytes_on_every_system(written):
    for path in written.rglob("*.txt"):
        assert b"\r" not in path.read_bytes()
    assert 1 <= phantom_sets.cores() <= 61


def test_another_process_may_write_another_set(tmp_path, monkeypatch):
    def other(folder, *_):
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "phantoms.json").write_text("{}")

    monkeypatch.setattr(phantom_sets, "_fill", other)
    with pytest.raises(DataError, match="another version"):
        write_phantoms(tmp_path / "set", SMALL, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("write", [lambda root: write_phantoms(root, SMALL, 0, 1), semiseg])
def test_the_current_folder_is_refused_unless_it_is_the_set(tmp_path, monkeypatch, write):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match=r"\.: is the current folder.*name a folder in it"):
        write(".")
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]
    write("set/../set")
    monkeypatch.chdir("set")
    assert write(".") == Path(".")


@pytest.mark.parametrize(
    ("config", "seed"),
    [
        (PhantomConfig(16, 2, (1, 1, 1), (1, 1, 1)), 0),
        (PhantomConfig(64, 99, (1, 1, 1), (1, 1, 1)), 0),
        (PhantomConfig(64, 2, (1, -1, 1), (1, 1, 1)), 0),
        (replace(SMALL, hospital=2), 0),
        (SMALL, -1),
    ],
)
def test_settings_out_of_range(tmp_path, config, seed):
    with pytest.raises(DataError):
        write_phantoms(tmp_path / "set", config, seed, progress=False)


@quick
@given(seed=seeds, label=labels)
def test_every_patient_has_enough_positions(seed, label):
    positions = draw_positions(make_patient(seed, label), phantom_sets.MAX_SLICES)
    assert positions == sorted(set(positions))


def test_the_mask_of_a_classification_slice_is_found_by_its_name(written):
    for name in ("Normal", "CP", "NCP"):
        path = next((written / "slices").glob(f"{name}_*.png"))
        mask = phantom_mask(path.name, SMALL.size)
        assert mask.shape == (SMALL.size, SMALL.size)
        assert (mask >= 2).any() == (name != "Normal")
        number, piece = path.stem.split("_")[1], path.stem.split("_")[3]
        job = next(job for job in phantom_sets._jobs(SMALL, 0) if job[2] == int(number))
        image, expected = render(make_patient(*job[3:]), int(piece) / 1000, SMALL.size)
        assert np.array_equal(mask, expected)
        assert np.abs(np.asarray(Image.open(path)) / 255 - image).max() < 0.003


def test_no_two_slices_of_a_patient_have_one_name(tmp_path):
    """Two of the clear slices of this patient were drawn at one position, and shared a file."""
    config = PRESETS["semiseg"].phantoms
    job = next(job for job in phantom_sets._jobs(config, 0) if job[2] == 68)
    lines = phantom_sets._write_patient(tmp_path, config, job)[2]
    assert len(set(lines)) == len(lines) == config.slices_per_patient


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_the_old_friend_has_the_same_lesions_at_every_size(preset):
    image, mask = old_friend(preset.phantoms.size)
    assert image.shape == mask.shape == (preset.phantoms.size,) * 2
    target = mask_to_targets(mask, min_area=preset.min_area)
    assert target["labels"].tolist() == [1, 1, 1, 2, 2]
    left, right = mask[:, : mask.shape[1] // 2], mask[:, mask.shape[1] // 2 :]
    assert (left > 1).any() and (right > 1).any()


def test_the_old_friend_is_in_no_data_set():
    seeds = {
        job[3] for preset in PRESETS.values() for job in phantom_sets._jobs(preset.phantoms, 0)
    }
    assert FRIEND[0] not in seeds
