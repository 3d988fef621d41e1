"""What is to be measured, and what was: plain records that travel between processes as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mnist_dist.bench.cost import Collective

TURNS = 3
"""How often each case has its turn: what is compared shall have had the same good and bad moments."""
WINDOWS = 9
"""Of each case, in all; odd, so that the median is one of them."""


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
    """Read what `write_cases` has written."""
    return [Case(**values) for values in json.loads(file.read_text(encoding="utf-8"))]


@dataclass(slots=True, kw_only=True)
class Window:
    """Some steps of training as rank 0 saw them."""

    images: int = 0
    """Over all ranks."""
    seconds: float = 0.0
    input: float = 0.0
    """Seconds of these for making batches."""
    compute: float = 0.0
    """Seconds from a batch that is there to the updated weights, exchange of gradients included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Training images a second over all ranks: the median of some windows, the slowest and the fastest."""

    images_per_second: float
    least: float
    most: float
    windows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The seconds of one step, by what they went to."""

    seconds: float
    input: float
    compute: float
    communication: float
    other: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one case."""

    case: Case
    rate: Rate
    step: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of rank 0, in bytes."""

    peak: int
    """Resident, until the first case was measured; images that are mapped from the store count too."""
    imports: int
    """Of these, before there were images or a network."""
    cuda_peak: int | None
    """Allocated on the GPU at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """What the device can do and what an image needs, in floating-point operations."""

    matrix_flop_per_second: float
    flop_per_image: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one group of processes found out; rank 0 writes it."""

    device: str
    device_reason: str
    precision: str
    parameters: int
    gradient_bytes: int
    measured: tuple[Measured, ...]
    memory: Memory | None = None
    arithmetic: Arithmetic | None = None
    collective: Collective = "all-reduce"
    exchanges: tuple[tuple[int, float], ...] = ()
    """Pairs of bytes and median seconds of the collective."""

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Record:
        """Read what `write` has written."""
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        values["measured"] = tuple(
            Measured(case=Case(**one["case"]), rate=Rate(**one["rate"]), step=Split(**one["step"]))
            for one in values["measured"]
        )
        values["memory"] = Memory(**values["memory"]) if values["memory"] else None
        values["arithmetic"] = Arithmetic(**values["arithmetic"]) if values["arithmetic"] else None
        values["exchanges"] = tuple((size, seconds) for size, seconds in values["exchanges"])
        return cls(**values)

    def find(self, case: Case) -> Measured | None:
        """Look a case up; None where the images or the device did not allow it."""
        wanted = case if case.precision != "auto" else replace(case, precision=self.precision)
        return next((one for one in self.measured if one.case == wanted), None)


def divide(seconds: float, a_step: float, log_every: int) -> tuple[int, int]:
    """Divide the time for a case into windows.

    Args:
        seconds: That it may take, more or less.
        a_step: Seconds of one step.
        log_every: Steps between two lines of the log.

    Returns:
        Steps of a window, a multiple of `log_every` where they are more, and windows of each of the `TURNS`.
    """
    steps = max(1, round(seconds / WINDOWS / a_step))
    steps -= steps % log_every if steps > log_every else 0
    return steps, WINDOWS // TURNS if steps * a_step * WINDOWS < 2 * seconds else 1


def rate_of(windows: Sequence[Window]) -> Rate:
    """Sum up windows of the same training."""
    rates = sorted(window.images / window.seconds for window in windows)
    return Rate(
        images_per_second=rates[len(rates) // 2], least=rates[0], most=rates[-1], windows=len(rates)
    )  # their number is odd, so the median is one of them


def split_of(windows: Sequence[Window], global_batch: int, without_exchange: Sequence[Window] = ()) -> Split:
    """Divide the time of a step, that of the window of median speed, so that the parts add up to it.

    Args:
        windows: Of the training.
        global_batch: Images in a step.
        without_exchange: Of the same training with every rank's gradients left where they are; none for one rank.

    Returns:
        Seconds. `communication` is what the exchange adds, waiting for the slowest rank included: 0 where the
        difference is smaller than the noise.
    """
    window = _median(windows)
    steps = window.images / global_batch
    compute = window.compute / steps
    communication = 0.0
    if without_exchange:
        alone = _median(without_exchange)
        communication = max(0.0, compute - alone.compute * global_batch / alone.images)
    return Split(
        seconds=window.seconds / steps,
        input=window.input / steps,
        compute=compute - communication,
        communication=communication,
        other=(window.seconds - window.input - window.compute) / steps,
    )


def _median(windows: Sequence[Window]) -> Window:
    return sorted(windows, key=lambda window: window.images / window.seconds)[len(windows) // 2]
