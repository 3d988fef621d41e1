"""What watches a run: console, TensorBoard and journal. They never change it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they need numpy, and names are shown without it
    from mnist_dist.observe.records import EpochReport, Evaluation, Event, Plan, Result, StepReport

EVENTS_SUFFIX = ".mnist-dist"
"""With what the names of the event files end that a run writes: no other file in `tensorboard/` is ever touched."""


class Observer:
    """Something that watches; each method does nothing unless overridden."""

    def plan(self, plan: Plan) -> None:
        """See what is going to be done, before the first step."""

    def progress(self, step: int) -> None:
        """See that a step is done, every step: must cost next to nothing."""

    def step(self, report: StepReport) -> None:
        """See the figures since the last such report."""

    def event(self, event: Event) -> None:
        """See that something happened in a step."""

    def epoch(self, report: EpochReport, test: Evaluation) -> None:
        """See a finished epoch, before its checkpoint is written."""

    def result(self, result: Result) -> None:
        """See how the run ended."""

    def sizes(self) -> dict[str, int]:
        """Flush, and tell the size of each file that grows, by its path in the run folder."""
        return {}

    def journal_sha256(self) -> str | None:
        """Return the hash of the journal up to its size; None from all but the journal."""
        return None

    def close(self) -> None:
        """Write what is left and let go of the terminal and of files; safe to call twice."""


class Observers(Observer):
    """Several observers as one; on all ranks but the first there are none."""

    def __init__(self, observers: tuple[Observer, ...] = ()) -> None:
        self._observers = observers

    def plan(self, plan: Plan) -> None:  # noqa: D102
        for observer in self._observers:
            observer.plan(plan)

    def progress(self, step: int) -> None:  # noqa: D102
        for observer in self._observers:
            observer.progress(step)

    def step(self, report: StepReport) -> None:  # noqa: D102
        for observer in self._observers:
            observer.step(report)

    def event(self, event: Event) -> None:  # noqa: D102
        for observer in self._observers:
            observer.event(event)

    def epoch(self, report: EpochReport, test: Evaluation) -> None:  # noqa: D102
        for observer in self._observers:
            observer.epoch(report, test)

    def result(self, result: Result) -> None:  # noqa: D102
        for observer in self._observers:
            observer.result(result)

    def sizes(self) -> dict[str, int]:  # noqa: D102
        return {path: size for observer in self._observers for path, size in observer.sizes().items()}

    def journal_sha256(self) -> str | None:  # noqa: D102
        return next(filter(None, (observer.journal_sha256() for observer in self._observers)), None)

    def close(self) -> None:  # noqa: D102
        with contextlib.ExitStack() as stack:  # where one fails, the others close all the same
            for observer in self._observers:
                stack.callback(observer.close)
