"""What the command line does with odd terminals, closed pipes, locked folders and interrupts."""

import builtins
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from covidmask import cli
from covidmask.cli import main
from covidmask.files import is_there, same_file
from covidmask.training.loop import load_checkpoint, save_checkpoint

COMMAND = [sys.executable, "-m", "covidmask"]
UNIX = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and rights of Unix")


@pytest.fixture
def lesions(tmp_path):
    """A folder of slices with masks whose patients have names that cp1252 does not know."""
    for part in ("image", "mask"):
        folder = tmp_path / "data" / part / "扫描"
        folder.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "data"


def start(*argv, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **options.pop("env", {})}
    return subprocess.Popen([*COMMAND, *map(str, argv)], env=environment, **options)


def test_names_that_the_terminal_cannot_show(lesions, encoding="cp1252"):
    folder = lesions.rename(lesions.with_name("肺"))
    done = start("stats", "--data", folder, env={"PYTHONIOENCODING": encoding})
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert out.decode(encoding).strip().endswith(r"\u80ba")


@UNIX
@pytest.mark.parametrize(
    "command, unbuffered", [("stats --data data", ""), ("--help", ""), ("--help", "1")]
)
def test_closed_pipe(command, unbuffered, lesions):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does when it has its line
    environment = {"PYTHONUNBUFFERED": unbuffered}
    done = start(*command.split(), stdout=writer, cwd=lesions.parent, env=environment)
    os.close(writer)
    quiet = (0, 141) if command == "--help" else (141,)  # some versions of tyro answer it alone
    assert done.communicate()[1] == b"" and done.returncode in quiet


@UNIX
def test_closed_pipe_for_errors_too(lesions):
    reader, writer = os.pipe()
    os.close(reader)
    done = start("phantoms", "--workers", 1, cwd=lesions.parent, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.wait() == 141
    assert [path.name for path in lesions.parent.rglob("*phantoms*")] == []


@UNIX
def test_full_disk_behind_the_output(lesions):
    with open("/dev/full", "w") as full:
        done = start("stats", "--data", lesions, "--json", lesions / "s.json", stdout=full)
        err = done.communicate()[1].decode()
    assert done.returncode == 2 and err.count("\n") == 1
    assert err.startswith("covidmask: error: the output or") and "No space left" in err


@UNIX
def test_no_output_at_all(lesions):
    line = f'exec "$@" >&-; echo never {lesions}'
    done = subprocess.run(["sh", "-c", line, "sh", *COMMAND, "stats", "--data", str(lesions)])
    assert done.returncode == 0


LOCKED = {  # command -> what its sentence names
    "stats --data locked": "locked",
    "stats --data locked/x": "locked/x",
    "stats --data data": "另一个",  # one patient of several
    "phantoms --out locked/x": "locked/x",
    "convert a.pth locked/x.safetensors": "locked/x",
    "predict locked/a.png --out o": "locked/",  # perhaps the weights in $COVIDMASK_DATA
    "predict data --out locked/x": "locked/",
    "evaluate segmenter --weights locked/x --data data": "locked/x",
    "train segmenter --data data --split locked/x --out o.safetensors": "另一个",
    "fetch cncb-lesions --from locked/x --out c": "locked/x",
    "check": "[FAIL] data folder locked",  # of $COVIDMASK_DATA
}
PROGRAM = """
import contextlib, io, json, sys
from covidmask.cli import main
found = {}
for command in json.loads(sys.argv[1]):
    text = io.StringIO()
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
        status = main(command.split())
    found[command] = status, text.getvalue()
print(json.dumps(found))
"""


@UNIX
def test_folders_that_may_not_be_entered(lesions):
    drop = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may enter any folder, and setpriv is not here")
        drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    locked = [lesions.parent / "locked", lesions / "image" / "另一个"]
    for folder in locked:
        folder.mkdir()
        folder.chmod(0)
    done = subprocess.run(
        [*drop, sys.executable, "-c", PROGRAM, json.dumps(list(LOCKED))],
        cwd=lesions.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "COVIDMASK_DATA": "locked"},
        stdout=subprocess.PIPE,
        text=True,
    )
    for folder in locked:
        folder.chmod(0o700)
    found = json.loads(done.stdout.splitlines()[-1])
    for command, (status, text) in found.items():
        assert status == 2 and "Traceback" not in text, (command, text)
        lines = [line for line in text.splitlines() if LOCKED[command] in line]
        assert any("Permission denied" in line for line in lines), (command, text)


