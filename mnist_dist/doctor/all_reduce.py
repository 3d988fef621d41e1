"""An all-reduce between two or more processes: they connect, the sum is right, and how long it takes."""

from __future__ import annotations

import os
import re
import statistics
import time
from pathlib import Path
from typing import Literal

import torch

from mnist_dist.doctor.finding import first_line
from mnist_dist.errors import ConfigError, WorkerError, memory
from mnist_dist.group import heartbeat
from mnist_dist.runtime import start

FLOATS = 2**18
"""1 MiB, as much as the gradients of a network with 262,144 weights."""
REPEATS = 21
"""The first few are slower: connections are made then."""


def measure(device: Literal["cpu", "cuda"], output: Path) -> None:
    """Check and time an all-reduce over all processes. Every rank.

    Args:
        device: `cpu` goes over gloo, `cuda` over NCCL.
        output: A file to which rank 0 writes the median seconds of one all-reduce.

    Raises:
        ConfigError: The library refuses to work here; the message quotes it.
        RuntimeError: Memory is exhausted.
        WorkerError: The sum is wrong, or another rank is gone.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # another check is about these
    try:
        _measure(device, output)
    except RuntimeError as error:  # of gloo or NCCL, behind the place in its source
        if memory.refusal_of(error) is not None:
            raise
        words = re.sub(r"^\[[^]]*\] ", "", first_line(error))
        raise ConfigError(f"Rank {os.environ['RANK']}: {words}") from error


def _measure(device: Literal["cpu", "cuda"], output: Path) -> None:
    with start(device=device, precision="fp32", threads=1) as runtime:
        heartbeat.beat()
        values = torch.full((FLOATS,), runtime.rank + 1.0, device=runtime.device)
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            total = runtime.sum(values)
            float(total[-1])  # waits for the device
            seconds.append(time.perf_counter() - began)
        expected = runtime.ranks * (runtime.ranks + 1) / 2
        if not bool((total == expected).all()):
            raise WorkerError(f"Rank {runtime.rank} of {runtime.ranks} got a wrong sum from an all-reduce.")
        if runtime.rank == 0:
            output.write_text(str(statistics.median(seconds)), encoding="utf-8")
