"""What one rank of many costs in time and memory, without the others: torch's fake process group stands in for them.

Each number of ranks has a process of its own, which is the rank in the middle. It does all that a rank does in a step,
on the CPU with one thread. Nobody answers it: the time on the network is left out, and the sums are wrong.

    python benchmarks/many_ranks.py
    python benchmarks/many_ranks.py --ranks 1 8 1024 --json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator
from torch.testing._internal.distributed.fake_pg import FakeStore

from mnist_dist.bench.measure import peak_memory
from mnist_dist.bench.windows import Series
from mnist_dist.config import load, parse_setting
from mnist_dist.data import Dataset, Sampler, Split
from mnist_dist.data.store_files import in_memory
from mnist_dist.runtime import Runtime, Vote
from mnist_dist.runtime.device import Choice
from mnist_dist.training import loop
from mnist_dist.training.reduction import Exact

RANKS = (1, 8, 1024)
"""Powers of two, as `exact` needs them."""
MICRO_BATCH = 8
"""Images of a rank in a step."""
LARGE_SET = 6_000_000
"""Images of a set whose epochs are never laid out as a whole."""
REPEATS = 9
SAMPLED_STEPS = 1 << 14
FACTS = 8
"""What the ranks compare before they train: config, data and versions."""
MEASURES = {
    "sampler": "its images of a step, of 6,000,000, microseconds",
    "vote": "a vote, microseconds",
    "agree": "comparing eight facts, once, ms",
    "exchange": "`exact`: gathering and adding the gradients of all ranks, ms",
    "step": "`exact`: a whole step, ms",
    "memory": "most memory, MB",
}


@contextlib.contextmanager
def one_rank(ranks: int, rank: int) -> Iterator[Runtime]:
    """Start one of many ranks on the CPU. No other rank exists: its answers are this rank's own."""
    place = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": 1}
    environment = {name: str(value) for name, value in place.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, environment if ranks > 1 else {}):
        if ranks > 1:
            torch.distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        choices = (Choice(value=value, reason="simulated") for value in ("cpu", "fp32"))
        runtime = Runtime(Accelerator(cpu=True), *choices, threads=1)
        try:
            yield runtime
        finally:
            runtime.close()
            if ranks > 1:
                torch.distributed.destroy_process_group()


def blank_images(images: int) -> Dataset:
    """Build a data set of black images."""
    pixels, labels = np.zeros((images, 1, 28, 28), np.uint8), np.arange(images) % 10
    stored = in_memory(pixels, labels, tuple(map(str, range(images))))
    splits = {name: Split(name=name, stored=stored) for name in ("train", "test")}
    names = tuple(map(str, range(10)))
    return Dataset(root="made up", classes=names, validation=None, mean=(0.5,), std=(0.5,), sha256="", state="",
                   folder=None, **splits)  # fmt: skip


def median_seconds(action: Callable[[], object]) -> float:
    """Time an action some times after once for warming up."""
    action()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measure(ranks: int) -> dict[str, float]:
    """Measure one rank of so many in this process."""
    torch.set_num_threads(1)
    rank, global_batch = ranks // 2, ranks * MICRO_BATCH
    settings = {"train.reduction": "exact", "train.micro_batch": MICRO_BATCH, "train.global_batch": global_batch,
                "train.device": "cpu", "train.epochs": 1e6}  # fmt: skip
    config = load("baseline", tuple(parse_setting(f"{key}={value}") for key, value in settings.items())).config
    sampler = Sampler(images=LARGE_SET, global_batch=global_batch, seed=0)
    with one_rank(ranks, rank) as runtime:
        found = {"sampler": 1e6 * _seconds_of_sampling(sampler, rank, ranks)}
        vote, facts = Vote(runtime), {str(number): "the same" for number in range(FACTS)}
        found["vote"] = 1e6 * median_seconds(lambda: (vote.cast(0), vote.result()))
        found["agree"] = 1e3 * median_seconds(lambda: runtime.agree(facts))
        series = Series(config, blank_images(2 * global_batch), runtime)
        reduction = series.parts.reduction
        assert isinstance(reduction, Exact)
        gradient = torch.zeros(sum(weight.numel() for weight in series.parts.model.parameters()) + 2)

        def exchange() -> None:
            reduction._subtrees.append((1, gradient.clone()))
            reduction.finish()

        found["exchange"] = 1e3 * median_seconds(exchange)
        with mock.patch.object(loop, "_finish_epoch"):  # no other rank takes its part of the evaluation
            series.run(1)
            found["step"] = 1e3 * statistics.median(series.run(1).seconds for _ in range(REPEATS))
    return found | {"memory": peak_memory() / 1e6}


def _seconds_of_sampling(sampler: Sampler, rank: int, ranks: int) -> float:
    """Time a step's images over many steps, since those of many are looked up together."""
    firsts = itertools.count(0, SAMPLED_STEPS)

    def some_steps() -> None:
        first = next(firsts)
        for step in range(first, first + SAMPLED_STEPS):
            sampler.share(step, rank=rank, ranks=ranks, micro_batch=MICRO_BATCH)

    return median_seconds(some_steps) / SAMPLED_STEPS


def main() -> None:
    """Measure each number of ranks in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(options.ranks[0])))
        return
    found = {}
    for ranks in options.ranks:
        words = [sys.executable, __file__, "--alone", "--ranks", str(ranks)]
        ended = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        found[ranks] = json.loads(ended.stdout)
    if options.json:
        print(json.dumps(found))
        return
    print(f"| one rank of | {' | '.join(f'{ranks:,}' for ranks in found)} |\n|{' --- |' * (len(found) + 1)}")
    for name, words in MEASURES.items():
        print(f"| {words} | {' | '.join(f'{row[name]:,.3g}' for row in found.values())} |")


if __name__ == "__main__":
    main()
