"""Check whether a store still matches its images, without decoding them if the file system can tell.

A store remembers the times of every folder below the splits, and size, times and inode of every file. What is added,
removed or renamed changes its folder's times; what is overwritten in place changes its own. Of very many files only
only some are checked, evenly spread: rewriting a data set of millions in place touches more than a few.

Where the file system says that a file may be another one (restored by tar, moved, on a disk that was mounted anew), or
cannot say (changed just before it was listed, within one tick of the clock), the pixels decide.
"""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from mnist_dist.data.decode import Decoding, decode_all, hand_over
from mnist_dist.data.files import DamagedStoreError, map_array, put, read_sealed, write_array, write_sealed
from mnist_dist.data.scan import Listing, file_stamp
from mnist_dist.data.store_files import DTYPES, Names, Sealed, Store, Text, array_path
from mnist_dist.data.walk import folder_stamp

MOST_FILES = 200_000
"""The most files that are checked."""
FOLDERS = "folders.json"
SIZE, MODIFIED, CHANGED, INODE = range(4)
"""Rows of the stamps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How much of a data set was looked at and found unchanged."""

    files: int
    of: int

    def __str__(self) -> str:
        return "" if self.files == self.of else f", {self.files:,} of {self.of:,} files looked at"


class Record(Sealed):
    """What `remember` writes."""

    folders: dict[Text, list[int] | None]
    settled: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
    leads_out: bool
    stamps: dict[str, int]
    """CRC-32 of the stamps of each split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A store's record of the files that it matches."""

    folders: dict[str, list[int] | None]
    """As `Listing` has them, as all that follows."""
    settled: int
    leads_out: bool
    stamps: dict[str, NDArray[np.uint64]]


def remember(listing: Listing, folder: Path) -> None:
    """Write a record of the files that a store matches. The caller holds the lock or is the only writer."""
    sums = {}
    for split, pictures in listing.splits.items():
        path = array_path(folder, split, "stamps")
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        write_array(temporary, pictures.stamps)
        put(temporary, path)
        sums[split] = zlib.crc32(pictures.stamps.data)
    record = {
        "folders": listing.folders,
        "settled": listing.settled,
        "leads_out": listing.leads_out,
        "stamps": sums,
    }
    write_sealed(folder / FOLDERS, record)


def recall(store: Store) -> Memory:
    """Read what `remember` has written.

    Raises:
        DamagedStoreError: A file is missing or damaged.
    """
    assert store.folder is not None
    try:
        record = Record.model_validate(read_sealed(store.folder / FOLDERS))
    except ValidationError:
        raise DamagedStoreError(f"{FOLDERS} has changed since it was written") from None
    if any(path.startswith("/") or ".." in path.split("/") for path in record.folders):
        raise DamagedStoreError(f"{FOLDERS} leads out of the data folder")
    stamps = {}
    for name, split in store.splits.items():
        path = array_path(store.folder, name, "stamps")
        stamps[name] = map_array(path, DTYPES["stamps"], (4, len(split.labels)))
        if zlib.crc32(stamps[name].data) != record.stamps.get(name):
            raise DamagedStoreError(f"bits of {path.name} have flipped")
    return Memory(folders=record.folders, settled=record.settled, leads_out=record.leads_out, stamps=stamps)


def look(root: Path, store: Store, memory: Memory) -> Look | None:
    """Compare a data folder with what its store was made from, without listing it.

    Args:
        root: The data folder.
        store: On disk.
        memory: Of the store.

    Returns:
        None where anything differs, or might: then the folder has to be listed again.
    """
    try:
        if any(_stamp(root / path) != stamp for path, stamp in memory.folders.items()):
            return None
        total = sum(len(split.files) for split in store.splits.values())
        looked_at = 0
        for name, split in store.splits.items():
            assert isinstance(split.files, Names)
            stamps = memory.stamps[name]
            rows = spread(len(split.files), MOST_FILES, total)
            if (stamps[CHANGED].view(np.int64) >= memory.settled).any():
                return None
            if not split.files.stay_below() or not _unchanged(root, split.files, rows, stamps):
                return None
            looked_at += len(rows)
    except (OSError, ValueError, TypeError, IndexError):
        return None
    return Look(files=looked_at, of=total)


def agrees(
    listing: Listing, store: Store, memory: Memory | None, decoding: Decoding, announce: Callable[[int], None]
) -> bool:
    """Compare the files of a data folder with a store: by stamps if they are certain, otherwise by pixels.

    Args:
        listing: Of the data folder.
        store: On disk.
        memory: Of the store; None: it is lost, so all images are compared.
        decoding: What the store's images were decoded to.
        announce: Told now and then how many images are still to be compared.
    """
    if listing.classes != store.classes or listing.splits.keys() != store.splits.keys():
        return False
    doubtful: dict[str, NDArray[np.int64]] = {}
    for name, pictures in listing.splits.items():
        split = store.splits[name]
        assert isinstance(split.files, Names)
        if not np.array_equal(pictures.labels, split.labels) or not split.files.equals(Names.of(pictures.files)):
            return False
        if memory is None:
            doubtful[name] = np.arange(len(pictures.files))
            continue
        if (memory.stamps[name][SIZE] != pictures.stamps[SIZE]).any():
            return False
        unsettled = pictures.stamps[CHANGED].view(np.int64) >= memory.settled
        doubtful[name] = np.flatnonzero(unsettled | (memory.stamps[name] != pictures.stamps).any(axis=0))
    left = sum(map(len, doubtful.values()))
    for name, rows in doubtful.items():
        if not len(rows):
            continue
        for compared in _compare(listing, name, rows, decoding, store.splits[name].images):
            if not compared:
                return False
            left -= compared
            announce(left)
    return True


def _compare(
    listing: Listing, split: str, rows: NDArray[np.int64], decoding: Decoding, images: NDArray[np.uint8]
) -> Iterator[int]:
    """Decode some images again; yield how many more are as the store has them, 0 where one is not."""
    files = tuple(listing.splits[split].files[row] for row in rows.tolist())
    for chunk in decode_all(listing.root, files, decoding, hand_over):
        some = rows[chunk.start : chunk.start + chunk.pictures]
        same = not chunk.unreadable and np.array_equal(chunk.kept, images[some])
        yield chunk.pictures if same else 0


def spread(count: int, most: int, total: int) -> NDArray[np.int64]:
    """Choose this split's part of `most` rows out of `total`, evenly spread: all `count` where they are few enough."""
    part = count if total <= most else max(1, count * most // total)
    return np.arange(part) * count // part


def _unchanged(root: Path, files: Names, rows: NDArray[np.int64], stamps: NDArray[np.uint64]) -> bool:
    before, found = os.fsencode(root) + b"/", array("Q")
    for file in files.encoded(rows):
        found.extend(file_stamp(os.stat(before + file)))  # noqa: PTH116 - a Path for each would take twice as long
    return np.array_equal(np.frombuffer(found, np.uint64).reshape(-1, len(stamps)), stamps[:, rows].T)


def _stamp(folder: Path) -> list[int] | None:
    """Return a folder's stamp; `None` if there is no such folder."""
    return folder_stamp(folder.stat()) if folder.is_dir() else None
