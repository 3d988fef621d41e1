"""The store of a data folder: found where it is up to date, else built, with each picture decoded once.

A store is a folder named by a hash of what it was made from: each file's path, size and time, the picture size and
the channels. It is built in a temporary folder under a lock and renamed, so a half-built one is never seen, in the
data folder, else the user's cache, else in memory alone.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from filelock import FileLock
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import DTypeLike, NDArray

from mnist_dist import heartbeat
from mnist_dist.data.freshness import look, remember
from mnist_dist.data.pictures import Chunk, Decoding, Keep, decode_all, hand_over
from mnist_dist.data.sources import Listing, Pictures, scan
from mnist_dist.data.stored import (
    FORMAT,
    INDEX,
    Store,
    array_path,
    from_arrays,
    identity,
    in_memory,
    moments_of,
    open_folder,
)
from mnist_dist.errors import DataError, typed

FOLDER = ".mnist-dist"
ANNOUNCE_SECONDS = 5.0
WARNED = 5
"""Decoders' warnings that are announced; `data check` lists all."""
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTSUP}

T = TypeVar("T")
Announce = Callable[[str], None]


def open_or_build(root: Path, decoding: Decoding, announce: Announce) -> Store:
    """Open the store of a data folder, or decode the pictures into one.

    Args:
        root: The data folder, laid out as `sources.scan` has it.
        decoding: What the pictures are decoded to.
        announce: Gets a line of text when decoding starts, while it goes on, and where the store cannot be kept.

    Raises:
        DataError: Folders are missing or pictures cannot be read; the message names them.
    """
    homes = [root / FOLDER, *_user_cache(root)]
    kind = f"{decoding.channels}x{decoding.image_size}x{decoding.image_size}"
    return _up_to_date(root, homes, kind) or _listed(scan(root), homes, kind, decoding, announce)


def _up_to_date(root: Path, homes: list[Path], kind: str) -> Store | None:
    """Find a store that agrees with the data folder as it is now, without listing that."""
    for home in homes:
        for folder in home.glob(f"{kind}-*"):
            store = open_folder(folder)
            if store is not None and (found := look(root, store)) is not None:
                return replace(store, state=f"{store.state}{found}")
    return None


def _listed(listing: Listing, homes: list[Path], kind: str, decoding: Decoding, announce: Announce) -> Store:
    """Open the store of these very files, or build it."""
    name = f"{kind}-{_key(listing, decoding)[:16]}"
    for home in homes:
        store = open_folder(home / name)
        if store is not None:
            with contextlib.suppress(OSError):  # the disk may be read-only
                remember(listing, home / name)  # folders may have changed without any of their pictures
            return store
    for home in homes:
        try:
            return _build_locked(listing, home, name, decoding, announce)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            announce(f"The decoded pictures cannot be kept in {home}: {error.strerror}.")
    announce("They are kept in memory instead, and decoded again at the next start.")
    return _decode_to_memory(listing, decoding, announce)


def _build_locked(listing: Listing, home: Path, name: str, decoding: Decoding, announce: Announce) -> Store:
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        store = open_folder(home / name)  # another process may have built it while this one waited
        if store is not None:
            return store
        _remove_outdated(home, name)
        temporary = home / f"building-{name}"
        try:
            temporary.mkdir()
            seconds = _build(listing, temporary, decoding, announce, home)
            temporary.rename(home / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    store = open_folder(home / name, f"decoded in {seconds:.1f} s")
    assert store is not None
    return store


def _build(listing: Listing, folder: Path, decoding: Decoding, announce: Announce, home: Path) -> float:
    started = time.monotonic()
    total = sum(len(pictures.files) for pictures in listing.splits.values())
    announce(f"Decoding {total:,} pictures once, into {home}")
    digest = identity(listing.classes)
    splits = {}
    for split, pictures in listing.splits.items():
        moments = []
        path, shape = array_path(folder, split, "images"), (len(pictures.files), *decoding.shape)
        with _array_file(path, shape) as file:
            write = partial(_write, path, _reserve(file, math.prod(shape)))
            images = np.load(path, mmap_mode="r")
            for chunk in _readable(listing.root, pictures, decoding, announce, write):
                digest.update(images[chunk.start : chunk.start + chunk.pictures].data)
                moments.append(chunk.kept)
        digest.update(pictures.labels.data)
        arrays = {"labels": pictures.labels, "moments": np.concatenate(moments), "stamps": pictures.stamps}
        for name, array in (arrays | _names(pictures.files)).items():
            with _array_file(array_path(folder, split, name), array.shape, array.dtype) as file:
                file.write(array.data)
        splits[split] = {"totals": arrays["moments"].sum(axis=0).tolist()}
    remember(listing, folder)
    index = {"format": FORMAT, "classes": listing.classes, "splits": splits, "sha256": digest.hexdigest()}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return time.monotonic() - started


def _names(files: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Lay file names out as `stored.Names` reads them."""
    encoded = [os.fsencode(file) for file in files]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return {"names": np.frombuffer(b"".join(encoded), np.uint8), "ends": ends}


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


def _decode_to_memory(listing: Listing, decoding: Decoding, announce: Announce) -> Store:
    splits = {}
    for split, pictures in listing.splits.items():
        chunks = _readable(listing.root, pictures, decoding, announce, hand_over)
        images = np.concatenate([chunk.kept for chunk in chunks])
        splits[split] = in_memory(images, pictures.labels, pictures.files)
    return from_arrays(listing.classes, splits, "in memory")


def _readable(
    root: Path, pictures: Pictures, decoding: Decoding, announce: Announce, keep: Keep[T]
) -> Iterator[Chunk[T]]:
    """Yield the decoded chunks of a split; raise after its last one if any picture could not be read."""
    unreadable: list[tuple[str, str]] = []
    done = warned = 0
    announced = time.monotonic()
    for chunk in decode_all(root, pictures.files, decoding, keep):
        heartbeat.beat()
        unreadable += chunk.unreadable
        for file, text in list(chunk.warnings.items())[: max(0, WARNED - warned)]:
            announce(f"warning: {root / file}: {text}")
        warned += len(chunk.warnings)
        done += chunk.pictures
        if time.monotonic() - announced > ANNOUNCE_SECONDS:
            announced = time.monotonic()
            announce(f"  {done:,} of {len(pictures.files):,}")
        yield chunk
    if warned > WARNED:
        announce(f"warning: {warned - WARNED:,} more pictures, which `mnist-dist data check {root}` lists.")
    if unreadable:
        some = "; ".join(f"{root / file} ({reason})" for file, reason in unreadable[:5])
        more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
        count = "1 picture" if len(unreadable) == 1 else f"{len(unreadable)} pictures"
        raise DataError(
            f"{count} cannot be read: {some}{more}. Repair or remove what {typed('data', 'check', root)} lists."
        )


def _key(listing: Listing, decoding: Decoding) -> str:
    digest = hashlib.sha256(f"{FORMAT} {decoding.image_size} {decoding.channels} {listing.classes!r}".encode())
    for split, pictures in listing.splits.items():
        digest.update(f"{split} {len(pictures.files)}\0".encode())
        digest.update("\0".join(pictures.files).encode("utf-8", "surrogateescape"))
        digest.update(pictures.stamps.data)
    return digest.hexdigest()


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
