"""How far a run has come: all that a checkpoint must say besides weights and optimizer state."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from mnist_dist.observe.records import EpochReport, StepReport

Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums and counts over some steps, added step by step; divided only when they are read."""

    images: Count = 0
    loss_sum: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Cross-entropy in nats."""
    correct: Amount = 0.0
    seconds: Amount = 0.0
    """Wall time of training, input and logging included, evaluation and checkpoints not."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.loss_sum / self.images

    @property
    def accuracy(self) -> float:
        """Share classified correctly while training, in [0, 1]."""
        return self.correct / self.images

    @property
    def images_per_second(self) -> float:
        """Training images over all ranks, by the wall time of training."""
        return self.images / self.seconds

    def add_step(self, *, images: int, loss_sum: float, correct: float) -> None:
        """Add one step. The order of steps decides on the bits of the sums."""
        self.images += images
        self.loss_sum += loss_sum
        self.correct += correct


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands, between two steps."""

    step: int = 0
    """Steps done."""
    epoch: Totals = field(default_factory=Totals)
    """Of the epoch that is going on, or that is over but whose row is still missing."""
    window: Totals = field(default_factory=Totals)
    """Since the last step report."""
    earlier_seconds: float = 0.0
    """Wall time of the run before this process took it up."""
    epoch_seconds: float = 0.0
    """Wall time of the epoch before this process took it up."""
    last: EpochReport | None = None
    """The newest epoch row."""
    best: dict[str, float] | None = None
    """`epoch`, `step` and `validation_accuracy` of the best epoch."""
    threads: int | None = None
    """CPU threads of each rank, where the run has chosen them."""
    ranks: int | None = None
    """Ranks for which it has chosen them."""
    started: float = field(default_factory=time.perf_counter)
    epoch_started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall time of the whole run so far."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def add_steps(self, rows: list[list[float]], *, images_per_step: int, seconds: float) -> None:
        """Add the loss sum and number correct of some steps, and the time that they took together."""
        for totals in (self.epoch, self.window):
            for loss_sum, correct in rows:
                totals.add_step(images=images_per_step, loss_sum=loss_sum, correct=correct)
            totals.seconds += seconds

    def report_window(self, *, epoch: int, learning_rate: float) -> StepReport:
        """Report on the steps since the last such report, and begin with the next ones."""
        window, self.window = self.window, Totals()
        return StepReport(
            step=self.step,
            epoch=epoch,
            loss=window.loss,
            accuracy=window.accuracy,
            learning_rate=learning_rate,
            images_per_second=window.images_per_second,
        )

    def finish_epoch(self, report: EpochReport) -> None:
        """Record an epoch's row and start the next epoch."""
        self.last = report
        accuracy = report.validation_accuracy
        if accuracy is not None and (self.best is None or accuracy > self.best["validation_accuracy"]):
            self.best = {"epoch": report.epoch, "step": report.step, "validation_accuracy": accuracy}
        self.epoch, self.window = Totals(), Totals()
        self.epoch_seconds, self.epoch_started = 0.0, time.perf_counter()

    def seconds_of_epoch(self) -> float:
        """Wall time of the epoch so far, evaluation and checkpoints included."""
        return self.epoch_seconds + time.perf_counter() - self.epoch_started

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {
            "step": self.step,
            "epoch": asdict(self.epoch),
            "window": asdict(self.window),
            "seconds": self.seconds,
            "epoch_seconds": self.seconds_of_epoch(),
            "last": asdict(self.last) if self.last else None,
            "best": self.best,
            "threads": self.threads,
            "ranks": self.ranks,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Progress:
        """Read what `to_json` wrote, in this version or another: figures that are missing in an epoch's row are absent.

        Raises:
            ValueError: A value has another type, or is negative where it counts something.
        """
        last = record.get("last")
        if isinstance(last, dict):
            record = {**record, "last": {figure.name: last.get(figure.name) for figure in fields(EpochReport)}}
        saved = TypeAdapter(_Saved).validate_python(record)
        return cls(
            step=saved.step,
            epoch=saved.epoch,
            window=saved.window,
            earlier_seconds=saved.seconds,
            epoch_seconds=saved.epoch_seconds,
            last=saved.last,
            best=asdict(saved.best) if saved.best else None,
            threads=saved.threads,
            ranks=saved.ranks,
        )


@dataclass(slots=True, kw_only=True)
class _Best:
    epoch: Count
    step: Count
    validation_accuracy: Amount


@dataclass(slots=True, kw_only=True)
class _Saved:
    """What `Progress.to_json` writes."""

    step: Count
    epoch: Totals
    window: Totals
    seconds: Amount
    epoch_seconds: Amount
    last: EpochReport | None
    best: _Best | None
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    ranks: Annotated[int, Field(ge=1)] | None = None


class Clock:
    """Times training between two looks at the device, and the minutes since the last checkpoint."""

    def __init__(self, every_minutes: float | None) -> None:
        self._save_seconds = math.inf if every_minutes is None else 60 * every_minutes
        self.restart()

    def restart(self) -> None:
        """Restart after a checkpoint, whose time does not count as training."""
        self._lap = self._saved = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap or restart."""
        former, self._lap = self._lap, time.perf_counter()
        return self._lap - former

    def save_is_due(self) -> bool:
        """Return whether it is time for the next checkpoint."""
        return time.perf_counter() - self._saved > self._save_seconds
