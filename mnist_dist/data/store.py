"""The store of a data folder: reused if it is up to date, otherwise built, with each image decoded once.

A store is a folder named by its image size, channels, and a hash of its content. It is built in a temporary folder
under a lock and renamed, so a half-built one is never seen, in the data folder, else the user's cache, else in memory
alone. Before it is used, its checksums are verified, and its files compared with those that it was made from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from filelock import Timeout
from numpy.typing import NDArray

from mnist_dist.data.decode import Chunk, Decoding, Keep, decode_all, hand_over
from mnist_dist.data.files import DamagedStoreError, Sums, array_file, remove, write_array, write_sealed
from mnist_dist.data.formats import look_at
from mnist_dist.data.freshness import Memory, agrees, look, recall, remember, spread
from mnist_dist.data.scan import OWN_FOLDER, ImageFiles, Listing, scan, unreadable
from mnist_dist.data.store_files import (
    DTYPES,
    FORMAT,
    INDEX,
    Names,
    Store,
    array_path,
    from_arrays,
    identity,
    in_memory,
    moments_of,
    open_folder,
    verify,
)
from mnist_dist.disk import locks
from mnist_dist.errors import typed
from mnist_dist.group import heartbeat

ANNOUNCE_SECONDS = 5.0
SAMPLED = 32
"""Headers that are read to see what decoding loses."""
MUCH_LARGER = 4
"""From so many times the configured size on, a line says that images lose most of their pixels."""
WARNED = 5
"""Decoders' warnings that are announced; `data check` lists all."""

T = TypeVar("T")
Announce = Callable[[str], None]


def open_or_build(root: Path, decoding: Decoding, announce: Announce, *, follow_links: bool = False) -> Store:
    """Open the store of a data folder, or decode the images into one.

    Args:
        root: The data folder, laid out as `sources.scan` has it.
        decoding: What the images are decoded to.
        announce: Gets a line of text when decoding starts, while it goes on, where a store is damaged, and where the
            store cannot be kept.
        follow_links: Follow links that lead out of the data folder.

    Raises:
        DataError: Folders are missing or images cannot be read; the message names them.
    """
    found: list[tuple[Store, Memory | None]] = []
    unusable: dict[Path, OSError] = {}
    homes = [root / OWN_FOLDER, *_user_cache(root)]
    for home in homes:
        try:
            for store, memory in _whole_stores(home, _kind(decoding), announce, home / "lock"):
                if memory is not None and (follow_links or not memory.leads_out):
                    looked = look(root, store, memory)
                    if looked is not None:
                        return replace(store, state=f"{store.state}{looked}")
                found.append((store, memory))
        except OSError as error:  # unreadable is not damaged: what is there is left alone
            unusable[home] = error
    listing = scan(root, follow_links=follow_links)
    for store, memory in found:
        if _agrees(listing, store, memory, decoding, announce):
            assert store.folder is not None
            with contextlib.suppress(OSError, Timeout), locks.held(store.folder.parent / "lock", blocking=False):
                remember(listing, store.folder)
            return store
    if (loss := what_is_lost(listing, decoding)) is not None:
        announce(loss)
    for home in homes:
        try:
            if home in unusable:
                raise unusable[home]
            return _build_locked(listing, home, decoding, announce)
        except OSError as error:
            announce(f"The decoded images cannot be kept in {home}: {error.strerror or error}.")
    announce("They are kept in memory instead, and decoded again at the next start.")
    return _decode_to_memory(listing, decoding, announce)


