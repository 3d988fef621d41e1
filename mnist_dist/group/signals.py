"""Signals that ask a run to stop: noted when they come, obeyed where all ranks can agree on a step.

SIGTERM, SIGUSR2, SIGHUP (unless it is ignored, as under nohup) and the first SIGINT are noted while `deferred`;
a second SIGINT ends the process at once, as does any of them outside of `deferred`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR2", "SIGHUP") if hasattr(signal, name))
PATIENCE_SECONDS = 1.0
"""How long a signal may wait for Python code to handle it before the process ends without that."""

_installed = False
_pending = 0
_leaving = 0
_deferred = False
_handled = 0
"""How often `_note` has run."""
_interrupts = 0
"""How often for SIGINT."""


def install() -> None:
    """Handle the stopping signals in this process; before torch is imported, which takes seconds."""
    global _installed
    _installed = True
    if hasattr(signal, "SIGCHLD"):  # where it is ignored, the system forgets how children ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in STOPPING:
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)
    if hasattr(signal, "pthread_sigmask"):  # our launcher blocks them until they can be handled
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def pending() -> int:
    """Return the number of the signal that has asked for a stop; 0 if none has."""
    return _pending


def leaving() -> int:
    """Return the number of the signal that ends this process; 0 if none. Interrupted imports may fail later."""
    return _leaving


def name_of(number: int) -> str:
    """Name a signal, also a real-time signal and one that the system gives no name."""
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    first, last = getattr(signal, "SIGRTMIN", 0), getattr(signal, "SIGRTMAX", -1)
    return f"SIGRTMIN+{number - first}" if first <= number <= last else f"signal {number}"


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Record signals instead of ending the process, for as long as the context lasts."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


@contextlib.contextmanager
def heard_in_native_code() -> Iterator[None]:
    """End this process also while it waits in native code, for as long as the context lasts.

    Python runs a handler only between its own instructions, and a rank can wait for another one inside of torch for
    half an hour. Where no handler has run in time, the process ends with the code that the handler would have given
    it: while signals are `deferred` for the second SIGINT alone, else for each. Does nothing without `install`.
    """
    if not _installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    former = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # written to as a signal comes
    threading.Thread(target=_listen, args=(reader, _handled, _interrupts), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        writer.close()  # ends the thread


def _listen(reader: socket.socket, came: int, interrupts: int) -> None:
    """Wait for signals beside the main thread, and then for its handler to run.

    Args:
        reader: Gets each signal's number as a byte.
        came: Signals that came before.
        interrupts: How many of them were SIGINT.
    """
    while numbers := reader.recv(64):
        came += sum(number in STOPPING for number in numbers)
        interrupts += numbers.count(signal.SIGINT)
        ends = [
            number
            for number in numbers
            if number in STOPPING and (not _deferred or (number == signal.SIGINT and interrupts > 1))
        ]
        if not ends:
            continue
        time.sleep(PATIENCE_SECONDS)
        if _handled < came:
            # The main thread is inside of torch and cannot raise; an exception here would end this thread alone.
            os._exit(128 + ends[0])
    reader.close()


def _note(number: int, frame: FrameType | None) -> None:
    global _pending, _handled, _interrupts, _leaving
    _handled += 1
    _interrupts += number == signal.SIGINT
    if not _deferred or _interrupts > 1:
        _leaving = number
        raise SystemExit(128 + number)
    _pending = _pending or number
