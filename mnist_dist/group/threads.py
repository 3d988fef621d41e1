"""Choose how many CPU threads a rank computes with, and how long they spin while waiting; without torch.

Threads of one operation wait for the slowest of them. On a quiet machine more threads are quicker; as soon as another
program takes one of the CPUs, each operation waits for the thread that has none, and the run falls to a fraction of
what one thread does (benchmarks/busy.py measures it). So a run that may choose takes as many threads as the other
programs leave CPUs, and fewer for the rest of the run when a program comes that takes one.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from mnist_dist.config.schema import Config
from mnist_dist.machine import allowed_cpus, asked_threads
from mnist_dist.machine.cpu_time import CPUS, NOTHING, Moment, others_between
from mnist_dist.models.catalogue import CATALOGUE

FLOP_PER_THREAD = 4e7
"""Floating-point operations of a step that make another thread worth its while: a step of 64 digits in `small_cnn` has
1.7e8, and its sixty operations take some 50 microseconds each with one thread. Measured with two threads only."""
LONG_STEP_FLOP = 2e9
"""A step of so many has operations that are long beside the time that a thread needs to wake up."""
SPINS, FEW_SPINS = 50_000, 5_000
"""GOMP_SPINCOUNT for short and for long operations. libgomp's own 300,000 cost a run nearly all its speed beside a busy
program; few spins cost a step of short operations a tenth on a quiet machine."""
A_CPU = 0.35
"""From this share of a CPU on, what others use counts as a whole one."""
WINDOW_SECONDS = 0.25
"""Over so long the CPUs are counted that others use; the system counts in hundredths of a second."""
MOST_OF_WINDOW_SECONDS = 1.0
"""What a window counts for at most: one that has a long step in it, or in which the run was suspended, is one sign."""
LEAST_SECONDS, MOST_SECONDS = 0.5, 3.0
"""How long a run has to be crowded."""
BREAKS = 1 / 4
"""The share of the last seconds that may have been free: other programs pause now and then."""

_began: Moment | None = None
_helpers_seconds = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpus:
    """What a rank shares with other ranks and other programs."""

    bound: int
    """CPUs on which the system may run this rank, by its affinity; all of the machine if it is not bound."""
    allowed: int
    """As many of those as its cgroup lets it have."""
    ranks: int = 1
    """Ranks that share them. A launcher that binds each rank to CPUs of its own leaves it alone on them."""

    @classmethod
    def of_this_rank(cls, ranks: int) -> Cpus:
        """Return the CPUs of this rank, which so many ranks share, itself included."""
        return cls(bound=len(CPUS), allowed=min(len(CPUS), allowed_cpus()), ranks=ranks)

    @staticmethod
    def name() -> str:
        """Return a text that ranks have in common if they share their CPUs."""
        return f"{socket.gethostname()} {sorted(CPUS)}"

    def threads_beside(self, others: float) -> int:
        """Return how many threads each rank can have so that none waits for a CPU.

        Args:
            others: CPUs that other programs use.
        """
        taken = math.floor(others + 1 - A_CPU)
        return max(1, min(self.allowed, self.bound - taken) // self.ranks)


def step_flop(config: Config, ranks: int) -> float | None:
    """Estimate the floating-point operations of one rank's micro-batch, forward and backward.

    Returns:
        `None` for a network whose size is not known without torch.
    """
    count = CATALOGUE[config.model.name].multiply_adds
    if count is None:
        return None
    images, _ = config.train.split_batch(ranks)
    return 6.0 * images * count(config.data.channels, config.data.image_size)


def useful_threads(flop: float | None, most: int) -> int:
    """Return how many threads the work of a step is worth, at most `most`."""
    return most if flop is None else max(1, min(most, math.floor(flop / FLOP_PER_THREAD)))


def prepare(config: Config, ranks: int) -> None:
    """Set how long threads spin, and begin to measure what other programs use: call it before torch is imported.

    A GOMP_SPINCOUNT or OMP_WAIT_POLICY of the user's stays.
    """
    global _began
    _began = Moment.now()
    flop = step_flop(config, ranks)
    spin(SPINS if flop is not None and flop < LONG_STEP_FLOP else FEW_SPINS)


def spin(count: int = FEW_SPINS) -> None:
    """Set how long threads spin unless the user has: call it before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(count))


def count_as_ours(seconds: float) -> None:
    """Count CPU seconds since `prepare` that a helper of this rank has used: it is no other program."""
    global _helpers_seconds
    _helpers_seconds += seconds


def others_since_prepare(ranks: int) -> float:
    """Return how many CPUs other programs have used since `prepare`; 0 if unknown.

    Args:
        ranks: That share this one's CPUs.
    """
    now = Moment.now()
    if _began is None or now is None:
        return 0.0
    return others_between(_began, now, processes=ranks, helpers=_helpers_seconds).cpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """How many threads a rank computes with."""

    threads: int
    reason: str
    """In words; empty for an equal share of the CPUs."""


