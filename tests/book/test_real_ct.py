"""Chapter 15 runs on real slices where a reader has them, and its page shows none."""

import os
from pathlib import Path

import nbformat
import pytest

from tools import book
from tools.book import ROOT, execute, read_twin
from tools.editions import edition

REAL = os.environ.get("COVIDMASK_REAL")
REAL_WORDS = "real slices of COVID-SemiSeg"
PHANTOM_WORDS = "phantoms in the COVID-SemiSeg layout"


def printed(notebook: nbformat.NotebookNode) -> str:
    """What the code cells print."""
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    return "".join(out.text for out in outputs if out.output_type == "stream")


def test_the_stored_outputs_come_from_phantoms():
    notebook = nbformat.read(ROOT / "book" / "15_real_lesions.ipynb", as_version=4)
    text = printed(notebook)
    assert f"This run uses {PHANTOM_WORDS}" in text
    assert REAL_WORDS not in text
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    assert 'SEMISEG = os.environ.get("COVIDMASK_SEMISEG", ' in parameters.source


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="COVIDMASK_REAL (folder of real CT) is not set")
def test_the_chapter_runs_on_real_slices(tmp_path, monkeypatch):
    source = Path(REAL) / "covid-semiseg"
    monkeypatch.setenv("COVIDMASK_SEMISEG", str(source))
    name = "15_real_lesions"
    notebook = edition(read_twin(ROOT / "book" / "py" / f"{name}.py"), name, "instructor")
    execute(notebook, tmp_path, name)  # an error in a cell is raised; the outputs stay in memory
    text = printed(notebook)
    assert f"This run uses {REAL_WORDS}" in text
    assert f"here: {PHANTOM_WORDS}" not in text
    whole = (source / "TestingSet").is_dir()
    assert ("the published split" in text) == whole
    assert ("no TestingSet here" in text) == (not whole)


def test_notebooks_are_made_without_real_slices(monkeypatch):
    monkeypatch.setenv("COVIDMASK_SEMISEG", "somewhere")
    monkeypatch.setattr("sys.argv", ["book.py", "notebooks"])
    seen = []
    monkeypatch.setattr(
        book, "run_chapters", lambda *_, **__: seen.append(os.environ["COVIDMASK_SEMISEG"])
    )
    book.main()
    assert seen == [""]
