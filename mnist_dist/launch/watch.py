"""Detect that a group hangs, and which rank began it, from the ranks' heartbeats."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

from mnist_dist.group.heartbeat import Pulses
from mnist_dist.launch.processes import Rank

STACK_SECONDS = 1.0
"""How long the ranks of a group that hangs have to write down where they are."""
FREEZE_SECONDS = 5.0
"""If this process itself was not run for so long, then the ranks were not either."""


class Watch:
    """Tells which ranks have fallen silent; one that never beats, of another program, is left alone.

    Args:
        pulses: The ranks' signs of life.
        start_seconds: How long one may be silent before its first step.
        hang_seconds: How long after it.
    """

    def __init__(self, pulses: Pulses, *, start_seconds: float, hang_seconds: float) -> None:
        self._pulses = pulses
        self._start_seconds = start_seconds
        self._hang_seconds = hang_seconds
        self._looked = time.monotonic()
        self._seen = [(pulse, self._looked) for pulse in pulses.read()]

    def silent(self, running: list[int], suspended_seconds: float = 0.0) -> list[int] | None:
        """Return the running ranks for which the others seem to wait, once one has been silent for too long.

        Ranks wait for each other, so all fall silent when one does: it is the one that has come least far.

        Args:
            running: The ranks that have not ended.
            suspended_seconds: How long all have been suspended so far, which does not count.
        """
        now = time.monotonic() - suspended_seconds
        frozen = now - self._looked > FREEZE_SECONDS
        self._looked = now
        for rank, pulse in enumerate(self._pulses.read()):
            if frozen or pulse != self._seen[rank][0]:
                self._seen[rank] = (pulse, now)
        for rank in running:
            pulse, since = self._seen[rank]
            patience = self._start_seconds if pulse.step < 0 else self._hang_seconds
            if pulse.beats and now - since > patience:
                least = min(self._seen[rank][0].place for rank in running)
                return [rank for rank in running if self._seen[rank][0].place == least]
        return None


def stopped(children: list[Rank]) -> list[int]:
    """Find the ranks that someone has stopped with SIGSTOP, as far as the system tells."""
    found = []
    for rank, child in enumerate(children):
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{child.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
            if state == "T":
                found.append(rank)
    return found


def kill_with_stacks(children: list[Rank]) -> None:
    """Ask the ranks that still answer for their stacks, in their logs, and kill all."""
    if hasattr(signal, "SIGQUIT"):
        for child in children:
            child.send_signal(signal.SIGQUIT)
        time.sleep(STACK_SECONDS)
    for child in children:
        child.kill()
