"""Whether a store still is what its pictures are, told without listing them.

A store remembers the times of every folder below the splits, and the size and time of every file. What is added,
removed or renamed changes its folder's times; what is overwritten in place changes its own. Of very many files only
some are looked at, evenly spread: whoever rewrites a data set of millions in place touches more than a few.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnist_dist.data.sources import Listing, times_of
from mnist_dist.data.stored import Names, Store, map_array

MOST_FILES = 200_000
"""So many files are looked at."""
FOLDERS = "folders.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How much of a data set was looked at and found unchanged."""

    files: int
    of: int

    def __str__(self) -> str:
        return "" if self.files == self.of else f", {self.files:,} of {self.of:,} files looked at"


def remember(listing: Listing, folder: Path) -> None:
    """Write down the times of a data set's folders beside its store, atomically."""
    temporary = folder / f"{FOLDERS}.{os.getpid()}"
    temporary.write_text(json.dumps(listing.folders), encoding="utf-8")
    temporary.replace(folder / FOLDERS)


def look(root: Path, store: Store) -> Look | None:
    """Compare a data folder with what its store was made from.

    Args:
        root: The data folder.
        store: On disk.

    Returns:
        None where anything differs, or might: then the folder has to be listed again.
    """
    assert store.folder is not None
    try:
        folders: dict[str, list[int] | None] = json.loads((store.folder / FOLDERS).read_text(encoding="utf-8"))
        if any(_times(root / path) != times for path, times in folders.items()):
            return None
        total = sum(len(split.files) for split in store.splits.values())
        looked_at = 0
        for name, split in store.splits.items():
            assert isinstance(split.files, Names)
            rows = spread(len(split.files), MOST_FILES, total)
            if not _unchanged(root, split.files, rows, map_array(store.folder, name, "stamps")):
                return None
            looked_at += len(rows)
    except (OSError, ValueError, AttributeError, IndexError):  # missing, or damaged
        return None
    return Look(files=looked_at, of=total)


def spread(count: int, most: int, total: int) -> NDArray[np.int64]:
    """Choose this split's part of `most` rows out of `total`, evenly spread: all `count` where they are few enough."""
    part = count if total <= most else max(1, count * most // total)
    return np.arange(part) * count // part


def _unchanged(root: Path, files: Names, rows: NDArray[np.int64], stamps: NDArray[np.int64]) -> bool:
    before = os.fsencode(root) + b"/"
    found = np.empty((len(rows), 2), np.int64)
    for place, file in enumerate(files.encoded(rows)):
        status = os.stat(before + file)  # noqa: PTH116 - a Path for each would take twice as long
        found[place] = status.st_size, status.st_mtime_ns
    return np.array_equal(found, stamps[:, rows].T)


def _times(folder: Path) -> list[int] | None:
    """Get a folder's times; None where there is none."""
    return times_of(folder.stat()) if folder.is_dir() else None
