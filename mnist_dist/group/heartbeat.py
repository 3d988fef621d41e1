"""Heartbeats: the main loop of each rank counts in shared memory, and its launcher reads the counts.

A beat is made by the code that does the work, never by a thread of its own: a rank that hangs falls silent.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from mnist_dist.errors import ConfigError

_RECORD = struct.Struct("=Qqq")
_WAITING = 1 << 40
_memory: mmap.mmap | None = None
_offset = 0
_beats = 0
_step = -1
_phase = 0


@dataclass(frozen=True, slots=True)
class Pulse:
    """How far a rank has come."""

    beats: int
    step: int
    """Steps of the run that are done; -1 until the first one that this process has done."""
    phase: int
    """Beats since that step, or many while it waits for rank 0."""

    @property
    def place(self) -> tuple[int, int]:
        """How far the rank has come: the one that the others wait for has the least."""
        return self.step, self.phase


def start(path: Path, rank: int) -> None:
    """Publish this process's beats in the file of a `Pulses`.

    Raises:
        ConfigError: It has no place for this rank.
    """
    global _memory, _offset
    offset = rank * _RECORD.size
    if path.stat().st_size < offset + _RECORD.size:
        raise ConfigError(f"{path.parent} is of a group without a rank {rank}: unset the MNIST_DIST_* variables.")
    with path.open("r+b") as file:
        _memory = mmap.mmap(file.fileno(), 0)
    _offset = offset


def beat(step: int | None = None) -> None:
    """Signal that this process works; costs less than a microsecond, and almost nothing without a launcher.

    Args:
        step: Steps done, where one was just finished.
    """
    global _beats, _step, _phase
    if _memory is not None:
        _beats += 1
        _step, _phase = (_step, _phase + 1) if step is None else (step, 0)
        _RECORD.pack_into(_memory, _offset, _beats, _step, _phase)


def wait() -> None:
    """Signal that this rank waits for rank 0, until its next beat."""
    global _beats
    if _memory is not None:
        _beats += 1
        _RECORD.pack_into(_memory, _offset, _beats, _step, _WAITING)


class Pulses:
    """The launcher's side: the pulses of all ranks, in a file that they share."""

    def __init__(self, path: Path, ranks: int) -> None:
        path.write_bytes(_RECORD.pack(0, -1, 0) * ranks)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def read(self) -> list[Pulse]:
        """Read the pulse of every rank."""
        return [Pulse(*record) for record in _RECORD.iter_unpack(self._memory)]

    def close(self) -> None:
        """Close the file."""
        self._memory.close()
