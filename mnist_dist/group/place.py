"""Is this process a worker that a launcher started, or a user's command that starts its own?"""

from __future__ import annotations

import math
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

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Environment variables with which every launcher tells a worker its place."""

TIMEOUT_SECONDS = 1800.0
MOST_SECONDS = 1e8
"""Three years: torch counts a timeout in nanoseconds, and more would overflow."""

STARTED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Set by mpirun. PMI_SIZE says less: an interactive shell under srun has it too."""


@dataclass(frozen=True, slots=True)
class GroupFolder:
    """The files through which our own launcher and its ranks communicate."""

    path: Path

    @property
    def rendezvous(self) -> Path:
        """Where the ranks meet, without an open network port."""
        return self.path / "rendezvous"

    @property
    def heartbeats(self) -> Path:
        """The ranks' signs of life."""
        return self.path / "heartbeats"

    @property
    def approval(self) -> Path:
        """Which store the launcher approves: absent if it looks for none, empty until it has."""
        return self.path / "approval.json"

    def complaint(self, rank: int) -> Path:
        """Why a rank failed."""
        return self.path / f"complaint-{rank}.json"


def group_folder_of(environment: Mapping[str, str]) -> GroupFolder | None:
    """Find the folder of the group; None where another launcher started this process, or none."""
    path = environment.get(GROUP_FOLDER)
    return GroupFolder(Path(path)) if path else None


def timeout_of(environment: Mapping[str, str]) -> float:
    """Read for how many seconds a rank waits for the others.

    Raises:
        ConfigError: It is no number, or none that torch could wait.
    """
    value = environment.get(TIMEOUT, str(TIMEOUT_SECONDS))
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= MOST_SECONDS:
        raise ConfigError(f"{TIMEOUT} is {value!r}: give the seconds a rank waits for the others, e.g. 1800.")
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """This process's place in its group."""

    rank: int
    ranks: int
    local_rank: int = 0
    """Its number on this machine."""
    local_ranks: int = 1
    """Processes on this machine, as far as the launcher says."""


def worker_of(environment: Mapping[str, str]) -> Worker | None:
    """Return this process's place if a launcher started it as a worker.

    torchrun, `accelerate launch`, Slurm recipes and our own launcher set RANK, LOCAL_RANK and WORLD_SIZE. A
    process that `accelerate launch` started alone has no rank, but ACCELERATE_DYNAMO_MODE.

    Args:
        environment: The process's environment variables.

    Returns:
        None for a user's command, which is to start its own processes.

    Raises:
        ConfigError: The group has another size than the recipe says, a place is out of range or no number, the
            address of the first rank is missing, or variables of a launcher are there without its others.
    """
    timeout_of(environment)
    if all(name in environment for name in PLACE):
        worker = _place_of(environment)
        if worker.ranks > 1 and group_folder_of(environment) is None:
            _check_address(environment)
    elif "ACCELERATE_DYNAMO_MODE" in environment:
        worker = Worker(rank=0, ranks=1)
    else:
        _refuse_remains(environment)
        return None
    folder = group_folder_of(environment)
    if folder is not None and not folder.heartbeats.is_file():
        raise ConfigError(f"{GROUP_FOLDER} names {folder.path}, which no launcher uses any longer: unset it.")
    launcher = environment.get(LAUNCHER)
    if launcher is not None and not _is_number(launcher):
        raise ConfigError(f"{LAUNCHER} is {launcher!r}, which should be the number of a process: unset it.")
    expected = environment.get(EXPECTED_RANKS, str(worker.ranks))
    if expected != str(worker.ranks):
        raise ConfigError(
            f"{EXPECTED_RANKS} is {expected}, but this group has {worker.ranks} processes: the launcher did not "
            f"start what was asked for. (`accelerate launch --cpu` starts one process; README.md has lines that work.)"
        )
    return worker


def _place_of(environment: Mapping[str, str]) -> Worker:
    """Read this process's place, and make sure that there is such a place."""
    names = (*PLACE, *(["LOCAL_WORLD_SIZE"] if "LOCAL_WORLD_SIZE" in environment else []))
    values = " ".join(f"{name}={environment[name]}" for name in names)
    if not all(_is_number(environment[name]) for name in names):
        raise ConfigError(f"The environment has {values}, which should be numbers from 0 on: unset them.")
    rank, local_rank, ranks = (int(environment[name]) for name in PLACE)
    local_ranks = int(environment.get("LOCAL_WORLD_SIZE", min(local_rank + 1, ranks)))
    if not (rank < ranks and local_rank < local_ranks <= ranks):
        raise ConfigError(
            f"The environment has {values}, and there is no such place: RANK counts from 0 to WORLD_SIZE - 1, and "
            f"LOCAL_RANK in the same way on each machine. Unset them, or start all processes with a launcher."
        )
    return Worker(rank=rank, ranks=ranks, local_rank=local_rank, local_ranks=local_ranks)


def _check_address(environment: Mapping[str, str]) -> None:
    """Check that the ranks have an address at which they can meet."""
    host, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if not host.strip() or not _is_number(port) or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            f"This process is one of {environment['WORLD_SIZE']} (WORLD_SIZE), which meet at MASTER_ADDR and "
            f"MASTER_PORT, and these are {host!r} and {port!r}: set them to the host of rank 0 and a port from 1 to "
            f"65535, or unset {', '.join(PLACE)}."
        )


def _refuse_remains(environment: Mapping[str, str]) -> None:
    """Raise an error if variables of a launcher are left in the environment of a user's command."""
    ours = [name for name in (GROUP_FOLDER, LAUNCHER, RANK_LOG, EXPECTED_RANKS) if name in environment]
    if ours:
        missing = [name for name in PLACE if name not in environment]
        raise ConfigError(
            f"The environment has {ours[0]}={environment[ours[0]]}, which a launcher sets, without "
            f"{', '.join(missing)}: `unset {' '.join(ours)}`, or start this with a launcher."
        )
    for name in STARTED_BY_MPI:
        if _is_number(environment.get(name, "")) and int(environment[name]) > 1:
            raise ConfigError(
                f"{name} is {environment[name]}: mpirun started this process as one of several, and each would begin a "
                f"run of its own. Use `--processes {environment[name]}` without mpirun, or unset {name}."
            )


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit()
