"""A chapter as Colab opens it: one notebook file alone, torch is there, covidmask is not."""

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
# one that draws its data and computes statistics, one that loads the shipped weights
CHAPTERS = ("01_data", "06_ranked_boxes")
RUN = """
import sys, nbformat
from nbclient import NotebookClient
class Client(NotebookClient):
    def handle_comm_msg(self, *arguments):
        pass  # see tools/book.py
notebook = nbformat.read("{name}.ipynb", as_version=4)
mine = dict(starter=1, check=1)  # what a student has yet to write
notebook.cells = [c for c in notebook.cells if not mine.keys() & c.metadata.get("tags", [])]
Client(notebook, timeout=None, startup_timeout=86400, iopub_timeout=86400).execute()
nbformat.write(notebook, "done.ipynb")
"""


def run(*command: object, **options) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A git repository that holds this checkout, uncommitted changes included."""
    folder = tmp_path_factory.mktemp("clone")
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    run("git", "init", "-q", cwd=folder)
    run("git", "add", "-A", cwd=folder)
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    run("git", *who, "commit", "-qm", "test", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment with all that is installed here, except covidmask."""
    folder = tmp_path_factory.mktemp("environment")
    packages = folder / "packages"
    packages.mkdir()
    for place in site.getsitepackages():
        for entry in Path(place).iterdir():
            if "covidmask" not in entry.name and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    # the setuptools of an older Python's venv cannot build the package; ours stands in `packages`
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools")
    own = run(python, "-c", "import site; print(site.getsitepackages()[0])").strip()
    Path(own, "all.pth").write_text(f"{packages}\n")
    return python


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_runs_from_its_one_file(name, repository, python, tmp_path):
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "covidmask")
    shutil.copy(ROOT / "book" / f"{name}.ipynb", tmp_path)
    look = "import importlib.util as u; print(u.find_spec('covidmask'))"
    absent = run(python, "-c", look, cwd=tmp_path)  # elsewhere, or Python would find the checkout
    assert absent.strip() == "None"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVIDMASK_")}
    environment |= {
        "COVIDMASK_REPOSITORY": str(repository),
        # what it needs is there: nothing is to be downloaded ("0" means without isolation)
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    run(python, "-c", RUN.format(name=name), cwd=tmp_path, env=environment)
    where = run(python, "-c", "import covidmask; print(covidmask.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(python.parents[1]), "installed from the clone"
    cells = nbformat.read(tmp_path / "done.ipynb", as_version=4).cells
    counts = [cell.execution_count for cell in cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_placeholder_address_fails_with_a_sentence(tmp_path, python):
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "covidmask")
    setup = (ROOT / "tools" / "setup_cell.py").read_text(encoding="utf-8")
    address = "https://github.com/repository_not_set/covidmask"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVIDMASK_")}
    done = subprocess.run(
        [python, "-c", setup],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment | {"COVIDMASK_REPOSITORY": address},
    )
    assert done.returncode != 0
    assert "set the environment variable COVIDMASK_REPOSITORY" in done.stderr
