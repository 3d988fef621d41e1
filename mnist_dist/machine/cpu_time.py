"""Read how much CPU time the machine, this process and other programs use; without torch."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

PROCESSOR_TIMES = Path("/proc/stat")
CPUS = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset(range(os.cpu_count() or 1))
"""Those that this process may run on, as it started: OpenMP may bind its main thread to fewer of them later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """CPUs, on average over a time, that this program could not have."""

    busy: float
    """Used by processes of other programs."""
    stolen: float
    """Given to other virtual machines by the host."""

    @property
    def cpus(self) -> float:
        """All of them together."""
        return self.busy + self.stolen


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Sums since the machine or the process started, in CPU seconds."""

    clock: float
    cpus: float
    """Used by all programs on `CPUS`, or on all CPUs where a container numbers them in another way."""
    stolen: float
    ours: float
    """Of this process and of children that have ended."""

    def __sub__(self, earlier: Moment) -> Moment:
        return Moment(**{name: getattr(self, name) - getattr(earlier, name) for name in self.__slots__})

    def __add__(self, span: Moment) -> Moment:
        return Moment(**{name: getattr(self, name) + getattr(span, name) for name in self.__slots__})

    @classmethod
    def now(cls, file: Path = PROCESSOR_TIMES) -> Moment | None:
        """Read the sums; `None` where the system does not show them (only Linux does)."""
        try:
            rows = dict(line.partition(" ")[::2] for line in file.read_text(encoding="ascii").splitlines())
            shown = [rows[name] for name in (f"cpu{number}" for number in CPUS) if name in rows] or [rows["cpu"]]
            columns = zip(*(map(int, row.split()[:8]) for row in shown), strict=True)
            user, nice, system, _, _, irq, softirq, stolen = map(sum, columns)
        except (OSError, KeyError, ValueError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        return cls(
            clock=time.monotonic(),
            cpus=(user + nice + system + irq + softirq) / ticks,
            stolen=stolen / ticks,
            ours=own_seconds(),
        )


NOTHING = Moment(clock=0.0, cpus=0.0, stolen=0.0, ours=0.0)
"""A span of no time, to which others are added."""


def own_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def others_between(before: Moment, after: Moment, *, processes: int = 1, helpers: float = 0.0) -> Others:
    """Return what other programs had between two moments.

    Args:
        before: The earlier moment.
        after: The later one.
        processes: How many processes of this program work on these CPUs, each as much as this one.
        helpers: CPU seconds that others have used on behalf of them all.
    """
    seconds = max(after.clock - before.clock, 1e-9)
    busy = (after.cpus - before.cpus) - processes * (after.ours - before.ours) - helpers
    return Others(busy=max(0.0, busy / seconds), stolen=max(0.0, (after.stolen - before.stolen) / seconds))
