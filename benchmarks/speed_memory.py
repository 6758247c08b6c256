"""Peak memory of one case; on a CPU in a process of its own, for which `peak` starts this file."""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import threading
from collections.abc import Callable

import psutil
import released_loop
import torch
from speed_bench import (
    BATCH,
    FULL,
    MODELS,
    SMALL,
    SMOKE,
    Bench,
    baseline_trainee,
    build,
    our_step,
    trainee,
)

from covidmask.models.detector import for_inference
from covidmask.training.ranked_cache import cache_ranked_boxes


def peak(options: list[str], bench: Bench) -> float:
    """Peak memory in MB of one case above what the imports and the model take."""
    if bench.device.type == "cuda":  # torch counts what is in use, so no other process is needed
        return measure_peak(parser().parse_args(options), bench)
    command = [sys.executable, __file__, "--device", bench.device.type, *options]
    if bench.scale is SMOKE:
        command.append("--smoke")
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)}: {run.stderr[-2000:]}")
    return float(run.stdout.splitlines()[-1])


def measure_peak(arguments: argparse.Namespace, bench: Bench) -> float:
    """What `peak` runs: one inference, step or ranking, and the most memory it has at a time."""
    side = arguments.side or dict(bench.scale.changes).get("image_size", 512)
    torch.manual_seed(1)
    images = [torch.rand(3, side, side, device=bench.device) for _ in range(BATCH)]
    labels = torch.arange(BATCH, device=bench.device) % 3
    name = arguments.model
    if arguments.baseline:
        model, optimizer = baseline_trainee(name, arguments.regime, bench)

        def work() -> None:
            released_loop.training_step(model, images, labels, optimizer)
    elif arguments.side:
        fast = for_inference(build(name, bench, image_size=side, max_size=2 * side))

        @torch.no_grad()
        def work() -> None:
            fast(images[:1])
    elif arguments.slices:
        model = build(name, bench)
        many = [(images[i % BATCH], 0) for i in range(arguments.slices)]

        def work() -> None:
            cache_ranked_boxes(model, many, progress=False)
    else:
        changes = {"n_boxes": arguments.n_boxes} if arguments.n_boxes else {}
        model, optimizer = trainee(name, arguments.regime, bench, **changes)

        def work() -> None:
            our_step(model, images, labels, optimizer, bench)

    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return resident(work)


def resident(work: Callable[[], object]) -> float:
    """MB by which the memory of this process grows while `work` runs, looked at every 2 ms."""
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return (highest - before) / 1e6


def parser() -> argparse.ArgumentParser:
    """The options that say which case it is."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    result.add_argument("--smoke", action="store_true", help="toy sizes")
    result.add_argument("--baseline", action="store_true", help="the released code's loop")
    result.add_argument("--model", choices=list(MODELS), default=SMALL)
    result.add_argument("--regime", default="heads_bn")
    for name in ("--side", "--n-boxes", "--slices"):
        result.add_argument(name, type=int)
    return result


def main() -> None:
    """Read the case from the command line and print its peak memory in MB."""
    arguments = parser().parse_args()
    scale = SMOKE if arguments.smoke else FULL
    print(measure_peak(arguments, Bench(arguments.device, scale=scale)))


if __name__ == "__main__":
    main()
