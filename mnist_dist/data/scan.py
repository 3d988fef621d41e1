"""Where images come from: image folders as torchvision lays them out, and the embedded digits."""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnist_dist.data.walk import EXTENSIONS, OUTSIDE, Walk, is_folder, is_picture
from mnist_dist.errors import DataError, typed

SPLITS = ("train", "val", "test")
OWN_FOLDER = ".mnist-dist"
"""Of the store, in a data folder."""
ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split that a folder of this name holds, in any case."""
UNSETTLED_NANOSECONDS = 2_000_000_000
"""Longer than the ticks of the clocks of file systems."""
POSIX = os.name == "posix"
WORD = 0xFFFF_FFFF_FFFF_FFFF
"""Times before 1970 or beyond 2554 are kept modulo this + 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFiles:
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
    splits: dict[str, ImageFiles]
    """`train` and, if there are such folders, `val` and `test`. A folder without splits is all `train`."""
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
    """What makes it unusable as a whole, each in a sentence."""


def scan(root: Path, *, follow_links: bool = False) -> Listing:
    """List the images of a data folder.

    It has one of four layouts: `train` with `test`, with `val`, or with both, each holding a folder for each class; or
    a folder for each class and no splits.

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
    """List the images of a data folder, and all that training would refuse or pass over.

    Raises:
        DataError: There is no such folder, or it has none of the layouts.
    """
    if not root.is_dir():
        raise DataError(
            f"There is no data folder {root}. Put images into {root / 'train' / 'CLASS'} and "
            f"{root / 'test' / 'CLASS'}, or into {root / 'CLASS'}, import a set with `mnist-dist data import`, "
            f"or name another folder with --data."
        )
    settled = time.time_ns() - UNSETTLED_NANOSECONDS
    walk = Walk(root, follow_links=follow_links)
    places = _places(root, walk)
    used = {
        split: place for split, place in places.items()
        if not (root / place).is_symlink() or walk.check_link(str(root / place))
    }  # fmt: skip
    class_folders = {split: walk.folders(str(root / place)) for split, place in used.items()}
    if places == {"train": ""}:
        class_folders["train"] = [name for name in class_folders["train"] if name != OWN_FOLDER]
    classes = tuple(sorted(set().union(*class_folders.values()), key=natural_key))
    faults = [] if walk.bad else _class_faults(root, used, class_folders, classes)
    splits = {split: _list_pictures(root, place, classes, class_folders[split], walk) for split, place in used.items()}
    faults += _empty_faults(root, used, classes, class_folders, splits)
    start = len(str(root / "train")) - len("train")
    times = {path[start:].replace(os.sep, "/"): stamp for path, stamp in walk.times.items()}
    folders = {path: stamp if stamp[1] < settled else [] for path, stamp in times.items()}
    listing = Listing(
        root=root,
        classes=classes,
        splits=splits,
        folders=dict.fromkeys(ALIASES) | folders,
        settled=settled,
        leads_out=walk.leads_out,
    )
    return Survey(listing=listing, bad=walk.bad, ignored=walk.ignored, faults=faults)


def unreadable(root: Path, what: str, bad: Iterable[tuple[str, str]]) -> DataError:
    """Build the error that names the first files of a data folder that cannot be read.

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


