"""One tree of the errors that a user can cause or meet, each kind with its exit code.

A message says what is wrong, where, and what to do. Anything else that is raised is a bug and exits with 1.
"""

from __future__ import annotations

import errno
from typing import Any

from mnist_dist.errors.shell import join


def typed(*words: object) -> str:
    """Return a command of this program as a message quotes it, e.g. "`mnist-dist resume 'my run'`"."""
    return f"`{join(['mnist-dist', *map(str, words)])}`"


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
    """The images, or the folders they lie in, cannot be used."""

    exit_code = 3


class CheckpointError(MnistDistError):
    """A checkpoint is missing, damaged, or of another model or data set."""

    exit_code = 4


class DamagedError(CheckpointError):
    """A checkpoint's files are not those that were written; one that cannot be read now is a StorageError."""


class StorageError(MnistDistError):
    """A disk is full or read-only, or a file on it cannot be read now."""

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


_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room below your quota",
    errno.EFBIG: "raise the limit of a file's size (`ulimit -f`), or take a disk that holds larger files",
    errno.EROFS: "mount it for writing",
    errno.EACCES: "its permissions must let you read and write it",
    errno.EPERM: "its permissions must let you read and write it",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "free memory",
    errno.EIO: "the disk or its connection fails: look at the system's log",
    errno.ESTALE: "the network disk has lost it: mount it again",
    errno.ENXIO: "the device is gone",
    errno.ENODEV: "the device is gone",
    errno.ETIMEDOUT: "the network disk does not answer",
    errno.ENOTDIR: "a file stands where a folder must be",
    errno.EISDIR: "a folder stands where a file must be",
    errno.ENOTEMPTY: "a folder stands where a file must be",
    errno.ENAMETOOLONG: "choose a shorter name",
}

STORAGE = frozenset(_REMEDIES) - {errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.ENOMEM}
"""Numbers of system errors that come from a disk, whatever file they name or do not name."""


def storage_error(error: OSError) -> StorageError:
    """Return what a failing disk raised as an error of this tree: the file, the reason, and what to do."""
    remedy = _REMEDIES.get(error.errno or 0)
    return StorageError(f"{error.filename or 'The disk'}: {error.strerror or error}{f': {remedy}' if remedy else ''}.")


def to_json(error: MnistDistError) -> list[Any]:
    """Return an error as JSON, for another process."""
    return [type(error).__name__, error.exit_code, *map(str, error.args)]


def from_json(record: list[Any]) -> MnistDistError:
    """Return the error that `to_json` wrote: of the same kind, with the same message and exit code."""
    name, exit_code, *lines = record
    kind: type[MnistDistError] = globals().get(name, MnistDistError)
    error = kind.__new__(kind, *lines)
    error.exit_code = exit_code
    return error
