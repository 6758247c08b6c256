"""`covidmask check`: what this machine has, one line each. Put its output into a bug report."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

from covidmask.files import check_writable, is_there

OPTIONAL = {  # extra -> what it is for
    "medical": "DICOM and NIfTI files",
    "train": "TensorBoard logs",
}


def check(data: Path, weights: Path) -> int:
    """Print [OK], [FAIL] and [--] (optional, absent) lines. Returns 0, or 2 after any [FAIL]."""
    lines = [*_packages(), *_together(), _device(), _folder("data", data)]
    lines.append(_folder("weights", weights))
    for state, text in lines:
        print(f"[{state}] {text}", flush=True)
    failures = sum(state == "FAIL" for state, _ in lines)
    print(f"{failures} of {len(lines)} checks failed" if failures else "All is well", flush=True)
    return 2 if failures else 0


def _packages() -> list[tuple[str, str]]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        own = metadata.metadata("covidmask")
    except metadata.PackageNotFoundError:
        return [("FAIL", "covidmask is not installed; run `pip install -e .` in its folder")]
    python = platform.python_version()
    fits = SpecifierSet(own["Requires-Python"]).contains(python, prereleases=True)
    lines = [
        ("OK" if fits else "FAIL", f"Python {python}, needs {own['Requires-Python']}"),
        ("OK", f"covidmask {own['Version']}"),
    ]
    for requirement in map(Requirement, metadata.requires("covidmask") or []):
        extra = next((e for e in OPTIONAL if f'extra == "{e}"' in str(requirement.marker)), None)
        if requirement.marker is not None and extra is None:
            continue  # for building and testing the book
        name, bound = requirement.name, f"needs {requirement.specifier}"
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            lines.append(
                ("--", f"{name}: absent, for {OPTIONAL[extra]} ({bound})")
                if extra
                else (
                    "FAIL",
                    f"{requirement.name}: absent, {bound}; pip install {requirement.name}",
                )
            )
            continue
        # a wheel built for one device calls itself 2.5.0+cpu; the part after + is no version
        fits = requirement.specifier.contains(version.split("+")[0], prereleases=True)
        remedy = "" if fits else f"; pip install --upgrade {name}"
        lines.append(("OK" if fits else "FAIL", f"{name} {version}, {bound}{remedy}"))
    return lines


def _together() -> Iterator[tuple[str, str]]:
    """Whether packages that must fit each other do; each probe is what fails where they do not."""
    for what, probe, remedy in (
        ("torch and torchvision", _nms, "install both with one command"),
        ("torch and numpy", _from_numpy, 'pip install --upgrade torch, or pip install "numpy<2"'),
        (
            "lightning and setuptools",
            lambda: import_module("lightning.fabric"),
            'pip install --upgrade lightning, or pip install "setuptools<81"',
        ),
    ):
        try:
            probe()
            yield "OK", f"{what} fit together"
        except Exception as error:  # ImportError, RuntimeError, OSError, AttributeError ...
            reason = (str(error) or type(error).__name__).splitlines()[0]
            yield "FAIL", f"{what} do not fit together ({reason}); {remedy}"


def _nms() -> None:
    import torch
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9]])
    if nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist() != [1]:
        raise RuntimeError("a wrong result")


def _from_numpy() -> None:
    import numpy
    import torch

    torch.from_numpy(numpy.zeros(2)).numpy()  # torch built for NumPy 1 fails beside NumPy 2


def _device() -> tuple[str, str]:
    try:
        import torch

        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = f"cuda, {torch.cuda.get_device_name()}" if cuda else "cpu"
        threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    except Exception as error:
        return "FAIL", f"device: torch cannot be used ({type(error).__name__})"
    more = "; mps is there, too: --device mps" if mps else ""
    return "OK", f"device {name} ({threads}){more}; {sys.platform}"


def _folder(name: str, folder: Path) -> tuple[str, str]:
    """Whether a folder, or the one that it would be made in, can be written."""
    there = Path(os.path.realpath(folder))
    try:
        while not is_there(there):
            there = there.parent
        note = "" if is_there(folder) else " (not made yet)"
        check_writable(there)
    except OSError as error:  # an OutputError names the folder itself
        problem = f"{folder}: {error.strerror}" if error.strerror else str(error)
        return "FAIL", f"{name} folder {problem}"
    return "OK", f"{name} folder {folder} can be written{note}"
