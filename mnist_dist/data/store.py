"""The store: a data set decoded once into uint8 arrays that every process maps into memory.

A store is a folder of .npy files with an `index.json`, named by a hash of what it was made from: each file's
path, size and time, the picture size and the channels. It is built in a temporary folder under a lock and
renamed, so a half-built one is never seen, in the data folder, else the user's cache, else in memory alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from filelock import FileLock
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import DTypeLike, NDArray

from mnist_dist import heartbeat
from mnist_dist.data.pictures import Chunk, Keep, decode_all, hand_over
from mnist_dist.data.sources import Listing, Pictures
from mnist_dist.errors import DataError

FORMAT = 1
FOLDER = ".mnist-dist"
ANNOUNCE_SECONDS = 5.0
MOMENTS_VALUES = 1 << 18
"""So many pixel values are summed up at once, so that they stay in the processor's cache."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTSUP}

T = TypeVar("T")
Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One split's pictures, as they lie in the store."""

    images: NDArray[np.uint8]
    """`(N, C, H, W)`, memory-mapped copy-on-write where the store is on disk."""
    labels: NDArray[np.int64]
    moments: NDArray[np.uint64]
    """`(N, C, 2)` sum and sum of squares of each picture's pixels, for exact means over any subset."""
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """All splits of a data set, decoded."""

    classes: tuple[str, ...]
    splits: dict[str, Stored] = field(repr=False)
    sha256: str
    """Identity of the data: over classes, pixels and labels of all splits."""
    state: str
    """Where it is and whether it was there already, in words."""


def open_or_build(listing: Listing, image_size: int, channels: int, announce: Announce) -> Store:
    """Open the store of a data folder, or decode the pictures into one.

    Args:
        listing: The pictures.
        image_size: Height and width to decode them to.
        channels: 1 or 3.
        announce: Gets a line of text when decoding starts, while it goes on, and where the store cannot be kept.

    Raises:
        DataError: Pictures cannot be read; the message names them.
    """
    key = _key(listing, image_size, channels)
    name = f"{channels}x{image_size}x{image_size}-{key[:16]}"
    homes = [listing.root / FOLDER, *_user_cache(listing.root)]
    for home in homes:
        store = _open(home / name)
        if store is not None:
            return store
    for home in homes:
        try:
            return _build_locked(listing, home, name, image_size, channels, announce)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            announce(f"The decoded pictures cannot be kept in {home}: {error.strerror}.")
    announce("They are kept in memory instead, and decoded again at the next start.")
    return _decode_to_memory(listing, image_size, channels, announce)


