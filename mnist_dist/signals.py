"""Signals that ask a run to stop: noted when they come, obeyed where all ranks can agree on a step.

SIGTERM, SIGUSR2, SIGHUP (unless it is ignored, as under nohup) and the first SIGINT are noted while `deferred`;
a second SIGINT ends the process at once, as does any of them outside of `deferred`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2", "SIGHUP") if hasattr(signal, name))

_pending = 0
_deferred = False


def install() -> None:
    """Handle the stopping signals in this process; before torch is imported, which takes seconds."""
    for number in STOPPING:
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def pending() -> int:
    """Tell which signal has asked for a stop; 0 if none has."""
    return _pending


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Note signals instead of ending the process, for as long as the context lasts."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def _note(number: int, frame: FrameType | None) -> None:
    global _pending
    if not _deferred or (number == signal.SIGINT and _pending == signal.SIGINT):
        raise SystemExit(128 + number)
    _pending = _pending or number
