"""Predict the rates of more processes from what `mnist-dist bench --json` measured. docs/scaling.md explains the model.

mnist-dist bench --config baseline --json | python benchmarks/cost_model.py --processes 2 4 8
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MOST = 64
"""Processes of the last prediction by default."""
PAYS = 0.5
"""Below this efficiency, more than half of the hardware waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`seconds = fixed + each * size`, neither of them negative."""

    fixed: float
    each: float
    """Seconds for each image or byte."""
    largest_error: float
    """The largest relative distance between the line and a measured time."""


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Fit a line to pairs of size and seconds by least squares of the relative errors.

    Sizes span orders of magnitude: with absolute errors only the largest would count.
    """
    sizes, seconds = np.array(points, dtype=float).T
    each, fixed = np.polyfit(sizes, seconds, 1, w=1 / seconds)
    if each < 0:
        each, fixed = 0.0, np.average(seconds, weights=seconds**-2)
    elif fixed < 0:
        each, fixed = np.average(seconds / sizes, weights=(sizes / seconds) ** 2), 0.0
    errors = np.abs(fixed + each * sizes - seconds) / seconds
    return Line(fixed=float(fixed), each=float(each), largest_error=float(errors.max()))


def messages(collective: str, ranks: int) -> int:
    """Return the messages that a rank sends one after the other on a ring (Patarasuk & Yuan, 2009)."""
    return 2 * (ranks - 1) if collective == "all-reduce" else ranks - 1


def volume(collective: str, ranks: int) -> float:
    """Return what each rank sends on a ring, in sizes of the gradient."""
    return 2 * (ranks - 1) / ranks if collective == "all-reduce" else ranks - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The time of a step: one rank's share of the batch, the overhead and the exchange. Nothing overlaps."""

    global_batch: int
    alone: Line
    """Seconds by images of one rank's step."""
    collective: str
    gradient_bytes: int
    latency: float
    """Seconds of one message."""
    bandwidth: float
    """Bytes a second that a rank sends while it receives as many."""
    overhead: float
    """Seconds of communication beyond the exchange, with two ranks or more."""

    @classmethod
    def of(cls, report: dict[str, Any]) -> CostModel:
        """Build the model from what `bench --json` prints.

        Raises:
            SystemExit: The report has only one process, or too few sizes of batch.
        """
        found, parts = report["collective"], report["parts_of_batch"]
        if found is None or len(parts) < 2:
            sys.exit("error: the report must have two processes (bench --processes 2) and two sizes of batch.")
        collective, ranks = found["collective"], found["processes"]
        line = fit_line(found["seconds_by_bytes"])
        latency = line.fixed / messages(collective, ranks)
        bandwidth = volume(collective, ranks) / max(line.each, 1e-15)  # a line may be flat
        model = cls(
            global_batch=report["global_batch"],
            alone=fit_line([(row["global_batch"], row["global_batch"] / row["images_per_second"]) for row in parts]),
            collective=collective,
            gradient_bytes=found["gradient_bytes"],
            latency=latency,
            bandwidth=bandwidth,
            overhead=0.0,
        )
        step = next(row["step"] for row in report["scaling"] if row["processes"] == ranks)
        overhead = max(0.0, step["communication"] - model.exchange(ranks))
        return replace(model, overhead=overhead)

    def exchange(self, ranks: int) -> float:
        """Return the seconds of one exchange; 0 for one rank."""
        sent = volume(self.collective, ranks) * self.gradient_bytes
        return messages(self.collective, ranks) * self.latency + sent / self.bandwidth

    def seconds(self, ranks: int) -> float:
        """Return the seconds of a step."""
        alone = self.alone.fixed + self.alone.each * self.global_batch / ranks
        return alone if ranks == 1 else alone + self.overhead + self.exchange(ranks)

    def efficiency(self, ranks: int) -> float:
        """Return the rate over `ranks` times that of one rank with the whole batch."""
        return self.seconds(1) / (ranks * self.seconds(ranks))

    def pays_up_to(self, most: int) -> int:
        """Return the most ranks, up to `most`, with an efficiency of `PAYS`: efficiency falls with each rank."""
        ranks = 1
        while ranks < most and self.efficiency(ranks + 1) >= PAYS:
            ranks += 1
        return ranks


def main() -> None:
    """Read a report from a file or standard input, and print the model and its predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=argparse.FileType(), nargs="?", default=sys.stdin, help="of bench --json")
    parser.add_argument("--processes", type=int, nargs="+", help=f"default: powers of two up to {MOST}")
    options = parser.parse_args()
    report = json.load(options.report)
    model = CostModel.of(report)
    batch = model.global_batch
    counts = options.processes or [1 << power for power in range(1, MOST.bit_length()) if batch % (1 << power) == 0]
    if min(counts, default=1) < 1:
        parser.error("--processes must be 1 or more")
    print(
        f"One process: {1000 * model.alone.fixed:.3f} ms a step and {1000 * model.alone.each:.5f} ms an image "
        f"(a fit within {model.alone.largest_error:.0%})\n"
        f"Exchange: {1000 * model.latency:.4f} ms a message, {model.bandwidth / 1e9:.3f} GB/s, "
        f"{model.gradient_bytes:,} bytes\n"
        f"Overhead: {1000 * model.overhead:.3f} ms a step\n\n"
        f"{'processes':>9} {'images/s':>10} {'efficiency':>10} {'measured':>10}"
    )
    measured = {row["processes"]: f"{row['images_per_second']:,.0f}" for row in report["scaling"]}
    for ranks in counts:
        rate = batch / model.seconds(ranks)
        print(f"{ranks:>9} {rate:>10,.0f} {model.efficiency(ranks):>10.0%} {measured.get(ranks, ''):>10}".rstrip())
    print(f"\nThe most processes with an efficiency of a half or more: {model.pays_up_to(max(counts, default=1))}.")


if __name__ == "__main__":
    main()
