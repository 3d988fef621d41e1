"""Turn data sets in the IDX format, MNIST's own, into image folders.

Format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits"; big-endian, two zero bytes,
a type code (8: unsigned byte), the number of dimensions, each dimension as 32 bits, then the values.
"""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mnist_dist.errors import ConfigError, DataError
from mnist_dist.machine import allowed_cpus, die_with_parent, start_helper

MNIST_MD5 = {
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
}
"""Of the four files' unzipped bytes, as published."""

CHUNK = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class IdxSet:
    """A data set in IDX files, read and checked."""

    images: dict[str, NDArray[np.uint8]]
    """`(N, H, W)` of `train` and `test`."""
    labels: dict[str, NDArray[np.uint8]]
    is_mnist: bool
    """Whether all four files are bit for bit MNIST's."""


def read_idx_folder(folder: Path) -> IdxSet:
    """Read the four IDX files of a folder, gzipped or not.

    Raises:
        DataError: A file is missing, damaged or no IDX file, or images and labels differ in number.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} to import from.")
    images: dict[str, NDArray[np.uint8]] = {}
    labels: dict[str, NDArray[np.uint8]] = {}
    digests = set()
    for split, stems in (("train", ("train",)), ("test", ("t10k", "test"))):
        for kind, target in (("images", images), ("labels", labels)):
            path = _find(folder, stems, kind)
            content = _read(path)
            digests.add(hashlib.md5(content, usedforsecurity=False).hexdigest())
            target[split] = _parse(path, content, dimensions=3 if kind == "images" else 1)
        if len(images[split]) != len(labels[split]):
            raise DataError(f"{folder} has {len(images[split])} {split} images but {len(labels[split])} labels.")
    return IdxSet(images=images, labels=labels, is_mnist=digests == MNIST_MD5)


def write_image_folder(idx: IdxSet, target: Path, announce: Callable[[str], None]) -> None:
    """Write a data set as `target/<split>/<class>/<number>.png`; all of it, or nothing.

    Raises:
        ConfigError: The target exists and is not empty.
        OSError: The disk is full or read-only.
    """
    check_target(target)
    temporary = target.with_name(f"{target.name}.importing-{os.getpid()}")
    try:
        for split, images in idx.images.items():
            announce(f"Writing {len(images):,} pictures to {target / split}")
            _write_split(temporary / split, images, idx.labels[split], classes=_class_names(idx))
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: Path) -> None:
    """Make sure that a folder can be imported to.

    Raises:
        ConfigError: It exists and is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to {target} exists and is not empty: name a new folder, or remove it first.")


def _find(folder: Path, stems: tuple[str, ...], kind: str) -> Path:
    found = [
        path
        for path in sorted(folder.iterdir())
        if kind in path.name and "ubyte" in path.name and any(stem in path.name for stem in stems)
    ]
    if not found:
        raise DataError(
            f"{folder} has no {stems[0]}-{kind}-*-ubyte or .gz: it needs images and labels of train and t10k "
            f"(or test), as MNIST names them."
        )
    plain = [path for path in found if path.suffix != ".gz"]
    if len({path.name.removesuffix(".gz") for path in found}) > 1:
        raise DataError(f"{folder} has more than one set of {stems[0]} {kind}: {', '.join(p.name for p in found)}.")
    return (plain or found)[0]


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Get the file again.") from None


def _parse(path: Path, content: bytes, *, dimensions: int) -> NDArray[np.uint8]:
    header = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is no IDX file of bytes in {dimensions} dimensions.")
    shape = np.frombuffer(content[4:header], ">u4").astype(int)
    if len(content) - header != shape.prod():
        raise DataError(
            f"{path} should hold {'x'.join(map(str, shape))} bytes after its header, but holds "
            f"{len(content) - header}: get the file again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _class_names(idx: IdxSet) -> list[str]:
    """Name the classes by their numbers, all equally long so that they sort by number."""
    highest = max(int(labels.max()) for labels in idx.labels.values())
    return [f"{label:0{len(str(highest))}}" for label in range(highest + 1)]


def _write_split(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.uint8], classes: list[str]) -> None:
    for label in np.unique(labels):
        (folder / classes[label]).mkdir(parents=True)
    jobs = [
        (folder, start, images[start : start + CHUNK], labels[start : start + CHUNK], classes)
        for start in range(0, len(images), CHUNK)
    ]
    if sys.platform != "linux":
        for job in jobs:
            _write_chunk(job)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(allowed_cpus(), fork, start_helper, (die_with_parent(),)) as pool:
        list(pool.map(_write_chunk, jobs))


def _write_chunk(job: tuple[Path, int, NDArray[np.uint8], NDArray[np.uint8], list[str]]) -> None:
    folder, start, images, labels, classes = job
    for number, (image, label) in enumerate(zip(images, labels, strict=True), start):
        Image.fromarray(image).save(folder / classes[label] / f"{number:05}.png", compress_level=1)
