"""An open store: a data set's pictures as uint8 arrays, in memory or in a folder of .npy files.

Opening one costs a few memory maps, whatever the number of pictures, and the processes of a machine share them.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

FORMAT = 3
INDEX = "index.json"
"""Written last: a folder without it is no store."""
FEW_BYTES = 1 << 30
"""So many are read ahead as a whole."""
MOMENTS_VALUES = 1 << 18
"""So many pixel values are summed up at once, so that they stay in the processor's cache."""


class Names(Sequence[str]):
    """File names that stay on disk until they are asked for.

    Args:
        text: All of them, encoded as the file system has them, one after the other.
        ends: `(N,)` where each ends.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self._text = text.data
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        return os.fsdecode(next(self.encoded(np.array([range(len(self))[place]]))))

    def encoded(self, rows: NDArray[np.int64]) -> Iterator[bytes]:
        """Yield some names as the file system has them."""
        starts = np.where(rows > 0, self._ends[rows - 1], 0)
        for start, end in zip(starts.tolist(), self._ends[rows].tolist(), strict=True):
            yield bytes(self._text[start:end])


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One split's pictures, as they lie in the store."""

    images: NDArray[np.uint8]
    """`(N, C, H, W)`, memory-mapped copy-on-write where the store is on disk, as all that follows."""
    labels: NDArray[np.int64]
    moments: NDArray[np.uint64]
    """`(N, C, 2)` sum and sum of squares of each picture's pixels, for exact means over any subset."""
    totals: NDArray[np.uint64]
    """`(C, 2)` the same of all pictures together."""
    files: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """All splits of a data set, decoded."""

    classes: tuple[str, ...]
    splits: dict[str, Stored] = field(repr=False)
    sha256: str
    """Identity of the data: over classes, pixels and labels of all splits."""
    state: str
    """Where it is and whether it was there already, in words."""
    folder: Path | None = None
    """Where it is on disk; None: in memory alone."""


def moments_of(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Sum each picture's pixels and their squares, per channel: `(N, C, H, W)` to `(N, C, 2)`."""
    values = images.reshape(*images.shape[:2], math.prod(images.shape[2:]))
    moments = np.empty((*values.shape[:2], 2), np.uint64)
    size = max(1, MOMENTS_VALUES // math.prod(values.shape[1:]))
    for start in range(0, len(values), size):
        some = values[start : start + size].astype(np.uint16)
        moments[start : start + size, :, 0] = some.sum(axis=-1, dtype=np.uint64)
        moments[start : start + size, :, 1] = np.square(some, out=some).sum(axis=-1, dtype=np.uint64)
    return moments


def in_memory(images: NDArray[np.uint8], labels: NDArray[np.int64], files: Sequence[str]) -> Stored:
    """Make a split of arrays that are in memory already."""
    moments = moments_of(images)
    return Stored(images=images, labels=labels, moments=moments, totals=moments.sum(axis=0), files=files)


def from_arrays(classes: tuple[str, ...], splits: dict[str, Stored], state: str) -> Store:
    """Make a store of splits in memory; its identity is that of the same pictures on disk."""
    digest = identity(classes)
    for split in splits.values():
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(split.labels.data)
    return Store(classes=classes, splits=splits, sha256=digest.hexdigest(), state=state)


def identity(classes: tuple[str, ...]) -> hashlib._Hash:
    """Begin the hash over classes, pixels and labels that tells data sets apart."""
    return hashlib.sha256(json.dumps(classes).encode())


def open_folder(folder: Path, state: str = "decoded earlier") -> Store | None:
    """Open a whole store, or return None where there is none or it is damaged.

    Args:
        folder: Of its files.
        state: How it came about, in words.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            return None
        splits = {name: _open_split(folder, name, facts) for name, facts in index["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return Store(
        classes=tuple(index["classes"]),
        splits=splits,
        sha256=index["sha256"],
        state=f"{state}, {folder}",
        folder=folder,
    )


def _open_split(folder: Path, split: str, facts: dict[str, Any]) -> Stored:
    return Stored(
        images=map_array(folder, split, "images"),
        labels=map_array(folder, split, "labels"),
        moments=map_array(folder, split, "moments"),
        totals=np.array(facts["totals"], np.uint64),
        files=Names(map_array(folder, split, "names"), map_array(folder, split, "ends")),
    )


def map_array(folder: Path, split: str, name: str) -> NDArray[Any]:
    """Map one of a store's arrays into memory."""
    array: NDArray[Any] = np.load(array_path(folder, split, name), mmap_mode="c")
    return array


def advise(images: NDArray[np.uint8], *, whole: bool = False) -> None:
    """Tell the kernel how mapped pixels will be read: else it reads far ahead (128 kB, or megabytes) of each picture.

    Args:
        images: Of a store; nothing is done where they are not mapped, or the system takes no advice.
        whole: They will all be read at once; otherwise at random, which for few is all soon.
    """
    if isinstance(images.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        images.base.madvise(mmap.MADV_WILLNEED if whole or images.nbytes <= FEW_BYTES else mmap.MADV_RANDOM)


def array_path(folder: Path, split: str, name: str) -> Path:
    """Name the file of one of a store's arrays."""
    return folder / f"{split}-{name}.npy"
