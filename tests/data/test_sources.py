"""Fetching and laying out real CT, with phantoms and a local host in the place of both."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from http_server import serve
from PIL import Image

from covidmask.cli import main
from covidmask.datasets import public_sets
from covidmask.datasets.classes import open_slices, parse_name, read_split
from covidmask.datasets.lesions import SemiSeg, open_lesions
from covidmask.datasets.phantom_sets import write_semiseg_phantoms
from covidmask.datasets.public_sets import collect, download
from covidmask.errors import DataError, OutputError
from covidmask.files import SPLITS

PATHS = ("one.bin", "deep/two.bin", "deep/er/three.bin")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tree(folder):
    """Every file below a folder, links and hidden ones too."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Limits of a patient user, in the time of a test."""
    monkeypatch.setattr(public_sets, "TIMEOUT", (0.4, 0.4))
    monkeypatch.setattr(public_sets, "RETRIES", 2)
    monkeypatch.setattr("pooch.core.time", types.SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def host(tmp_path):
    root = tmp_path / "host"
    for number, path in enumerate(PATHS):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(np.random.default_rng(number).bytes(3000))
    with serve(root) as host:
        yield host


@pytest.fixture
def files(host):
    return {path: sha256(host.root / path) for path in PATHS}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# ---- downloads ------------------------------------------------------------------------------


def test_a_second_run_fetches_only_what_is_missing_or_wrong(host, files, out):
    assert download(host.url, files, out) == list(PATHS)
    assert tree(out) == sorted(PATHS)
    assert all((out / path).read_bytes() == (host.root / path).read_bytes() for path in PATHS)
    assert host.requests == dict.fromkeys(PATHS, 1)
    assert download(host.url + "/", files, out) == []
    assert sum(host.requests.values()) == 3
    (out / PATHS[0]).unlink()
    (out / PATHS[2]).write_bytes(b"half of")
    assert download(host.url, files, out) == [PATHS[0], PATHS[2]]
    assert host.requests == {PATHS[0]: 2, PATHS[1]: 1, PATHS[2]: 2}
    assert {path: sha256(out / path) for path in PATHS} == files


@pytest.mark.parametrize(
    "faults", [[503], [500, 429], ["short"], ["cut"], ["wrong"], ["silent"], ["silent", "short"]]
)
def test_a_passing_fault_is_overcome(faults, host, files, out):
    host.faults[PATHS[1]] = list(faults)
    download(host.url, files, out)
    assert {path: sha256(out / path) for path in PATHS} == files
    assert host.requests[PATHS[1]] == len(faults) + 1


@pytest.mark.parametrize(
    "fault, requests, words",
    [
        (403, 3, "(403 Client Error: Forbidden"),
        (404, 3, "(404 Client Error: Not Found"),
        (503, 3, "(503 Server Error"),
        ("wrong", 3, "SHA256 hash of downloaded file (two.bin) does not match"),
        ("short", 3, "cannot be fetched ("),
        ("cut", 3, "SHA256 hash"),
        ("silent", 3, "Read timed out"),
        (("to", PATHS[1]), 93, "redirects"),
    ],
)
def test_a_lasting_fault_ends_in_one_sentence(fault, requests, words, host, files, out):
    download(host.url, {PATHS[0]: files[PATHS[0]]}, out)
    (out / PATHS[1]).parent.mkdir()
    (out / PATHS[1]).write_bytes(b"an old version")
    host.faults[PATHS[1]] = fault
    with pytest.raises(DataError) as caught:
        download(host.url, {path: files[path] for path in PATHS[:2]}, out)
    message = str(caught.value)
    assert message.startswith(f"{host.url}/{PATHS[1]}: ") and words in message
    assert "\n" not in message
    assert host.requests[PATHS[1]] == requests
    assert tree(out) == sorted(PATHS[:2])  # the others are kept, and nothing is half-written
    assert (out / PATHS[1]).read_bytes() == b"an old version"
    host.faults.clear()
    assert download(host.url, files, out) == list(PATHS[1:])
    assert host.requests[PATHS[0]] == 1


def test_redirects_are_followed(host, files, out):
    host.faults[PATHS[0]] = [("to", "moved.bin")]
    shutil.copy(host.root / PATHS[0], host.root / "moved.bin")
    download(host.url, files, out)
    assert sha256(out / PATHS[0]) == files[PATHS[0]] and host.requests["moved.bin"] == 1


def test_after_a_failure_no_other_file_is_begun(host, files, out):
    host.faults = {PATHS[0]: 403}
    many = {f"deep/{number}.bin": files[PATHS[1]] for number in range(300)}
    with pytest.raises(DataError, match="403 Client Error"):
        download(host.url, {PATHS[0]: files[PATHS[0]], **many}, out)
    assert sum(host.requests.values()) < 290


def test_nobody_answers(files, out):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match="cannot be fetched .*Connection refused"):
        download(f"http://127.0.0.1:{port}", files, out)
    with pytest.raises(DataError, match="nowhere/.*: cannot be fetched .*check the address"):
        download("nowhere", files, out)
    assert tree(out) == []


def test_a_place_that_cannot_be_written(host, files, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="file/out.*: cannot be written"):
        download(host.url, files, tmp_path / "file" / "out")


@pytest.mark.parametrize("how", ["download", "copy"])
def test_a_disk_that_is_full(how, host, files, out, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "move", full)
    with pytest.raises(OutputError, match="/out: cannot be written .No space left.*; make room"):
        download(host.url if how == "download" else host.root, files, out)
    assert tree(out) == []


def test_a_killed_download_leaves_nothing_that_counts(host, files, out):
    host.faults[PATHS[2]] = ["silent"]
    code = "import json, pathlib, sys; from covidmask.datasets.public_sets import download; "
    code += "download(sys.argv[1], json.loads(sys.argv[2]), pathlib.Path(sys.argv[3]))"
    child = subprocess.Popen([sys.executable, "-c", code, host.url, json.dumps(files), str(out)])
    for _ in range(600):
        if host.requests[PATHS[2]]:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / PATHS[2]).exists()  # but perhaps a temporary file of pooch
    assert PATHS[2] in download(host.url, files, out)
    assert {path: sha256(out / path) for path in PATHS} == files


def test_copies_are_compared_too(host, files, out):
    assert download(host.root, files, out) == list(PATHS)
    assert download(host.root, files, out) == [] and tree(out) == sorted(PATHS)
    (host.root / PATHS[0]).write_bytes(b"edited")
    assert download(host.root, files, out) == []  # what is there is right
    out = out / "new"
    with pytest.raises(DataError, match=r"one.bin: cannot be .*SHA256"):
        download(host.root, files, out)
    (host.root / PATHS[0]).unlink()
    with pytest.raises(DataError, match=r"one.bin: cannot be fetched .*No such file"):
        download(host.root, files, out)


