"""An open store: a data set's images as uint8 arrays, in memory or in a folder of .npy files.

Opening one costs a few memory maps, whatever the number of images, and the processes of a machine share them.
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
from typing import Annotated, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, model_validator

from mnist_dist.data.files import (
    BLOCK,
    DamagedStoreError,
    is_folder,
    map_array,
    open_regular,
    read_sealed,
    verify_array,
)

FORMAT = 5
INDEX = "index.json"
"""Written last: a folder without it is no store."""
FEW_BYTES = 1 << 30
"""So many are read ahead as a whole, and verified before a run."""
DTYPES: dict[str, np.dtype[Any]] = {
    "images": np.dtype(np.uint8),
    "labels": np.dtype(np.int64),
    "moments": np.dtype(np.uint64),
    "names": np.dtype(np.uint8),
    "ends": np.dtype(np.int64),
    "stamps": np.dtype(np.uint64),
}
"""Of the arrays of a store: their files cannot ask for others."""
VERIFIED = {"images", "labels", "moments", "names", "ends"}
"""The arrays that have checksums in the index; `freshness` has those of the stamps."""
MOMENTS_VALUES = 1 << 18
"""So many pixel values are summed up at once, so that they stay in the processor's cache."""


class Names(Sequence[str]):
    """File names that stay on disk until they are asked for.

    Args:
        text: All of them, encoded as the file system has them, one after the other.
        ends: `(N,)` where each ends.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text = text
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[row] for row in range(*place.indices(len(self)))]
        return os.fsdecode(next(self.encoded(np.array([range(len(self))[place]]))))

    @classmethod
    def of(cls, files: Sequence[str]) -> Names:
        """Lay names out."""
        encoded = [os.fsencode(file) for file in files]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def equals(self, other: Names) -> bool:
        """Return whether these are the same names in the same order."""
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)

    def stay_below(self) -> bool:
        """Return whether all names stay inside the folder that they are relative to."""
        starts = np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])
        return b"/../" not in self.text.tobytes() and not np.isin(self.text[starts], (ord("."), ord("/"))).any()

    def encoded(self, rows: NDArray[np.int64]) -> Iterator[bytes]:
        """Yield some names as the file system has them."""
        text = self.text.data
        starts = np.where(rows > 0, self.ends[rows - 1], 0)
        for start, end in zip(starts.tolist(), self.ends[rows].tolist(), strict=True):
            yield text[start:end].tobytes()


Count = Annotated[int, Field(ge=1, lt=1 << 63)]
Total = Annotated[int, Field(ge=0, lt=1 << 63)]
Text = InstanceOf[str]
"""A name of any bytes, which pydantic's own strings refuse."""


class Sealed(BaseModel):
    """Content of a sealed file of a store, which may come from a stranger: types are exact, numbers bounded."""

    model_config = ConfigDict(strict=True, frozen=True)


class Facts(Sealed):
    """What the index says of a split."""

    images: Count
    names: Count
    """Bytes of all file names together."""
    totals: list[Annotated[list[Total], Field(min_length=2, max_length=2)]]
    crc32: dict[str, list[Total]]


class Index(Sealed):
    """What makes a folder a store; the sizes of its files are compared with it."""

    channels: int
    image_size: Count
    classes: list[Text]
    splits: dict[Literal["train", "val", "test"], Facts]
    sha256: Text

    @model_validator(mode="after")
    def _fits_together(self) -> Index:
        """Raise where channels, splits, totals or checksums are not those of any store."""
        splits = self.splits.values()
        if self.channels not in (1, 3) or "train" not in self.splits:
            raise ValueError
        if any(len(facts.totals) != self.channels or facts.crc32.keys() != VERIFIED for facts in splits):
            raise ValueError
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSplit:
    """One split's images, as they lie in the store."""

    images: NDArray[np.uint8]
    """`(N, C, H, W)`, memory-mapped copy-on-write where the store is on disk, as all that follows."""
    labels: NDArray[np.int64]
    moments: NDArray[np.uint64]
    """`(N, C, 2)` sum and sum of squares of each image's pixels, for exact means over any subset."""
    totals: NDArray[np.uint64]
    """`(C, 2)` the same of all images together."""
    files: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """All splits of a data set, decoded."""

    classes: tuple[str, ...]
    splits: dict[str, StoredSplit] = field(repr=False)
    sha256: str
    """Identity of the data: over classes, pixels and labels of all splits."""
    state: str
    """Where it is and whether it was there already, in words."""
    folder: Path | None = None
    """Where it is on disk; None: in memory alone."""