@pytest.mark.parametrize(
    "path, words",
    [("x" * 300, "name too long"), ("loop", "loop: "), ("file.txt/x", "file.txt/x: ")],
)
def test_paths_that_cannot_be(path, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    (tmp_path / "loop").symlink_to("loop")
    for command in (["stats", "--data", path], ["predict", path, "--out", "o"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith("covidmask: error: ") and err.count("\n") == 1
        assert words in err and path[:300] in err


@pytest.mark.parametrize(
    "argv, option",
    [
        (["predict", "", "--out", "o"], "predict"),
        (["predict", "a.png", "--out", ""], "--out"),
        (["predict", "a.png", "--out="], "--out"),
        (["stats", "--data", ""], "--data"),
        (["stats", "--json", ""], "--json"),
        (["train", "segmenter", "--checkpoint", ""], "--checkpoint"),
    ],
)
def test_values_that_are_empty(argv, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"covidmask: error: {option}: its value is empty")
    assert not list(tmp_path.iterdir())


NUMBERS = {
    "predict a.png --out o": "score every series",
    "evaluate segmenter": "score threshold mask-threshold nms min-area batch-size",
    "evaluate classifier": "batch-size",
    "train segmenter": "lr epochs seed workers memory batch-size segmenter.warmup detector.rpn-nms"
    " segmenter.average",
    "train classifier": "lr epochs seed workers memory batch-size classifier.n-boxes",
    "phantoms": "seed workers",
    "stats": "min-area",
    "fetch covidx-ct --from x": "seed per-class",
    "fetch cncb-lesions --from x": "seed",
}


@pytest.mark.parametrize("command", NUMBERS)
def test_numbers_that_no_option_can_have(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option in NUMBERS[command].split():
        real = ("score", "threshold", "mask-threshold", "nms", "lr", "detector.rpn-nms")
        real += ("segmenter.average",)
        floats = ["nan", "inf", "-inf"] if option in real else []
        for value in (*floats, "-1", str(10**400)):
            assert main([*command.split(), f"--{option}={value}"]) == 2, (option, value)
            err = capsys.readouterr().err
            assert re.match(rf"covidmask: error: --([a-z-]+\.)?{option} -?[1in]", err)
            assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("window", ["nan 1500", "-600 inf", "1e308 1e308"])
def test_windows_that_cannot_be(window, capsys):
    assert main(["predict", "a.png", "--out", "o", "--window", *window.split()]) == 2
    assert capsys.readouterr().err.startswith("covidmask: error: --window ")


def test_not_enough_memory(monkeypatch, capsys):
    def allocate(self):
        raise error

    monkeypatch.setattr(cli.Stats, "run", allocate)
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried 2 GiB")):  # noqa: B007
        assert main(["stats"]) == 2
        assert "not enough memory" in capsys.readouterr().err
    error = RuntimeError("a fault of ours")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["stats"])


def test_interrupt_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    save_checkpoint(path, {"run": {}, "w": torch.zeros(3)})

    class Interrupted(io.FileIO):
        def write(self, data):
            raise KeyboardInterrupt

    real = io.open

    def opened(file, mode="r", *args, **kwargs):
        if "w" in mode and Path(file).parent == tmp_path:
            return Interrupted(os.fspath(file), "w")
        return real(file, mode, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", opened)
        patched.setattr(io, "open", opened)
        patched.setattr(Path, "open", opened)  # Python 3.10 keeps its own `io.open`
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, {"run": {}, "w": torch.ones(3)})
    assert load_checkpoint(path, {})["w"].tolist() == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_one_file_under_two_names(tmp_path):
    a = tmp_path / "a"
    a.touch()
    (tmp_path / "soft").symlink_to(a)
    (tmp_path / "hard").hardlink_to(a)
    (tmp_path / "b").touch()
    for name in ("a", "soft", "hard", "../" + tmp_path.name + "/a"):
        assert same_file(a, tmp_path / name)
    assert not same_file(a, tmp_path / "b") and not same_file(a, tmp_path / "none")
    assert same_file(tmp_path / "none", tmp_path / "x" / ".." / "none")
    assert is_there(a) and not is_there(a / "below") and not is_there(tmp_path / "none")
