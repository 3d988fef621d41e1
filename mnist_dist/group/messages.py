"""What a launcher and its ranks tell each other: typed records in files that are written whole, each read in one place.

The launcher, which needs no torch, checks whether the images have changed, or decodes them, while its ranks import
torch. It then approves a store, which the ranks open without checking again: that takes milliseconds, whatever the
number of images. A rank that fails says why, since its exit code does not.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mnist_dist.errors import WorkerError
from mnist_dist.group import heartbeat
from mnist_dist.group.place import LAUNCHER, GroupFolder

POLL_SECONDS = 0.003


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """The launcher's word to all ranks: which store to open."""

    folder: str | None
    """Absolute path of the store. `None`: there is none on disk, and each rank reads the images itself."""
    state: str = ""
    """How the store came about, in words."""
    sha256: str = ""
    """Identity of the store's data."""
    cpu_seconds: float = 0.0
    """CPU time that the launcher used for it: the ranks must not count it as another program's."""

    def write(self, group: GroupFolder) -> None:
        """Write the approval for which the ranks wait."""
        _write(group.approval, asdict(self))

    @classmethod
    def wait(cls, group: GroupFolder) -> Approval | None:
        """Wait for the launcher's approval.

        Returns:
            `None` if the launcher approves nothing: then each rank opens the images itself.

        Raises:
            WorkerError: The launcher is gone.
        """
        if not group.approval.exists():
            return None
        launcher = int(os.environ.get(LAUNCHER, os.getppid()))
        while (record := _read(group.approval)) == {}:
            heartbeat.beat()
            time.sleep(POLL_SECONDS)
            if os.getppid() != launcher:  # only if the kernel does not end ranks with their launcher
                raise WorkerError("The launcher of this process is gone.")
        if record is None:  # a later launcher has removed what this one left
            raise WorkerError("The launcher of this process is gone.")
        return cls(**record)


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint:
    """A rank's word to the launcher: why it failed."""

    message: str
    """For the user, of one line or more."""
    seconds: float
    """When it failed, by `time.monotonic`: the first failure is the cause of the others."""

    def write(self, group: GroupFolder, rank: int) -> None:
        """Write the complaint.

        Raises:
            OSError: The temporary folder is full or gone.
        """
        _write(group.complaint(rank), asdict(self))

    @classmethod
    def read(cls, group: GroupFolder, rank: int) -> Complaint | None:
        """Read a rank's complaint; `None` if it has left none."""
        record = _read(group.complaint(rank))
        return cls(**record) if record else None


def _write(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any] | None:
    """Read a record: empty if it is not written yet, `None` if there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    record: dict[str, Any] = json.loads(text) if text else {}
    return record
