"""The records of `bench`: processes exchange them as JSON, and the report is made of them. Without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

TURNS = 3
"""Turns of each case, so that all cases get the same good and bad moments."""
WINDOWS = 9
"""Windows of each case, in all; odd, so that the median is one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way of training."""

    global_batch: int
    micro_batch: int | None
    precision: str
    threads: int
    """Of each process."""


def write_cases(cases: Sequence[Case], file: Path) -> None:
    """Write cases as JSON."""
    file.write_text(json.dumps([asdict(case) for case in cases]), encoding="utf-8")


def read_cases(file: Path) -> list[Case]:
    """Read what `write_cases` wrote."""
    return TypeAdapter(list[Case]).validate_json(file.read_bytes())


@dataclass(slots=True, kw_only=True)
class Window:
    """Some steps of training as rank 0 saw them."""

    images: int = 0
    """Over all ranks."""
    seconds: float = 0.0
    input: float = 0.0
    """Seconds of these for making batches."""
    compute: float = 0.0
    """Seconds from a ready batch to the updated weights, including the exchange of gradients."""

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The seconds of one step; the parts add up to it."""

    seconds: float
    input: float
    compute: float
    communication: float
    """What the exchange adds, including the wait for the slowest rank: 0 if the difference is within the noise."""
    other: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The speed of one case, in training images a second over all ranks."""

    processes: int
    threads: int
    """Of each process."""
    precision: str
    global_batch: int
    micro_batch: int | None
    images_per_second: float
    """Of the median window."""
    least: float
    most: float
    windows: int
    step: StepTime
    speedup: float = 1.0
    """Against the config as it is: with one process in `scaling`, with as many processes in `alternatives`."""
    efficiency: float = 1.0
    """Against `processes` times one process alone with as many threads as each of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """The memory of rank 0, in bytes."""

    peak: int
    """Resident after some steps; images that are mapped from the store count too."""
    imports: int
    """Resident before images or a network were loaded."""
    cuda_peak: int | None
    """Allocated on the GPU at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How much of the device's arithmetic one process uses, in floating-point operations."""

    flop_per_image: float
    matrix_flop_per_second: float
    threads: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeTimes:
    """How long the exchange of gradients takes by itself."""

    collective: str
    """`all-reduce`, or `all-gather` for `exact`."""
    processes: int
    gradient_bytes: int
    """Of one step."""
    seconds_by_bytes: tuple[tuple[int, float], ...]
    """Median seconds for each size; the size of the gradient is one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """What one group of processes measured; rank 0 writes it."""

    device: str
    device_reason: str
    precision: str
    parameters: int
    speeds: tuple[Speed, ...]
    memory: PeakMemory | None = None
    arithmetic: Arithmetic | None = None
    collective: ExchangeTimes | None = None

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> GroupResult:
        """Read what `write` wrote."""
        return TypeAdapter(cls).validate_json(file.read_bytes())

    def find(self, case: Case) -> Speed | None:
        """Return the speed of a case; `None` if the images or the device did not allow it."""
        wanted = case if case.precision != "auto" else replace(case, precision=self.precision)
        fields = asdict(wanted)
        return next((speed for speed in self.speeds if all(getattr(speed, k) == v for k, v in fields.items())), None)


def divide_time(seconds: float, a_step: float, log_every: int) -> tuple[int, int]:
    """Divide the time for a case into windows.

    Args:
        seconds: Roughly what the case may take.
        a_step: Seconds of one step.
        log_every: Steps between two lines of the log.

    Returns:
        The steps of a window, a multiple of `log_every` if they are more, and the windows of each turn.
    """
    steps = max(1, round(seconds / WINDOWS / a_step))
    steps -= steps % log_every if steps > log_every else 0
    return steps, WINDOWS // TURNS if steps * a_step * WINDOWS < 2 * seconds else 1


def speed_of(
    case: Case,
    processes: int,
    windows: Sequence[Window],
    watched: Sequence[Window],
    without_exchange: Sequence[Window] = (),
) -> Speed:
    """Return the speed of a case and the parts of its median step.

    Args:
        case: The case.
        processes: The number of ranks.
        windows: An odd number of windows, for the rate.
        watched: An odd number of windows, for the parts of a step.
        without_exchange: The same training without exchange of gradients; empty for one rank.
    """
    rates = sorted(window.rate for window in windows)
    window = _median(watched)
    steps = window.images / case.global_batch
    compute = window.compute / steps
    communication = 0.0
    if without_exchange:
        alone = _median(without_exchange)
        communication = max(0.0, compute - alone.compute * case.global_batch / alone.images)
    return Speed(
        processes=processes,
        **asdict(case),
        images_per_second=rates[len(rates) // 2],
        least=rates[0],
        most=rates[-1],
        windows=len(rates),
        step=StepTime(
            seconds=window.seconds / steps,
            input=window.input / steps,
            compute=compute - communication,
            communication=communication,
            other=(window.seconds - window.input - window.compute) / steps,
        ),
    )


def _median(windows: Sequence[Window]) -> Window:
    return sorted(windows, key=lambda window: window.rate)[len(windows) // 2]
