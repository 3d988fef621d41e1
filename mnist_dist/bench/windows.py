"""Run the training loop for windows of some steps, and time their parts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mnist_dist.bench.records import Case, Window
from mnist_dist.config import Config
from mnist_dist.config.schema import Checkpoint
from mnist_dist.data import Dataset
from mnist_dist.data.batches import Batches
from mnist_dist.observe import Observer, Observers
from mnist_dist.observe.records import StepReport
from mnist_dist.run.build import build_parts
from mnist_dist.runtime import Runtime
from mnist_dist.training import loop
from mnist_dist.training.parts import Parts
from mnist_dist.training.state import Progress

FIRST_STEPS = 3
"""Untimed windows of one step: memory is allocated and kernels are chosen in them."""
ENDLESS = 1e9
"""Epochs: `max_steps` ends a window, never the end of the run."""


class Stopwatch(Observer):
    """Adds up the parts of one window's steps."""

    def __init__(self, device: torch.device, *, synchronised: bool) -> None:
        self._device = device
        self._synchronised = synchronised
        self._global_batch = 0
        self._seen = 0
        self._since = 0.0
        self.window = Window()

    def start(self, *, first: int, global_batch: int) -> None:
        """Start a new window."""
        self._seen, self._global_batch = first, global_batch
        self._since = 0.0
        self.window = Window()

    def batch_wanted(self) -> None:
        """Time the moment at which the loop asks for a micro-batch."""
        now = self._now()
        if self._since:
            self.window.compute += now - self._since
        self._since = now

    def batch_there(self) -> None:
        """Time the moment at which the loop gets its micro-batch."""
        now = self._now()
        self.window.input += now - self._since
        self._since = now

    def progress(self, step: int) -> None:
        """Time the moment at which the weights are updated."""
        self.window.compute += self._now() - self._since
        self._since = 0.0

    def step(self, report: StepReport) -> None:
        """Add the loop's own time, which waits for the device and leaves evaluation out."""
        images = (report.step - self._seen) * self._global_batch
        self._seen = report.step
        self.window.images += images
        self.window.seconds += images / report.images_per_second

    def _now(self) -> float:
        if self._synchronised:
            synchronise(self._device)
        return time.perf_counter()


class TimedBatches(Batches):
    """Batches that a stopwatch times; the loop calls only `take` here."""

    def __init__(self, batches: Batches, stopwatch: Stopwatch) -> None:
        self._batches = batches
        self._stopwatch = stopwatch

    def take(self, images: NDArray[np.int64], epochs: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """Return a batch; see `Batches`."""
        self._stopwatch.batch_wanted()
        batch = self._batches.take(images, epochs)
        self._stopwatch.batch_there()
        return batch


class WithoutExchange(Runtime):
    """The same rank, whose gradients are not combined with those of other ranks."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime._accelerator, runtime.device_choice, runtime.precision, runtime.threads)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Return a context in which a backward pass changes only this rank's gradients."""
        return super().accumulate(model, last=False)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return this rank's tensor in place of every rank's."""
        return [values] * self.ranks


class Series:
    """A training that continues from window to window."""

    def __init__(self, config: Config, dataset: Dataset, runtime: Runtime, *, synchronised: bool = False) -> None:
        """Build it. Every rank.

        Args:
            config: Of a case.
            dataset: With all training images.
            runtime: This rank's, or one `WithoutExchange`.
            synchronised: Wait for the device between the parts of a step, which makes steps slower on a GPU.
        """
        few = replace(dataset, validation=None, test=replace(dataset.reported, name="test", rows=np.arange(1)))
        self._stopwatch = Stopwatch(runtime.device, synchronised=synchronised)
        parts = build_parts(config, few, runtime)
        timed = TimedBatches(parts.batches["train"], self._stopwatch)
        self.parts: Parts = replace(
            parts, batches=parts.batches | {"train": timed}, observers=Observers((self._stopwatch,))
        )
        self._step = 0

    def run(self, steps: int) -> Window:
        """Train for some steps. Every rank, with the same number."""
        options = self.parts.config.train
        first, self._step = self._step, self._step + steps
        train = options.model_copy(update={"max_steps": self._step})  # the loop reports after its last step
        config = self.parts.config.model_copy(update={"train": train})
        self._stopwatch.start(first=first, global_batch=options.global_batch)
        loop.train(replace(self.parts, config=config), Progress(step=first))
        return self._stopwatch.window


def seconds_of_step(series: Series, runtime: Runtime, seconds: float) -> float:
    """Return roughly how long a step takes, after trying for about `seconds`; this warms up too. Every rank.

    Returns:
        The same on every rank.
    """
    _warm_up(series)
    steps = 1
    while (took := float(runtime.broadcast(series.run(steps).seconds))) < seconds:
        steps *= 2
    return took / steps


def take_turns(series: Sequence[Series], steps: int, windows: int) -> list[list[Window]]:
    """Train several series in turns, window by window, so that a busy moment hits all of them. Every rank.

    Returns:
        The windows of each series.
    """
    for one in series:
        _warm_up(one)
    taken = [[one.run(steps) for one in series] for _ in range(windows)]
    return [list(of_one) for of_one in zip(*taken, strict=True)]


def _warm_up(series: Series) -> None:
    for _ in range(FIRST_STEPS):
        series.run(1)


def config_of(config: Config, case: Case) -> Config:
    """Return the config of a case, without an end and without checkpoints.

    The learning rate is 0: a step does all its work, and a measurement of any length cannot diverge. Steps are
    taken one by one, since the parts of a step are timed.
    """
    changed = {
        "global_batch": case.global_batch,
        "micro_batch": case.micro_batch,
        "precision": case.precision,
        "threads": case.threads,
        "epochs": ENDLESS,
        "graph": "off",
    }
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=changed),
            "optimizer": config.optimizer.model_copy(update={"learning_rate": 0.0}),
            "checkpoint": Checkpoint(),
        },
    )


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
