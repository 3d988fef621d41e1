"""Starts the ranks of one machine once and watches them to their end: torch-free, so it costs nothing next to them."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from mnist_dist.disk.storage import ContentError, make_folder, obstacle, open_append
from mnist_dist.errors import CheckpointError, WorkerError
from mnist_dist.errors.shell import join, quote
from mnist_dist.group.heartbeat import Pulse, Pulses
from mnist_dist.group.messages import Complaint
from mnist_dist.group.place import EXPECTED_RANKS, GROUP_FOLDER, LAUNCHER, RANK_LOG, TIMEOUT, GroupFolder
from mnist_dist.group.signals import name_of
from mnist_dist.launch.forward import Signals
from mnist_dist.launch.processes import Guard, Rank
from mnist_dist.launch.watch import Watch, kill_with_stacks, stopped
from mnist_dist.machine import allowed_cpus
from mnist_dist.observe.names import shown

POLL_SECONDS = 0.02
TAIL_BYTES, TAIL_LINES, TAIL_WIDTH = 1 << 16, 20, 400
"""How much of the end of a rank's log is read, and shown."""
ECHO_SECONDS = 1.0
"""How long after the first failure its cause may still show up on another rank."""
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Lets glibc keep the memory of a step's tensors for the next step's. Else it gives it back, page by page, until it has
learnt their sizes: the first 60,000 images took a fifth longer."""
GRACE_SECONDS = 3.0
"""From asking ranks to end until they are killed."""
KILLED = -9
"""How a process that was killed has ended, also where there is no SIGKILL."""
PEER_SECONDS = 600.0
"""Ranks wait this much longer for each other than the launcher waits for them, so that it finds which one hangs."""

Meanwhile = Callable[[GroupFolder], None]
"""Leaves a `word` in the folder for the ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The processes of one machine that work together; rank 0 has the terminal, the others a log file each."""

    command: tuple[str, ...]
    """What every rank runs; the environment tells it its rank."""
    ranks: int
    log: Callable[[int], Path] | None = None
    """Names a rank's log file; None keeps no logs."""
    threads: int | None = None
    """CPU threads of each rank; None shares the CPUs equally."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What every rank gets besides."""
    foreign: bool = False
    """Whether it is the user's own program: then each of its processes gets a signal, as from a terminal."""
    start_seconds: float = 1800
    """How long a rank that beats may take to its first step."""
    hang_seconds: float = 600
    """How long it may be silent after that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """The failure of one rank that caused those of the others."""

    code: int
    """Its exit code; negative: the signal that killed it, or that ended it as it hung."""
    step: int
    """Steps done at that time; -1 before the first."""
    message: str
    """Names in it are shown, so that its line breaks are its own."""
    knows_why: bool = True
    """Whether the rank itself has said what went wrong."""
    stopping: bool = False
    """Whether it was to stop anyway."""


def run_once(group: Group, folder: GroupFolder, signals: Signals, meanwhile: Meanwhile | None = None) -> Failure | None:
    """Start a group and wait until it has ended; all ranks die with this process however it ends (on Linux).

    Args:
        group: What to start.
        folder: New and private.
        signals: Passed on to the ranks; after one of them, ending is no failure.
        meanwhile: Done here while the ranks start, who wait for the word that it leaves; if it raises, they are ended.

    Returns:
        None if every rank was done, or ended by a signal that came here.

    Raises:
        ConfigError: The command cannot be started.
    """
    pulses = Pulses(folder.heartbeats, group.ranks)
    if meanwhile is not None:
        folder.approval.touch()
    with contextlib.ExitStack() as stack:
        stack.callback(pulses.close)
        outputs = [None, *(stack.enter_context(_open(_output(group, folder, rank))) for rank in range(1, group.ranks))]
        children = signals.children = []
        guard = Guard()
        stack.callback(guard.close)
        stack.callback(_end, children)
        for rank, output in enumerate(outputs):
            environment = os.environ | _environment(group, folder, rank)
            children.append(Rank(group.command, environment, output, whole=group.foreign))
            guard.watch(children)
        signals.pass_on()
        if meanwhile is not None:
            signals.interrupt(partial(meanwhile, folder))
        watch = Watch(pulses, start_seconds=group.start_seconds, hang_seconds=group.hang_seconds)
        ends, silent = _wait(children, signals, watch, guard)
        if silent is not None:
            culprits = stopped(children) or silent
            kill_with_stacks(children)
            return _hung(culprits, group, pulses.read(), stopping=bool(signals.received))
        return _cause(ends, group, folder, pulses.read(), signals)


def describe(group: Group) -> str:
    """Write down what would be started, as lines for a shell."""
    folder = GroupFolder(Path("PRIVATE-FOLDER"))
    lines = []
    for rank in range(group.ranks):
        environment = _environment(group, folder, rank)
        words = [*(f"{name}={quote(value)}" for name, value in environment.items()), join(group.command)]
        lines.append(" \\\n  ".join(words))
    return " &\n".join(lines)


def _output(group: Group, folder: GroupFolder, rank: int) -> Path:
    return group.log(rank) if group.log else folder.path / f"rank-{rank}.log"


def _environment(group: Group, folder: GroupFolder, rank: int) -> dict[str, str]:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(group.ranks),
        "LOCAL_WORLD_SIZE": str(group.ranks),
        EXPECTED_RANKS: str(group.ranks),
        GROUP_FOLDER: str(folder.path),
        LAUNCHER: str(os.getpid()),
        TIMEOUT: str(max(group.start_seconds, group.hang_seconds) + PEER_SECONDS),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, allowed_cpus() // group.ranks))),
    }
    if group.log is not None:
        environment[RANK_LOG] = str(group.log(rank))
    environment |= {name: os.environ.get(name, value) for name, value in KEEP_MEMORY.items()}
    if group.threads is not None:
        environment["OMP_NUM_THREADS"] = str(group.threads)
    if "GLOO_SOCKET_IFNAME" not in os.environ and hasattr(socket, "if_nameindex"):
        for name in {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}:
            environment["GLOO_SOCKET_IFNAME"] = name  # ranks of one machine need no network
    return environment | dict(group.environment)


def _wait(
    children: list[Rank], signals: Signals, watch: Watch, guard: Guard
) -> tuple[dict[int, int], list[int] | None]:
    """Wait until all ranks have ended, or a while after the first failure, or until one has fallen silent.

    Args:
        children: The ranks.
        signals: After one that came here, ranks end one by one, and none of them is a failure.
        watch: Of the same ranks.
        guard: Of the same ranks.

    Returns:
        The exit codes in the order in which the ranks ended, and those that have fallen silent.
    """
    deadline, ends = None, dict[int, int]()
    while len(ends) < len(children):
        for rank, child in enumerate(children):
            if rank not in ends and (code := child.poll()) is not None:
                ends[rank] = code
                guard.watch([other for other in children if other.returncode is None])
        if deadline is None and any(ends.values()) and not signals.received:
            deadline = time.monotonic() + ECHO_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        running = [rank for rank in range(len(children)) if rank not in ends]
        if deadline is None and (silent := watch.silent(running, signals.suspended_seconds)) is not None:
            return ends, silent
        time.sleep(POLL_SECONDS)
    return ends, None


def _end(children: list[Rank]) -> None:
    """End the ranks that still run, at first politely."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for child in children:
        child.kill()
        while child.poll() is None:
            time.sleep(POLL_SECONDS)