def choose(config: Config, cpus: Cpus, *, ranks: int, most: int, others: float) -> Chosen:
    """Choose the threads of a run that leaves them open, and has not chosen any before.

    Args:
        config: The run's.
        cpus: That this rank may use.
        ranks: Of the run, on all machines.
        most: What this process was given, by OMP_NUM_THREADS or as its share.
        others: CPUs that other programs use.
    """
    useful, beside = useful_threads(step_flop(config, ranks), most), cpus.threads_beside(others)
    if beside < min(useful, cpus.threads_beside(0.0)):
        return Chosen(threads=beside, reason=f"other programs use {others:.1f} of {cpus.bound} CPUs")
    useful = min(useful, beside)
    return Chosen(threads=useful, reason="" if useful in (most, beside) else "a step has little work")


def crowded_by_itself(fixed: int | None, environment: Mapping[str, str], cpus: Cpus) -> str | None:
    """Return a warning where more threads were asked for than there are CPUs; None where all is well.

    Args:
        fixed: What the config says, if it fixes the threads.
        environment: May hold OMP_NUM_THREADS; a run that chooses its threads takes no more than fit, whatever it says.
        cpus: That this rank may use.
    """
    given = fixed or asked_threads(environment) or 0
    if given == 1 or given * cpus.ranks <= cpus.allowed:
        return None
    there = f"{cpus.allowed} CPU{'s' * (cpus.allowed > 1)}"
    if not fixed:
        return f"OMP_NUM_THREADS is {given}, for {there}: each process takes what fits."
    processes = f"{cpus.ranks} processes" if cpus.ranks > 1 else "one process"
    return (
        f"train.threads is {fixed}, which gives {processes} {fixed * cpus.ranks} threads on {there}: threads that wait "
        f"for a CPU make a run slow, so lower it."
    )


class Crowding:
    """Detects during training that other programs leave a run fewer CPUs than it has threads.

    Args:
        cpus: That this rank may use.
        threads: What this rank computes with; `None`: that may not change.
        now: Reads the CPU times.
    """

    def __init__(self, cpus: Cpus, threads: int | None, now: Callable[[], Moment | None] = Moment.now) -> None:
        self._cpus = cpus
        self._now = now
        self._threads = threads or 1
        self._steps_per_second = 0.0  # while it was not crowded
        self._windows: list[tuple[float, int]] = []  # seconds, and threads that fitted, of the last ones
        self._window = NOTHING
        self._steps = 0
        self._begin_span()

    def lower(self, threads: int) -> None:
        """Record that this rank now computes with fewer threads."""
        self._threads = threads
        self._windows.clear()
        self._next_window()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the measurement while the run does not train, as in an evaluation or a checkpoint."""
        self._end_span()
        yield
        self._begin_span()

    def look(self, steps_left: int) -> int:
        """Return how many threads fit beside the other programs if those have been fewer for a while; otherwise 0.

        Costs next to nothing but four times a second: call it every step.

        Args:
            steps_left: To the run's end: a run that is soon over does not wait as long.
        """
        self._steps += 1
        if time.monotonic() < self._due:
            return 0
        self._end_span()
        self._begin_span()
        seconds = self._window.clock
        if seconds < WINDOW_SECONDS:
            return 0
        fitting = self._cpus.threads_beside(others_between(NOTHING, self._window, processes=self._cpus.ranks).cpus)
        if fitting >= self._threads:
            self._steps_per_second = self._steps / seconds
        self._next_window()
        self._windows.append((min(seconds, MOST_OF_WINDOW_SECONDS), fitting))
        patience = self._patience(steps_left)
        while sum(seconds for seconds, _ in self._windows[1:]) >= patience / (1 - BREAKS):
            del self._windows[0]
        crowded = [(seconds, threads) for seconds, threads in self._windows if threads < self._threads]
        return max(threads for _, threads in crowded) if sum(seconds for seconds, _ in crowded) >= patience else 0

    def _patience(self, steps_left: int) -> float:
        """Return the seconds that have to be crowded: fewer threads cost speed once the other program has ended."""
        seconds_left = steps_left / self._steps_per_second if self._steps_per_second else math.inf
        return max(LEAST_SECONDS, min(MOST_SECONDS, seconds_left / 4))

    def _next_window(self) -> None:
        self._window, self._steps = NOTHING, 0
        self._begin_span()

    def _begin_span(self) -> None:
        self._before = self._now() if self._threads > 1 else None
        never = self._before is None
        self._due = math.inf if never else time.monotonic() + WINDOW_SECONDS - self._window.clock

    def _end_span(self) -> None:
        now = self._now() if self._before is not None else None
        if self._before is not None and now is not None:
            self._window += now - self._before
