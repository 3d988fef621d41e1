"""The processes of a group: each leads a session of its own, and what it starts ends with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from mnist_dist.errors import ConfigError
from mnist_dist.group.signals import STOPPING
from mnist_dist.machine import die_with_parent

SHELL = "/bin/sh"
GUARD = """
exec 3<&0
{
  while read -r line; do sessions=$line; done
  for session in $sessions; do kill -s KILL -- "-$session"; pkill -KILL -s "$session"; done
} <&3 3<&- &
"""


class Rank(subprocess.Popen[bytes]):
    """A rank of a group.

    Args:
        command: What it runs.
        environment: All of its variables.
        output: Where it prints; None: where this process does.
        whole: Whether a signal goes to all that it has started too, as a terminal would send it; else the command is
            ours, and signals wait until it handles them.

    Raises:
        ConfigError: The command cannot be started.
    """

    def __init__(
        self, command: tuple[str, ...], environment: Mapping[str, str], output: IO[bytes] | None, *, whole: bool
    ) -> None:
        self._whole = whole
        try:
            super().__init__(
                command,
                env=environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # the terminal's Ctrl-C comes here alone, and is passed on once
                preexec_fn=_before_exec(blocked=not whole),
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL in a word
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{command[0]} cannot be started: {reason}.") from None

    def poll(self) -> int | None:
        """Return the exit code once the process has ended; what it has left running is killed then."""
        if self.returncode is not None:
            return self.returncode
        if hasattr(os, "waitid"):  # its number stays taken until it is waited for
            with contextlib.suppress(ChildProcessError):  # somebody else has waited for it
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    return None
                self._send_to_all(signal.SIGKILL)
        code = super().poll()
        if code is not None and not hasattr(os, "waitid"):
            self._send_to_all(getattr(signal, "SIGKILL", signal.SIGTERM))
        return code

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process, or to all that it has started too; nothing where it has ended."""
        if not self._whole or not hasattr(os, "killpg"):
            super().send_signal(sig)
        elif self.poll() is None:
            self._send_to_all(sig)

    def kill(self) -> None:
        """Kill the process and all that it has started."""
        if self.poll() is None:
            if hasattr(os, "killpg"):
                self._send_to_all(signal.SIGKILL)
            else:
                super().kill()

    def suspend(self) -> None:
        """Stop the process, and all that it has started, until `resume`."""
        if self.poll() is None:
            self._send_to_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the suspended ranks."""
        if self.poll() is None:
            self._send_to_all(signal.SIGCONT)

    def _send_to_all(self, number: int) -> None:
        if not hasattr(os, "killpg"):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has none left, or another user's alone
            os.killpg(self.pid, number)
        for pid in _in_other_groups(self.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def _before_exec(*, blocked: bool) -> Callable[[], None] | None:
    """Return what a rank's new process calls before it becomes the command.

    Args:
        blocked: Whether signals that stop a run wait until the command, which is ours, can handle them.
    """
    dies = die_with_parent()
    if not blocked or not hasattr(signal, "pthread_sigmask"):
        return dies

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        if dies is not None:
            dies()

    return in_child


def _in_other_groups(session: int) -> list[int]:
    """Find the processes of a session outside of its first group, as a shell with job control makes them (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # it has ended
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) == session != int(fields[2]):
                found.append(int(folder.name))
    return found


class Guard:
    """A shell that waits beside this process, and kills the sessions of its ranks if it ends without saying so.

    The kernel ends the ranks themselves then (see `die_with_parent`), but not what they have started.
    """

    def __init__(self) -> None:
        self._pipe: int | None = None
        if os.name != "posix" or not Path(SHELL).exists():
            return
        reader, self._pipe = os.pipe()
        try:  # not a child of this process, whose children are the ranks alone
            subprocess.run([SHELL, "-c", GUARD], stdin=reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           cwd="/", start_new_session=True, check=False)  # fmt: skip
        finally:
            os.close(reader)

    def watch(self, ranks: list[Rank]) -> None:
        """Tell the guard which ranks still run."""
        if self._pipe is not None:
            with contextlib.suppress(OSError):  # somebody has killed it
                os.write(self._pipe, " ".join(str(rank.pid) for rank in ranks).encode() + b"\n")

    def close(self) -> None:
        """End the guard: nothing is left to kill."""
        self.watch([])
        if self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
