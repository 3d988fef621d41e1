"""Trains in several ways for some steps each, and measures: `launch local -n RANKS -- python steady.py DEVICE SIZE`.

Rank 0 prints a JSON object with a record for each way: images a second, and how often a step made the host wait for
the device, with the lines of code that did. No report of the loop lies in the timed steps nor in the watched ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from many_ranks import blank_images

from mnist_dist.bench.windows import synchronise
from mnist_dist.config import Setting, load
from mnist_dist.observe import Observer, Observers
from mnist_dist.run.build import build_parts, join
from mnist_dist.training import loop
from mnist_dist.training.state import Progress


@dataclass(frozen=True)
class Size:
    warm: int
    """Steps before anything is measured."""
    timed: int
    watched: int
    """Steps in which waits are counted."""
    batch_divisor: int


SIZES = {"small": Size(3, 4, 2, 64), "full": Size(40, 200, 40, 1)}
BATCH = "batch"
"""Images of each rank in a step, in place of 64."""
WAYS: dict[str, dict[str, object]] = {
    "small_cnn": {},
    "small_cnn, captured steps": {"train.graph": "auto"},
    "small_cnn, a large batch": {BATCH: 1024},
    "small_cnn, fp32": {"train.precision": "fp32"},
    "small_cnn, fp16": {"train.precision": "fp16"},
    "small_cnn, exact": {"train.reduction": "exact"},
    "small_cnn, augmented": {"data.augment.rotation_degrees": 10, "data.augment.shift_pixels": 2},
    "small_cnn, pixels on the host": {"data.residency": "host"},
    "large_cnn, a large batch": {BATCH: 1024, "model.name": "large_cnn"},
}
SYNCHRONISING = "called a synchronizing CUDA operation"
"""What torch warns of in its debug mode."""


class Over(Exception):  # noqa: N818
    """All steps are done."""


class Watch(Observer):
    """Times some steps, looks for waits in some more, and ends the loop."""

    def __init__(self, device: torch.device, size: Size) -> None:
        self._device = device
        self._timed_from = size.warm
        self._watched_from = size.warm + size.timed
        self._end = size.warm + size.timed + size.watched
        self._watching = contextlib.ExitStack()
        self.seconds = 0.0
        self.waits = Counter[str]()

    def progress(self, step: int) -> None:
        if step == self._timed_from:
            synchronise(self._device)
            self.seconds -= time.perf_counter()
        elif step == self._watched_from:
            synchronise(self._device)
            self.seconds += time.perf_counter()
            self._watching.enter_context(counted(self.waits, self._device.type))
        elif step == self._end:
            self._watching.close()
            raise Over


@contextlib.contextmanager
def counted(waits: Counter[str], device: str) -> Iterator[None]:
    """Count the waits of the host for a GPU, by the line of code that waits; the CPU is its own host."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits.update(
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if SYNCHRONISING in str(warning.message)
    )


def measure(device: str, size: Size, ranks: int, way: dict[str, object]) -> dict[str, object]:
    """Train in one way. Every rank."""
    batch = max(1, int(str(way.get(BATCH, 64))) // size.batch_divisor) * ranks
    values = {"train.device": device, "train.global_batch": batch, "train.epochs": 1e6, "train.log_every": 10**9}
    values |= {"train.micro_batch": batch // ranks} | {key: way[key] for key in way if key != BATCH}
    settings = tuple(Setting(key=key, value=value, origin="here") for key, value in values.items())
    config = load("baseline", settings).config
    images = blank_images((size.warm + size.timed + size.watched + 1) * batch)
    with join(config) as runtime:
        watch = Watch(runtime.device, size)
        parts = build_parts(config, images, runtime)
        with contextlib.suppress(Over):
            loop.train(replace(parts, observers=Observers((watch,))), Progress())
        return {
            "batch": batch,
            "device": runtime.device_choice.reason if device == "cuda" else device,
            "precision": runtime.precision.value,
            "images_per_second": size.timed * batch / watch.seconds,
            "waits": {place: count / size.watched for place, count in watch.waits.items()},
        }


def main() -> None:
    """Measure every way that the device and the number of ranks allow."""
    device, size = sys.argv[1:]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ways = {
        name: way
        for name, way in WAYS.items()
        if (device == "cuda" or "train.precision" not in way)
        and (ranks.bit_count() == 1 or way.get("train.reduction") != "exact")
        and (ranks == 1 or "train.graph" not in way)
    }
    found = {name: measure(device, SIZES[size], ranks, way) for name, way in ways.items()}
    if rank == 0:
        nccl = torch.cuda.nccl.version() if device == "cuda" else ()
        versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "NCCL": ".".join(map(str, nccl))}
        print(json.dumps({"versions": versions, "ways": found}))


if __name__ == "__main__":
    main()
