"""A data set ready for use: splits over one store, with the training set's mean and standard deviation."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnist_dist.config.schema import EMBEDDED_DIGITS, Data
from mnist_dist.data import scan
from mnist_dist.data.decode import Decoding
from mnist_dist.data.files import DamagedStoreError
from mnist_dist.data.store import Announce, open_or_build
from mnist_dist.data.store_files import Store, StoredSplit, from_arrays, in_memory, open_folder
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.group import threads
from mnist_dist.group.messages import Approval
from mnist_dist.group.place import GroupFolder
from mnist_dist.keyed import Purpose, keyed_hash

HELD_OUT = 0.2
"""The share of a folder without splits that is held out for validation, unless the config says another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Images of a store: all of one of its splits, or some of them."""

    name: str
    stored: StoredSplit = field(repr=False)
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
        """Return the `(C, H, W)` pixels of an image."""
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
    test: Split | None
    """`None`: the folder has no test images, and the validation images are reported instead."""
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
        """The splits by name, in the order train, validation, test; those that there are."""
        splits = (self.train, self.validation, self.test)
        return {split.name: split for split in splits if split is not None}

    @property
    def reported(self) -> Split:
        """The split whose figures are the run's result: the test images, or the validation images if there are none."""
        split = self.test or self.validation
        assert split is not None
        return split


def open_dataset(
    data: Data, *, seed: int, announce: Announce, group: GroupFolder | None = None, whole: bool = False
) -> Dataset:
    """Open what `data` describes, decoding the images where no store of them exists yet.

    Needs no torch. Any number of processes may call it at once.

    Args:
        data: The config's section.
        seed: What the held-out validation images are drawn from.
        announce: Gets lines of text about decoding.
        group: Where our own launcher says which store it has approved; only its ranks have it.
        whole: Take a folder without splits as test images, instead of holding some out for validation.

    Raises:
        ConfigError: A validation fraction is asked for where there is a `val` folder already.
        DataError: Folders or images are missing or unreadable.
    """
    store = approved_store(group) if group is not None else None
    if store is None:
        store = _open_store(data, announce)
        _announce_absent(store, announce)
    train = store.splits["train"]
    others = store.splits.keys() - {"train"}
    whole = whole and not others
    rows, held_out = None, None
    if not whole:
        rows, held_out = divide(train.labels, train.files, data, seed=seed, classes=store.classes, others=others)
    test = train if whole else store.splits.get("test")
    validation = None
    if held_out is not None:
        validation = Split(name="validation", stored=train, rows=held_out)
    elif "val" in store.splits:
        validation = Split(name="validation", stored=store.splits["val"])
    mean, std = (data.mean, data.std) if data.mean and data.std else mean_and_std(train, rows)
    return Dataset(
        root=data.root,
        classes=store.classes,
        train=Split(name="train", stored=train, rows=rows),
        validation=validation,
        test=Split(name="test", stored=test) if test else None,
        mean=mean,
        std=std,
        sha256=store.sha256,
        state=store.state,
        folder=store.folder,
    )


def _announce_absent(store: Store, announce: Announce) -> None:
    """Announce the classes of which a split has no images: they are trained, but not evaluated."""
    for name, stored in store.splits.items():
        absent = np.flatnonzero(np.bincount(stored.labels, minlength=len(store.classes)) == 0).tolist()
        if absent:
            some = ", ".join(store.classes[label] for label in absent[:5])
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            split = "validation" if name == "val" else name
            announce(f"The {split} images have none of the class{'es' * (len(absent) > 1)} {some}{more}.")


def approved_store(group: GroupFolder) -> Store | None:
    """Open the store that the launcher approves, without checking its images again.

    Returns:
        `None` if this rank must open the images itself.

    Raises:
        WorkerError: The launcher is gone.
    """
    approval = Approval.wait(group)
    if approval is None:
        return None
    threads.count_as_ours(approval.cpu_seconds)
    try:
        store = open_folder(Path(approval.folder)) if approval.folder else None
    except (DamagedStoreError, OSError):  # removed or replaced in the meantime, as by another launcher
        return None
    return replace(store, state=approval.state) if store is not None and store.sha256 == approval.sha256 else None


def divide(
    labels: NDArray[np.int64],
    files: Sequence[str],
    data: Data,
    *,
    seed: int,
    classes: tuple[str, ...],
    others: Collection[str],
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Decide which training images to train on, and which to hold out if the config or the layout asks for it.

    Args:
        labels: `(N,)` of the training images.
        files: Their paths.
        data: The config's section.
        seed: What the held-out ones are drawn from if there are other splits.
        classes: By label.
        others: The other splits that the folder has; none: it has no splits at all.

    Returns:
        Rows to train on, `None` meaning all, and rows held out, `None` meaning none.

    Raises:
        ConfigError: There is a `val` folder, and a fraction is asked for.
        DataError: A class has too few images.
    """
    if not others:
        return hold_out(labels, files, data, classes)
    if not data.validation_fraction:
        return None, None
    if "val" in others:
        raise ConfigError(
            f"data.validation_fraction is {data.validation_fraction}, but {Path(data.root)} has a folder of "
            f"validation images: use one of the two."
        )
    return stratified_split(labels, data.validation_fraction, seed)


def hold_out(
    labels: NDArray[np.int64], files: Sequence[str], data: Data, classes: tuple[str, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out images of a folder without splits by a hash of each one's path below its class.

    So the side of an image depends on nothing else: adding or removing others, or another seed, does not move it.

    Args:
        labels: `(N,)`.
        files: Their paths, as `CLASS/...`.
        data: The config's section; `validation_fraction` is the share to hold out, or else `HELD_OUT`.
        classes: By label.

    Returns:
        Rows to train on and rows held out, both ascending.

    Raises:
        DataError: A class has no image left on one side.
    """
    fraction = data.validation_fraction or HELD_OUT
    paths = (file.partition("/")[2].encode("utf-8", "surrogateescape") for file in files)
    words = np.array([int.from_bytes(hashlib.sha256(path).digest()[:8], "little") for path in paths], np.uint64)
    held_out = words < np.uint64(int(fraction * 2**64))
    for side, what in ((~held_out, "to train on"), (held_out, "to validate on")):
        counts = np.bincount(labels[side], minlength=len(classes))
        if not counts.all():
            raise DataError(
                f"The class {classes[int(counts.argmin())]!r} has too few images: of a share of {fraction:g} held out "
                f"by their names, none is left {what}. Add images, set data.validation_fraction, or make folders "
                f"train and val yourself."
            )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


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


def mean_and_std(stored: StoredSplit, rows: NDArray[np.int64] | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
