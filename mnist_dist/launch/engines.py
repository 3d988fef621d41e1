"""Start a training with torchrun or `accelerate launch`: their command and environment."""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from mnist_dist.errors import ConfigError
from mnist_dist.errors.shell import join, quote
from mnist_dist.group.place import EXPECTED_RANKS
from mnist_dist.machine import allowed_cpus, route_to

PORT = 29400
HEAD = re.compile(
    r"(\[(?P<bracketed>[0-9A-Fa-f:.]+)\]|(?P<bare>[0-9A-Fa-f]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)"
    r"|(?P<name>[A-Za-z0-9_]([\w.-]*\w)?\.?))(?(bare)|(:(?P<port>[0-9]{1,5}))?)",
    re.ASCII,
)
"""A name or an address of IPv4 or IPv6; with a port, IPv6 needs brackets."""
ADDRESS_OF_THIS_MACHINE = "ADDRESS-OF-THIS-MACHINE"
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
    """Whether the ranks compute on CPUs; if not `decided`, because this machine has no GPU."""
    decided: bool = False
    """Whether the user said so."""
    max_restarts: int = 3
    python: tuple[str, ...] = (sys.executable, "-P")
    """The words that start Python."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the ranks get besides."""
    dry_run: bool = False
    """Whether this is only to be shown: machine 0 need not be there then."""

    def __post_init__(self) -> None:
        if self.head is not None:
            self.endpoint  # noqa: B018 - raises
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
        """Host and port of machine 0; an IPv6 address is without brackets.

        Raises:
            ConfigError: `head` is none.
        """
        head = "localhost" if self.head is None else self.head.strip()
        match = HEAD.fullmatch(head)
        if match is not None:
            host = match["bracketed"] or match["bare"] or match["name"]
            port = int(match["port"] or PORT)
            is_ipv6 = ":" in host
            if 0 < port < 1 << 16 and (not is_ipv6 or _is_ipv6(host)):
                return host, port
        raise ConfigError(
            f"--head is {self.head!r}: give HOST or HOST:PORT of machine 0, the port from 1 to 65535, e.g. "
            f"node-0:{PORT}, 10.0.0.1:{PORT} or [fd00::1]:{PORT}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A command, and the environment variables that it needs besides those that are there."""

    environment: dict[str, str]
    parts: tuple[tuple[str, ...], ...]
    """The command's words: the program, each option with its value, and what it runs."""
    remarks: tuple[str, ...] = ()
    """What to know before starting it on another machine."""

    def __str__(self) -> str:
        """The launch as lines for a shell."""
        variables = [f"{name}={quote(value)}" for name, value in self.environment.items()]
        command = " \\\n  ".join([*variables, *map(join, self.parts)])
        return "\n".join([*(f"# {remark}" for remark in self.remarks), command])

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
        address = _own_address(host, cluster)
        is_host = "true" if cluster.node_rank == 0 else "false"  # otherwise every machine waits a minute to find out
        options = [
            ("--nnodes", str(cluster.nodes)),
            size,
            restarts,
            ("--rdzv-backend", "c10d"),
            ("--rdzv-endpoint", f"[{host}]:{port}" if ":" in host else f"{host}:{port}"),
            ("--rdzv-id", "mnist-dist"),
            ("--rdzv-conf", f"is_host={is_host}"),
            ("--local-addr", address),
        ]
    engine = (*cluster.python, "-m", "torch.distributed.run")
    return _launch(cluster, (engine, *options, ("-m", "mnist_dist", *words)))


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
    engine = (*cluster.python, "-m", "accelerate.commands.accelerate_cli", "launch")
    config = ("--config_file", str(recipes() / "accelerate" / recipe))
    return _launch(cluster, (engine, config, *options, ("-m", "mnist_dist", *words)))


def recipes() -> Path:
    """Find the folder of recipes: the packaged one if it is there, else the checkout's."""
    packaged = Path(str(files("mnist_dist") / "recipes"))
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "launch"


def _own_address(host: str, cluster: Cluster) -> str:
    """Find the address with which this machine speaks to machine 0.

    Raises:
        ConfigError: There is no way to it.
    """
    if cluster.dry_run and not (_is_ipv6(host) or host.replace(".", "").isdigit() or host == "localhost"):
        return ADDRESS_OF_THIS_MACHINE  # its name may mean something on the cluster alone
    try:
        return route_to(host)[0]
    except OSError as error:
        if cluster.dry_run:
            return ADDRESS_OF_THIS_MACHINE
        raise ConfigError(f"--head: {host} cannot be reached from here: {error.strerror}.") from None


def _is_ipv6(host: str) -> bool:
    try:
        return isinstance(ipaddress.ip_address(host), ipaddress.IPv6Address)
    except ValueError:
        return False


def _launch(cluster: Cluster, parts: tuple[tuple[str, ...], ...]) -> Launch:
    """Complete a command by its environment, and by what a person should know who starts it on another machine."""
    lines = [f"Start this on machine {cluster.node_rank} of {cluster.nodes}."] if cluster.nodes > 1 else []
    if cluster.decided:
        lines.append(f"For machines {'of any kind: it computes on their CPUs' if cluster.cpu else 'with GPUs'}.")
    elif cluster.ranks > 1:
        lines.append("Each process computes on a GPU of its machine, or on CPUs where there is none.")
    else:
        kind, other = ("without a GPU", "cuda") if cluster.cpu else ("with a GPU", "cpu")
        lines.append(f"For a machine {kind}, as this one; for another kind, write --device {other} behind `train`.")
    if "OMP_NUM_THREADS" not in os.environ:
        lines.append(f"OMP_NUM_THREADS is for machines with {allowed_cpus()} CPUs, as this one.")
    if any(ADDRESS_OF_THIS_MACHINE in part for part in parts):
        lines.append(f"Replace {ADDRESS_OF_THIS_MACHINE} by the address at which the other machines reach it.")
    return Launch(environment=_environment(cluster), parts=parts, remarks=tuple(lines))


def _environment(cluster: Cluster) -> dict[str, str]:
    environment = {EXPECTED_RANKS: str(cluster.ranks), **cluster.environment}
    threads = max(1, allowed_cpus() // cluster.processes_per_node)
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    # Without this, ranks that are started again after a killed one meet at the address of the dead store.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Without this, SIGUSR2 kills torchrun, which `accelerate launch` is too, and leaves the ranks behind.
    environment["PET_SIGNALS_TO_HANDLE"] = FORWARDED_SIGNALS
    return environment
