"""environment.yml and pyproject.toml name the same packages, and what is installed fits them.

The conda solve itself is not run.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
CONDA_NAMES = {"torch": "pytorch"}  # where conda-forge's name is another
CONDA_ONLY = {"python", "pip"}
# version 2 of jupyter-book is another program; version 7 of ipykernel hangs (ipykernel #1554)
UPPER_BOUNDS = {"jupyter-book", "ipykernel"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def wanted() -> dict[str, Requirement]:
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group]
    names = [r.name for r in requirements]
    assert len(names) == len(set(names)), "a package is listed twice"
    return {r.name: r for r in requirements}


def conda() -> dict[str, Requirement]:
    lines = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    pip_lines = next(line["pip"] for line in lines if isinstance(line, dict))
    assert "-e ." in pip_lines
    plain = [line for line in [*lines, *pip_lines] if isinstance(line, str) and line != "-e ."]
    return {r.name: r for r in map(Requirement, plain)}


def test_both_files_name_the_same_packages_and_bounds():
    from_project = {CONDA_NAMES.get(n, n): str(r.specifier) for n, r in wanted().items()}
    from_conda = {n: str(r.specifier) for n, r in conda().items() if n not in CONDA_ONLY}
    assert from_conda == from_project


def test_python_bound_agrees():
    assert str(conda()["python"].specifier) == project()["requires-python"]


def test_only_tools_of_the_book_have_an_upper_bound():
    bounded = {n for n, r in wanted().items() if re.search(r"<|==|~=", str(r.specifier))}
    assert bounded == UPPER_BOUNDS


@pytest.mark.parametrize("name", sorted(wanted()))
def test_installed_version_fits(name):
    requirement = wanted()[name]
    if requirement.marker and not requirement.marker.evaluate():
        pytest.skip(f"not needed here: {requirement.marker}")
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.fail(
            f"{name} is not installed: see `make` in README.md, or pip install -e with all extras"
        )
    # a wheel built for one device calls itself 2.5.0+cpu; the part after + is no version bound
    assert requirement.specifier.contains(installed.split("+")[0], prereleases=True)


def test_installed_package_is_this_one():
    assert version("covidmask") == __import__("covidmask").__version__