def moments_of(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Sum each image's pixels and their squares, per channel: `(N, C, H, W)` to `(N, C, 2)`."""
    values = images.reshape(*images.shape[:2], math.prod(images.shape[2:]))
    moments = np.empty((*values.shape[:2], 2), np.uint64)
    size = max(1, MOMENTS_VALUES // math.prod(values.shape[1:]))
    for start in range(0, len(values), size):
        some = values[start : start + size].astype(np.uint16)
        moments[start : start + size, :, 0] = some.sum(axis=-1, dtype=np.uint64)
        moments[start : start + size, :, 1] = np.square(some, out=some).sum(axis=-1, dtype=np.uint64)
    return moments


def in_memory(images: NDArray[np.uint8], labels: NDArray[np.int64], files: Sequence[str]) -> StoredSplit:
    """Build a split from arrays in memory."""
    moments = moments_of(images)
    return StoredSplit(images=images, labels=labels, moments=moments, totals=moments.sum(axis=0), files=files)


def from_arrays(classes: tuple[str, ...], splits: dict[str, StoredSplit], state: str) -> Store:
    """Build a store from splits in memory; its identity is that of the same images on disk."""
    digest = identity(classes)
    for split in splits.values():
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(split.labels.data)
    return Store(classes=classes, splits=splits, sha256=digest.hexdigest(), state=state)


def identity(classes: tuple[str, ...]) -> hashlib._Hash:
    """Return a new hash over classes, pixels and labels, which identifies a data set."""
    return hashlib.sha256(json.dumps(classes).encode())


def open_folder(folder: Path, state: str = "decoded earlier") -> Store | None:
    """Open a store without reading its pixels.

    Args:
        folder: Of its files.
        state: How it came about, in words.

    Returns:
        None if an earlier version has written it.

    Raises:
        DamagedStoreError: A file is missing, cut, no regular file, or its size is not what the index says.
    """
    if not is_folder(folder):
        raise DamagedStoreError("it is no folder")
    index = read_sealed(folder / INDEX)
    if index.get("format") != FORMAT:
        return None
    try:
        known = Index.model_validate(index)
    except ValidationError:
        raise DamagedStoreError(f"{INDEX} has changed since it was written") from None
    shape = known.channels, known.image_size, known.image_size
    splits: dict[str, StoredSplit] = {
        name: _open_split(folder, name, facts, shape) for name, facts in known.splits.items()
    }
    return Store(
        classes=tuple(known.classes),
        splits=splits,
        sha256=known.sha256,
        state=f"{state}, {folder}",
        folder=folder,
    )


def _open_split(folder: Path, split: str, facts: Facts, shape: tuple[int, ...]) -> StoredSplit:
    count = facts.images
    return StoredSplit(
        images=_map(folder, split, "images", (count, *shape)),
        labels=_map(folder, split, "labels", (count,)),
        moments=_map(folder, split, "moments", (count, shape[0], 2)),
        totals=np.array(facts.totals, np.uint64),
        files=Names(_map(folder, split, "names", (facts.names,)), _map(folder, split, "ends", (count,))),
    )


def verify(store: Store, few_bytes: int = FEW_BYTES) -> None:
    """Compare what is on disk with the sums in the index.

    Args:
        store: In a folder.
        few_bytes: Of more pixels, a quarter as many bytes are read, in blocks that are drawn anew at each call.

    Raises:
        DamagedStoreError: Some bits have flipped, labels are out of range, or totals are wrong.
    """
    assert store.folder is not None
    index = read_sealed(store.folder / INDEX)
    total = sum(split.images.nbytes for split in store.splits.values())
    for name, split in store.splits.items():
        some = max(1, few_bytes // 4 * split.images.nbytes // total // BLOCK) if total > few_bytes else None
        for array, sums in index["splits"][name]["crc32"].items():
            path = array_path(store.folder, name, array)
            verify_array(path, sums, some if array == "images" else None)
        if not 0 <= int(split.labels.min()) <= int(split.labels.max()) < len(store.classes):
            raise DamagedStoreError(f"{array_path(store.folder, name, 'labels').name} has classes that do not exist")
        with open_regular(array_path(store.folder, name, "moments")) as file:  # faster than through the memory map
            file.seek(-split.moments.nbytes, os.SEEK_END)
            columns = np.fromfile(file, np.uint64).reshape(len(split.labels), -1).T
        if [int(column.sum()) for column in columns] != split.totals.ravel().tolist():  # faster than sum(axis=0)
            raise DamagedStoreError(f"the totals of {name} in {INDEX} are not those of its images")


def _map(folder: Path, split: str, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    return map_array(array_path(folder, split, name), DTYPES[name], shape)


def advise(images: NDArray[np.uint8], *, whole: bool = False) -> None:
    """Advise the kernel on how mapped pixels are read: else it reads far ahead (128 kB, or megabytes) of each image.

    Args:
        images: Of a store; nothing is done where they are not mapped, or the system takes no advice.
        whole: They will all be read at once; otherwise at random, which for few is all soon.
    """
    if isinstance(images.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        images.base.madvise(mmap.MADV_WILLNEED if whole or images.nbytes <= FEW_BYTES else mmap.MADV_RANDOM)


def array_path(folder: Path, split: str, name: str) -> Path:
    """Name the file of one of a store's arrays."""
    return folder / f"{split}-{name}.npy"
