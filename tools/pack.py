"""A folder for a class without a network: package, what it needs, notebooks, slides, phantoms.

    python tools/pack.py                # after `make course` and `covidmask phantoms`

Copy the folder to each machine, or to a drive; README.txt in it says how to install from it. There,
the system and the minor version of Python must be the same as here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import tyro

from covidmask.files import phantoms_folder, write_text

ROOT = Path(__file__).resolve().parents[1]
CPU = "https://download.pytorch.org/whl/cpu"  # without CUDA: 200 MB instead of 5 GB
README = """\
covidmask for a class: nothing here needs a network.

1. Python {python}, as on the machine that made this folder:

       python3 -m venv env
       env/bin/pip install --no-index --find-links wheels "covidmask[medical]" {extras}

   On Windows: env\\Scripts\\pip. About 3 minutes and 2 GB.

2.     COVIDMASK_DATA=data env/bin/jupyter-lab notebooks

   On Windows: set COVIDMASK_DATA=data, then env\\Scripts\\jupyter-lab notebooks.

3. Open 00_whole_path.ipynb and run it from the first cell to the last. All cells work without a
   GPU. Slides are in slides/: open a file in a browser; key S shows the notes.

The slices are phantoms, drawn by formulas; weights of small networks trained on phantoms are in the
package. For research and teaching only, not for diagnosis.
"""
EXTRAS = ("jupyterlab", "ipywidgets")


def pack(
    out: Path = ROOT / "_build" / "pack" / "covidmask-class",
    course: Path = ROOT / "_build" / "course",
    dependencies: bool = True,
    index: str = CPU,
) -> None:
    """Fill OUT.

    Args:
        course: what `make course` made; its student notebooks and slides are taken.
        dependencies: also the wheels of all that covidmask needs (about 1 GB, downloaded).
        index: where torch is taken from.
    """
    phantoms = phantoms_folder("quick")
    for needed, command in ((course / "student", "make course"),
                            (phantoms, "covidmask phantoms --preset quick")):  # fmt: skip
        if not needed.is_dir():
            sys.exit(f"{needed}: is missing; run `{command}` first")
    shutil.rmtree(out, ignore_errors=True)
    wheels = out / "wheels"
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "-w", wheels, ROOT], check=True)
    if dependencies:
        [own] = wheels.glob("covidmask-*.whl")
        wanted = [f"{own}[medical]", *EXTRAS]
        options = ["--only-binary", ":all:", "--extra-index-url", index, "--dest", wheels]
        subprocess.run([*pip, "download", *options, *wanted], check=True)
    shutil.copytree(course / "student", out / "notebooks")
    shutil.copytree(course / "slides", out / "slides")
    shutil.copytree(phantoms, out / "data" / phantoms.name)
    for name in ("LICENSE", "LICENSE-CC-BY-4.0"):
        shutil.copy(ROOT / name, out)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    write_text(out / "README.txt", README.format(python=python, extras=" ".join(EXTRAS)))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e9:.1f} GB, for Python {python} on this kind of system")


if __name__ == "__main__":
    tyro.cli(pack, description=__doc__)
