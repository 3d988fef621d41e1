"""Decode the images of a data set to arrays of one size, in parallel."""

from __future__ import annotations

import contextlib
import errno
import math
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from mnist_dist.data.formats import MAX_MEGAPIXELS, UnreadableError, decode, decoders
from mnist_dist.errors import DataError, DeviceMemoryError, MnistDistError, WorkerError
from mnist_dist.fast.png import decode_plain
from mnist_dist.machine import allowed_cpus, die_with_parent, start_helper

CHUNK = 128
PLAIN_CHUNK = 2048
CHUNK_BYTES = 1 << 25
"""The most images and bytes in a chunk, which one process decodes. The filters of plain PNG files are undone for a
whole chunk at once; other images may take a while each."""
CHUNKS_AHEAD = 8
"""Chunks per process that are decoded ahead of the one that is read."""
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, getattr(signal, "SIGBUS", signal.SIGSEGV))
"""Signals that end a process whose own code crashed."""

T = TypeVar("T")
Keep = Callable[[int, NDArray[np.uint8]], T]
"""Called in the decoding process with the index of a chunk's first image and its `(n, C, H, W)` pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """What images are decoded to."""

    image_size: int
    """Height and width of the result; an image is stretched to it."""
    channels: int
    """1 for grayscale (ITU-R 601 luma), 3 for colour."""
    max_megapixels: int = MAX_MEGAPIXELS
    """Larger images are refused before they are decoded."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of each image."""
        return self.channels, self.image_size, self.image_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk(Generic[T]):
    """Consecutive images, decoded."""

    start: int
    """The first of them."""
    pictures: int
    kept: T
    unreadable: list[tuple[str, str]]
    """A (file, reason) pair for each image that cannot be read and is left black."""
    warnings: dict[str, str]
    """Warnings of decoders about images that they could read, by file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunks(Generic[T]):
    """All images, cut into chunks; every process has a copy, and shares `progress`."""

    root: str
    files: tuple[str, ...]
    decoding: Decoding
    keep: Keep[T]
    size: int
    progress: MutableSequence[int]
    """Two values a chunk: its process, and 1 + the index of its current image (0: not started, or done)."""
    large: AbstractContextManager[object]
    """Held by the process that has a large image in memory."""

    def __len__(self) -> int:
        return math.ceil(len(self.files) / self.size)

    def decode(self, chunk: int) -> Chunk[T]:
        """Decode one chunk and keep what `keep` returns."""
        try:
            return self._decode(chunk)
        except MemoryError:
            file = self.files[self.progress[2 * chunk + 1] - 1]
            raise DeviceMemoryError(
                f"Memory ran out while {self.root}/{file} and those after it were decoded: free some, or decode on "
                f"fewer CPUs at once (taskset)."
            ) from None

    def _decode(self, chunk: int) -> Chunk[T]:
        start = chunk * self.size
        files = self.files[start : start + self.size]
        paths = [f"{self.root}/{file}" for file in files]
        self.progress[2 * chunk : 2 * chunk + 2] = [os.getpid(), 1 + start]
        image_size, channels = self.decoding.image_size, self.decoding.channels
        unreadable: list[tuple[str, str]] = []
        warnings: dict[str, str] = {}
        images = np.zeros((len(files), *self.decoding.shape), np.uint8)
        plain, pixels = decode_plain(paths, image_size, channels)
        images[plain] = pixels
        for row in sorted(set(range(len(files))).difference(plain.tolist())):
            self.progress[2 * chunk + 1] = 1 + start + row
            warned: list[str] = []
            try:
                images[row] = decode(
                    paths[row],
                    image_size,
                    channels,
                    max_megapixels=self.decoding.max_megapixels,
                    warn=warned.append,
                    alone=self.large,
                )
            except UnreadableError as error:
                unreadable.append((files[row], error.reason))
            if warned:
                warnings[files[row]] = "; ".join(warned)
        kept = self.keep(start, images)
        self.progress[2 * chunk + 1] = 0
        return Chunk(start=start, pictures=len(files), kept=kept, unreadable=unreadable, warnings=warnings)

    def had(self, processes: set[int]) -> list[str]:
        """Return the files that some processes were decoding, or all processes if none is given."""
        at = zip(self.progress[::2], self.progress[1::2], strict=True)
        return [
            f"{self.root}/{self.files[file - 1]}" for pid, file in at if file and (pid in processes or not processes)
        ]


def decode_all(root: Path, files: tuple[str, ...], decoding: Decoding, keep: Keep[T]) -> Iterator[Chunk[T]]:
    """Decode many images with all CPUs, in order, a chunk at a time.

    On Linux, worker processes decode. If an image crashes one of them, the error still names the image.

    Args:
        root: What the files are relative to.
        files: The images.
        decoding: What they are decoded to.
        keep: It is called where a chunk was decoded, and what it returns is pickled and travels here.

    Raises:
        DataError: An image made its decoder crash.
        DeviceMemoryError: Memory ran out, or the system killed a process, most likely for its memory.
        StorageError: The disk or its permissions do not let an image be read now.
    """
    image_size, channels = decoding.image_size, decoding.channels
    plain, _ = decode_plain([f"{root}/{file}" for file in files[:1]], image_size, channels)  # as the others likely are
    if not len(plain):
        decoders()
    most = PLAIN_CHUNK if len(plain) else CHUNK
    size = max(1, min(most, CHUNK_BYTES // math.prod(decoding.shape)))
    numbers = 2 * math.ceil(len(files) / size)
    chunks = _Chunks(
        root=str(root),
        files=files,
        decoding=decoding,
        keep=keep,
        size=size,
        progress=multiprocessing.RawArray("q", numbers) if sys.platform == "linux" else [0] * numbers,
        large=multiprocessing.Lock() if sys.platform == "linux" else contextlib.nullcontext(),
    )
    yield from _in_processes(chunks) if sys.platform == "linux" else map(chunks.decode, range(len(chunks)))


def discard(start: int, images: NDArray[np.uint8]) -> None:
    """Keep nothing of a chunk."""


def hand_over(start: int, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep a chunk's pixels."""
    return images


