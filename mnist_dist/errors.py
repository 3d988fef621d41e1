"""One tree of the errors that a user can cause or meet, each kind with its exit code.

A message says what is wrong, where, and what to do. Anything else that is raised is a bug and exits with 1.
"""

from __future__ import annotations

import shlex


def typed(*words: object) -> str:
    """Return a command of this program as a message quotes it, e.g. "`mnist-dist resume 'my run'`"."""
    return f"`{shlex.join(['mnist-dist', *map(str, words)])}`"


class MnistDistError(Exception):
    """What every error of this package derives from; `exit_code` is the command's.

    Its arguments are the lines of its message: most have one. A line break inside a line is a name's own.
    """

    exit_code = 1

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class ConfigError(MnistDistError):
    """The command line, the config or the environment asks for what cannot be."""

    exit_code = 2


class DataError(MnistDistError):
    """The pictures, or the folders they lie in, cannot be used."""

    exit_code = 3


class CheckpointError(MnistDistError):
    """A checkpoint is missing, damaged, or of another model or data set."""

    exit_code = 4


class StorageError(MnistDistError):
    """A disk is full or read-only."""

    exit_code = 5


class StoppedError(MnistDistError):
    """A signal stopped the run, and a checkpoint was saved; exits with 128 + the signal's number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class NonFiniteError(MnistDistError):
    """The loss or a gradient is infinite or not a number."""

    exit_code = 6


class WorkerError(MnistDistError):
    """A process of the group died or hung."""

    exit_code = 7


class GroupError(MnistDistError):
    """A rank of a group failed; exits with the rank's code."""

    def __init__(self, *lines: str, code: int) -> None:
        super().__init__(*lines)
        self.exit_code = code


class DeviceMemoryError(MnistDistError):
    """The memory of the device, or of this machine, does not hold what is needed."""

    exit_code = 8
