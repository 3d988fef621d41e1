"""Is this process a worker that a launcher started, or a user's command that starts its own?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.errors import ConfigError

EXPECTED_RANKS = "MNIST_DIST_WORLD_SIZE"
"""Environment variable with which a recipe says how many processes there must be."""

GROUP_FOLDER = "MNIST_DIST_GROUP_FOLDER"
"""Environment variable with the private folder in which our own launcher and its ranks meet."""

LAUNCHER = "MNIST_DIST_LAUNCHER"
"""Environment variable with the process id of our own launcher."""

RANK_LOG = "MNIST_DIST_RANK_LOG"
"""Environment variable with which our own launcher tells a rank where its tracebacks go."""

TIMEOUT = "MNIST_DIST_TIMEOUT"
"""Environment variable with the seconds for which a rank waits for the others in a collective."""


@dataclass(frozen=True, slots=True)
class GroupFolder:
    """The files through which our own launcher and its ranks speak with each other."""

    path: Path

    @property
    def rendezvous(self) -> Path:
        """Where the ranks find each other, without a port that is open to the network."""
        return self.path / "rendezvous"

    @property
    def heartbeats(self) -> Path:
        """The ranks' signs of life."""
        return self.path / "heartbeats"

    @property
    def word(self) -> Path:
        """What the launcher does for all ranks while they start: absent if nothing, empty until it is done."""
        return self.path / "word.json"

    def failure(self, rank: int) -> Path:
        """What a rank says about its own failure."""
        return self.path / f"failure-{rank}.json"


def group_folder_of(environment: Mapping[str, str]) -> GroupFolder | None:
    """Find the folder of the group; None where another launcher started this process, or none."""
    path = environment.get(GROUP_FOLDER)
    return GroupFolder(Path(path)) if path else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """This process's place in its group."""

    rank: int
    ranks: int


def worker_of(environment: Mapping[str, str]) -> Worker | None:
    """Tell a worker from a user's command.

    torchrun, `accelerate launch`, Slurm recipes and our own launcher set RANK, LOCAL_RANK and WORLD_SIZE. A
    process that `accelerate launch` started alone has no rank, but ACCELERATE_DYNAMO_MODE.

    Args:
        environment: The process's environment variables.

    Returns:
        None for a user's command, which is to start its own processes.

    Raises:
        ConfigError: The group has another size than the recipe says, or a rank is no number.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if all(name in environment for name in names):
        try:
            rank, _, ranks = (int(environment[name]) for name in names)
        except ValueError:
            values = " ".join(f"{name}={environment[name]}" for name in names)
            raise ConfigError(f"The environment has {values}, which should be numbers: unset them.") from None
        worker = Worker(rank=rank, ranks=ranks)
    elif "ACCELERATE_DYNAMO_MODE" in environment:
        worker = Worker(rank=0, ranks=1)
    else:
        return None
    expected = environment.get(EXPECTED_RANKS, str(worker.ranks))
    if expected != str(worker.ranks):
        raise ConfigError(
            f"{EXPECTED_RANKS} is {expected}, but this group has {worker.ranks} processes: the launcher did not "
            f"start what was asked for. (`accelerate launch --cpu` starts one process; README.md has lines that work.)"
        )
    return worker
