"""Who watches a run: one line for each watcher. Another watcher is an `Observer` and one line in `build`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mnist_dist.config import Resolved
from mnist_dist.data import Dataset
from mnist_dist.observe import Observers
from mnist_dist.observe.console import TrainingConsole
from mnist_dist.observe.journal import Journal
from mnist_dist.observe.tensorboard import TensorBoard


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What watchers know of a run before it begins."""

    console: Console
    journal: Path
    """The file for one JSON object a line."""
    tensorboard: Path
    """The folder for event files."""
    resolved: Resolved
    dataset: Dataset
    first_step: int
    """Steps done by earlier processes of a resumed run."""


def build(run: Watched) -> Observers:
    """Build all watchers of a run. Rank 0 alone.

    Raises:
        StorageError, OSError: A file of theirs cannot be opened.
    """
    return Observers(
        (
            TrainingConsole(run.console),
            Journal(run.journal),
            TensorBoard(
                run.tensorboard,
                config=run.resolved.config,
                config_yaml=run.resolved.to_yaml(),
                dataset=run.dataset,
                first_step=run.first_step,
            ),
        )
    )