_chunks: _Chunks[Any]
"""The chunks that a process of the pool decodes."""


def _in_processes(chunks: _Chunks[T]) -> Iterator[Chunk[T]]:
    others = set(multiprocessing.active_children())
    fork = multiprocessing.get_context("fork")
    processes = max(1, min(allowed_cpus(), len(chunks)))  # there may be nothing to decode
    workers: set[multiprocessing.process.BaseProcess] = set()
    submitted: deque[Future[Chunk[T]]] = deque()
    try:
        with ProcessPoolExecutor(processes, fork, _begin, (die_with_parent(), chunks)) as pool:
            pool.submit(os.getpid)  # starts them all
            workers = set(multiprocessing.active_children()) - others
            try:
                for chunk in range(len(chunks)):
                    submitted.append(pool.submit(_decode_chunk, chunk))
                    if len(submitted) > CHUNKS_AHEAD * processes:
                        yield submitted.popleft().result()
                while submitted:
                    yield submitted.popleft().result()
            except BaseException:  # a signal or an error: the chunks that are being decoded are dropped
                for worker in workers:
                    worker.terminate()
                raise
    except BrokenProcessPool:
        raise _broken(chunks, {worker.pid or 0: worker.exitcode or 0 for worker in workers}) from None
    except OSError as error:
        if error.errno not in (errno.ENOMEM, errno.EAGAIN):
            raise
        raise DeviceMemoryError(
            f"The system cannot start a process to decode {chunks.root} ({error.strerror}): free memory, or decode on "
            f"fewer CPUs at once (taskset)."
        ) from None


def _begin(ends_with_parent: Callable[[], None] | None, chunks: _Chunks[Any]) -> None:
    global _chunks
    start_helper(ends_with_parent)
    _chunks = chunks


def _decode_chunk(number: int) -> Chunk[Any]:
    return _chunks.decode(number)


def _broken(chunks: _Chunks[T], exits: dict[int, int]) -> MnistDistError:
    """Return the error for a pool whose process ended.

    Args:
        chunks: What it was decoding.
        exits: Its processes with their exit codes. When one has ended, the pool ends the others with SIGTERM.
    """
    killed = {pid: -code for pid, code in exits.items() if code < 0 and code != -signal.SIGTERM}
    pictures = chunks.had(set(killed)) or [f"images of {chunks.root}"]
    some = ", ".join(pictures[:3]) + (f" and {len(pictures) - 3} more" if len(pictures) > 3 else "")
    number = min(killed.values(), default=0)
    if number in CRASHES:
        return DataError(f"{some} made the decoder crash ({signal.Signals(number).name}): repair or remove it.")
    if number == signal.SIGKILL:
        return DeviceMemoryError(
            f"The system killed a process that was decoding {some} (SIGKILL), most likely because memory ran out: free "
            f"some, decode on fewer CPUs at once (taskset), or make large images smaller."
        )
    return WorkerError(f"A process that was decoding {some} was ended from outside: start the command again.")
