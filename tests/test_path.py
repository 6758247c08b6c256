"""Which files one picture passes on its way through `covidmask predict`: few enough to read."""

import importlib
import inspect
import pkgutil
import sys
import threading
from collections import defaultdict
from pathlib import Path

import pytest
from scan_files import write_image

import covidmask
from covidmask.cli import main
from covidmask.datasets.patients import old_friend

HOME = Path(covidmask.__file__).parent
FILES = {
    "cli.py",
    "files.py",
    "datasets/scans.py",
    "models/weights.py",
    "models/detector.py",
    "models/ranked_boxes.py",
    "models/classifier.py",
    "predict.py",
}


@pytest.fixture
def all_imported():
    """So that no module is run, nor a room opened, while we look."""
    for module in pkgutil.walk_packages(covidmask.__path__, "covidmask."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_one_picture_passes_eight_files(tmp_path, monkeypatch, all_imported):
    monkeypatch.setenv("COVIDMASK_DATA", str(tmp_path))  # no weights there: the shipped ones
    write_image(tmp_path / "one.png", old_friend(128)[0])
    seen = defaultdict(set)

    def look(frame, event, argument):
        code = frame.f_code  # a function is optimised, the body of a module or class is not
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED:
            path = Path(code.co_filename)  # "<string>" is what `dataclass` writes itself
            if path.is_relative_to(HOME):
                seen[path.relative_to(HOME).as_posix()].add(code.co_name)

    before = sys.getprofile()
    threading.setprofile(look)
    sys.setprofile(look)
    try:
        words = ["predict", str(tmp_path / "one.png"), "--out", str(tmp_path / "out")]
        status = main([*words, "--device", "cpu"])
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    assert status == 0 and (tmp_path / "out" / "one_lesions.png").exists()
    assert set(seen) == FILES, {name: seen[name] for name in sorted(set(seen) ^ FILES)}
    assert len(FILES) <= 8
