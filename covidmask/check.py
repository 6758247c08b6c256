"""`covidmask check`: what this machine has, one line each. Put its output into a bug report."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from covidmask.files import check_writable, data_root, is_there


@dataclass(frozen=True)
class Check:
    """Look over this machine: [OK] is fine, [FAIL] must be mended, [--] is optional."""

    def run(self) -> int:
        lines, data = list(_packages()), data_root()
        again = "install torch and torchvision again, with one command, and then lightning"
        for what, probe, remedy in (
            ("torch, torchvision, numpy and lightning", _together, again),
            ("device", _device, again),
            (f"data folder {data}", lambda: _writable(data), "name another in $COVIDMASK_DATA"),
        ):
            try:
                lines.append(("OK", f"{what}: {probe()}"))
            except Exception as error:  # ImportError, RuntimeError, OSError, AttributeError ...
                reason = (str(error) or type(error).__name__).splitlines()[0]
                lines.append(("FAIL", f"{what}: {reason}; {remedy}"))
        for state, text in lines:
            print(f"[{state}] {text}", flush=True)
        failed = sum(state == "FAIL" for state, _ in lines)
        print(f"{failed} of {len(lines)} checks failed" if failed else "All is well", flush=True)
        return 2 if failed else 0


def _packages() -> Iterator[tuple[str, str]]:
    from packaging.requirements import Requirement

    try:
        own = metadata.version("covidmask")
    except metadata.PackageNotFoundError:
        yield "FAIL", "covidmask is not installed; run `pip install -e .` in its folder"
        return
    yield "OK", f"covidmask {own}, Python {platform.python_version()}"
    for needed in map(Requirement, metadata.requires("covidmask") or ()):
        extra = str(needed.marker or "").partition('extra == "')[2][:-1]
        if needed.marker and extra not in ("medical", "timm", "train"):  # to build and to test
            continue
        name, bounds = needed.name, needed.specifier
        try:
            fits = bounds.contains(version := metadata.version(name), prereleases=True)
            yield "OK" if fits else "FAIL", f"{name} {version}, needs {bounds}"
        except metadata.PackageNotFoundError:
            remedy = f"optional ({extra})" if extra else f"pip install {name}"
            yield "--" if extra else "FAIL", f"{name}: absent, needs {bounds}; {remedy}"


def _together() -> str:
    import lightning.fabric  # older ones need pkg_resources of setuptools  # noqa: F401
    import numpy
    import torch
    from torchvision.ops import nms

    torch.from_numpy(numpy.zeros(2)).numpy()  # torch built for NumPy 1 fails beside NumPy 2
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9]])
    if nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist() != [1]:
        raise RuntimeError("nms of torchvision gives a wrong result")
    return "fit together"


def _device() -> str:
    import torch

    name = f"cuda, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"
    mps = "; mps is there, too: --device mps" if torch.backends.mps.is_available() else ""
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    return f"{name} ({threads}){mps}; {sys.platform}"


def _writable(folder: Path) -> str:
    # it, or the folder that it would be made in: looking makes none
    path = folder.absolute()
    check_writable(next(filter(is_there, (path, *path.parents))))
    return "can be written"
