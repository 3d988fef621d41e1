"""What a rank that our own launcher started does besides its work: it beats, and leaves word of its failure."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import IO

from mnist_dist.disk.storage import ContentError, obstacle, open_append
from mnist_dist.errors import MnistDistError
from mnist_dist.group import heartbeat
from mnist_dist.group.messages import Complaint
from mnist_dist.group.place import RANK_LOG, GroupFolder
from mnist_dist.observe.names import message_of, shown, shown_lines
from mnist_dist.observe.output import ESCAPED


def begin(group: GroupFolder) -> None:
    """Show signs of life from now on, and stacks in the log when the launcher asks for them with SIGQUIT."""
    heartbeat.start(group.heartbeats, _rank())
    heartbeat.beat()
    if hasattr(signal, "SIGQUIT"):
        with contextlib.suppress(OSError):  # where there can be no log there can be no run: it will say so itself
            faulthandler.register(signal.SIGQUIT, file=_open_log(), all_threads=True)


def leave_word(group: GroupFolder, error: Exception) -> int:
    """Write for the launcher why this rank fails; the traceback goes to the rank's log alone.

    Returns:
        The exit code: 1 for a bug.
    """
    lines = traceback.format_exception(error)
    log = os.environ.get(RANK_LOG)
    if log is not None:
        with contextlib.suppress(OSError), _open_log() as file:  # the disk may be full
            file.writelines(lines)
    if isinstance(error, MnistDistError):
        code, message = error.exit_code, message_of(error)
    else:
        code = 1
        bug = f"Rank {_rank()} failed, which is a bug: {type(error).__name__}: {error}."
        trace = "\n" + shown_lines("".join(lines)).rstrip()
        message = shown(bug) + (trace if log is None else shown(f" The traceback is in {log}."))
    try:
        Complaint(message=message, seconds=time.monotonic()).write(group, _rank())
    except OSError:  # the temporary folder is full too, or gone
        print(f"error: {message}", file=sys.stderr)
    return code


def _open_log() -> IO[str]:
    """Open this rank's log; standard error where the launcher keeps none."""
    path = os.environ.get(RANK_LOG)
    if path is None:
        return sys.stderr
    log = Path(path)
    if obstacle(log.parent, folder=True) is not None:
        raise OSError(f"{log.parent} is no folder of the run")
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        return io.TextIOWrapper(open_append(log), encoding="utf-8", errors=ESCAPED, line_buffering=True)
    except ContentError as error:  # a link or the like lies there
        raise OSError(str(error)) from None


def _rank() -> int:
    return int(os.environ["RANK"])
