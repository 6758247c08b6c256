"""What the four rooms show is there, whatever is imported first, and nothing imports upwards."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import covidmask

PACKAGE = Path(covidmask.__file__).parent
ROOMS = ("datasets", "models", "metrics", "training")
FLOORS = ("datasets", "models", "metrics", "training", "plotting", "predict", "cli")
PROMISED = {  # names that other people's code relies on
    "datasets": ("make_slice", "SemiSeg", "find_scans", "read_slices", "read_image"),
    "models": (
        *("load_author_checkpoint", "ShippedWeights", "load_segmenter", "load_classifier"),
        *("save_model", "covid_ct_mask_net"),
    ),
    "metrics": ("report", "CocoAP"),
    "training": (),
}


@pytest.mark.parametrize("name", ROOMS)
def test_names_of_a_room(name):
    room = importlib.import_module(f"covidmask.{name}")
    assert set(PROMISED[name]) <= set(room.__all__)
    modules = {path.stem for path in (PACKAGE / name).glob("*.py")}
    assert not modules & set(room.__all__), "a module, once imported, would hide such a name"
    for shown in room.__all__:
        assert getattr(room, shown) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = room.nothing


def test_rooms_are_opened_without_torch():
    code = f"import sys; from covidmask import {', '.join(ROOMS)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("covidmask"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from (name.split(".")[1] for name in names if "." in name)


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_imports_upwards(floor):
    files = [PACKAGE / f"{floor}.py"] if (PACKAGE / f"{floor}.py").exists() else []
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    for path in files or (PACKAGE / floor).glob("*.py"):
        assert not above & set(imports(path)), path
    for path in (PACKAGE / "config.py", PACKAGE / "files.py", PACKAGE / "errors.py"):
        assert not set(FLOORS) & set(imports(path)), path
