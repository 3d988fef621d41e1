"""Forward the launcher's signals to its ranks, each once, and suspend them while it is suspended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

from mnist_dist.group.signals import STOPPING
from mnist_dist.launch.processes import Rank

SUSPENDING = tuple(getattr(signal, name) for name in ("SIGTSTP", "SIGTTIN", "SIGTTOU") if hasattr(signal, name))
"""What a terminal suspends a job with: Ctrl-Z, and input or output of one in the background."""


class Interrupted(BaseException):
    """A signal came while this process was busy with something other than waiting."""


class Signals:
    """Passes signals that stop a run on to the ranks; a second SIGINT kills them."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.children: list[Rank] = []
        self.suspended_seconds = 0.0
        """How long this process and its ranks have been suspended so far."""
        self._busy = False

    @property
    def hurried(self) -> bool:
        """Whether the user wants an end at once."""
        return self.received.count(signal.SIGINT) > 1

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.received.append(number)
        self._send(number)
        if self._busy:
            raise Interrupted

    def pass_on(self) -> None:
        """Pass on what came while the ranks were being started."""
        if self.received:
            self._send(self.received[0])

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Handle signals for as long as the context lasts."""
        former = {number: signal.getsignal(number) for number in (*STOPPING, *SUSPENDING)}
        for number, handler in former.items():
            if number == signal.SIGINT or handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._suspend if number in SUSPENDING else self)
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def interrupt(self, action: Callable[[], None]) -> None:
        """Do something that a signal ends."""
        with contextlib.suppress(Interrupted):
            self._busy = True
            try:
                if not self.received:
                    action()
            finally:
                self._busy = False

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Suspend the ranks and this process; they continue when this process does."""
        began = time.monotonic()
        for child in self.children:
            child.suspend()
        signal.signal(number, signal.SIG_DFL)
        # Where a terminal has no shell that could let the job go on, the kernel does not suspend it. Without a
        # terminal it was somebody who can.
        os.kill(os.getpid(), number if _has_terminal() else signal.SIGSTOP)
        signal.signal(number, self._suspend)  # here it goes on
        for child in self.children:
            child.resume()
        self.suspended_seconds += time.monotonic() - began

    def _send(self, number: int) -> None:
        for child in self.children:
            if child.poll() is None:
                if self.hurried:
                    child.kill()
                elif os.name == "posix":  # elsewhere the console has told them already
                    child.send_signal(number)


def _has_terminal() -> bool:
    """Return whether a terminal controls this process."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True
