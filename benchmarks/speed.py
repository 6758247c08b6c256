"""How much faster than the released code's loops: both timed in turn, in one run, on one machine.

    python benchmarks/speed.py                       # CPU: about 30 minutes on two idle cores
    python benchmarks/speed.py --device cuda         # GPU: float32 and bfloat16
    python benchmarks/speed.py --page                # rewrite the page from the results, no timing
    python benchmarks/speed.py --smoke --out x.json  # everything at toy sizes: does it run?

Writes results/benchmarks.json (or results/benchmarks-cuda.json) and the page book/fast.md with its
figures. The baseline is `released_loop.py`. Weights are random, slices are synthetic phantoms of
512 x 512; times are medians of runs that alternate between baseline and ours. Each part is stored
in _build/ as soon as it is measured, and a run that was stopped goes on there if commit and
machine are still the same (`--fresh` starts anew).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import speed_page
import torch
from quick_preset import ROOT, environment
from speed_bench import BATCH, FULL, MODELS, SMALL, SMOKE, Bench, Scale
from speed_memory import peak
from speed_parts import (
    ap,
    batches,
    gradients,
    growth,
    heads_only,
    inference,
    reading,
    stages,
    steps,
    trained,
    tried,
    waiting,
)

from covidmask.config import PAPER
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.lesions import LesionSlices
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.files import atomic_path

# The released code itself, timed on two cores of this kind: seconds a slice, seconds a step of 8.
RELEASED_CODE = {"ResNet-50": (0.62, 18.2), "ResNet-18 cut 1": (0.23, 9.2)}


class Results:
    """What is measured so far, in a file that a run that was stopped finds again."""

    def __init__(self, path: Path, origin: dict, fresh: bool) -> None:
        self.path = path
        self.values = {**origin, "parts": {}}
        if path.exists() and not fresh:
            found = json.loads(path.read_text())
            same = ("commit", "hardware", "processor", "torch", "threads", "scale")
            if all(found[key] == origin[key] for key in same):
                print(f"going on with {path}", flush=True)
                self.values["parts"] = found["parts"]

    def part(self, name: str, work: Callable[[], dict]) -> dict:
        """Measure it, unless it is there, and store it. `name` has slashes between its levels."""
        parts = self.values["parts"]
        if name not in parts:
            start = time.perf_counter()
            value = work()
            parts[name] = {"took": round(time.perf_counter() - start, 1), "value": value}
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
            print(f"{name}, {parts[name]['took']} s: {json.dumps(value)}"[:600], flush=True)
        return parts[name]["value"]

    def nested(self) -> dict:
        """All of it, parts below their levels."""
        result = {key: value for key, value in self.values.items() if key != "parts"}
        for name, entry in self.values["parts"].items():
            *levels, last = name.split("/")
            place = result
            for level in levels:
                place = place.setdefault(level, {})
            place[last] = entry["value"]
        result["minutes"] = sum(entry["took"] for entry in self.values["parts"].values()) / 60
        return result


def measure(bench: Bench, root: Path, results: Results) -> None:
    """Every table, at one precision."""
    scale, cuda = bench.scale, bench.device.type == "cuda"
    slices = SliceImages(root / "slices", "train")
    lesions = LesionSlices(root / "lesions", "test", min_area=PAPER.min_area)
    third = len(slices) // 3  # the classes stand one after the other
    chosen = [third * (i % 3) + i // 3 for i in range(BATCH)] if third > 2 else [0] * BATCH
    images = [slices[i][0].to(bench.device) for i in chosen]
    labels = torch.tensor([slices.labels[i] for i in chosen], device=bench.device)
    exact = bench.precision == "32-true"
    for name in MODELS:

        def part(key: str, work: Callable[[], dict], name: str = name) -> dict:
            gc.collect()
            return results.part(f"{bench.precision}/{name}/{key}", work)

        large = name != SMALL
        inferred = part("inference", lambda name=name: inference(name, images, bench))
        part("stages", lambda name=name: stages(name, images, bench))
        if exact or cuda:  # bfloat16 on a CPU: for inference alone
            for regime in ("heads_bn", "full"):
                repeats = scale.slow if large and regime == "full" and not cuda else scale.repeats
                part(
                    f"step/{regime}",
                    lambda name=name, regime=regime, repeats=repeats: steps(
                        name, regime, images, labels, bench, repeats
                    ),
                )
            step = part("step/heads_bn", dict)
            part(
                "heads_only",
                lambda name=name, step=step: heads_only(name, slices, bench, step["baseline"]),
            )
        if exact:
            repeats = scale.slowest if large else scale.slow  # the baseline takes a minute or more
            part("ap", lambda name=name, repeats=repeats: ap(name, lesions, bench, repeats))
            for regime in ("heads_bn", "full"):
                for who, option in (("baseline", ["--baseline"]), ("ours", [])):
                    options = ["--model", name, "--regime", regime, *option]
                    part(
                        f"peak_megabytes/{regime}/{who}",
                        lambda options=options: peak(options, bench),
                    )
            if not cuda:
                part("gradients", lambda name=name: gradients(name, images[:2], labels[:2], bench))
                part("tried", lambda name=name: tried(name, images, bench))
        if cuda:
            part("waiting", lambda name=name: waiting(name, slices, bench))
            part("batches", lambda name=name: batches(name, images, labels, bench))
        if exact and not large:
            seconds = step["ours"], inferred["ours"]
            results.part("reading", lambda seconds=seconds: reading(slices, *seconds))
            results.part("growth", lambda: growth(slices, bench))


def main() -> None:
    """Read the command line, time, write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true", help="only rewrite the page")
    parser.add_argument("--fresh", action="store_true", help="measure every part again")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: does it run?")
    arguments = parser.parse_args()
    if arguments.smoke and arguments.out is None:
        parser.error("--smoke needs --out, so that it cannot replace results")
    scale = SMOKE if arguments.smoke else FULL
    if not arguments.page:
        run(arguments, scale)
        if arguments.out is not None:
            return
    speed_page.write(ROOT)


def run(arguments: argparse.Namespace, scale: Scale) -> None:
    """Measure everything and write the file of results."""
    suffix = "" if arguments.device == "cpu" else f"-{arguments.device}"
    out = arguments.out or ROOT / "results" / f"benchmarks{suffix}.json"
    origin = {
        "about": "times on synthetic phantoms, random weights; see benchmarks/speed.py",
        **environment(),
        "command": " ".join(["python", "benchmarks/speed.py", *sys.argv[1:]]),
        "processor": processor(),
        "scale": "smoke" if arguments.smoke else "full",
        "released_code_seconds": RELEASED_CODE,
    }
    if arguments.device == "cuda":
        origin["hardware"] = f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    partial = ROOT / "_build" / f"{out.stem}.part.json"
    results = Results(partial, origin, arguments.fresh)
    with TemporaryDirectory() as folder:
        root = write_phantoms(Path(folder) / "phantoms", scale.phantoms, progress=False)
        for precision in ("32-true", "bf16-mixed"):
            measure(Bench(arguments.device, precision, scale), root, results)
        bench = Bench(arguments.device, scale=scale)
        results.part("trained", lambda: trained(bench, Path(folder) / "quick"))
    with atomic_path(out) as temporary:
        text = json.dumps(results.nested(), indent=1) + "\n"
        temporary.write_text(text, encoding="utf-8", newline="\n")
    partial.unlink(missing_ok=True)
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
