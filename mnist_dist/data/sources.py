"""Where pictures come from: image folders as torchvision lays them out, and the embedded digits."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnist_dist.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What counts as a picture: torchvision's own list."""

SPLITS = ("train", "val", "test")
UNSETTLED_NANOSECONDS = 2_000_000_000
"""Longer than the ticks of the clocks of file systems."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """The picture files of one split, sorted by path."""

    files: tuple[str, ...]
    """Paths relative to the data folder, with forward slashes."""
    labels: NDArray[np.int64]
    """`(N,)` index into the classes."""
    stamps: NDArray[np.int64]
    """`(2, N)` sizes in bytes and modification times in nanoseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Every picture of a data folder, under one class index for all splits."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Pictures]
    """`train`, `test` and, where there is such a folder, `val`."""
    folders: dict[str, list[int] | None]
    """Times of modification and change in nanoseconds, from before it was listed, of each folder that was; None: there
    is none. Empty for one that was changed so shortly before that a later change might get the same times."""


def scan(root: Path) -> Listing:
    """List the pictures below `root/train`, `root/test` and, if it exists, `root/val`.

    Raises:
        DataError: A folder is missing, a class is in only some of the splits, or a class has no pictures.
    """
    try:
        return _scan(root)
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): repair or remove it.") from None


def _scan(root: Path) -> Listing:
    if not root.is_dir():
        raise DataError(
            f"There is no data folder {root}. Put pictures into {root / 'train' / 'CLASS'} and "
            f"{root / 'test' / 'CLASS'}, import a set with `mnist-dist data import`, or name another folder "
            f"with --data."
        )
    for split in ("train", "test"):
        if not (root / split).is_dir():
            raise DataError(f"{root} has no folder {split!r}: it needs {root / split / 'CLASS'}/*.png.")
    settled = time.time_ns() - UNSETTLED_NANOSECONDS
    times: dict[str, list[int]] = {}
    class_folders = {split: _class_folders(root / split, times) for split in SPLITS if (root / split).is_dir()}
    classes = _common_classes(root, class_folders)
    splits = {split: _list_pictures(root, split, classes, times) for split in class_folders}
    start = len(str(root / "train")) - len("train")
    folders = {path[start:].replace(os.sep, "/"): stamp if stamp[0] < settled else [] for path, stamp in times.items()}
    return Listing(root=root, classes=classes, splits=splits, folders=dict.fromkeys(SPLITS) | folders)


def embedded_digits(image_size: int) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Load the 1,797 handwritten digits of the package, enlarged; every fifth one is for testing.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository (CC BY 4.0), as scikit-learn ships it: 8x8 pixels of 17 grey levels.

    Returns:
        For `train` and `test`: `(N, 1, image_size, image_size)` uint8 images and `(N,)` int64 labels.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        small = (archive["images"].astype(np.uint16) * 255 // 16).astype(np.uint8)  # (1797, 8, 8)
        labels = archive["labels"].astype(np.int64)
    size = (image_size, image_size)
    images = np.stack([np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC)) for digit in small])
    is_test = np.arange(len(labels)) % 5 == 4
    return {
        "train": (images[~is_test, None], labels[~is_test]),
        "test": (images[is_test, None], labels[is_test]),
    }


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield every file below a folder; links are followed, except back into a folder they lie in."""
    yield from _walk(str(folder), frozenset(), {})


def times_of(folder: os.stat_result) -> list[int]:
    """Get when a folder was modified, which programs such as tar set back, and when changed, which they cannot."""
    return [folder.st_mtime_ns, folder.st_ctime_ns]


def is_picture(name: str) -> bool:
    """Tell by its ending whether a file counts as a picture; hidden files never do."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _walk(folder: str, above: frozenset[tuple[int, int]], times: dict[str, list[int]]) -> Iterator[os.DirEntry[str]]:
    status = Path(folder).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    times[folder] = times_of(status)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path, above | {identity}, times)
            else:
                yield entry


def _class_folders(folder: Path, times: dict[str, list[int]]) -> set[str]:
    times[str(folder)] = times_of(folder.stat())
    return {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}


def _common_classes(root: Path, folders: dict[str, set[str]]) -> tuple[str, ...]:
    classes = set.union(*folders.values())
    if len(classes) < 2:
        found = f"only the class {min(classes)!r}" if classes else "no class folders"
        raise DataError(f"{root} has {found}: a classifier needs two classes or more, each a folder in train and test.")
    missing = [f"{root / split / name}" for split in folders for name in sorted(classes - folders[split])]
    if missing:
        raise DataError(
            f"Each class must be in every split, and {_count(missing, 'folder is', 'folders are')} missing: "
            f"{_some(missing)}. Add pictures there, or remove the class from the other splits."
        )
    return tuple(sorted(classes))


def _list_pictures(root: Path, split: str, classes: tuple[str, ...], times: dict[str, list[int]]) -> Pictures:
    start = len(str(root / split)) + 1
    rows: list[tuple[str, int, int, int]] = []
    empty: list[str] = []
    for label, name in enumerate(classes):
        before = len(rows)
        for entry in _walk(str(root / split / name), frozenset(), times):
            if is_picture(entry.name):
                status = entry.stat()
                path = f"{split}/{entry.path[start:].replace(os.sep, '/')}"
                rows.append((path, label, status.st_size, status.st_mtime_ns))
        if len(rows) == before:
            empty.append(str(root / split / name))
    if empty:
        raise DataError(
            f"{_count(empty, 'class folder has', 'class folders have')} no pictures: {_some(empty)}. "
            f"Pictures are files that end in {' '.join(EXTENSIONS)}."
        )
    rows.sort()
    files, labels, *stamps = zip(*rows, strict=True)
    return Pictures(files=files, labels=np.array(labels, np.int64), stamps=np.array(stamps, np.int64))


def _count(items: list[str], one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"


def _some(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
