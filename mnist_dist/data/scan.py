"""Where images come from: image folders as torchvision lays them out, and the embedded digits."""

from __future__ import annotations

import os
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnist_dist.data.walk import EXTENSIONS, OUTSIDE, Walk, is_folder
from mnist_dist.errors import DataError, typed

SPLITS = ("train", "val", "test")
OWN_FOLDER = ".mnist-dist"
"""Of the store, in a data folder."""
LIKE_VAL = ("valid", "validation", "dev")
UNSETTLED_NANOSECONDS = 2_000_000_000
"""Longer than a tick of any file system's clock."""
POSIX = os.name == "posix"
WORD = 0xFFFF_FFFF_FFFF_FFFF
"""Times before 1970 or beyond 2554 are kept modulo this + 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """The image files of one split, sorted by path."""

    files: tuple[str, ...]
    """Paths relative to the data folder, with forward slashes."""
    labels: NDArray[np.int64]
    """`(N,)` index into the classes."""
    stamps: NDArray[np.uint64]
    """`(4, N)`: what `file_stamp` says of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Every image of a data folder, under one class index for all splits."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Pictures]
    """`train`, `test` and, where there is such a folder, `val`."""
    folders: dict[str, list[int] | None]
    """What `folder_stamp` says of each folder, from before it was listed; None: there is none. Empty for a folder that
    was changed so shortly before that a later change might get the same times."""
    settled: int
    """In nanoseconds: what was changed before this gets another time when it is changed again."""
    leads_out: bool
    """Whether links out of the data folder were followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """A data folder with all that is wrong with it."""

    listing: Listing
    bad: dict[str, str]
    """Why a path that looks like part of the data cannot be used."""
    ignored: dict[str, str]
    """Why a path is passed over; folders end in a slash."""
    faults: list[str]
    """Faults that make the whole folder unusable, one sentence each."""


def scan(root: Path, *, follow_links: bool = False) -> Listing:
    """List the images below `root/train`, `root/test` and, if it exists, `root/val`.

    Args:
        root: The data folder.
        follow_links: Follow links that lead out of it, too.

    Raises:
        DataError: A folder is missing, a class is in only some of the splits, a class has no images, or some of the
            files cannot be used.
    """
    found = survey(root, follow_links=follow_links)
    if found.bad:
        raise unreadable(root, "file", found.bad.items())
    if found.faults:
        raise DataError(found.faults[0])
    return found.listing


def survey(root: Path, *, follow_links: bool = False) -> Survey:
    """List the images of a data folder, and everything that training would refuse or skip.

    Raises:
        DataError: There is no such folder, or it has no `train` or `test`.
    """
    if not root.is_dir():
        raise DataError(
            f"There is no data folder {root}. Put images into {root / 'train' / 'CLASS'} and "
            f"{root / 'test' / 'CLASS'}, import a set with `mnist-dist data import`, or name another folder "
            f"with --data."
        )
    settled = time.time_ns() - UNSETTLED_NANOSECONDS
    walk = Walk(root, follow_links=follow_links)
    walk.ignored |= _beside_splits(root)
    present = [split for split in SPLITS if (root / split).is_dir()]
    for split in ("train", "test"):
        if split not in present:
            alike = sorted(
                path.name for path in root.iterdir() if path.name.lower().startswith(split) and path.is_dir()
            )
            hint = f" Is {root / alike[0]} meant? Rename it." if alike else ""
            raise DataError(f"{root} has no folder {split!r}: it needs {root / split / 'CLASS'}/*.png.{hint}")
    used = [split for split in present if not (root / split).is_symlink() or walk.check_link(str(root / split))]
    class_folders = {split: walk.folders(str(root / split)) for split in used}
    classes = tuple(sorted(set().union(*class_folders.values())))
    faults = [] if walk.bad else _class_faults(root, class_folders, classes)
    splits = {split: _list_pictures(root, split, classes, class_folders[split], walk) for split in used}
    faults += _empty_faults(root, classes, class_folders, splits)
    start = len(str(root / "train")) - len("train")
    times = {path[start:].replace(os.sep, "/"): stamp for path, stamp in walk.times.items()}
    folders = {path: stamp if stamp[1] < settled else [] for path, stamp in times.items()}
    listing = Listing(
        root=root,
        classes=classes,
        splits=splits,
        folders=dict.fromkeys(SPLITS) | folders,
        settled=settled,
        leads_out=walk.leads_out,
    )
    return Survey(listing=listing, bad=walk.bad, ignored=walk.ignored, faults=faults)


def unreadable(root: Path, what: str, bad: Iterable[tuple[str, str]]) -> DataError:
    """Return an error that names the first unreadable files of a data folder.

    Args:
        root: The data folder.
        what: `file` or `image`.
        bad: Their paths and the reasons.
    """
    pairs = list(bad)
    some = "; ".join(f"{path} ({reason})" for path, reason in pairs[:5])
    more = f"; and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    advice = f"Repair or remove what {typed('data', 'check', root)} lists."
    if any(reason.startswith(OUTSIDE) for _, reason in pairs):
        advice += " If the links are your own, add --set data.follow_links=true."
    return DataError(f"{_count(pairs, what, what + 's')} cannot be read: {some}{more}. {advice}")


def file_stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return a file's size, mtime and change time in nanoseconds, and inode, each as 64 bits.

    The inode tells files apart that were renamed or linked; the change time is set by every write, and cannot be set
    back by tar, cp -p, rsync -t or touch, as mtime is.
    """
    changed = status.st_ctime_ns if POSIX else status.st_mtime_ns  # elsewhere ctime is the file's creation
    return status.st_size, status.st_mtime_ns & WORD, changed & WORD, status.st_ino & WORD


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


