"""Run a command to its end, and measure its time and memory; or become a rank."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

LOOK_SECONDS = 0.5
"""Between two looks at the memory; one takes about a millisecond a process, on the cores that are measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command's time and memory."""

    out: str
    seconds: float
    """From before the process started to after it ended."""
    peak_bytes: int | None
    """Most memory seen at once over the command's processes, shared pages divided among those that share them
    (Linux's proportional set size); None where it was not watched or the system does not tell."""


def become_rank() -> None:
    """Start this script again as our launcher starts a rank, with its threads and memory settings, unless it is one."""
    if "RANK" not in os.environ:
        launch = ("launch", "local", "--processes", "1", "--max-restarts", "0", "--")
        words = [sys.executable, "-m", "mnist_dist", *launch, sys.executable, *sys.argv]
        sys.exit(subprocess.run(words, check=False).returncode)


def run_command(words: Sequence[object], *, watch_memory: bool = False) -> Ended:
    """Run a command and wait for it.

    Raises:
        SystemExit: It failed; the message has what it wrote to standard error.
    """
    peak = 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(list(map(str, words)), stdout=out, stderr=errors, stdin=subprocess.DEVNULL)
        try:
            while watch_memory and process.poll() is None:
                peak = max(peak, _memory_of_tree(process.pid))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=LOOK_SECONDS)
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        seconds = time.perf_counter() - began
        for file in (out, errors):
            file.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, words))} ended with {process.returncode}:\n{errors.read()}")
        return Ended(out=out.read(), seconds=seconds, peak_bytes=peak or None)


def _memory_of_tree(pid: int) -> int:
    """Add up the memory of a process and all below it; those that end meanwhile count nothing."""
    import psutil  # comes with the extra `benchmark`

    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += getattr(process.memory_full_info(), "pss", 0)
    return total
