"""What a data-parallel step costs on any number of processes, from figures that were measured on a few.

docs/scaling.md explains the formulas and works an example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mnist_dist.bench.fitting import Line

Collective = Literal["all-reduce", "all-gather"]
"""What `ddp` and what `exact` exchange gradients with."""
PAYS = 0.5
"""Below this efficiency, more than half of the hardware waits."""


def rounds(collective: Collective, ranks: int) -> int:
    """Count the messages that a rank sends one after the other, on a ring (Patarasuk & Yuan, 2009)."""
    return 2 * (ranks - 1) if collective == "all-reduce" else ranks - 1


def volume(collective: Collective, ranks: int) -> float:
    """Tell how many times the size of the gradient each rank sends, on a ring."""
    return 2 * (ranks - 1) / ranks if collective == "all-reduce" else ranks - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """The exchange of gradients between ranks."""

    collective: Collective
    gradient_bytes: int
    latency_seconds: float
    """Of one message."""
    bytes_per_second: float
    """That a rank sends while it receives as many."""

    @classmethod
    def from_line(cls, line: Line, collective: Collective, *, ranks: int, gradient_bytes: int) -> Exchange:
        """Take latency and bandwidth from the times of a collective of several sizes.

        Args:
            line: Seconds by bytes of the tensor that each rank hands in.
            collective: Which.
            ranks: Between how many it was measured, two at least.
            gradient_bytes: What a step exchanges.
        """
        return cls(
            collective=collective,
            gradient_bytes=gradient_bytes,
            latency_seconds=line.fixed / rounds(collective, ranks),
            bytes_per_second=volume(collective, ranks) / max(line.each, 1e-15),  # a line may be flat
        )

    def seconds(self, ranks: int) -> float:
        """Predict the time of one exchange; 0 for one rank."""
        sent = volume(self.collective, ranks) * self.gradient_bytes
        return rounds(self.collective, ranks) * self.latency_seconds + sent / self.bytes_per_second


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """The time of a step: what a rank does by itself with its share of the batch, then the exchange."""

    alone: Line
    """Seconds by images of one rank's step without others."""
    exchange: Exchange
    overhead_seconds: float = 0.0
    """What the reduction takes besides the exchange, as soon as there is a second rank."""

    def seconds(self, global_batch: int, ranks: int) -> float:
        """Predict the time of a step; nothing is taken to overlap."""
        alone = self.alone.seconds(global_batch / ranks)
        return alone if ranks == 1 else alone + self.overhead_seconds + self.exchange.seconds(ranks)

    def images_per_second(self, global_batch: int, ranks: int) -> float:
        """Predict the rate over all ranks."""
        return global_batch / self.seconds(global_batch, ranks)

    def efficiency(self, global_batch: int, ranks: int) -> float:
        """Compare the rate with `ranks` times that of one rank with the whole batch."""
        return self.seconds(global_batch, 1) / (ranks * self.seconds(global_batch, ranks))

    def pays_up_to(self, global_batch: int, most: int) -> int:
        """Find the number of ranks, up to the most, that still has an efficiency of `PAYS`: it falls with each."""
        ranks = 1
        while ranks < most and self.efficiency(global_batch, ranks + 1) >= PAYS:
            ranks += 1
        return ranks
