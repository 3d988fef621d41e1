"""Hands the signals that reach the launcher on to its ranks, each once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from types import FrameType

from mnist_dist.signals import STOPPING


class Interrupted(BaseException):
    """A signal came while this process was busy with something other than waiting."""


class Signals:
    """Passes signals that stop a run on to the ranks; a second SIGINT kills them."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.children: list[subprocess.Popen[bytes]] = []
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
        with contextlib.suppress(Interrupted):
            self._busy = True
            try:
                if not self.received:
                    action()
            finally:
                self._busy = False

    def _send(self, number: int) -> None:
        for child in self.children:
            if child.poll() is None:
                if self.hurried:
                    child.kill()
                elif os.name == "posix":  # elsewhere the console has told them already
                    child.send_signal(number)
