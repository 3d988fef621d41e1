"""From a user's command to the group of processes that does its work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from mnist_dist.errors import ConfigError
from mnist_dist.group import foreign
from mnist_dist.group.place import Worker, worker_of
from mnist_dist.launch.group import Group
from mnist_dist.machine import visible_gpus

DECODING_SECONDS = 86400.0


def this_worker(processes: int | None) -> Worker | None:
    """Return this process's place if it is a worker.

    Args:
        processes: What `--processes` says.

    Raises:
        ConfigError: It is a worker of a group of another size, or a variable asks for another way of training.
    """
    foreign.refuse(os.environ)
    worker = worker_of(os.environ)
    if worker is not None and processes not in (None, worker.ranks):
        raise ConfigError(
            f"--processes is {processes}, but this process was started as one of {worker.ranks}: "
            f"leave the number to the launcher that started it."
        )
    return worker


def choose_ranks(processes: int | None, device: str) -> int:
    """Return how many processes to start: the number asked for, or one for each visible GPU, or one.

    Raises:
        ConfigError: There are not so many GPUs.
    """
    if processes is not None:
        if device == "cuda" and 0 < (gpus := visible_gpus()) < processes:
            raise ConfigError(f"--processes is {processes}, and {gpus} GPUs are visible: one process a GPU, so {gpus}.")
        return processes
    from importlib.metadata import version  # takes as long as half of this package

    if device in ("cpu", "mps") or version("torch").endswith("+cpu"):
        return 1
    return max(1, visible_gpus())


def own_group(
    *,
    ranks: int,
    log: Callable[[int], Path] | None = None,
    threads: int | None = None,
    extra: tuple[str, ...] = (),
) -> Group:
    """Describe this very command line, with `extra` options, as a group of workers; see `Group`."""
    # Where no launcher decodes the images beforehand, a rank does, and the others wait for it in silence.
    return Group(
        command=(*own_command(), *sys.argv[1:], *extra),
        ranks=ranks,
        log=log,
        threads=threads,
        environment=safe_environment(),
        start_seconds=DECODING_SECONDS,
    )


def own_command() -> tuple[str, ...]:
    """Name the words that start this program, whatever folder the user is in."""
    return (*safe_python(), "-m", "mnist_dist")


def safe_python() -> tuple[str, ...]:
    """Name the words that start Python so that no module of the user's folder hides another."""
    return (sys.executable,) if _is_found_in_working_folder() else (sys.executable, "-P")


def safe_environment() -> dict[str, str]:
    """Return the variables that keep the working folder out of child processes' imports, e.g. torchrun's workers."""
    return {} if _is_found_in_working_folder() else {"PYTHONSAFEPATH": "1"}


def _is_found_in_working_folder() -> bool:
    """Return whether this program is importable only because the user stands in its checkout."""
    checkout = str(Path(__file__).parents[2])
    elsewhere = sys.path if sys.flags.safe_path else sys.path[1:]
    return Path.cwd() == Path(checkout) and checkout not in elsewhere


def own_output(file: Path | None, command: str) -> Path:
    """Return the file for which a command has started this worker.

    Raises:
        ConfigError: It has none, so another launcher has started it.
    """
    if file is None:
        raise ConfigError(
            f"{command} starts its own processes: call it without another launcher, and without the variables RANK, "
            f"LOCAL_RANK and WORLD_SIZE."
        )
    return file