def what_is_lost(listing: Listing, decoding: Decoding) -> str | None:
    """Return a sentence if images lose their colour or most of their pixels, judged by some headers; else `None`."""
    files = listing.splits["train"].files
    chosen = [files[row] for row in spread(len(files), SAMPLED, len(files)).tolist()]
    seen = [look_at(listing.root / file, max_megapixels=decoding.max_megapixels) for file in chosen]
    found = [shape for shape in seen if shape is not None]
    if not found:
        return None
    width, height = (statistics.median_low(column) for column in ([w for w, _, _ in found], [h for _, h, _ in found]))
    size, colour = decoding.image_size, sum(is_colour for _, _, is_colour in found) > len(found) / 2
    to_gray, to_small = colour and decoding.channels == 1, min(width, height) > MUCH_LARGER * size
    if not to_gray and not to_small:
        return None
    keys = ["data.channels=3"] * to_gray + ["a larger data.image_size"] * to_small
    become = f"{'gray ' * to_gray}{size}x{size}"
    return (
        f"The images are {'in colour' if colour else 'gray'}, {width}x{height} (median), and are converted to "
        f"{become}: to keep more, set {' and '.join(keys)}."
    )


def _kind(decoding: Decoding) -> str:
    return "x".join(map(str, decoding.shape))


def _whole_stores(
    home: Path, kind: str, announce: Announce, lock: Path | None = None
) -> Iterator[tuple[Store, Memory | None]]:
    """Yield the undamaged stores of an image size, each with its record of the files.

    Args:
        home: Of the stores.
        kind: How their names begin.
        announce: Gets a line where one is damaged.
        lock: Of those who write there; None: the caller holds it.

    Raises:
        OSError: The disk or its permissions do not let them be read.
    """
    if home.is_symlink() or not home.is_dir():
        return
    for folder in sorted(home.glob(f"{kind}-*")):
        try:
            store = open_folder(folder)
            if store is None:
                continue
            verify(store)
        except DamagedStoreError as error:
            announce(f"The decoded images in {folder} are damaged ({error}).")
            continue
        try:
            memory = _recall(store, lock)
        except DamagedStoreError as error:
            announce(f"What {folder} knows of the files is damaged ({error}): all images are compared with it.")
            memory = None
        yield store, memory


def _recall(store: Store, lock: Path | None) -> Memory:
    """Recall what a store remembers; if another process is writing it down just now, wait for it.

    Raises:
        DamagedStoreError: A file is missing or damaged.
    """
    try:
        return recall(store)
    except DamagedStoreError:
        if lock is None:
            raise
        with contextlib.suppress(OSError), locks.held(lock):  # the disk may be read-only
            pass
        return recall(store)


def _agrees(listing: Listing, store: Store, memory: Memory | None, decoding: Decoding, announce: Announce) -> bool:
    """Return whether a store still matches its files."""
    progress = Announcer(announce)

    def say(left: int) -> None:
        progress(f"Comparing images with the store: {left:,} left")

    return agrees(listing, store, memory, decoding, say)


def _build_locked(listing: Listing, home: Path, decoding: Decoding, announce: Announce) -> Store:
    if home.is_symlink():
        raise OSError(errno.ELOOP, "it is a link, and nothing is written through links in a data folder")
    home.mkdir(parents=True, exist_ok=True)
    kind = _kind(decoding)
    with locks.held(home / "lock") as locked:
        for store, memory in _whole_stores(home, kind, lambda line: None):
            if _agrees(listing, store, memory, decoding, announce):
                assert store.folder is not None
                with contextlib.suppress(OSError):  # the disk may be read-only
                    remember(listing, store.folder)
                return store  # another process has built it while this one waited
        if locked:  # without locks, others may be building
            for path in home.glob("building-*"):
                remove(path)
        temporary = home / f"building-{kind}-{os.getpid()}-{time.time_ns():x}"
        try:
            temporary.mkdir()
            seconds, sha256 = _build(listing, temporary, decoding, announce, home)
            folder = home / f"{kind}-{sha256[:16]}"
            remove(folder)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for path in set(home.glob(f"{kind}-*")) - {folder}:  # not before: an image might not have been readable
            remove(path)
    try:
        built = open_folder(folder, f"decoded in {seconds:.1f} s")
    except DamagedStoreError as error:
        raise OSError(errno.EIO, f"what was written there comes back damaged ({error})") from None
    assert built is not None
    return built


