"""A data set ready for use: splits over one store, with the training set's mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnist_dist.config.schema import EMBEDDED_DIGITS, Data
from mnist_dist.data import scan
from mnist_dist.data.approval import approved
from mnist_dist.data.decode import Decoding
from mnist_dist.data.store import Announce, open_or_build
from mnist_dist.data.store_files import Store, Stored, from_arrays, in_memory
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.group.place import GroupFolder
from mnist_dist.keyed import Purpose, keyed_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Images of a store: all of one of its splits, or some of them."""

    name: str
    stored: Stored = field(repr=False)
    rows: NDArray[np.int64] | None = field(default=None, repr=False)
    """Image `i` is row `rows[i]` of what is stored; None: all of it as it is, at no cost however many there are."""

    def __len__(self) -> int:
        return len(self.stored.labels if self.rows is None else self.rows)

    @property
    def labels(self) -> NDArray[np.int64]:
        """`(N,)` class of each image of the split."""
        return self.stored.labels if self.rows is None else self.stored.labels[self.rows]

    def file(self, image: int) -> str:
        """Name the file of an image, relative to the data folder."""
        return self.stored.files[self._row(image)]

    def pixels(self, image: int) -> NDArray[np.uint8]:
        """Get the `(C, H, W)` pixels of an image."""
        pixels: NDArray[np.uint8] = self.stored.images[self._row(image)]
        return pixels

    def _row(self, image: int) -> int:
        return image if self.rows is None else int(self.rows[image])


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What a run trains and evaluates on."""

    root: str
    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    mean: tuple[float, ...]
    """Of each channel, for pixels in [0, 1]."""
    std: tuple[float, ...]
    sha256: str
    state: str
    """Where the store is and how it came about, in words."""
    folder: Path | None
    """Where the store is on disk; None: in memory alone."""

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name, in the order train, validation (if there is one), test."""
        splits = (self.train, self.validation, self.test)
        return {split.name: split for split in splits if split is not None}


def open_dataset(data: Data, *, seed: int, announce: Announce, group: GroupFolder | None = None) -> Dataset:
    """Open what `data` describes, decoding the images where no store of them exists yet.

    Needs no torch. Any number of processes may call it at once.

    Args:
        data: The config's section.
        seed: What the held-out validation images are drawn from.
        announce: Gets lines of text about decoding.
        group: Where our own launcher says which store it has approved; only its ranks have it.

    Raises:
        ConfigError: A validation fraction is asked for where there is a `val` folder already.
        DataError: Folders or images are missing or unreadable.
    """
    store = (approved(group) if group is not None else None) or _open_store(data, announce)
    train = store.splits["train"]
    rows, held_out = divide(train.labels, data, seed=seed, has_val="val" in store.splits)
    validation = None
    if held_out is not None:
        validation = Split(name="validation", stored=train, rows=held_out)
    elif "val" in store.splits:
        val = store.splits["val"]
        validation = Split(name="validation", stored=val)
    mean, std = (data.mean, data.std) if data.mean and data.std else mean_and_std(train, rows)
    test = store.splits["test"]
    return Dataset(
        root=data.root,
        classes=store.classes,
        train=Split(name="train", stored=train, rows=rows),
        validation=validation,
        test=Split(name="test", stored=test),
        mean=mean,
        std=std,
        sha256=store.sha256,
        state=store.state,
        folder=store.folder,
    )


def divide(
    labels: NDArray[np.int64], data: Data, *, seed: int, has_val: bool
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Decide which training images to train on, and which to hold out if the config asks for it.

    Args:
        labels: `(N,)` of the training images.
        data: The config's section.
        seed: What the held-out ones are drawn from.
        has_val: Whether there is a `val` folder.

    Returns:
        Rows to train on, None meaning all, and rows held out, None meaning none.

    Raises:
        ConfigError: There is a `val` folder, and a fraction is asked for.
        DataError: A class has too few images.
    """
    if not data.validation_fraction:
        return None, None
    if has_val:
        raise ConfigError(
            f"data.validation_fraction is {data.validation_fraction}, but {Path(data.root) / 'val'} exists: "
            f"use one of the two."
        )
    return stratified_split(labels, data.validation_fraction, seed)


def stratified_split(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out the same share of each class.

    Returns:
        Rows to train on and rows held out, both ascending.

    Raises:
        DataError: A class has too few images to leave one on each side.
    """
    order = np.lexsort((keyed_hash(Purpose.VALIDATION, seed, np.arange(len(labels))), labels))
    held_out = np.zeros(len(labels), np.bool_)
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        count = round(fraction * len(rows))
        if not 0 < count < len(rows):
            raise DataError(
                f"data.validation_fraction is {fraction}, which leaves none of a class's {len(rows)} images for "
                f"{'validation' if count == 0 else 'training'}: change the fraction or add images."
            )
        held_out[rows[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def mean_and_std(stored: Stored, rows: NDArray[np.int64] | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure each channel's mean and standard deviation over some rows or all, for pixels in [0, 1], exactly.

    Raises:
        DataError: All pixels of a channel are the same.
    """
    totals = stored.totals if rows is None else stored.moments[rows].sum(axis=0, dtype=np.uint64)
    sums, squares = np.moveaxis(totals.astype(np.float64), -1, 0)
    pixels = len(stored.labels if rows is None else rows) * stored.images.shape[2] * stored.images.shape[3]
    mean = sums / pixels
    variance = squares / pixels - mean**2
    if (variance <= 0).any():
        raise DataError("All training images have the same plain colour: there is nothing to learn.")
    return tuple((mean / 255).tolist()), tuple((np.sqrt(variance) / 255).tolist())


def _open_store(data: Data, announce: Announce) -> Store:
    if data.root == EMBEDDED_DIGITS:
        return _digits(data)
    decoding = Decoding(image_size=data.image_size, channels=data.channels, max_megapixels=data.max_megapixels)
    return open_or_build(Path(data.root), decoding, announce, follow_links=data.follow_links)


def _digits(data: Data) -> Store:
    splits = {}
    for name, (images, labels) in scan.embedded_digits(data.image_size).items():
        files = tuple(f"{name}/{label}/{row:04}" for row, label in enumerate(labels))
        splits[name] = in_memory(images.repeat(data.channels, axis=1), labels, files)
    return from_arrays(tuple("0123456789"), splits, "in memory, from the package")
