"""Editions, slides and grading, on a chapter of a few cells."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools import editions, grading, pack, slides

TWIN = """\
# %% [markdown]
# # 6 · Squares
#
# What is a square {cite:p}`He2017`, and how large is it?
#
# ```{admonition} Synthetic data
# :class: important
# Numbers are made up.
# ```

# %% tags=["fold"]
# @title Imports
import math

# %% [markdown]
# ## Sides
#
# A side is $a$. See {cite:t}`Wilson1927`.

# %%
side = 3

# %% [markdown] tags=["quiz"]
# ## Quiz
#
# **1. How many sides has it?**
#
# - [ ] Three. :: That is
#   a triangle.
# - [x] Four. :: Count them.

# %% [markdown] tags=["exercise"]
# ### Exercise 1 · Area
#
# Kind: write a function, **
#
# Write `area(a)`.
#
# Hint: a times a.

# %% tags=["starter"]
def area(a):
    raise NotImplementedError("your turn")


# %% tags=["solution"]
# @title Solution
def area(a):
    return a * a


print(area(side))


# %% tags=["wrong"]
def area(a):
    return 2 * a


# %% tags=["check"]
# @title Check your answer
assert area(side) == 9, "try a drawing"

# %% [markdown] tags=["answer"]
# It is **nine**.
"""


@pytest.fixture
def twin(tmp_path) -> nbformat.NotebookNode:
    path = tmp_path / "06_squares.py"
    path.write_text(TWIN, encoding="utf-8")
    notebook = jupytext.read(path, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    return notebook


def sources(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells)


def made(twin, which: str) -> nbformat.NotebookNode:
    """An edition without the set-up cell, which would install nothing here, and take its time."""
    return editions.edition(twin, "06_squares", which)


def test_a_student_gets_plain_markdown_and_no_solution(twin):
    text = sources(made(twin, "student"))
    assert "return a * a" not in text and "return 2 * a" not in text and "nine" not in text
    assert "NotImplementedError" in text and "try a drawing" in text
    assert "{cite" not in text and "```{" not in text and ":class:" not in text
    assert "([He et al., 2017](https://" in text and "[Wilson (1927)](https://doi.org/" in text
    assert "> **Synthetic data.** Numbers are made up." in text
    assert "*Write a function* ★★☆" in text
    assert "<details><summary>Hint</summary>\n\na times a.\n\n</details>" in text
    assert "<details><summary>Three.</summary>\n\n✘ No. That is a triangle." in text
    assert "<details><summary>Four.</summary>\n\n✔ Yes. Count them." in text
    setup, first = (c for c in made(twin, "student").cells[:3] if c.cell_type == "code")
    assert setup.source.startswith("# @title Set-up") and "import math" in first.source


def test_an_instructor_gets_everything_and_the_page_folds_it(twin):
    teacher, page = made(twin, "instructor"), made(twin, "page")
    assert "return a * a" in sources(teacher) and "nine" in sources(teacher)
    assert "NotImplementedError" not in sources(teacher), "it would undo the solution"
    assert "{cite:p}`He2017`" in sources(page) and "Set-up" not in sources(page)
    for notebook, fold in ((teacher, "hide-input"), (page, "hide-cell")):
        [cell] = [c for c in notebook.cells if "solution" in editions.tags(c)]
        assert fold in cell.metadata.tags and cell.metadata.cellView == "form"
    answer = next(c.source for c in page.cells if "nine" in c.source)
    assert answer.startswith("<details>")


def test_solutions_pass_and_what_is_wrong_does_not(twin):
    notebook = made(twin, "test")
    planted = [c.source for c in notebook.cells if "must not pass" in c.source]
    assert len(planted) == 2 and "NotImplementedError" in planted[0]
    NotebookClient(notebook, timeout=120).execute()
    lenient = next(c for c in twin.cells if "check" in editions.tags(c))
    lenient.source = lenient.source.replace("area(side) == 9", "area(side) > 0")
    with pytest.raises(CellExecutionError, match="a wrong answer passed the check"):
        NotebookClient(made(twin, "test"), timeout=120).execute()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('tags=["check"]', 'tags=["starter"]', "'starter' after 'wrong'"),
        ("# @title Solution", "", "a folded cell begins with"),
        ("Count them.", "", "lacks"),
    ],
)
def test_a_twin_with_a_mistake_is_refused(tmp_path, old, new, problem):
    assert old in TWIN
    text = TWIN.replace(" :: Count them." if old == "Count them." else old, new)
    path = tmp_path / "06_squares.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=problem):
        made(jupytext.read(path, fmt="py:percent"), "instructor")


def graded(folder: Path, archive: Path, notebook: nbformat.NotebookNode, name: str) -> list[float]:
    """What `otter run` gives, by exercise."""
    file = folder / f"{name}.ipynb"
    nbformat.write(notebook, file)
    command = [sys.executable, "-m", "otter", "run", "-a", archive, "-o", folder, file]
    subprocess.run(command, check=True, cwd=folder, capture_output=True)
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tests"]
    return [test["score"] for test in found if test.get("max_score")]


def test_otter_gives_a_solution_all_points_and_a_starter_none(twin, tmp_path):
    pytest.importorskip("otter", reason="covidmask[course] is not installed")
    archive = grading.autograder(twin, tmp_path / "grading" / "06_squares.zip")
    for which, points in (("instructor", 2), ("student", 0)):
        assert graded(tmp_path, archive, made(twin, which), which) == [points]


def test_slides_show_sections_figures_and_questions(twin, tmp_path):
    figure = next(c for c in twin.cells if c.source == "side = 3")
    figure.metadata["mystnb"] = {"image": {"alt": 'a "3"'}, "figure": {"caption": "Three of $a$."}}
    picture = nbformat.v4.new_output("display_data", {"image/png": "AAAA"})
    figure.outputs = [picture]
    page = slides.slides(twin)
    assert "<h1>6 · Squares</h1>" in page and "<h2>Sides</h2>" in page
    assert 'alt="a &quot;3&quot;" src="data:image/png;base64,AAAA"' in page
    words = re.sub(r"</?span[^>]*>", "", page)
    assert "A side is \\(a\\)." in words and "Three of \\(a\\)." in words
    assert page.count('class="fragment why"') == 2 and "Count them." in page
    assert "return a * a" not in page and "try a drawing" not in page
    slides.copy_parts(tmp_path)
    assert (tmp_path / "reveal/reveal.js").exists() and (tmp_path / "mathjax").is_dir()


def test_pack_holds_what_a_class_needs(tmp_path, monkeypatch, capsys):
    course, phantoms = tmp_path / "course", tmp_path / "data" / "phantoms-quick"
    monkeypatch.setenv("COVIDMASK_DATA", str(phantoms.parent))
    with pytest.raises(SystemExit, match="run `make course` first"):
        pack.pack(tmp_path / "class", course, dependencies=False)
    for folder in (course / "student", course / "slides", phantoms):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x", encoding="utf-8")
    pack.pack(tmp_path / "class", course, dependencies=False)
    found = {path.parent.name for path in (tmp_path / "class").rglob("file")}
    assert found == {"notebooks", "slides", "phantoms-quick"}
    [wheel] = (tmp_path / "class" / "wheels").glob("covidmask-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith(".safetensors")], "no weights"
    assert "--no-index" in (tmp_path / "class" / "README.txt").read_text(encoding="utf-8")
    assert "GB, for Python" in capsys.readouterr().out
