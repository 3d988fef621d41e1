"""Starts the ranks of one machine and watches them: torch-free, so it costs nothing next to them."""

from __future__ import annotations

import contextlib
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
from mnist_dist.machine import allowed_cpus, die_with_parent
from mnist_dist.signals import STOPPING
from mnist_dist.worker import EXPECTED_RANKS, RENDEZVOUS

POLL_SECONDS = 0.02
ECHO_SECONDS = 1.0
"""How long after the first failure its cause may still show up on another rank."""
GRACE_SECONDS = 10.0
"""From asking ranks to end until they are killed."""
LOST_PEER = 7
"""Exit code of a rank that failed only because another one was gone."""


def run_local(
    command: list[str],
    *,
    ranks: int,
    log: Callable[[int], Path],
    threads: int | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> int:
    """Run a command as a group of processes on this machine.

    Rank 0 has the terminal, the others a log file each. When one fails the others are ended, and on Linux all
    die with this process however it ends. Signals that reach this process reach each rank once.

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
    codes: list[int | None] = []
    signals = _Signals()
    children = signals.children
    with contextlib.ExitStack() as stack:
        private = stack.enter_context(tempfile.TemporaryDirectory(prefix="mnist-dist-"))
        outputs = [None, *(stack.enter_context(_open_log(log(rank))) for rank in range(1, ranks))]
        stack.enter_context(signals.handled())
        stack.callback(_end, children)
        for rank, output in enumerate(outputs):
            environment = os.environ | _environment(rank, ranks, threads, Path(private) / "rendezvous")
            children.append(_start(command, environment, output))
        signals.interrupt(meanwhile)
        codes = _wait(children, signals.received)
    if signals.received and any(code != 0 for code in codes):
        return 128 + signals.received[0]
    return _verdict(codes, log)


def _environment(rank: int, ranks: int, threads: int | None, rendezvous: Path) -> dict[str, str]:
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        EXPECTED_RANKS: str(ranks),
        RENDEZVOUS: rendezvous.as_uri(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, allowed_cpus() // ranks))),
    }
    # How long a thread spins for the others: libgomp's default costs a rank nearly all its speed as soon as another
    # program is busy (2 cores: 290 images/s instead of 13,000; with this 970), and this costs nothing otherwise.
    environment["GOMP_SPINCOUNT"] = os.environ.get("GOMP_SPINCOUNT", "50000")
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
            preexec_fn=die_with_parent(),
        )
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be started: {error.strerror}.") from None


class _Interrupted(BaseException):
    """A signal came while this process was busy with something other than waiting."""


class _Signals:
    """Passes signals that stop a run on to the ranks; a second SIGINT kills them."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.children: list[subprocess.Popen[bytes]] = []
        self.busy = False
        """Whether a signal shall interrupt what this process is doing."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        for child in self.children:
            if child.poll() is None:
                if self.received.count(signal.SIGINT) > 1:
                    child.kill()
                elif os.name == "posix":  # elsewhere the console has told them already
                    child.send_signal(number)
        if self.busy:
            raise _Interrupted

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals for as long as the context lasts."""
        former = {number: signal.getsignal(number) for number in STOPPING}
        for number, handler in former.items():
            if number == signal.SIGINT or handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def interrupt(self, action: Callable[[], None]) -> None:
        """Do something that a signal ends."""
        with contextlib.suppress(_Interrupted):
            self.busy = True
            try:
                if not self.received:
                    action()
            finally:
                self.busy = False


def _wait(children: list[subprocess.Popen[bytes]], received: list[int]) -> list[int | None]:
    """Wait until all ranks have ended, or a while after the first failure.

    Args:
        children: The ranks.
        received: Signals; after one, ranks end one by one, and none of them is a failure.

    Returns:
        The exit codes at that time, None for ranks that still run.
    """
    deadline = None
    while None in (codes := [child.poll() for child in children]):
        if deadline is None and any(codes) and not received:
            deadline = time.monotonic() + ECHO_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    return codes


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


def _verdict(codes: list[int | None], log: Callable[[int], Path]) -> int:
    """Find the failure that caused the others, show it if it happened out of sight, and return its code."""
    failed = {rank: code for rank, code in enumerate(codes) if code}
    if not failed:
        return 0
    causes = {rank: code for rank, code in failed.items() if code != LOST_PEER} or failed
    rank, code = next(((rank, code) for rank, code in causes.items() if code > 0), next(iter(causes.items())))
    if code < 0:
        name = signal.Signals(-code).name
        raise WorkerError(
            f"Rank {rank} of {len(codes)} was killed by {name} (by the system if memory ran out); "
            f"the others were ended."
        )
    if rank > 0:
        tail = log(rank).read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        print("\n".join([f"rank {rank} failed; {log(rank)} ends with:", *tail]), file=sys.stderr)
    return code


def _open_log(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")