def _beside_splits(root: Path) -> dict[str, str]:
    """Return what lies beside the folders of the splits."""
    ignored = {}
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name not in (*SPLITS, OWN_FOLDER):
                folder = is_folder(entry)
                like_val = folder and entry.name.lower() in LIKE_VAL
                reason = "call it val to validate on it" if like_val else "beside train, val and test"
                ignored[entry.path + "/" * folder] = reason
    return ignored


def _class_faults(root: Path, folders: dict[str, list[str]], classes: Sequence[str]) -> list[str]:
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no class folders"
        return [f"{root} has {found}: a classifier needs two classes or more, each a folder in train and test."]
    missing = [(split, name) for split, found in folders.items() for name in sorted({*classes} - {*found})]
    if not missing:
        return []
    twins = _twins(classes)
    for split, name in missing:
        if twin := next((other for other in twins.get(name, ()) if other in folders[split]), None):
            there = next(other for other, found in folders.items() if name in found)
            return [
                f"The class {name!r} is not spelt the same in {root / there} ({name!a}) and {root / split} "
                f"({twin!a}), although the names may look alike (upper and lower case, or the Unicode forms NFC "
                f"and NFD): rename one of the folders to the other's name."
            ]
    paths = [f"{root / split / name}" for split, name in missing]
    return [
        f"Each class must be in every split, and {_count(paths, 'folder is', 'folders are')} missing: "
        f"{_some(paths)}. Add images there, or remove the class from the other splits."
    ]


def _twins(classes: Sequence[str]) -> dict[str, list[str]]:
    """Return the classes whose names differ only in case or Unicode form."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return {name: [other for other in names if other != name] for names in alike.values() for name in names}


def _empty_faults(
    root: Path, classes: Sequence[str], folders: dict[str, list[str]], splits: dict[str, Pictures]
) -> list[str]:
    empty = [
        str(root / split / name)
        for split, pictures in splits.items()
        for name, count in zip(classes, np.bincount(pictures.labels, minlength=len(classes)), strict=True)
        if not count and name in folders[split]
    ]
    if not empty:
        return []
    return [
        f"{_count(empty, 'class folder has', 'class folders have')} no images: {_some(empty)}. "
        f"Images are files that end in {' '.join(EXTENSIONS)}."
    ]


def _list_pictures(root: Path, split: str, classes: Sequence[str], folders: Sequence[str], walk: Walk) -> Pictures:
    start = len(str(root / split)) + 1
    label_of = {name: label for label, name in enumerate(classes)}
    rows = [
        (f"{split}/{path[start:].replace(os.sep, '/')}", label_of[name], *file_stamp(status))
        for name in folders
        for path, status in walk.pictures(str(root / split / name))
    ]
    rows.sort()
    files, labels, *stamps = zip(*rows, strict=True) if rows else ((),) * 6
    return Pictures(files=files, labels=np.array(labels, np.int64), stamps=np.array(stamps, np.uint64))


def _count(items: Sequence[object], one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"


def _some(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
