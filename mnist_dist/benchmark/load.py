"""How much of the machine others had while something was measured; without torch."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

PROCESSOR_TIMES = Path("/proc/stat")


@dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """CPUs, on average over a time, that were not to be had."""

    busy: float
    """Used by processes that are not ours."""
    stolen: float
    """Given to other virtual machines by the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Sums since the machine or the process started, in CPU seconds."""

    clock: float
    machine: float
    stolen: float
    ours: float
    """Of this process and of children that have ended."""

    @classmethod
    def now(cls, file: Path = PROCESSOR_TIMES) -> Moment | None:
        """Look at the sums; None where the system does not show them."""
        try:
            words = file.read_text(encoding="ascii").split("\n", 1)[0].split()
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, stolen = (int(word) / ticks for word in words[1:9])
        return cls(
            clock=time.monotonic(),
            machine=user + nice + system + irq + softirq,
            stolen=stolen,
            ours=sum(os.times()[:4]),
        )


def others_between(before: Moment, after: Moment) -> Others:
    """Work out what others had between two moments."""
    seconds = max(after.clock - before.clock, 1e-9)
    busy = (after.machine - before.machine) - (after.ours - before.ours)
    return Others(busy=max(0.0, busy / seconds), stolen=max(0.0, (after.stolen - before.stolen) / seconds))
