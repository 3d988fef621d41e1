"""Run a group of ranks on this machine to its end; after a failure, start it again from a checkpoint."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import Timeout

from mnist_dist.disk import locks
from mnist_dist.errors import GroupError, WorkerError
from mnist_dist.group.place import GroupFolder
from mnist_dist.launch.forward import Signals
from mnist_dist.launch.group import KILLED, Failure, Group, Meanwhile, run_once
from mnist_dist.machine import check_loopback, temporary_folder

RESTARTED = (1, WorkerError.exit_code)
"""Exit codes after which another try may go better; after all others it would end in the same way."""
PREFIX = "mnist-dist-group-"
STALE_SECONDS = 60.0


@dataclass(slots=True, kw_only=True)
class Restarts:
    """Decides whether a group that has failed is started again."""

    limit: int = 0
    """How often in a row, without a new checkpoint in between."""
    again: tuple[str, ...] = ()
    """Options that the command has besides when it is started again."""
    saved_step: Callable[[], int | None] = lambda: None
    """Tells the step of the newest checkpoint."""
    spent: int = field(default=0, init=False)
    _last: Failure | None = field(default=None, init=False)
    _saved: int | None = field(default=None, init=False)

    def refusal(self, failure: Failure) -> str | None:
        """Return why there is no further try after this failure; None counts one more try."""
        saved, former = self.saved_step(), self._last
        if saved != self._saved:
            self.spent = 0
        self._saved, self._last = saved, failure
        if self.limit == 0 or not _may_pass(failure):
            return ""
        if former is not None and _is_the_same(former, failure):
            return "The same error recurred at the same step after a restart, so the run was not restarted again."
        if self.spent == self.limit:
            times = "once" if self.spent == 1 else f"{self.spent} times"
            return f"It was started again {times} without coming as far as another checkpoint."
        self.spent += 1
        return None

    def describe(self) -> str:
        """Return a sentence about what happens next."""
        start = "the beginning" if self._saved is None else f"the checkpoint of step {self._saved}"
        return f"Starting again from {start} (try {self.spent} of {self.limit} without progress)."


def run_local(group: Group, restarts: Restarts | None = None, meanwhile: Meanwhile | None = None) -> int:
    """Run a group to its end, started again after failures as often as `restarts` allows.

    Args:
        group: What to start.
        restarts: Never, if None.
        meanwhile: Done here each time while the ranks start, who wait for the word that it leaves; if it raises,
            they are ended.

    Returns:
        0, or 128 + n after signal n.

    Raises:
        ConfigError: The command cannot be started.
        GroupError: A rank failed; has its exit code.
        WorkerError: A rank hung, or was killed by a signal that this process did not get.
    """
    restarts = restarts or Restarts()
    if group.ranks > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        check_loopback()
    signals, attempt = Signals(), group
    with private_folder() as private, signals.handled():
        while True:
            folder = GroupFolder(Path(tempfile.mkdtemp(dir=private)))
            failure = run_once(attempt, folder, signals, meanwhile)
            if failure is None:
                done = all(child.returncode == 0 for child in signals.children)
                return 0 if done else 128 + signals.received[0]
            _show_cursor()
            if signals.received and not failure.stopping and _may_pass(failure):  # it came after the failure
                print(f"warning: {failure.message}", file=sys.stderr)
                return 128 + signals.received[0]
            refusal = "" if failure.stopping else restarts.refusal(failure)
            if refusal is not None:
                lines = f"{failure.message} {refusal}".strip().split("\n")
                raise GroupError(*lines, code=failure.code) if failure.code > 0 else WorkerError(*lines)
            print(f"warning: {failure.message} {restarts.describe()}", file=sys.stderr)
            attempt = replace(group, command=(*group.command, *restarts.again))


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Create a temporary folder that only this user can read, and remove those that killed launchers have left."""
    with temporary_folder(PREFIX) as folder, locks.held(folder / "lock", blocking=False):
        for stale in folder.parent.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError, Timeout):  # another user's, or in use
                if time.time() - stale.lstat().st_mtime > STALE_SECONDS and (stale / "lock").exists():
                    with locks.held(stale / "lock", blocking=False) as locked:
                        if locked:
                            shutil.rmtree(stale)
        yield folder


def _may_pass(failure: Failure) -> bool:
    """Return whether another try may go better after this failure."""
    return failure.code < 0 or failure.code in RESTARTED


def _is_the_same(one: Failure, other: Failure) -> bool:
    """Return whether the same failure recurred at the same step. Kills and unexplained early ends never count."""
    known = other.step >= 0 or other.knows_why
    return (
        known and other.code != KILLED and (one.step, one.code, one.message) == (other.step, other.code, other.message)
    )


def _show_cursor() -> None:
    """Show the cursor again after a killed progress display."""
    if sys.stdout.isatty():
        sys.stdout.flush()
        with contextlib.suppress(OSError):  # the terminal has gone
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # as text it would be shown escaped