def _hung(culprits: list[int], group: Group, pulses: list[Pulse], *, stopping: bool) -> Failure:
    """Describe a hang. Where all ranks have come equally far, nothing tells which one began it.

    A GPU that stops shows itself so: each process runs ahead of its device until it must wait for it, all at one place.
    """
    step = min(pulse.step for pulse in pulses)
    seconds = group.start_seconds if step < 0 else group.hang_seconds
    when = f"after step {step}" if step >= 0 else "before its first step"
    where = f"; the stacks of the ranks that still answered are in {shown(group.log(0).parent)}" if group.log else ""
    silence = f"no sign of life for {seconds:g} s {when}"
    if len(culprits) == 1:
        message = f"Rank {culprits[0]} of {group.ranks} hangs: {silence}{where}."
    elif len(culprits) < group.ranks:
        message = f"Ranks {', '.join(map(str, culprits))} of {group.ranks} hang: {silence}{where}."
    else:
        message = (
            f"All {group.ranks} ranks hang: {silence}. They have come equally far, so which one began it is not "
            f"known{where}. If they use GPUs, one of these may have stopped: `dmesg | grep Xid` names it."
        )
    return Failure(code=KILLED, step=step, message=message, stopping=stopping)


def _cause(
    ends: dict[int, int], group: Group, folder: GroupFolder, pulses: list[Pulse], signals: Signals
) -> Failure | None:
    """Find the failure that caused the others.

    Args:
        ends: The exit codes in the order in which the ranks ended.
        group: The ranks.
        folder: Where they have left word.
        pulses: Their last signs of life.
        signals: What came here: then only a rank that complains, or that was killed before it could save, has failed.
    """
    failed = {rank: code for rank, code in ends.items() if code}
    found = {rank: Complaint.read(folder, rank) for rank in failed}
    words = {rank: complaint for rank, complaint in found.items() if complaint is not None}
    echoes = [rank for rank, code in failed.items() if code == WorkerError.exit_code]
    causes = [rank for rank in failed if rank not in echoes]
    # Who complained knows why; of several the first. Then who ended first.
    causes.sort(key=lambda rank: words[rank].seconds if rank in words else float("inf"))
    if signals.received:
        lost = [] if signals.hurried else [rank for rank, code in failed.items() if code == KILLED]
        causes, echoes = [rank for rank in causes if rank in words or rank in lost], []
    if not (causes or echoes):
        return None
    rank = (causes or echoes)[0]
    code = failed[rank]
    if rank in words:
        message = words[rank].message
    elif code < 0:
        message = f"Rank {rank} of {group.ranks} was killed by {name_of(-code)} (by the system if memory ran out)."
    else:
        message = f"Rank {rank} of {group.ranks} failed with exit code {code}" + _tail(group, folder, rank)
    return Failure(
        code=code,
        step=pulses[rank].step,
        message=message,
        knows_why=rank in words,
        stopping=bool(signals.received),
    )


def _tail(group: Group, folder: GroupFolder, rank: int) -> str:
    """Show the end of what a rank printed out of sight."""
    if rank == 0:
        return "; its own words stand above."
    path = _output(group, folder, rank)
    return "\n".join([f"; {shown(path)} ends with:" if group.log else "; it ended with:", *last_lines(path)])


def last_lines(path: Path) -> list[str]:
    """Read the end of a log, however long it is and whatever is in it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).decode("utf-8", errors="replace").splitlines()
    except OSError as error:  # somebody has removed it
        return [f"({error.strerror})"]
    return [line if len(line) <= TAIL_WIDTH else f"{line[:TAIL_WIDTH]} ..." for line in map(shown, lines[-TAIL_LINES:])]


def _open(path: Path) -> IO[bytes]:
    """Open a rank's log; a stranger's run folder may hold a link in its place.

    Raises:
        CheckpointError: There is something other than a log.
    """
    kind = obstacle(path.parent, folder=True)
    if kind is not None:
        raise CheckpointError(f"{path.parent} is a {kind}, where the ranks' logs are written: move it away.")
    make_folder(path.parent)
    try:
        return open_append(path)
    except ContentError as error:
        raise CheckpointError(f"{error}, where a rank's log is written: move it away.") from None
