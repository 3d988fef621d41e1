"""Runs the training loop for windows of some steps, and looks at the clock while it does."""

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
"""Taken one by one before anything is timed: memory is allocated and kernels are chosen in them."""
ENDLESS = 1e9
"""Epochs: the learning rate stays where a run begins, and no run ends before its window."""


class WindowOver(Exception):  # noqa: N818
    """The last step of a window is done."""


class Stopwatch(Observer):
    """Adds up the parts of one window's steps, and ends the loop after the last of them."""

    def __init__(self, device: torch.device, *, synchronised: bool) -> None:
        self._device = device
        self._synchronised = synchronised
        self._global_batch = 0
        self._last = self._seen = 0
        self._since = 0.0
        self.window = Window()

    def start(self, *, first: int, last: int, global_batch: int) -> None:
        """Begin with a new window."""
        self._seen, self._last, self._global_batch = first, last, global_batch
        self._since = 0.0
        self.window = Window()

    def batch_wanted(self) -> None:
        """Note that the loop asks for a batch: the first of a step, or a further micro-batch."""
        now = self._now()
        if self._since:
            self.window.compute += now - self._since
        self._since = now

    def batch_there(self) -> None:
        """Note that the loop gets its batch."""
        now = self._now()
        self.window.input += now - self._since
        self._since = now

    def progress(self, step: int) -> None:
        """See that the weights are updated."""
        self.window.compute += self._now() - self._since
        self._since = 0.0

    def step(self, report: StepReport) -> None:
        """Take the loop's own time, which waits for the device and leaves evaluation out."""
        images = (report.step - self._seen) * self._global_batch
        self._seen = report.step
        self.window.images += images
        self.window.seconds += images / report.images_per_second
        if report.step == self._last:
            raise WindowOver

    def _now(self) -> float:
        if self._synchronised:
            synchronise(self._device)
        return time.perf_counter()


class TimedBatches(Batches):
    """The same batches, with a stopwatch that sees them made."""

    def __init__(self, batches: Batches, stopwatch: Stopwatch) -> None:
        vars(self).update(vars(batches))
        self._stopwatch = stopwatch

    def take(self, images: NDArray[np.int64], epochs: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """Make a batch; see `Batches`."""
        self._stopwatch.batch_wanted()
        batch = super().take(images, epochs)
        self._stopwatch.batch_there()
        return batch


class WithoutExchange(Runtime):
    """The same rank, but its gradients are not combined with those of others."""

    def __init__(self, runtime: Runtime) -> None:
        vars(self).update(vars(runtime))

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Let a backward pass add to this rank's gradients, and leave it at that."""
        return super().accumulate(model, last=False)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Take this rank's tensor for everybody's."""
        return [values] * self.ranks


class Series:
    """A training that goes on from window to window."""

    def __init__(self, config: Config, dataset: Dataset, runtime: Runtime, *, synchronised: bool = False) -> None:
        """Build it. Every rank.

        Args:
            config: Of a case.
            dataset: With all the training images.
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
        log_every = options.log_every if steps % options.log_every == 0 else steps
        first = -(-self._step // log_every) * log_every  # there is a report after the last step then
        self._step = first + steps
        config = self.parts.config.model_copy(
            update={"train": options.model_copy(update={"log_every": log_every})},
        )
        self._stopwatch.start(first=first, last=self._step, global_batch=options.global_batch)
        try:
            loop.train(replace(self.parts, config=config), Progress(step=first))
        except WindowOver:
            return self._stopwatch.window
        raise AssertionError("the loop has come to an end of its own")


def seconds_of_step(series: Series, runtime: Runtime, seconds: float) -> float:
    """Find out roughly how long a step takes, in about so many seconds, which warms up too. Every rank.

    Returns:
        The same on every rank.
    """
    _warm_up(series)
    steps = 1
    while (took := float(runtime.broadcast(series.run(steps).seconds))) < seconds:
        steps *= 2
    return took / steps


def take_turns(series: Sequence[Series], steps: int, windows: int) -> list[list[Window]]:
    """Train in each of several ways, window by window, so that a busy moment hits all of them. Every rank.

    Returns:
        The windows of each way.
    """
    for one in series:
        _warm_up(one)
    taken = [[one.run(steps) for one in series] for _ in range(windows)]
    return [list(of_one) for of_one in zip(*taken, strict=True)]


def _warm_up(series: Series) -> None:
    for _ in range(FIRST_STEPS):
        series.run(1)


def config_of(config: Config, case: Case) -> Config:
    """Change a config to what a case asks for, without an end and without checkpoints, which are not training.

    The learning rate is 0: a step does all its work, and a measurement of any length cannot diverge. Steps are
    taken one by one, since the parts of a step are timed.
    """
    changed = {
        "global_batch": case.global_batch,
        "micro_batch": case.micro_batch,
        "precision": case.precision,
        "threads": case.threads,
        "epochs": ENDLESS,
        "max_steps": None,
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
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
