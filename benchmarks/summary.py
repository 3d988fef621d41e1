"""Summaries of measurements: medians with their spread, means with their confidence, and where they were taken."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mnist_dist.machine import allowed_cpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A few measurements of one thing."""

    median: float
    least: float
    most: float
    count: int

    def to_text(self, form: str) -> str:
        """Write the median with its range, each number in a form of `format`, such as `,.0f`."""
        return f"{self.median:{form}} ({self.least:{form}} to {self.most:{form}})"


def spread_of(values: Sequence[float]) -> Spread:
    """Find the median and the range of at least one value."""
    return Spread(median=statistics.median(values), least=min(values), most=max(values), count=len(values))


def steady_rate(rates: Sequence[float]) -> float:
    """Find the rate over all epochs but the first, which are equally long; over the first where there is no other."""
    return statistics.harmonic_mean(rates[1:] or rates)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of the population's mean, by Student's t distribution.

    Args:
        values: A sample of a normally distributed population, two values at least.
        confidence: How often such an interval holds the mean.
    """
    mean = statistics.fmean(values)
    half = student_t(confidence, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def student_t(confidence: float, freedom: int) -> float:
    """Find the t that a variable of Student's distribution stays within, either way, with that probability.

    With t = sqrt(freedom) tan(a), the density over a is proportional to cos(a)^(freedom - 1) in (0, pi/2).
    """
    edges = np.linspace(0, math.pi / 2, 100_001)
    mass = np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1)
    probability = np.concatenate([[0.0], mass.cumsum() / mass.sum()])
    return math.sqrt(freedom) * math.tan(np.interp(confidence, probability, edges))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, without a line break at its end."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def describe_machine() -> dict[str, Any]:
    """Return where the measurements were taken: processor, cores, system, and versions of what is compared."""
    packages = ("mnist-dist", "torch", "torchvision", "accelerate", "lightning")
    return {
        "processor": _processor(),
        "cores": allowed_cpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"Python": platform.python_version()} | {name: _version(name) for name in packages},
    }


def machine_text(machine: dict[str, Any], device: str = "cpu") -> str:
    """Write what `describe_machine` found of the hardware, and where it was trained if not there."""
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    return ", ".join([machine["processor"], cores, *([device] if device != "cpu" else []), machine["system"]])


def versions_text(machine: dict[str, Any]) -> str:
    """Write what `describe_machine` found of the versions."""
    return ", ".join(f"{name} {number}" for name, number in machine["versions"].items())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
