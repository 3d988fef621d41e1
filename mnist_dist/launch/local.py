"""Starts the ranks of one machine and watches them: torch-free, so it costs nothing next to them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from mnist_dist.errors import ConfigError, WorkerError
from mnist_dist.launch.hardware import allowed_cpus
from mnist_dist.launch.worker import EXPECTED_RANKS

POLL_SECONDS = 0.02
ECHO_SECONDS = 1.0
"""How long after the first failure its cause may still show up on another rank."""
GRACE_SECONDS = 10.0
"""From asking ranks to end until they are killed."""
LOST_PEER = 7
"""Exit code of a rank that failed only because another one was gone."""

PR_SET_PDEATHSIG = 1


def run_local(
    command: list[str],
    *,
    ranks: int,
    log: Callable[[int], Path],
    threads: int | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Run a command as a group of processes on this machine.

    Rank 0 has the terminal, the others a log file each. All die with this process, and when one fails the
    others are ended. Signals that reach this process reach each rank once.

    Args:
        command: What every rank runs; the environment tells it its rank.
        ranks: Number of processes.
        log: Names a rank's log file.
        threads: CPU threads of each; None shares the CPUs equally.
        meanwhile: Done here while the ranks start; if it raises, they are ended.

    Returns:
        0, the exit code of the rank that failed first, or 128 + n after signal n.

    Raises:
        ConfigError: The command cannot be started.
        WorkerError: A rank was killed by a signal that nobody sent to this process.
    """
    with tempfile.TemporaryDirectory(prefix="mnist-dist-") as private, contextlib.ExitStack() as files:
        children: list[subprocess.Popen[bytes]] = []
        with _forwarding(children) as received:
            try:
                for rank in range(ranks):
                    output = None if rank == 0 else files.enter_context(_open_log(log(rank)))
                    environment = os.environ | _environment(rank, ranks, threads, Path(private) / "rendezvous")
                    children.append(_start(command, environment, output))
                meanwhile()
                _wait(children)
            finally:
                _end(children)
            if received:
                return 128 + received[0]
    return _verdict([child.returncode for child in children], log)


def _environment(rank: int, ranks: int, threads: int | None, rendezvous: Path) -> dict[str, str]:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        EXPECTED_RANKS: str(ranks),
        "MNIST_DIST_RENDEZVOUS": rendezvous.as_uri(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, allowed_cpus() // ranks))),
    }
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if "GLOO_SOCKET_IFNAME" not in os.environ and hasattr(socket, "if_nameindex"):
        for name in {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}:
            environment["GLOO_SOCKET_IFNAME"] = name  # ranks of one machine need no network
    return environment


def _start(command: list[str], environment: dict[str, str], output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # the terminal's Ctrl-C comes here alone, and is passed on once
            preexec_fn=_die_with_parent() if sys.platform == "linux" else None,
        )
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be started: {error.strerror}.") from None


def _die_with_parent() -> Callable[[], None]:
    """Make what a new process calls so that the kernel kills it when this one ends, however it ends."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(128 + signal.SIGKILL)

    return in_child


@contextlib.contextmanager
def _forwarding(children: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the children; the second of them kills. Yields the signals received."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            if child.poll() is None:
                child.send_signal(number if len(received) == 1 else signal.SIGKILL)

    former = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all ranks have ended, or a while after the first failure."""
    deadline = None
    while None in (codes := [child.poll() for child in children]):
        if deadline is None and any(codes):
            deadline = time.monotonic() + ECHO_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            return
        time.sleep(POLL_SECONDS)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """End the ranks that still run, at first politely."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _verdict(codes: list[int], log: Callable[[int], Path]) -> int:
    """Find the failure that caused the others, show it where it happened out of sight, and return its code."""
    failed = [rank for rank, code in enumerate(codes) if code]
    if not failed:
        return 0
    killed = [rank for rank in failed if codes[rank] < 0 and codes[rank] != -signal.SIGTERM]
    causes = [rank for rank in failed if codes[rank] > 0 and codes[rank] not in (LOST_PEER, 128 + signal.SIGTERM)]
    if killed and not causes:
        name = signal.Signals(-codes[killed[0]]).name
        raise WorkerError(
            f"Rank {killed[0]} of {len(codes)} was killed by {name} (out of memory, perhaps); the others were ended."
        )
    rank = (causes or failed)[0]
    if rank > 0:
        tail = log(rank).read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        print("\n".join([f"rank {rank} failed; {log(rank)} ends with:", *tail]), file=sys.stderr)
    return codes[rank] if codes[rank] > 0 else LOST_PEER


def _open_log(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")
