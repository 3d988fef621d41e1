"""File locks that die with their process, and what happens on a disk that has none."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from mnist_dist.disk.storage import obstacle

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What disks without locks answer, such as NFS without its lock daemon or Lustre mounted without flock."""


def take(path: Path, *, blocking: bool = True) -> FileLock:
    """Lock a file, which is created if necessary, until the lock is released or the process dies.

    Args:
        path: The file.
        blocking: Wait for the process that holds it.

    Returns:
        The lock; its `is_locked` is false on a disk without locks. A lock file that merely exists would outlive a
        killed process there, and block its resume on another machine.

    Raises:
        Timeout: Another process holds it, and `blocking` is false.
        OSError: The file cannot be opened, or is a link, a folder, a pipe or a device.
    """
    kind = obstacle(path, folder=False)
    if kind is not None:
        raise OSError(errno.ELOOP, f"it is a {kind}, where a lock file must be", str(path))
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=blocking)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock


@contextlib.contextmanager
def held(path: Path, *, blocking: bool = True) -> Iterator[bool]:
    """Hold a lock as `take` does while a block runs; the value is whether it is locked."""
    lock = take(path, blocking=blocking)
    try:
        yield lock.is_locked
    finally:
        lock.release()