def moments_of(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Sum each picture's pixels and their squares, per channel: `(N, C, H, W)` to `(N, C, 2)`."""
    values = images.reshape(*images.shape[:2], -1)
    moments = np.empty((*values.shape[:2], 2), np.uint64)
    size = max(1, MOMENTS_VALUES // values[0].size) if len(values) else 1
    for start in range(0, len(values), size):
        some = values[start : start + size].astype(np.uint16)
        moments[start : start + size, :, 0] = some.sum(axis=-1, dtype=np.uint64)
        moments[start : start + size, :, 1] = np.square(some, out=some).sum(axis=-1, dtype=np.uint64)
    return moments


def _build_locked(listing: Listing, home: Path, name: str, image_size: int, channels: int, announce: Announce) -> Store:
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        store = _open(home / name)  # another process may have built it while this one waited
        if store is not None:
            return store
        _remove_outdated(home, name)
        temporary = home / f"building-{name}"
        try:
            temporary.mkdir()
            seconds = _build(listing, temporary, image_size, channels, announce, home)
            temporary.rename(home / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    store = _open(home / name, f"decoded in {seconds:.1f} s")
    assert store is not None
    return store


def _build(listing: Listing, folder: Path, image_size: int, channels: int, announce: Announce, home: Path) -> float:
    started = time.monotonic()
    total = sum(len(pictures.files) for pictures in listing.splits.values())
    announce(f"Decoding {total:,} pictures once, into {home}")
    digest = _identity(listing.classes)
    for split, pictures in listing.splits.items():
        moments = []
        path, shape = folder / f"{split}-images.npy", (len(pictures.files), channels, image_size, image_size)
        with _array_file(path, shape) as file:
            write = partial(_write, path, _reserve(file, math.prod(shape)))
            images = np.load(path, mmap_mode="r")
            for chunk in _readable(listing.root, pictures, image_size, channels, announce, write):
                digest.update(images[chunk.start : chunk.start + chunk.pictures].data)
                moments.append(chunk.kept)
        digest.update(pictures.labels.data)
        for name, array in (("labels", pictures.labels), ("moments", np.concatenate(moments))):
            with _array_file(folder / f"{split}-{name}.npy", array.shape, array.dtype) as file:
                file.write(array.tobytes())
        (folder / f"{split}-files.json").write_text(json.dumps(pictures.files), encoding="utf-8")
    index = {
        "format": FORMAT,
        "classes": listing.classes,
        "splits": list(listing.splits),
        "sha256": digest.hexdigest(),
    }
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return time.monotonic() - started


def _reserve(file: IO[bytes], length: int) -> int:
    """Let a file with nothing but a header be so many bytes longer, and say where they begin."""
    file.flush()
    offset = file.tell()
    file.truncate(offset + length)
    return offset


def _write(path: Path, offset: int, start: int, images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Write a chunk to its place in the file, from whichever process has decoded it, and hand over its moments."""
    with path.open("r+b", buffering=0) as file:  # not through a memory map: that cannot say that the disk is full
        file.seek(offset + start * images[0].size)
        rest = images.data.cast("B")
        while rest:
            rest = rest[file.write(rest) :]
    return moments_of(images)


@contextlib.contextmanager
def _array_file(path: Path, shape: tuple[int, ...], dtype: DTypeLike = np.uint8) -> Iterator[IO[bytes]]:
    """Open a .npy file whose values are written afterwards, and sync it at the end."""
    with path.open("wb") as file:
        write_array_header_1_0(file, header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": shape})
        yield file
        file.flush()
        os.fsync(file.fileno())


def _decode_to_memory(listing: Listing, image_size: int, channels: int, announce: Announce) -> Store:
    splits = {}
    for split, pictures in listing.splits.items():
        chunks = _readable(listing.root, pictures, image_size, channels, announce, hand_over)
        images = np.concatenate([chunk.kept for chunk in chunks])
        splits[split] = in_memory(images, pictures.labels, pictures.files)
    return from_arrays(listing.classes, splits, "in memory")


def in_memory(images: NDArray[np.uint8], labels: NDArray[np.int64], files: tuple[str, ...]) -> Stored:
    """Make a split of arrays that are in memory already."""
    return Stored(images=images, labels=labels, moments=moments_of(images), files=files)


def from_arrays(classes: tuple[str, ...], splits: dict[str, Stored], state: str) -> Store:
    """Make a store of splits in memory; its identity is that of the same pictures on disk."""
    digest = _identity(classes)
    for split in splits.values():
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(split.labels.data)
    return Store(classes=classes, splits=splits, sha256=digest.hexdigest(), state=state)


def _readable(
    root: Path, pictures: Pictures, image_size: int, channels: int, announce: Announce, keep: Keep[T]
) -> Iterator[Chunk[T]]:
    """Yield the decoded chunks of a split; raise after its last one if any picture could not be read."""
    unreadable: list[tuple[str, str]] = []
    done = 0
    announced = time.monotonic()
    for chunk in decode_all(root, pictures.files, image_size, channels, keep):
        heartbeat.beat()
        unreadable += chunk.unreadable
        done += chunk.pictures
        if time.monotonic() - announced > ANNOUNCE_SECONDS:
            announced = time.monotonic()
            announce(f"  {done:,} of {len(pictures.files):,}")
        yield chunk
    if unreadable:
        some = "; ".join(f"{root / file} ({reason})" for file, reason in unreadable[:5])
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        count = "1 picture" if len(unreadable) == 1 else f"{len(unreadable)} pictures"
        raise DataError(
            f"{count} cannot be read: {some}{more}. Repair or remove what `mnist-dist data check {root}` lists."
        )


def _open(folder: Path, state: str = "decoded earlier") -> Store | None:
    """Open a whole store, or return None where there is none or it is damaged."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        splits = {split: _open_split(folder, split) for split in index["splits"]}
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return Store(classes=tuple(index["classes"]), splits=splits, sha256=index["sha256"], state=f"{state}, {folder}")


def _open_split(folder: Path, split: str) -> Stored:
    return Stored(
        images=np.load(folder / f"{split}-images.npy", mmap_mode="c"),
        labels=np.load(folder / f"{split}-labels.npy"),
        moments=np.load(folder / f"{split}-moments.npy"),
        files=tuple(json.loads((folder / f"{split}-files.json").read_text(encoding="utf-8"))),
    )


def _key(listing: Listing, image_size: int, channels: int) -> str:
    digest = hashlib.sha256(f"{FORMAT} {image_size} {channels} {listing.classes!r}".encode())
    for split, pictures in listing.splits.items():
        digest.update(f"{split} {len(pictures.files)}\0".encode())
        digest.update("\0".join(pictures.files).encode("utf-8", "surrogateescape"))
        digest.update(pictures.stamps.data)
    return digest.hexdigest()


def _identity(classes: tuple[str, ...]) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(classes).encode())


def _user_cache(root: Path) -> list[Path]:
    """Name the folder for a data folder in the user's cache; none for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.home() raises
    if not Path(base).is_absolute():
        return []
    return [Path(base) / "mnist-dist" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]]


def _remove_outdated(home: Path, name: str) -> None:
    """Remove stores of the same picture size that were made from other files, and what a killed build left.

    The caller holds the lock, so nobody else is building here.
    """
    for pattern in (f"{name.rpartition('-')[0]}-*", "building-*"):
        for path in home.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