def natural_key(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """Return what sorts names as people count: `2` before `10`."""
    pieces = re.split("([0-9]+)", name)
    return tuple((int(piece), "") if piece.isascii() and piece.isdigit() else (0, piece) for piece in pieces), name


def _places(root: Path, walk: Walk) -> dict[str, str]:
    """Find the folder of each split, by its name below the root; one empty name where there are no splits.

    Raises:
        DataError: A split is missing, or two folders are the same split.
    """
    with os.scandir(root) as entries:
        folders = {entry.name: is_folder(entry) for entry in entries}
    places: dict[str, str] = {}
    for name in sorted(name for name, folder in folders.items() if folder and name.lower() in ALIASES):
        split = ALIASES[name.lower()]
        if split in places:
            raise DataError(
                f"{root / places[split]} and {root / name} are both folders for the {split} split: keep one of them."
            )
        places[split] = name
    visible = [name for name, folder in folders.items() if folder and not name.startswith(".")]
    if not places and any(_holds_pictures(root / name) for name in visible):
        return {"train": ""}
    missing = "train" if "train" not in places else "test" if len(places) == 1 else None
    if missing is not None:
        alike = sorted(name for name, folder in folders.items() if folder and name.lower().startswith(missing))
        hint = f" Is {root / alike[0]} meant? Rename it." if alike else ""
        without = ", or CLASS/*.png without splits" if not places else ""
        without = f" or {root / 'val' / 'CLASS'}/*.png" if missing == "test" else without
        raise DataError(f"{root} has no folder {missing!r}: it needs {root / missing / 'CLASS'}/*.png{without}.{hint}")
    for name, folder in folders.items():
        if name not in (*places.values(), OWN_FOLDER):
            walk.ignored[str(root / name) + "/" * folder] = "beside train, val and test"
    return {split: places[split] for split in SPLITS if split in places}


def _holds_pictures(folder: Path) -> bool:
    """Return whether images lie in a folder itself."""
    try:
        with os.scandir(folder) as entries:
            return any(is_picture(entry.name) for entry in entries)
    except OSError:
        return False


def _class_faults(
    root: Path, places: dict[str, str], folders: dict[str, list[str]], classes: Sequence[str]
) -> list[str]:
    if len(classes) < 2:
        found = f"only the class {classes[0]!r}" if classes else "no class folders"
        return [f"{root} has {found}: a classifier needs two classes or more, each a folder of its own."]
    missing = [(split, name) for split, found in folders.items() for name in sorted({*classes} - {*found})]
    if not missing:
        return []
    twins = _twins(classes)
    for split, name in missing:
        if twin := next((other for other in twins.get(name, ()) if other in folders[split]), None):
            there = next(other for other, found in folders.items() if name in found)
            return [
                f"The class {name!r} is not spelt the same in {root / places[there]} ({name!a}) and "
                f"{root / places[split]} ({twin!a}), although the names may look alike (upper and "
                f"lower case, or the Unicode forms NFC and NFD): rename one of the folders to the other's name."
            ]
    paths = [f"{root / places[split] / name}" for split, name in missing if split == "train"]
    if not paths:
        return []  # a class without images to evaluate is trained all the same
    return [
        f"Each class needs training images, and {_count(paths, 'folder is', 'folders are')} missing: "
        f"{_some(paths)}. Add images there, or remove the class from the other splits."
    ]


def _twins(classes: Sequence[str]) -> dict[str, list[str]]:
    """Find the classes whose names differ in nothing but case or Unicode form."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    return {name: [other for other in names if other != name] for names in alike.values() for name in names}


def _empty_faults(
    root: Path,
    places: dict[str, str],
    classes: Sequence[str],
    folders: dict[str, list[str]],
    splits: dict[str, ImageFiles],
) -> list[str]:
    empty = [
        str(root / places[split] / name)
        for split, pictures in splits.items()
        for name, count in zip(classes, np.bincount(pictures.labels, minlength=len(classes)), strict=True)
        if not count and name in folders[split] and split == "train"
    ]
    if not empty:
        return []
    return [
        f"{_count(empty, 'class folder has', 'class folders have')} no images: {_some(empty)}. "
        f"Images are files that end in {' '.join(EXTENSIONS)}."
    ]


def _list_pictures(root: Path, place: str, classes: Sequence[str], folders: Sequence[str], walk: Walk) -> ImageFiles:
    start = len(str(root / "train")) - len("train")
    label_of = {name: label for label, name in enumerate(classes)}
    rows = [
        (path[start:].replace(os.sep, "/"), label_of[name], *file_stamp(status))
        for name in folders
        for path, status in walk.pictures(str(root / place / name))
    ]
    rows.sort()
    files, labels, *stamps = zip(*rows, strict=True) if rows else ((),) * 6
    return ImageFiles(files=files, labels=np.array(labels, np.int64), stamps=np.array(stamps, np.uint64))


def _count(items: Sequence[object], one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"


def _some(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
