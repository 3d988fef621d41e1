"""Where the time of a training step goes: torch's operators by their own time, and how fast the arithmetic is.

The steps are those of `mnist-dist train` in one process on the CPU. Some are timed as they are; then as many are
watched by torch's profiler, which makes each operator a little slower:

    python benchmarks/step_profile.py --data Dataset --batch 64
    python benchmarks/step_profile.py --data Dataset --batch 64 --model large_cnn
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import torch
from commands import become_rank
from torch.profiler import ProfilerActivity, profile

from mnist_dist.bench.measure import flop_by_operator, matrix_flop_per_second
from mnist_dist.config import Setting, load
from mnist_dist.data import open_dataset
from mnist_dist.errors import MnistDistError
from mnist_dist.observe import Observer, Observers
from mnist_dist.run.build import build_parts, join
from mnist_dist.training import loop
from mnist_dist.training.state import Progress

WARM_STEPS = 100
TOUCHED_BLOCKS, BLOCK_BYTES = 3, 1 << 29
"""Of memory, used and freed before the profiler starts. The profiler's records take the places of a step's tensors, so
that later steps get memory further up: without this for the first time, which would count as an operator's time."""
COUNTED_AS = {
    "mkldnn_convolution": "convolution",
    "convolution_backward": "convolution_backward",
    "addmm": "addmm",
    "mm": "mm",
}
"""Operators that the FLOP counter knows, by the profiler's names."""


class Watch(Observer):
    """Times some steps, then profiles as many."""

    def __init__(self, steps: int) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.timed = self.profiled = 0.0  # seconds of all steps
        self._steps = steps

    def progress(self, step: int) -> None:  # noqa: D102
        now = time.perf_counter()
        if step == WARM_STEPS:
            self.timed -= now
        elif step == WARM_STEPS + self._steps:
            self.timed += now
            _ = [torch.ones(BLOCK_BYTES, dtype=torch.uint8) for _ in range(TOUCHED_BLOCKS)]
            self.profiler.start()
            self.profiled -= time.perf_counter()
        elif step == WARM_STEPS + 2 * self._steps:
            self.profiled += now
            self.profiler.stop()


def profile_steps(options: argparse.Namespace) -> None:
    """Train and print a table."""
    values = {
        "data.root": options.data,
        "model.name": options.model,
        "train.global_batch": options.batch,
        "train.device": "cpu",
        "train.epochs": 1e6,
        "train.max_steps": WARM_STEPS + 2 * options.steps,
        "train.log_every": 10**9,
    }
    settings = tuple(Setting(key=key, value=value, origin="here") for key, value in values.items())
    config = load("baseline", settings).config
    dataset = open_dataset(config.data, seed=config.train.seed, announce=print)
    watch = Watch(options.steps)
    with join(config) as runtime:
        parts = build_parts(config, dataset, runtime)
        flops = flop_by_operator(parts)
        loop.train(replace(parts, observers=Observers((watch,))), Progress())
        square = matrix_flop_per_second(runtime.device, "fp32")

    rows = sorted(watch.profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    step = watch.timed / options.steps
    print(f"{options.model}, {runtime.threads} threads: a step of {options.batch} takes {step * 1e3:.2f} ms", end="")
    print(f" ({options.batch / step:,.0f} images/s), {watch.profiled / options.steps * 1e3:.2f} ms with the profiler.")
    rate = sum(flops.values()) / step
    print(f"Arithmetic: {rate / 1e9:.0f} GFLOP/s, {rate / square:.0%} of a matrix product's {square / 1e9:.0f}.\n")
    print("| operator | calls a step | ms | share | GFLOP/s |\n| --- | --- | --- | --- | --- |")
    rest = watch.profiled
    for row in rows[: options.rows]:
        name, seconds = row.key.removeprefix("aten::"), row.self_cpu_time_total / 1e6
        rest -= seconds
        work = flops.get(COUNTED_AS.get(name, ""), 0) * options.steps
        pace = f"{work / seconds / 1e9:,.0f}" if work else ""
        share = seconds / watch.profiled
        calls = row.count / options.steps
        print(f"| {name} | {calls:.0f} | {seconds / options.steps * 1e3:.3f} | {share:.1%} | {pace} |")
    share = rest / watch.profiled
    print(f"| {len(rows) - options.rows} others, and Python | | {rest / options.steps * 1e3:.3f} | {share:.1%} | |")


def main() -> None:
    """Profile in a process as our launcher starts it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Dataset")
    parser.add_argument("--model", default="small_cnn")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=24)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    become_rank()
    try:
        profile_steps(options)
    except MnistDistError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