# ---- archives -------------------------------------------------------------------------------


def write_zip(path, members, **options):
    """members: name -> bytes, or (bytes, Unix mode)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            data, mode = data if isinstance(data, tuple) else (data, stat.S_IFREG | 0o644)
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            file.writestr(info, data)
    return path


def everything(path):
    return path.as_posix()


GOOD = {"./a/1.png": b"one", "a/2.png": b"two", "b/": b"", "note.txt": b"three"}


def test_an_archive(tmp_path, out):
    path = write_zip(tmp_path / "x.ZIP", GOOD)

    def place(member):
        return f"flat/{member.name}" if member.suffix == ".png" else None

    assert sorted(collect([path], out, place)) == ["flat/1.png", "flat/2.png"]
    assert tree(out) == ["flat/1.png", "flat/2.png"] and (out / "flat/2.png").read_bytes() == b"two"


def test_a_zip_whose_paths_have_backslashes(tmp_path, out):
    path = write_zip(tmp_path / "x.zip", {"a\\": b"", "a\\b\\1.png": b"one"})
    assert collect([path], out, everything) == ["a/b/1.png"]
    assert (out / "a" / "b" / "1.png").read_bytes() == b"one"


LINK, FIFO = stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644
EVIL = ["../evil", "a/../../evil", "{top}/evil", "..\\evil", "C:\\evil", "C:evil", "\\evil"]
EVIL += ["a\\..\\..\\evil", "\\\\host\\evil"]


@pytest.mark.parametrize("name", EVIL)
def test_paths_that_lead_out_are_refused(name, tmp_path, out):
    path = write_zip(tmp_path / "x.zip", {"good.png": b"1", name.format(top=tmp_path): b"2"})
    with pytest.raises(DataError, match="evil' leads out of the folder.* if you trust it"):
        collect([path], out / "deep", everything)
    assert not list(tmp_path.rglob("*evil")) and tree(out) == []


@pytest.mark.parametrize("kind", [LINK, FIFO])
def test_links_and_devices(kind, tmp_path, out):
    path = write_zip(tmp_path / "x.zip", {"b": b"1", "a/x": (b"../../outside", kind)})
    with pytest.raises(DataError, match="'a/x' .*is a link or a device"):
        collect([path], out, everything)
    assert tree(out) == []


def test_bombs_are_not_unpacked(tmp_path, out):
    bomb = write_zip(tmp_path / "b.zip", {f"{i}.png": bytes(20_000_000) for i in range(3)})
    for place in (everything, lambda path: None):  # members that nobody wants count as well
        with pytest.raises(DataError, match="b.zip: .* unpacks to too much for pictures; unpack"):
            collect([bomb], out, place)
    assert tree(out) == []
    noise = np.random.default_rng(0).bytes(50_000)
    large = write_zip(tmp_path / "l.zip", {f"{i}.png": noise for i in range(4)})
    assert len(collect([large], out / "large", everything)) == 4


def test_a_size_that_lies_does_not_pass(tmp_path, out):
    """A zip that says 10 bytes and holds 20 million: no more than it says is ever written."""
    path = write_zip(tmp_path / "lie.zip", {"0.png": bytes(20_000_000)})
    data = path.read_bytes().replace((20_000_000).to_bytes(4, "little"), bytes([10, 0, 0, 0]))
    path.write_bytes(data)
    with pytest.raises(DataError, match="cannot be taken in .*CRC"):
        collect([path], out, everything)
    assert tree(out) == []


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def test_damaged_archives(tmp_path, out):
    noise = np.random.default_rng(0).bytes(100_000)
    good = write_zip(tmp_path / "g.zip", {"a.png": noise}).read_bytes()
    broken = {
        "short.zip": good[:-50],
        "flip.zip": flip(good, 500),
        "text.tar": b"no zip at all" * 100,
        "empty.zip": b"",
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: cannot be taken in .*; check .* unpack it"):
            raise AssertionError(f"{name}: {collect([tmp_path / name], out / name, everything)}")
    locked = bytearray(good)
    for start in (good.index(b"PK\1\2") + 8, 6):
        locked[start] |= 1  # the flag of a password
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(DataError, match="locked.zip: cannot be taken in .*password"):
        collect([tmp_path / "locked.zip"], out, everything)


def test_of_two_members_with_one_place_the_first_is_taken(tmp_path, out):
    path = write_zip(tmp_path / "x.zip", {"a/1.png": b"first", "b/1.png": b"second"})
    assert collect([path], out, lambda member: member.name) == ["1.png"]
    assert (out / "1.png").read_bytes() == b"first"


def test_what_a_killed_run_has_left_is_not_taken_for_whole(tmp_path, out):
    write_files(out / ".partial", {"1.png": b"ha"})
    path = write_zip(tmp_path / "x.zip", {"1.png": b"half"})
    assert collect([path], out, everything) == ["1.png"]
    assert tree(out) == ["1.png"] and (out / "1.png").read_bytes() == b"half"


# ---- COVID-SemiSeg --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def semiseg_files(tmp_path_factory):
    """Phantoms in the published layout, and their sums."""
    root = write_semiseg_phantoms(tmp_path_factory.mktemp("semiseg") / "host", 64, (3, 2))
    return root, {path: sha256(root / path) for path in tree(root) if path.endswith("g")}


@pytest.fixture
def semiseg(semiseg_files, monkeypatch):
    """The same as the published set, at an address where nobody answers."""
    table = {"http://127.0.0.1:9": semiseg_files[1]}
    monkeypatch.setitem(public_sets.SETS["covid-semiseg"], "files", table)
    return semiseg_files


def same_slices(one, two):
    for index in range(len(one)):
        for a, b in zip(one.read(index), two.read(index), strict=True):
            np.testing.assert_array_equal(a, b)
    return len(one) == len(two)


def test_covid_semiseg(semiseg, out):
    root, files = semiseg
    with serve(root) as host:
        counts = public_sets.fetch_files("covid-semiseg", out, host.url)
        assert counts == {"files fetched": len(files), "files that were there": 0}
        assert "NON-COMMERCIAL" in (out / "TERMS.txt").read_text()
        for split, count in (("train", 3), ("test", 2)):
            published = open_lesions(out, split)
            assert isinstance(published, SemiSeg) and len(published) == count
            assert same_slices(published, SemiSeg(root, split))
        before = {
            path: (out / path).stat().st_mtime_ns for path in tree(out) if "TERMS" not in path
        }
        assert public_sets.fetch_files("covid-semiseg", out, host.url)["files fetched"] == 0
        assert {path: (out / path).stat().st_mtime_ns for path in before} == before
        name = "TrainingSet/MultiClassInfection-Train/GT/1.png"
        (out / name).write_bytes(b"edited")
        assert public_sets.fetch_files("covid-semiseg", out, host.url)["files fetched"] == 1
        assert host.requests[name] == 2 and sum(host.requests.values()) == 11
        assert same_slices(SemiSeg(out, "train"), SemiSeg(root, "train"))


def test_a_mirror_that_holds_half_of_covid_semiseg(semiseg, out, tmp_path):
    root, files = semiseg
    half = shutil.copytree(root / "TrainingSet", tmp_path / "half" / "TrainingSet").parent
    with serve(half) as host:
        for _ in range(2):
            with pytest.raises(DataError, match="TestingSet/.*404 .*; check"):
                public_sets.fetch_files("covid-semiseg", out, host.url)
        kept = [path for path in files if path.startswith("TrainingSet")]
        assert tree(out) == ["TERMS.txt", *sorted(kept)]
        assert all(host.requests[path] == 1 for path in kept)
    with serve(root) as host:
        assert public_sets.fetch_files("covid-semiseg", out, host.url)["files fetched"] == 4
    assert same_slices(SemiSeg(out, "test"), SemiSeg(root, "test"))


def test_covid_semiseg_from_a_folder_with_copies(semiseg, out):
    root, files = semiseg
    assert public_sets.fetch_files("covid-semiseg", out, str(root))["files fetched"] == len(files)
    assert same_slices(SemiSeg(out, "test"), SemiSeg(root, "test"))


def test_the_table_of_covid_semiseg():
    ((address, files),) = public_sets.SETS["covid-semiseg"]["files"].items()
    assert address.startswith(
        "https://raw.githubusercontent.com/DengPingFan/Inf-Net/fb3a03b5b2f706"
    )
    assert len(files) == 196
    for split, count in (("TrainingSet/MultiClassInfection-Train", 50), ("TestingSet", 48)):
        for part, suffix in (("Imgs", ".jpg"), ("GT", ".png")):
            here = [PurePosixPath(f) for f in files if f.startswith(split) and f"/{part}/" in f]
            assert len({path.stem for path in here}) == count
            assert {path.suffix for path in here} == {suffix}
    assert all(len(sum) == 64 and int(sum, 16) for sum in files.values())


@pytest.mark.skipif(
    not os.environ.get("COVIDMASK_REAL"), reason="COVIDMASK_REAL (folder of real CT) is not set"
)
def test_the_table_names_the_real_files(tmp_path):
    root = Path(os.environ["COVIDMASK_REAL"]) / "covid-semiseg"
    (files,) = public_sets.SETS["covid-semiseg"]["files"].values()
    there = {path: sum for path, sum in files.items() if (root / path).is_file()}
    assert len(there) >= 100
    assert {path: sha256(root / path) for path in there} == there


# ---- COVIDx-CT ------------------------------------------------------------------------------

CLASSES = ("Normal", "CP", "NCP")
SPLIT_OF = {"train": (0, 1, 2), "val": (3,), "test": (4,)}  # patients of each class


def png(number, size=16):
    data = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (size, size), dtype=np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def jpeg(number):
    data = io.BytesIO()
    Image.open(io.BytesIO(png(number))).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture
def covidx(tmp_path, monkeypatch):
    """Lists of 5 patients per class with 2 slices each, with their own sums; name -> PNG."""
    folder = tmp_path / "lists"
    folder.mkdir(exist_ok=True)
    names = {  # a number is a patient of one class, as in the real lists
        split: [
            f"{c}_{10 * (i + 1) + p}_{40 + p}_{s:04}.png"
            for i, c in enumerate(CLASSES)
            for p in people
            for s in (1, 2)
        ]
        for split, people in SPLIT_OF.items()
    }
    for split, part in names.items():
        lines = [f"{n} {CLASSES.index(n.split('_')[0])} 1 2 14 15" for n in part]
        (folder / f"{split}_COVIDx_CT-1.txt").write_text("\n".join(lines) + "\n")
    author = [
        f"{CLASSES.index(n.split('_')[0])}_{n.partition('_')[2]}" for n in names["train"][::2]
    ]
    (folder / "train_split_classification.txt").write_text("\n".join(author) + "\n")
    table = {
        address: {name: sha256(folder / name) for name in part}
        for address, part in public_sets.SETS["covidx-ct"]["files"].items()
    }
    monkeypatch.setitem(public_sets.SETS["covidx-ct"], "files", table)
    everyone = [name for part in names.values() for name in part]
    return types.SimpleNamespace(
        lists=folder, names=names, images={name: png(i) for i, name in enumerate(everyone)}
    )


def write_files(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def lay_out(out, *froms, **options):
    return public_sets.lay_out_covidx_ct(out, froms, per_class=2, **options)


def as_cncb(name):
    """The path in an archive of CNCB: <class>/<patient>/<scan>/<slice>.jpg."""
    return name.replace("_", "/").replace(".png", ".jpg")


COUNTS = {
    "train": 9,
    "val": 6,
    "test": 6,
    "train_all": 18,
    "sample_seed0": 6,
    "sample_seed0_by_patient": 6,
}


def test_covidx_ct_from_a_kaggle_folder(covidx, out, tmp_path):
    kaggle = write_files(tmp_path / "kaggle" / "2A_images", covidx.images)
    others = {"NCP_volume-covid19-A-0001_0_0001.png": b"", "CP_99_1_0001.png": png(1), "x.csv": b""}
    write_files(kaggle, others)  # later versions hold more
    assert lay_out(out, kaggle.parent, lists=covidx.lists) == COUNTS
    assert "CC BY 3.0" in (out / "TERMS.txt").read_text()
    slices = out / "slices"
    assert {p.name for p in slices.glob("*.png")} == set(covidx.images)
    assert all(p.is_symlink() and p.samefile(kaggle / p.name) for p in slices.glob("*.png"))
    for split, names in covidx.names.items():
        listed = read_split(slices / f"{'train_all' if split == 'train' else split}.txt")
        assert [entry.name for entry in listed] == names
        assert listed[0].box == (1, 2, 14, 15)
    assert [e.name for e in read_split(slices / "train.txt")] == covidx.names["train"][::2]
    for split, count in (("train", 9), ("val", 6), ("test", 6)):
        dataset = open_slices(out, split, require_classes=True)
        assert len(dataset) == count and dataset[0][0].shape == (3, 16, 16)
    by_patient = read_split(slices / "sample_seed0_by_patient.txt")
    assert len({parse_name(e.name)[:2] for e in by_patient}) == 6
    before = {p: p.lstat().st_mtime_ns for p in slices.glob("*.png")}
    (slices / "of_mine.png").write_bytes(b"left alone")
    assert lay_out(out, kaggle, lists=covidx.lists, seed=7)["sample_seed7"] == 6
    assert (slices / "of_mine.png").exists()
    assert {p: p.lstat().st_mtime_ns for p in before} == before  # nothing was linked again


def test_covidx_ct_in_the_author_s_names(covidx, out, tmp_path):
    files = {f"{parse_name(n).label}_{n.partition('_')[2]}": d for n, d in covidx.images.items()}
    assert lay_out(out, write_files(tmp_path / "own", files), lists=covidx.lists) == COUNTS
    assert open_slices(out, "test").names == covidx.names["test"]


def test_covidx_ct_from_archives_in_parts(covidx, out, tmp_path):
    files = {as_cncb(name): jpeg(i) for i, name in enumerate(covidx.images)}
    healthy = {n: d for n, d in files.items() if n.startswith("Normal")}
    others = {n: d for n, d in files.items() if n not in healthy} | {"NCP/999/1/0001.jpg": b"x"}
    one = write_zip(tmp_path / "one.zip", healthy)
    # in the second, nothing says the class: patient, scan and slice are enough
    two = write_zip(tmp_path / "two.zip", {n.partition("/")[2]: d for n, d in others.items()})
    with pytest.raises(DataError) as caught:
        lay_out(out, one, lists=covidx.lists)
    message = str(caught.value)
    assert "of the 30 slices of the COVIDx-CT-1 lists, 20 (CP_20_40_0001.png, " in message
    assert "--allow-missing" in message
    assert len(list((out / "slices").glob("*.jpg"))) == 10 and not list(out.glob("slices/*.txt"))
    one.unlink()  # it is not needed again
    assert lay_out(out, two, lists=covidx.lists) == COUNTS
    assert len(list((out / "slices").glob("*.jpg"))) == 30
    assert not (out / ".partial").exists()
    assert len(open_slices(out, "test")) == 6


def test_covidx_ct_reads_a_folder_of_cncb_in_place(covidx, out, tmp_path):
    files = {as_cncb(name): jpeg(i) for i, name in enumerate(covidx.images)}
    cncb = write_files(tmp_path / "cncb", files)
    assert lay_out(out, cncb / "NCP", cncb / "CP", cncb / "Normal", lists=covidx.lists) == COUNTS
    assert (out / "slices" / "NCP_30_40_0001.jpg").samefile(cncb / "NCP/30/40/0001.jpg")


def test_slices_that_are_missing_or_damaged(covidx, out, tmp_path):
    files = dict(covidx.images)
    gone, cut, empty = covidx.names["train"][0], covidx.names["val"][0], covidx.names["test"][1]
    wrong_class = covidx.names["train"][5]
    del files[gone]
    files[f"NCP_{wrong_class.partition('_')[2]}"] = files.pop(wrong_class)
    files[cut], files[empty] = files[cut][:-20], b""
    source = write_files(tmp_path / "in", files)
    with pytest.raises(DataError) as caught:
        lay_out(out, source, lists=covidx.lists)
    message = str(caught.value)
    assert f"4 ({gone}, {wrong_class}, {cut}, ...) are missing or damaged" in message
    counts = lay_out(out, source, lists=covidx.lists, allow_missing=True)
    assert counts["train_all"] == 16 and counts["val"] == counts["test"] == 5
    assert (out / "missing.txt").read_text().split() == [gone, wrong_class, cut, empty]
    assert len(open_slices(out, "test")) == 5
    write_files(source, covidx.images)
    assert lay_out(out, source, lists=covidx.lists) == COUNTS
    assert (out / "missing.txt").read_text() == ""
    shutil.move(source, tmp_path / "elsewhere")  # the links lead nowhere now
    with pytest.raises(DataError, match=r"30 \(Normal_10_40_0001.png"):
        lay_out(out, tmp_path / "lists", lists=covidx.lists)
    assert lay_out(out, tmp_path / "elsewhere", lists=covidx.lists) == COUNTS
    shutil.move(tmp_path / "elsewhere", tmp_path / "again")
    assert lay_out(out, tmp_path / "again", lists=covidx.lists) == COUNTS
    assert all(p.is_symlink() for p in (out / "slices").glob("*.png"))  # linked anew, not copied


def test_what_is_no_source(covidx, out, tmp_path):
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(DataError, match="absent: there is no such file or folder"):
        lay_out(out, tmp_path / "absent", lists=covidx.lists)
    assert not out.exists()
    with pytest.raises(DataError, match="x.rar: is no archive; name a folder or a .zip"):
        lay_out(out, tmp_path / "x.rar", lists=covidx.lists)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="of the 30 slices"):
        lay_out(out, tmp_path / "empty", lists=covidx.lists, allow_missing=True)
    with pytest.raises(DataError, match="holds 6 slices|5000 are asked for"):
        kaggle = write_files(tmp_path / "kaggle", covidx.images)
        public_sets.lay_out_covidx_ct(out, [kaggle], covidx.lists, per_class=5000)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/TERMS.txt: cannot be written"):
        lay_out(tmp_path / "file", kaggle, lists=covidx.lists)


def test_an_archive_that_lies_leaves_nothing(covidx, out, tmp_path):
    members = {as_cncb(name): jpeg(1) for name in list(covidx.images)[:3]} | {"../x.jpg": b""}
    with pytest.raises(DataError, match="leads out"):
        lay_out(out, write_zip(tmp_path / "x.zip", members), lists=covidx.lists)
    assert not list(out.rglob("*.jpg")) and not (out / ".partial").exists()


@pytest.mark.parametrize("broken", ["symlink", "both"])
def test_disks_without_links(broken, covidx, out, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not on this disk")

    monkeypatch.setattr(os, "symlink", refuse)
    if broken == "both":
        monkeypatch.setattr(os, "link", refuse)
    kaggle = write_files(tmp_path / "kaggle", covidx.images)
    assert lay_out(out, kaggle, lists=covidx.lists) == COUNTS
    file = out / "slices" / covidx.names["val"][0]
    assert not file.is_symlink() and file.read_bytes() == covidx.images[file.name]
    assert file.samefile(kaggle / file.name) == (broken == "symlink")


def test_an_output_inside_the_source(covidx, tmp_path):
    kaggle = write_files(tmp_path / "data" / "kaggle", covidx.images)
    for _ in range(2):
        assert lay_out(tmp_path / "data" / "out", tmp_path / "data", lists=covidx.lists) == COUNTS
    link = tmp_path / "data" / "out" / "slices" / covidx.names["val"][0]
    assert link.samefile(kaggle / link.name)


def test_lists_are_downloaded_and_compared(covidx, out, tmp_path, monkeypatch):
    kaggle = write_files(tmp_path / "kaggle", covidx.images)
    with serve(covidx.lists) as host:
        table = public_sets.SETS["covidx-ct"]["files"].values()
        addresses = (host.url, f"{host.url}/")  # two hosts, as in the real table
        table = dict(zip(addresses, table, strict=True))
        monkeypatch.setitem(public_sets.SETS["covidx-ct"], "files", table)
        host.faults["val_COVIDx_CT-1.txt"] = 404
        with pytest.raises(DataError, match="val_COVIDx_CT-1.txt: .*404 .* folder with copies"):
            lay_out(out, kaggle)
        host.faults.clear()
        assert lay_out(out, kaggle) == COUNTS
        requests = dict(host.requests)
        assert lay_out(out, kaggle) == COUNTS and host.requests == requests
    (covidx.lists / "val_COVIDx_CT-1.txt").write_text("NCP_1_1_1.png\n")
    with pytest.raises(DataError, match="val_COVIDx_CT-1.txt: .*SHA256"):
        lay_out(out / "new", kaggle, lists=covidx.lists)


def test_kaggle(covidx, out, tmp_path, monkeypatch, capsys):
    command = ["fetch", "covidx-ct", "--from", "kaggle", "--source", str(covidx.lists)]
    command += ["--out", str(out), "--per-class", "2"]
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # not installed
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "pip install kagglehub" in error and "kaggle.com/datasets/hgunraj/covidxct" in error
    kaggle = write_files(tmp_path / "cache", covidx.images)
    asked = []
    hub = types.SimpleNamespace(dataset_download=lambda name: asked.append(name) or str(kaggle))
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    assert main(command) == 0
    assert asked == ["hgunraj/covidxct/versions/1"]
    assert "  train_all: 18\n" in capsys.readouterr().out

    def fails(name):
        raise RuntimeError("403: consent\nis needed")

    hub.dataset_download = fails
    assert main(command) == 2
    assert "the download fails (403: consent is needed)" in capsys.readouterr().err


# ---- masked slices of CNCB ------------------------------------------------------------------


@pytest.fixture
def lesions(tmp_path, monkeypatch):
    """Lists of 13 + 2 patients with 5 slices each, their own sums, and the files."""
    folder = tmp_path / "lists"
    folder.mkdir(exist_ok=True)
    people = {"train": range(13), "test": range(20, 22)}
    names = {s: [f"{p}_{20 * n}.jpg" for p in people[s] for n in range(1, 6)] for s in people}
    for split, part in names.items():
        (folder / f"{split}_split_segmentation.txt").write_text("\n".join(part) + "\n")
    ((address, part),) = public_sets.SETS["cncb-lesions"]["files"].items()
    table = {address: {name: sha256(folder / name) for name in part}}
    monkeypatch.setitem(public_sets.SETS["cncb-lesions"], "files", table)
    data = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16) // 64).save(data, "PNG")
    files = {}
    for number, name in enumerate(n for part in names.values() for n in part):
        place = name.replace("_", "/")
        files[f"image/{place}"] = jpeg(number)
        files[f"mask/{place[:-4]}.png"] = data.getvalue()
    return types.SimpleNamespace(lists=folder, names=names, files=files)


LESION_COUNTS = {"train": 65, "test": 10, "train_500": 50, "test_150": 15}


def lay_out_lesions(out, source, lesions, **options):
    return public_sets.lay_out_cncb_lesions(out, [source], lesions.lists, **options)


@pytest.mark.parametrize("how", ["folder", "deep", "zip"])
def test_cncb_lesions(how, lesions, out, tmp_path):
    files = {**lesions.files, "image/77/1.jpg": b"not listed", "readme.md": b""}
    if how == "folder":
        source = write_files(tmp_path / "in", files)
    elif how == "deep":
        source = write_files(tmp_path / "in" / "a" / "Anything at all", files).parents[1]
    else:
        source = write_zip(tmp_path / "any.zip", {f"x/y/{n}": d for n, d in files.items()})
    assert lay_out_lesions(out, source, lesions) == LESION_COUNTS
    assert "not established" in (out / "TERMS.txt").read_text()
    assert len(list(out.glob("image/*/*"))) == len(list(out.glob("mask/*/*.png"))) == 75
    assert [s for s in ("train", "test") if open_lesions(out, s).names != lesions.names[s]] == []
    train, test = (open_lesions(out, out / f"{n}.txt") for n in ("train_500", "test_150"))
    assert not set(train.patients) & set(test.patients)
    assert sorted(train.names + test.names) == sorted(lesions.names["train"])
    assert (len(train), len(test)) == (50, 15)
    before = {p: p.lstat().st_mtime_ns for p in out.glob("*/*/*")}
    assert lay_out_lesions(out, source, lesions, seed=1) == LESION_COUNTS
    assert {p: p.lstat().st_mtime_ns for p in before} == before
    assert open_lesions(out, out / "test_150.txt").names != test.names  # another seed


def test_cncb_lesions_that_are_not_right(lesions, out, tmp_path):
    source = write_files(tmp_path / "in", lesions.files)
    (source / "mask/3/20.png").unlink()
    (source / "image/21/40.jpg").unlink()
    with pytest.raises(DataError, match=r"train_split_.*without a mask: 1 .*mask/3/20.png"):
        lay_out_lesions(out, source, lesions)
    shutil.copy(source / "mask/3/40.png", source / "mask/3/20.png")
    with pytest.raises(DataError, match=r"test_split_.*not on disk.*: 1 \(21_40.jpg\)"):
        lay_out_lesions(out, source, lesions)
    assert list(out.glob("*.txt")) == [out / "TERMS.txt"]  # no list, so nobody reads the rest
    write_files(source, lesions.files)
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(source / "mask/3/20.png")
    with pytest.raises(DataError, match=r"mask/3/20.png: .*expected codes 0..3"):
        lay_out_lesions(out, source, lesions)
    assert not (out / "train.txt").exists() and not (out / ".partial").exists()
    write_files(source, lesions.files)
    (source / "image/3/20.jpg").write_bytes(lesions.files["image/3/20.jpg"][:100])
    with pytest.raises(DataError, match=r"image/3/20.jpg: this is no image, or a damaged"):
        lay_out_lesions(out, source, lesions)
    write_files(source, lesions.files)
    assert lay_out_lesions(out, source, lesions) == LESION_COUNTS
    write_files(source / "copy", lesions.files)
    with pytest.raises(DataError, match=r"image/0/100 is there twice, .* and .*; name one's"):
        lay_out_lesions(out, source, lesions)
    with pytest.raises(DataError, match="no such file or folder"):
        lay_out_lesions(out, tmp_path / "absent.zip", lesions)


# ---- the command line -----------------------------------------------------------------------


def test_commands(semiseg, lesions, covidx, out, tmp_path, monkeypatch, capsys):
    root, files = semiseg
    monkeypatch.setenv("COVIDMASK_DATA", str(out))
    with serve(root) as host:
        assert main(["fetch", "covid-semiseg", "--source", host.url]) == 0
    text = capsys.readouterr().out
    assert text.index("NON-COMMERCIAL") < text.index(f"is whole in {out / 'covid-semiseg'}")
    assert "  files fetched: 10\n" in text
    assert main(["fetch", "covid-semiseg"]) == 0  # all is there, nobody is asked
    assert "files fetched: 0\n  files that were there: 10" in capsys.readouterr().out
    assert main(["stats", "--data", str(out / "covid-semiseg")]) == 0
    assert capsys.readouterr().out.count("Statistics of 5 slices") == 1
    source = write_zip(tmp_path / "masked.zip", lesions.files)
    lists = ["--source", str(lesions.lists)]
    assert main(["fetch", "cncb-lesions", "--from", str(source), *lists]) == 0
    assert "  train_500: 50\n" in capsys.readouterr().out
    kaggle = write_files(tmp_path / "kaggle", covidx.images)
    command = ["fetch", "covidx-ct", "--from", str(kaggle), *lists, "--per-class", "1"]
    assert main([*command, "--seed", "4"]) == 0
    assert (out / "covidx-ct" / "slices" / "sample_seed4_by_patient.txt").is_file()
    assert main(["stats", "--data", str(out / "covidx-ct")]) == 0
    assert "Statistics of 21 slices" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, words",
    [
        ("covid-semiseg --source http://127.0.0.1:9 --out new", "cannot be fetched"),
        ("covidx-ct --from absent --out new", "absent: there is no such file or folder"),
        ("covidx-ct --from absent --seed -1", "--seed -1: must be at least 0"),
        ("covidx-ct --from absent --per-class 0", "--per-class 0: must be at least 1"),
        ("cncb-lesions --from absent.zip --out new", "absent.zip: there is no such file"),
        ("cncb-lesions --from absent.zip --seed -1", "--seed -1: must be at least 0"),
    ],
)
def test_commands_with_bad_input(command, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fetch", *command.split()]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if "covidmask: error:" in line]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in captured.err
    assert [path for path in tree(tmp_path) if not path.endswith("TERMS.txt")] == []


def test_help_names_every_option_and_loads_neither_torch_nor_pooch(capsys):
    assert main(["fetch", "--help"]) == 0
    text = capsys.readouterr().out
    words = ("covid-semiseg", "covidx-ct", "cncb-lesions", "--out", "--source", "--from", "--seed")
    assert all(word in text for word in (*words, "--per-class"))
    assert "non-commercial" in text and "established" in text and "None" not in text
    code = "import sys; from covidmask.cli import main; main(['fetch', '--help']); "
    code += "print([m for m in ('torch', 'numpy', 'pooch', 'requests') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---- the public lists -----------------------------------------------------------------------

needs_lists = pytest.mark.skipif(
    not os.environ.get("COVIDMASK_SPLITS"),
    reason="COVIDMASK_SPLITS (folder of the public split lists) is not set",
)


@needs_lists
def test_the_sums_of_the_public_lists():
    folder = Path(os.environ["COVIDMASK_SPLITS"])
    for name in ("covidx-ct", "cncb-lesions"):
        for files in public_sets.SETS[name]["files"].values():
            assert {name: sha256(folder / name) for name in files} == files


@needs_lists
def test_covidx_ct_1_whole(tmp_path):
    """All 104,009 slices of the lists, each of them an empty picture."""
    folder = Path(os.environ["COVIDMASK_SPLITS"])
    source = tmp_path / "in"
    source.mkdir()
    one = png(0)
    (source / "one").write_bytes(one)
    for split in ("train", "val", "test"):
        for entry in read_split(folder / f"{split}_COVIDx_CT-1.txt"):
            os.symlink("one", source / entry.name)
    start = time.monotonic()
    counts = public_sets.lay_out_covidx_ct(tmp_path / "out", [source], folder)
    assert time.monotonic() - start < 300  # hours, if each name were sought in a list
    assert counts == {
        "train": 3000,
        "val": 21036,
        "test": 21191,
        "train_all": 61782,
        "sample_seed0": 3000,
        "sample_seed0_by_patient": 3000,
    }
    train = open_slices(tmp_path / "out", "train", require_classes=True)
    assert [train.labels.count(label) for label in range(3)] == [1000, 1000, 1000]
    assert len(set(train.patients)) == 608


@needs_lists
def test_the_released_lesion_lists_divide_into_500_and_150(tmp_path):
    folder = Path(os.environ["COVIDMASK_SPLITS"])
    mask, image = io.BytesIO(), png(0)
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(mask, "PNG")
    files = {}
    for split in ("train", "test"):
        for name in (folder / f"{split}_split_segmentation.txt").read_text().split():
            place = name[:-4].replace("_", "/")
            files |= {f"image/{place}.png": image, f"mask/{place}.png": mask.getvalue()}
    source, out = write_files(tmp_path / "in", files), tmp_path / "out"
    for seed in (0, 1):
        counts = public_sets.lay_out_cncb_lesions(out, [source], folder, seed)
        assert counts == {"train": 650, "test": 100, "train_500": 500, "test_150": 150}
        parts = [open_lesions(out, out / f"{name}.txt") for name in ("train_500", "test_150")]
        assert [len(set(part.patients)) for part in parts] == [100, 30]
        assert not set(parts[0].patients) & set(parts[1].patients)


# ---- COVID-CT and the sample of COVID-CT-MD -------------------------------------------------


@pytest.fixture
def covid_ct(tmp_path):
    """A host with the layout of the repository: six lists, and two archives of small figures."""
    root, sums = tmp_path / "repository", {}
    names = {
        "COVID": {"train": ["2020.01.24-p2-1%0.png", "2020.01.24-p2-1%1.png"],
                  "val": ["a_b-p1.png"], "test": ["2020-new_x-p3%1.png"]},
        "NonCOVID": {"train": ["0.jpg"], "val": ["1%0.jpg", "1%1.jpg"], "test": ["1043.png"]},
    }  # fmt: skip
    (root / "Images-processed").mkdir(parents=True)
    for kind, splits in names.items():
        with zipfile.ZipFile(root / f"Images-processed/CT_{kind}.zip", "w") as archive:
            archive.writestr("filler", np.random.default_rng(0).bytes(400_000))
            for split, part in splits.items():
                listed = root / f"Data-split/{kind}/{split}CT_{kind}.txt"
                listed.parent.mkdir(parents=True, exist_ok=True)
                listed.write_text("\n".join(part) + " \n", encoding="utf-8")
                for name in part:
                    data = io.BytesIO()
                    noise = np.random.default_rng(len(sums)).integers(255, size=(40, 50))
                    grey = Image.fromarray(noise.astype(np.uint8))
                    grey.save(data, "PNG" if name.endswith("png") else "JPEG")
                    archive.writestr(f"CT_{kind}/{name}", data.getvalue())
                    archive.writestr(f"__MACOSX/CT_{kind}/._{name}", b"none")
                    digest = hashlib.sha256(data.getvalue()).hexdigest()
                    sums.setdefault(split, {})[f"CT_{kind}/{name}"] = digest
    with serve(root) as host:
        host.sums = sums
        yield host


@pytest.fixture
def own_sums(covid_ct, monkeypatch):
    monkeypatch.setitem(public_sets.SETS["covid-ct"], "images", covid_ct.sums)


def fetch_covid_ct(host, out, *options):
    return main(["fetch", "covid-ct", "--source", host.url, "--out", str(out), *options])


def test_covid_ct_from_nothing(covid_ct, own_sums, out, capsys):
    assert fetch_covid_ct(covid_ct, out) == 0
    text = capsys.readouterr().out
    assert "Note" not in text and "train: 3" in text and "test: 2" in text
    dataset = open_slices(out, "train", require_classes=True)
    assert dataset.classes == ("NonCOVID", "COVID")
    assert list(zip(dataset.names, dataset.labels, strict=True)) == [
        ("0.jpg", 0), ("2020.01.24-p2-1%0.png", 1), ("2020.01.24-p2-1%1.png", 1)]  # fmt: skip
    assert dataset.patients == ["0", "2020.01.24-p2-1", "2020.01.24-p2-1"]  # panels of one figure
    assert not dataset.patients_known
    assert dataset[1][0].shape == (3, 40, 50)
    assert not list(out.rglob("*.zip*"))
    before = sum(covid_ct.requests.values())
    assert fetch_covid_ct(covid_ct, out) == 0
    assert sum(covid_ct.requests.values()) == before  # all there


@pytest.mark.parametrize("fault", ["short", "no ranges"])
def test_an_archive_goes_on_where_the_connection_broke(fault, covid_ct, own_sums, out):
    path = "Images-processed/CT_COVID.zip"
    covid_ct.faults[path] = ["short", fault]
    assert fetch_covid_ct(covid_ct, out) == 0
    assert covid_ct.requests[path] == 3 - (fault == "no ranges")
    assert (covid_ct.resumed.get(path, 0) > 0) == (fault == "short")
    assert len(open_slices(out, "test")) == 2


def test_two_at_once_do_not_meet_and_a_killed_one_blocks_nobody(covid_ct, own_sums, out, capsys):
    code = "import pathlib, sys, time; from covidmask.datasets.public_sets import filling\n"
    code += "with filling('covid-ct', pathlib.Path(sys.argv[1])):\n"
    code += "    print('in', flush=True)\n    time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"in\n"
        assert fetch_covid_ct(covid_ct, out) == 2
        assert f"{out}: another `covidmask fetch` is filling this" in capsys.readouterr().err
        assert tree(out) == [".fetch.lock"] and not covid_ct.requests
    finally:
        first.kill()
        first.communicate()
    assert fetch_covid_ct(covid_ct, out) == 0
    assert len(open_slices(out, "test")) == 2 and not (out / ".fetch.lock").exists()


@pytest.mark.parametrize("options", [(), ("--from",)], ids=["download", "unpack"])
def test_a_disk_that_is_full_is_named(options, covid_ct, own_sums, out, capsys):
    import resource  # no file may grow beyond 100,000 bytes, of archives with 400,000

    noise = np.random.default_rng(0).bytes(200_000)
    large = str(write_zip(out.parent / "large.zip", {"CT_COVID/a_b-p1.png": noise}))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert fetch_covid_ct(covid_ct, out, *options, *(large for _ in options)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert err.startswith(f"covidmask: error: {out}: cannot be written (File too large); make room")
    assert err.count("\n") == 1 and "http" not in err


def test_a_failure_leaves_only_what_the_next_call_goes_on_with(covid_ct, own_sums, out):
    listed = "Data-split/COVID/trainCT_COVID.txt"
    covid_ct.faults = {listed: 404}
    lists = sorted(f"Data-split/{k}/{s}CT_{k}.txt" for k in ("COVID", "NonCOVID") for s in SPLITS)
    assert main(["fetch", "covid-ct", "--source", "/nowhere", "--out", str(out / "deep")]) == 2
    assert not out.exists()
    assert fetch_covid_ct(covid_ct, out) == 2
    assert set(tree(out)) < set(lists)
    covid_ct.faults = {"Images-processed/CT_COVID.zip": ["short", 404, 404]}
    assert fetch_covid_ct(covid_ct, out) == 2
    left = [path for path in tree(out) if "NonCOVID.zip" not in path]
    assert left == sorted([*lists, "Images-processed/CT_COVID.zip.part"])
    assert fetch_covid_ct(covid_ct, out) == 0
    assert (out / "TERMS.txt").exists() and not (out / "Images-processed").exists()
    covid_ct.faults = {listed: 404}
    (out / listed).unlink()
    assert fetch_covid_ct(covid_ct, out) == 2
    assert (out / "TERMS.txt").exists()  # of a folder that was whole


def test_what_is_no_archive_is_not_kept(covid_ct, own_sums, out, capsys):
    path = "Images-processed/CT_COVID.zip"
    covid_ct.faults[path] = "wrong"
    assert fetch_covid_ct(covid_ct, out) == 2
    assert "CT_COVID.zip: cannot be fetched (" in capsys.readouterr().err
    assert not list(out.rglob("CT_COVID.zip*"))
    covid_ct.faults[path] = ["cut"]
    assert fetch_covid_ct(covid_ct, out) == 0


def test_an_image_with_other_bytes_is_named(covid_ct, own_sums, monkeypatch, out, capsys):
    changed = covid_ct.sums["val"] | {"CT_NonCOVID/1%1.jpg": "0" * 64}
    monkeypatch.setitem(public_sets.SETS["covid-ct"]["images"], "val", changed)
    assert fetch_covid_ct(covid_ct, out) == 0
    assert "Note: " in (text := capsys.readouterr().out)
    assert "1 (1%1.jpg): not the published bytes" in text and "1%0.jpg" not in text


def test_covid_ct_of_your_own_copy_needs_no_network(covid_ct, own_sums, out, tmp_path, capsys):
    copy = tmp_path / "copy"
    for archive in (covid_ct.root / "Images-processed").iterdir():
        zipfile.ZipFile(archive).extractall(copy)
    (copy / "CT_COVID/2020-new_x-p3%1.png").unlink()
    command = ["fetch", "covid-ct", "--from", str(copy), "--out", str(out)]
    dead = {"http://127.0.0.1:9": dict.fromkeys(["Data-split/none.txt"])}
    public_sets.SETS["covid-ct"]["files"], old = dead, public_sets.SETS["covid-ct"]["files"]
    try:
        assert main(command) == 2
        assert "2020-new_x-p3%1.png) are missing" in capsys.readouterr().err
        assert main([*command, "--allow-missing"]) == 0
    finally:
        public_sets.SETS["covid-ct"]["files"] = old
    assert "Note: the lists cannot be fetched" in capsys.readouterr().out
    assert open_slices(out, "test").names == ["1043.png"]


def test_your_own_archive_stays_and_other_folders_give_nothing(covid_ct, own_sums, out, capsys):
    out.mkdir()
    mine = out / "mine.zip"
    shutil.copyfile(covid_ct.root / "Images-processed/CT_COVID.zip", mine)
    assert fetch_covid_ct(covid_ct, out, "--from", str(mine)) == 2
    assert mine.exists()
    other = out / "other"  # other images, of which two are called like figures of the set
    other.mkdir()
    for name in ("0.jpg", "1043.png"):
        Image.new("L", (30, 30)).save(other / name)
    assert fetch_covid_ct(covid_ct, out, "--from", str(other)) == 2
    assert not (out / "slices/0.jpg").exists() and not (out / "slices/1043.png").exists()
    assert fetch_covid_ct(covid_ct, out) == 0 and mine.exists()


def test_a_pipe_among_your_files_does_not_block(covid_ct, own_sums, out, tmp_path, capsys):
    os.makedirs(tmp_path / "CT_COVID")
    os.mkfifo(tmp_path / "CT_COVID/a_b-p1.png")
    command = f"fetch covid-ct --from {tmp_path} --source {covid_ct.url} --out {out}".split()
    code = "import sys; from covidmask.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *command], timeout=200, capture_output=True)
    assert done.returncode == 2 and b"are missing or damaged" in done.stderr


def test_a_damaged_figure_and_a_cut_list_are_fetched_again(covid_ct, own_sums, out, capsys):
    assert fetch_covid_ct(covid_ct, out) == 0
    (out / "slices/1043.png").write_bytes(b"<html>")
    assert fetch_covid_ct(covid_ct, out) == 0
    assert open_slices(out, "test")[0][0].shape == (3, 40, 50)
    listed = out / "Data-split/COVID/trainCT_COVID.txt"
    listed.write_text("", encoding="utf-8")
    assert fetch_covid_ct(covid_ct, out) == 2 and not listed.exists()
    assert fetch_covid_ct(covid_ct, out) == 0
    listed.write_text("<!DOCTYPE html>\n<p>Sign in</p>\n", encoding="utf-8")
    assert fetch_covid_ct(covid_ct, out, "--allow-missing") == 2 and not listed.exists()
    assert "the list train names 2 (<!DOCTYPE, <p>Sign), no image" in capsys.readouterr().err
    assert fetch_covid_ct(covid_ct, out) == 0
    listed.write_text("2020.01.24-p2-1%0.png\n", encoding="utf-8")
    capsys.readouterr()
    assert fetch_covid_ct(covid_ct, out) == 0
    assert "the list train names 2 images, not the 3" in capsys.readouterr().out


def test_the_sums_of_covid_ct_are_those_of_its_split():
    images = public_sets.SETS["covid-ct"]["images"]
    folders = ("CT_COVID/", "CT_NonCOVID/")
    counts = {
        s: [sum(p.startswith(f) for p in part) for f in folders] for s, part in images.items()
    }
    assert counts == {"train": [191, 234], "val": [60, 58], "test": [98, 105]}
    assert len({sha for part in images.values() for sha in part.values()}) == 746


@pytest.mark.skipif(
    not os.environ.get("COVIDMASK_REAL"), reason="COVIDMASK_REAL (folder of real CT) is not set"
)
def test_real_figures(out, capsys):
    real = Path(os.environ["COVIDMASK_REAL"]) / "covid-ct"
    sums = {name: sha for part in public_sets.SETS["covid-ct"]["images"].values()
            for name, sha in part.items()}  # fmt: skip
    originals = [p for p in (real / "originals").rglob("*") if p.is_file()]
    assert originals
    for path in originals:
        assert sums[path.relative_to(real / "originals").as_posix()] == sha256(path)
    command = ["fetch", "covid-ct", "--from", str(real), "--source", "http://127.0.0.1:9"]
    assert main([*command, "--out", str(out)]) == 2  # an address of yours must answer
    public_sets.SETS["covid-ct"]["files"], old = (
        {"http://127.0.0.1:9": dict.fromkeys(["Data-split/none.txt"])},
        public_sets.SETS["covid-ct"]["files"],
    )
    try:
        assert main([*command[:-2], "--out", str(out), "--allow-missing"]) == 0
    finally:
        public_sets.SETS["covid-ct"]["files"] = old
    assert "train: 425" in (text := capsys.readouterr().out) and "val: 118" in text
    dataset = open_slices(out, "train", require_classes=True)
    assert np.bincount(dataset.labels).tolist() == [234, 191]
    image, label = dataset[0]
    assert image.shape[0] == 3 and 0 <= image.min() < image.max() <= 1 and label == 0


def test_the_sample_of_covid_ct_md(tmp_path, out, capsys):
    root = tmp_path / "host"
    root.mkdir()
    with zipfile.ZipFile(root / "main.zip", "w") as archive:
        for folder in (
            "COVID-19 subjects/P001",
            "Cap subjects/cap001",
            "Normal subjects/normal001",
        ):
            for name in ("1.dcm", "._1.dcm", "notes.txt"):
                archive.writestr(f"COVID-CT-MD-main/Sample data/{folder}/{name}", name)
        archive.writestr("COVID-CT-MD-main/Index.csv", "x")
    command = ["fetch", "covid-ct-md", "--out", str(out)]
    with serve(root) as host:
        assert main([*command, "--source", host.url]) == 0
        assert main([*command, "--source", host.url]) == 0
        assert host.requests["main.zip"] == 1
        (out / "Control/normal001/1.dcm").unlink()
        assert main([*command, "--source", host.url]) == 0
        assert host.requests["main.zip"] == 2
    assert tree(out) == ["COVID-19/P001/1.dcm", "Common pneumonia/cap001/1.dcm",
                         "Control/normal001/1.dcm", "TERMS.txt", "files.txt"]  # fmt: skip
    assert "Common pneumonia: 1" in capsys.readouterr().out
    assert main([*command[:-1], str(out / "x"), "--from", str(out / "COVID-19")]) == 2
    assert "there is no DICOM file of Control" in capsys.readouterr().err
