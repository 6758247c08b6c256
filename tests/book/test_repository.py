"""`make repository URL=...` writes one address everywhere, and a fork can do it again."""

import shutil
from pathlib import Path

import pytest

from tools.set_repository import FILES, set_repository

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = "repository_not_set/covidmask"


def texts(root: Path) -> dict[str, str]:
    files = [path for glob in FILES for path in root.glob(glob)]
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in files}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for glob in FILES:
        for path in ROOT.glob(glob):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    set_repository("https://github.com/first-owner/first.book", tmp_path)  # whatever stood there
    return tmp_path


def test_address_reaches_every_place(copy):
    after = texts(copy)
    assert not [name for name, text in after.items() if PLACEHOLDER in text]
    holders = {name for name, text in after.items() if "/first-owner/first.book" in text}
    assert {"_config.yml", "README.md", "pyproject.toml", "CITATION.cff"} <= holders
    notebooks = {name for name in after if name.endswith(".ipynb")}
    assert notebooks <= holders
    colab = "https://colab.research.google.com/github/first-owner/first.book/blob/main/book/"
    assert colab in after["README.md"]


def test_second_address_replaces_the_first(copy):
    first = texts(copy)
    changed = set_repository("https://github.com/second/covid.git", copy)
    second = texts(copy)
    assert not [name for name, text in second.items() if "first-owner" in text]
    assert {str(p.relative_to(copy)) for p in changed} == {
        name for name, text in first.items() if "first-owner/first.book" in text
    }
    assert "https://github.com/second/covid\n" in second["CITATION.cff"].replace('"', "")
    set_repository("https://github.com/first-owner/first.book/", copy)
    assert texts(copy) == first  # nothing else was touched


@pytest.mark.parametrize(
    "url", ["", "covidmask", "https://gitlab.com/a/b", "https://github.com/a", "git@github.com:a/b"]
)
def test_no_address(url, copy):
    before = texts(copy)
    with pytest.raises(SystemExit, match="URL=https://github.com/OWNER/NAME"):
        set_repository(url, copy)
    assert texts(copy) == before
