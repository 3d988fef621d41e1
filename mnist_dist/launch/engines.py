"""Hands a training over to torchrun or `accelerate launch`: the command and the environment that they need."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mnist_dist.errors import ConfigError
from mnist_dist.machine import allowed_cpus, route_to
from mnist_dist.worker import EXPECTED_RANKS

PORT = 29400
FORWARDED_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where a training runs: so many machines, each started with the same command but for its `node_rank`."""

    nodes: int = 1
    processes_per_node: int = 1
    node_rank: int = 0
    head: str | None = None
    """HOST or HOST:PORT of machine 0, as the others reach it; needed with several machines."""
    cpu: bool = True
    """Whether the ranks compute on CPUs."""
    max_restarts: int = 3

    def __post_init__(self) -> None:
        if self.nodes > 1 and not self.head:
            raise ConfigError(f"--nodes is {self.nodes}: give --head HOST:PORT, machine 0 as the others reach it.")
        if not 0 <= self.node_rank < self.nodes:
            raise ConfigError(
                f"--node-rank is {self.node_rank}, and there are {self.nodes} machines: they count from 0 to "
                f"{self.nodes - 1}."
            )

    @property
    def ranks(self) -> int:
        """Processes on all machines together."""
        return self.nodes * self.processes_per_node

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port of machine 0.

        Raises:
            ConfigError: The port is no number.
        """
        host, _, port = (self.head or "localhost").partition(":")
        if port and not port.isdecimal():
            raise ConfigError(f"--head is {self.head}: its port should be a number, e.g. {host}:{PORT}.")
        return host, int(port or PORT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A command, and the environment variables that it needs besides those that are there."""

    environment: dict[str, str]
    parts: tuple[tuple[str, ...], ...]
    """The command's words: the program, each option with its value, and what it runs."""

    def __str__(self) -> str:
        """The launch as lines for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n  ".join([*variables, *map(shlex.join, self.parts)])

    def replace_this_process(self) -> None:
        """Become that command; it does not return."""
        command = [word for part in self.parts for word in part]
        os.execvpe(command[0], command, os.environ | self.environment)


def torchrun(cluster: Cluster, words: tuple[str, ...]) -> Launch:
    """Plan a torchrun on this machine; every machine of the cluster runs its own, at about the same time.

    Args:
        cluster: Where to run.
        words: The command of this program, e.g. `train --resume --run-dir runs/a`.
    """
    size = ("--nproc-per-node", str(cluster.processes_per_node))
    restarts = ("--max-restarts", str(cluster.max_restarts))
    if cluster.nodes == 1:
        options = [("--standalone",), size, restarts]
    else:
        host, port = cluster.endpoint
        try:
            address, _ = route_to(host)
        except OSError as error:
            raise ConfigError(f"--head: {host} cannot be reached from here: {error.strerror}.") from None
        is_host = "true" if cluster.node_rank == 0 else "false"  # else every machine waits a minute to find out
        options = [
            ("--nnodes", str(cluster.nodes)),
            size,
            restarts,
            ("--rdzv-backend", "c10d"),
            ("--rdzv-endpoint", f"{host}:{port}"),
            ("--rdzv-id", "mnist-dist"),
            ("--rdzv-conf", f"is_host={is_host}"),
            ("--local-addr", address),
        ]
    engine = (sys.executable, "-m", "torch.distributed.run")
    return Launch(environment=_environment(cluster), parts=(engine, *options, ("-m", "mnist_dist", *words)))


def accelerate(cluster: Cluster, words: tuple[str, ...]) -> Launch:
    """Plan an `accelerate launch` on this machine; every machine of the cluster runs its own.

    Args:
        cluster: Where to run.
        words: The command of this program.
    """
    options = [("--num_processes", str(cluster.ranks))]  # over all machines
    if cluster.nodes > 1:
        host, port = cluster.endpoint
        options += [("--num_machines", str(cluster.nodes)), ("--machine_rank", str(cluster.node_rank))]
        options += [("--main_process_ip", host), ("--main_process_port", str(port))]
    if cluster.nodes > 1:
        recipe = "machines.yaml"
    elif cluster.ranks > 1:
        recipe = "cpu-processes.yaml" if cluster.cpu else "gpus.yaml"
    else:
        recipe = "cpu.yaml" if cluster.cpu else "gpu.yaml"
    if cluster.ranks > 1:
        options += [("--max_restarts", str(cluster.max_restarts))]
    engine = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
    config = ("--config_file", str(recipes() / "accelerate" / recipe))
    return Launch(environment=_environment(cluster), parts=(engine, config, *options, ("-m", "mnist_dist", *words)))


def recipes() -> Path:
    """Find the folder of recipes: the packaged one if it is there, else the checkout's."""
    packaged = Path(str(files("mnist_dist") / "recipes"))
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "launch"


def _environment(cluster: Cluster) -> dict[str, str]:
    environment = {EXPECTED_RANKS: str(cluster.ranks)}
    threads = max(1, allowed_cpus() // cluster.processes_per_node)
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    if cluster.cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    # Without this, ranks that are started again after a killed one meet at the address of the dead store.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Without this, SIGUSR2 kills torchrun, which `accelerate launch` is too, and leaves the ranks behind.
    environment["PET_SIGNALS_TO_HANDLE"] = FORWARDED_SIGNALS
    return environment
