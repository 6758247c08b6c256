"""How much faster than the released code's loops: both timed in turn, in one run, on one machine.

    python benchmarks/speed.py                       # CPU: about 30 minutes on two idle cores
    python benchmarks/speed.py --device cuda         # GPU: float32 and bfloat16
    python benchmarks/speed.py --page                # fill the pages from the results, no timing
    python benchmarks/speed.py --smoke --out x.json  # everything at toy sizes: does it run?

Writes results/benchmarks.json (or results/benchmarks-cuda.json) and fills the tables of
book/fast.md, its figure, chapter 6 and README.md. The baseline is `released_loop.py`. Weights are
random, slices are synthetic phantoms of 512 x 512; times are medians of runs that alternate between
baseline and ours. Each part is stored in _build/ as soon as it is measured, and a run that was
stopped goes on there if commit and machine are still the same (`--fresh` starts anew).
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import speed_page
import speed_parts as parts
import torch
from common import RESULTS, ROOT, environment, read, save
from torch.utils.benchmark import timer

from covidmask.config import PRESETS
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import write_phantoms

# The released code itself, timed on two cores of this kind: seconds a slice, seconds a step of 8.
RELEASED_CODE = {"ResNet-50": (0.62, 18.2), "ResNet-18 cut 1": (0.23, 9.2)}


class Results:
    """What is measured so far, in a file that a run that was stopped finds again."""

    def __init__(self, path: Path, origin: dict, fresh: bool) -> None:
        self.path, self.origin, self.found = path, origin, {}
        old = {} if fresh else read(path)
        same = ("commit", "hardware", "processor", "torch", "threads", "scale")
        if all(old.get("origin", {}).get(key) == origin[key] for key in same):
            print(f"going on with {path}", flush=True)
            self.found = old["parts"]

    def part(self, name: str, work: Callable, *arguments) -> dict:
        """Measure it, unless it is there, and store it. `name` has slashes between its levels."""
        if name not in self.found:
            gc.collect()
            start = timer()
            value = work(*arguments)
            self.found[name] = {"took": round(timer() - start, 1), "value": value}
            save(self.path, {"origin": self.origin, "parts": self.found})
            print(f"{name}, {self.found[name]['took']} s: {value}"[:600], flush=True)
        return self.found[name]["value"]

    def nested(self) -> dict:
        """All of it, parts below their levels."""
        result = dict(self.origin)
        for name, entry in self.found.items():
            *levels, last = name.split("/")
            place = result
            for level in levels:
                place = place.setdefault(level, {})
            place[last] = entry["value"]
        return {**result, "minutes": sum(entry["took"] for entry in self.found.values()) / 60}


def measure(bench: parts.Bench, root: Path, results: Results) -> None:
    """Every table, at one precision."""
    scale, cuda, exact = bench.scale, bench.cuda, bench.precision == "32-true"
    slices = SliceImages(root / "slices", "train")
    lesions = LesionSlices(root / "lesions", "test", min_area=PRESETS["paper"].min_area)
    third = len(slices) // 3  # the classes stand one after the other
    chosen = [third * (i % 3) + i // 3 for i in range(8)] if third > 2 else [0] * 8
    images = [slices[i][0].to(bench.device) for i in chosen]
    labels = torch.tensor([slices.labels[i] for i in chosen], device=bench.device)
    for name in parts.MODELS:

        def part(key: str, work: Callable, *arguments, name: str = name) -> dict:
            return results.part(f"{bench.precision}/{name}/{key}", work, *arguments)

        large = name != parts.SMALL
        inferred = part("inference", parts.inference, name, images, bench)
        part("stages", parts.stages, name, images, bench)
        if exact or cuda:  # bfloat16 on a CPU: for inference alone
            for regime in ("full", "heads_bn"):  # the last one's step is used below
                repeats = scale.slow if large and regime == "full" and not cuda else scale.repeats
                more = images, labels, bench, repeats
                step = part(f"step/{regime}", parts.steps, name, regime, *more)
            part("heads_only", parts.heads_only, name, slices, bench, step["baseline"])
        if exact:
            repeats = scale.slowest if large else scale.slow  # the baseline takes a minute or more
            part("ap", parts.ap, name, lesions, bench, repeats)
            for regime in ("heads_bn", "full"):
                for who in ("baseline", "ours"):
                    case = name, regime, who == "baseline"
                    part(f"peak_megabytes/{regime}/{who}", parts.peak, bench, *case)
            if not cuda:
                part("gradients", parts.gradients, name, images[:2], labels[:2], bench)
                part("tried", parts.tried, name, images, bench)
        if cuda:
            part("waiting", parts.waiting, name, slices, bench)
            part("batches", parts.batches, name, images, labels, bench)
        if exact and not large:
            seconds = step["ours"], inferred["ours"]
            results.part("reading", parts.reading, slices, *seconds, bench)
            results.part("growth", parts.growth, slices, bench)


def main() -> None:
    """Read the command line, time, write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true", help="only fill the pages")
    parser.add_argument("--fresh", action="store_true", help="measure every part again")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run?")
    arguments = parser.parse_args()
    if arguments.smoke and arguments.out is None:
        parser.error("--smoke needs --out, so that it cannot replace results")
    if not arguments.page:
        run(arguments)
    if arguments.page or arguments.out is None:
        speed_page.write()


def run(arguments: argparse.Namespace) -> None:
    """Measure everything and write the file of results."""
    cuda = arguments.device == "cuda"
    out = arguments.out or RESULTS / f"benchmarks{'-cuda' * cuda}.json"
    origin = {
        "about": "times on synthetic phantoms, random weights; see benchmarks/speed.py",
        **environment(),
        "processor": processor(),
        "scale": "smoke" if arguments.smoke else "full",
        "released_code_seconds": RELEASED_CODE,
    }
    if cuda:
        origin["hardware"] = f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    results = Results(ROOT / "_build" / f"{out.stem}.part.json", origin, arguments.fresh)
    scale = parts.SMOKE if arguments.smoke else parts.FULL
    with TemporaryDirectory() as folder:
        root = write_phantoms(Path(folder) / "phantoms", scale.phantoms, progress=False)
        for precision in ("32-true", "bf16-mixed"):
            measure(parts.Bench(arguments.device, precision, scale), root, results)
        bench = parts.Bench(arguments.device, scale=scale)
        results.part("trained", parts.trained, bench, Path(folder) / "quick")
    save(out, results.nested())
    results.path.unlink(missing_ok=True)
    print(f"written: {out}")


def processor() -> str:
    """The processor's name, and whether it multiplies bfloat16 in hardware."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    kinds = [kind for kind in ("avx512_bf16", "amx_bf16") if kind in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.processor())} ({', '.join(kinds) or 'no bfloat16'})"


if __name__ == "__main__":
    main()