def _build(listing: Listing, folder: Path, decoding: Decoding, announce: Announce, home: Path) -> tuple[float, str]:
    """Decode all images into a folder; returns the seconds it took and the identity of the data."""
    started = time.monotonic()
    total = sum(len(pictures.files) for pictures in listing.splits.values())
    announce(f"Decoding {total:,} images once, into {home}")
    digest = identity(listing.classes)
    splits = {}
    for split, pictures in listing.splits.items():
        moments, sums = [], Sums()
        path, shape = array_path(folder, split, "images"), (len(pictures.files), *decoding.shape)
        with array_file(path, shape, DTYPES["images"]) as file:
            write = partial(_write, path, _reserve(file, math.prod(shape)))
            images = np.load(path, mmap_mode="r")
            for chunk in _readable(listing.root, pictures, decoding, announce, write):
                written = images[chunk.start : chunk.start + chunk.pictures].data
                digest.update(written)
                sums.update(written)
                moments.append(chunk.kept)
        digest.update(pictures.labels.data)
        names = Names.of(pictures.files)
        arrays: dict[str, NDArray[Any]] = {
            "labels": pictures.labels,
            "moments": np.concatenate(moments),
            "names": names.text,
            "ends": names.ends,
        }
        crc32 = {name: write_array(array_path(folder, split, name), array) for name, array in arrays.items()}
        splits[split] = {
            "images": len(pictures.files),
            "names": len(names.text),
            "totals": arrays["moments"].sum(axis=0).tolist(),
            "crc32": {"images": sums.values} | crc32,
        }
    remember(listing, folder)
    index = {
        "format": FORMAT,
        "channels": decoding.channels,
        "image_size": decoding.image_size,
        "classes": listing.classes,
        "splits": splits,
        "sha256": digest.hexdigest(),
    }
    write_sealed(folder / INDEX, index)
    return time.monotonic() - started, digest.hexdigest()


def _reserve(file: IO[bytes], length: int) -> int:
    """Extend a file that holds only a header by so many bytes, and return where they begin."""
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


def _decode_to_memory(listing: Listing, decoding: Decoding, announce: Announce) -> Store:
    splits = {}
    for split, pictures in listing.splits.items():
        chunks = _readable(listing.root, pictures, decoding, announce, hand_over)
        images = np.concatenate([chunk.kept for chunk in chunks])
        splits[split] = in_memory(images, pictures.labels, pictures.files)
    return from_arrays(listing.classes, splits, "in memory")


def _readable(
    root: Path, pictures: ImageFiles, decoding: Decoding, announce: Announce, keep: Keep[T]
) -> Iterator[Chunk[T]]:
    """Yield the decoded chunks of a split; raise after its last one if any image could not be read."""
    bad: list[tuple[str, str]] = []
    done = warned = 0
    progress = Announcer(announce)
    for chunk in decode_all(root, pictures.files, decoding, keep):
        bad += [(f"{root / file}", reason) for file, reason in chunk.unreadable]
        for file, text in list(chunk.warnings.items())[: max(0, WARNED - warned)]:
            announce(f"warning: {root / file}: {text}")
        warned += len(chunk.warnings)
        done += chunk.pictures
        progress(f"  {done:,} of {len(pictures.files):,}")
        yield chunk
    if warned > WARNED:
        announce(f"warning: {warned - WARNED:,} more images, which {typed('data', 'check', root)} lists.")
    if bad:
        raise unreadable(root, "image", bad)


class Announcer:
    """Announces a line every few seconds, with a heartbeat each time."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._last = time.monotonic()

    def __call__(self, line: str) -> None:
        """Announce a line, if the last one was long ago."""
        heartbeat.beat()
        if time.monotonic() - self._last > ANNOUNCE_SECONDS:
            self._last = time.monotonic()
            self._announce(line)


def _user_cache(root: Path) -> list[Path]:
    """Name the folder for a data folder in the user's cache; none for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - Path.home() raises
    if not Path(base).is_absolute():
        return []
    return [Path(base) / "mnist-dist" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]]
