"""What a rank that our own launcher started does besides its work: it beats, and leaves word of its failure."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
import traceback
from pathlib import Path

from mnist_dist import heartbeat
from mnist_dist.errors import MnistDistError
from mnist_dist.worker import RANK_LOG, GroupFolder


def begin(group: GroupFolder) -> None:
    """Show signs of life from now on, and stacks in the log when the launcher asks for them with SIGQUIT."""
    heartbeat.start(group.heartbeats, _rank())
    heartbeat.beat()
    log = os.environ.get(RANK_LOG)
    if log is not None and hasattr(signal, "SIGQUIT"):
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        faulthandler.register(signal.SIGQUIT, file=Path(log).open("a", encoding="utf-8"), all_threads=True)  # noqa: SIM115


def leave_word(group: GroupFolder, error: Exception) -> int:
    """Tell the launcher why this rank fails; the traceback goes to the rank's log alone.

    Returns:
        The exit code: 1 for a bug.
    """
    lines = traceback.format_exception(error)
    log = os.environ.get(RANK_LOG)
    if log is not None:
        with Path(log).open("a", encoding="utf-8") as file:
            file.writelines(lines)
    if isinstance(error, MnistDistError):
        code, message = error.exit_code, str(error)
    else:
        code = 1
        where = "".join(["\n", *lines]).rstrip() if log is None else f" The traceback is in {log}."
        message = f"Rank {_rank()} failed, which is a bug: {type(error).__name__}: {error}.{where}"
    record = {"code": code, "message": message, "seconds": time.monotonic()}
    temporary = group.failure(_rank()).with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(group.failure(_rank()))
    return code


def _rank() -> int:
    return int(os.environ["RANK"])
