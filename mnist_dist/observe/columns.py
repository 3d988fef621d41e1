"""The figures of an epoch: one table, which console, journal and TensorBoard read.

Another figure is one more row. Its value is a field of `EpochReport`, or computed from the report and the evaluation of
the test split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mnist_dist.observe.records import EpochReport, Evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A row of the table of figures: one column of the epoch table."""

    name: str
    """In the journal and in TensorBoard."""
    title: str = ""
    """In the terminal; empty: not shown there."""
    format: str = ".4f"
    """How the terminal formats it."""
    rank: int = 0
    """Columns of a higher rank leave a narrow terminal first; those of rank 0 always stay."""
    scalar: bool = True
    """Whether TensorBoard draws it."""
    value: Callable[[EpochReport, Evaluation], float | None] | None = None
    """Computes it; `None`: it is the report's field of that name."""


COLUMNS = (
    Column(name="epoch", title="epoch", format="d", scalar=False),
    Column(name="step", title="step", format="d", rank=5, scalar=False),
    Column(name="images", scalar=False),
    Column(name="train_loss", title="train loss"),
    Column(name="train_accuracy", title="train acc.", format=".2%", rank=3),
    Column(name="validation_loss", title="val. loss", rank=2),
    Column(name="validation_accuracy", title="val. acc.", format=".2%"),
    Column(name="test_images", scalar=False),
    Column(name="test_loss", title="test loss"),
    Column(name="test_accuracy", title="test acc.", format=".2%"),
    Column(name="images_per_second", title="images/s", format=",.0f", rank=1),
    Column(name="seconds", title="seconds", format=".1f", rank=4),
    Column(name="learning_rate", title="learn. rate", format=".3g", rank=6),
)


def figures_of(report: EpochReport, test: Evaluation) -> dict[str, float]:
    """Return the figures of an epoch by name, in the table's order; those that an epoch does not have are left out."""
    values = {
        column.name: column.value(report, test) if column.value else getattr(report, column.name) for column in COLUMNS
    }
    return {name: value for name, value in values.items() if value is not None}
