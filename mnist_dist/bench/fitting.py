"""A straight line through a few measured times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`seconds = fixed + each * size`, neither of them negative."""

    fixed: float
    """Seconds that do not depend on the size."""
    each: float
    """Seconds for each unit of size: for each image, for each byte."""
    largest_error: float
    """The largest relative distance between the line and a measured time: 0.1 is ten per cent."""

    def seconds(self, size: float) -> float:
        """Read off the time for a size."""
        return self.fixed + self.each * size


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """Fit a line to times by least squares of the relative errors.

    Sizes span orders of magnitude: with absolute errors the largest alone would decide, and the fixed part would be
    noise.

    Args:
        points: Pairs of size and seconds (above 0), with two different sizes at least.
    """
    assert len({size for size, _ in points}) > 1, points
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_size = sum(weight * size for weight, (size, _) in zip(weights, points, strict=True)) / total
    mean_seconds = sum(weight * seconds for weight, (_, seconds) in zip(weights, points, strict=True)) / total
    pairs = [(weight, size, seconds) for weight, (size, seconds) in zip(weights, points, strict=True)]
    spread = sum(weight * (size - mean_size) ** 2 for weight, size, _ in pairs)
    each = sum(weight * (size - mean_size) * (seconds - mean_seconds) for weight, size, seconds in pairs) / spread
    fixed = mean_seconds - each * mean_size
    if each < 0:
        each, fixed = 0.0, mean_seconds
    elif fixed < 0:
        fixed = 0.0
        each = sum(w * size * seconds for w, size, seconds in pairs) / sum(w * size**2 for w, size, _ in pairs)
    largest_error = max(abs(fixed + each * size - seconds) / seconds for size, seconds in points)
    return Line(fixed=fixed, each=each, largest_error=largest_error)
