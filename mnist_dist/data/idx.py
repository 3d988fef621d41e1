"""Turn data sets in the IDX format, MNIST's own, into image folders.

Format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits"; big-endian, two zero bytes,
a type code (8: unsigned byte), the number of dimensions, each dimension as 32 bits, then the values.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import multiprocessing
import os
import stat
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from filelock import Timeout
from numpy.typing import NDArray
from PIL import Image

from mnist_dist.data.files import remove
from mnist_dist.disk import locks
from mnist_dist.disk.storage import named
from mnist_dist.errors import STORAGE, ConfigError, DataError, WorkerError, storage_error
from mnist_dist.machine import allowed_cpus, die_with_parent, start_helper

MNIST_MD5 = {
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
}
"""Of the four files' unzipped bytes, as published."""

CHUNK = 2000
MOST_BYTES = 1 << 32
"""Of a file's values, five million images of 28x28: they are held in memory."""
DEFLATE_RATIO = 1032
"""No zipped byte becomes more than so many (zlib's documentation)."""
UNFINISHED = ".importing-"
"""How the folder's name begins in which an import is written."""


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
        DataError: A file is missing, damaged, too large or no IDX file, or the files do not fit each other.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} to import from.")
    images: dict[str, NDArray[np.uint8]] = {}
    labels: dict[str, NDArray[np.uint8]] = {}
    digests: set[str] = set()
    for split, stems in (("train", ("train",)), ("test", ("t10k", "test"))):
        labels[split] = _read(_find(folder, stems, "labels"), 1, digests)
        images[split] = _read(_find(folder, stems, "images"), 3, digests, count=len(labels[split]))
    unknown = set(np.unique(labels["test"]).tolist()) - set(np.unique(labels["train"]).tolist())
    if unknown:
        raise DataError(
            f"The test labels of {folder} have {', '.join(map(str, sorted(unknown)))}, which no training image has: "
            f"get the files again."
        )
    return IdxSet(images=images, labels=labels, is_mnist=digests == MNIST_MD5)


def write_image_folder(idx: IdxSet, target: Path, announce: Callable[[str], None]) -> None:
    """Write a data set as `target/<split>/<class>/<number>.png`; all of it, or nothing.

    It is written into a hidden folder of the target, and the splits are renamed at the end. The next import removes
    the hidden folder of one that was killed, and nothing else.

    Raises:
        ConfigError: The target exists and is not empty.
        WorkerError: A process that wrote images was killed.
        OSError: The disk is full or read-only.
    """
    check_target(target)
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=target))  # no other import has it, on any machine
    try:
        with locks.held(temporary / "lock"):
            for left in check_target(target, own=temporary):
                remove(left)
            for split, images in idx.images.items():
                announce(f"Writing {len(images):,} images to {target / split}")
                _write_split(temporary / split, images, idx.labels[split], classes=_class_names(idx))
            for split in idx.images:
                (temporary / split).rename(target / split)
    finally:
        remove(temporary)
        if is_new:
            with contextlib.suppress(OSError):  # it has the images
                target.rmdir()


def check_target(target: Path, own: Path | None = None) -> list[Path]:
    """Make sure that a folder can be imported to.

    Args:
        target: The folder; it need not exist.
        own: What this import has made in it.

    Returns:
        The hidden folders that killed imports have left in it.

    Raises:
        ConfigError: It exists and holds anything else, or another import is writing there.
    """
    if not target.exists():
        return []
    entries = sorted({*target.iterdir()} - {own}) if target.is_dir() else [target]
    unfinished = [path for path in entries if path.name.startswith(UNFINISHED) and path.is_dir()]
    if len(unfinished) < len(entries):
        raise ConfigError(f"--to {target} exists and is not empty: name a new folder, or remove it first.")
    for path in unfinished:
        try:
            with locks.held(path / "lock", blocking=False):
                pass
        except Timeout:
            raise ConfigError(f"--to {target}: another import is writing there. Wait for it.") from None
    return unfinished


def _find(folder: Path, stems: tuple[str, ...], kind: str) -> Path:
    """Find the file of a split: in the folder, or in a folder of its name, as archives of MNIST have it."""
    named = [path for path in sorted(folder.iterdir()) if _is_named(path, stems, kind)]
    found = [path for path in named if not path.is_dir()]
    if not found:
        found = [inner for path in named for inner in sorted(path.iterdir()) if _is_named(inner, stems, kind)]
    if not found:
        raise DataError(
            f"{folder} has no {stems[0]}-{kind}-*-ubyte or .gz: it needs images and labels of train and t10k "
            f"(or test), as MNIST names them."
        )
    plain = [path for path in found if path.suffix != ".gz"]
    if len({path.name.removesuffix(".gz") for path in found}) > 1:
        raise DataError(f"{folder} has more than one set of {stems[0]} {kind}: {', '.join(p.name for p in found)}.")
    return (plain or found)[0]


def _is_named(path: Path, stems: tuple[str, ...], kind: str) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and kind in path.name and "ubyte" in path.name and any(stem in path.name for stem in stems)


def _read(path: Path, dimensions: int, digests: set[str], count: int | None = None) -> NDArray[np.uint8]:
    """Read an IDX file of bytes: no more of it than its header says.

    Args:
        path: The file.
        dimensions: 3 for images, 1 for labels.
        digests: Gets the MD5 of its unzipped content.
        count: What its first dimension must be.

    Raises:
        DataError: It is damaged, too large or no such file.
        StorageError: The disk does not let it be read now.
    """
    header = 4 + 4 * dimensions
    try:
        with named(path), _open(path) as (file, most):
            start = file.read(header)
            shape = _shape(path, start, dimensions)
            if count is not None and shape[0] != count:
                raise DataError(f"{path} has {shape[0]} images, but there are {count} labels for them: get both again.")
            length = math.prod(shape)
            content = file.read(min(length + 1, most))
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno in STORAGE:
            raise storage_error(error) from None
        raise DataError(f"{path} cannot be read: {error}. Get the file again.") from None
    if len(content) != length:
        holds = f"holds {len(content)}" if len(content) < length else "holds more"
        raise DataError(
            f"{path} should hold {'x'.join(map(str, shape))} bytes after its header, but {holds}: get the file again."
        )
    digest = hashlib.md5(start, usedforsecurity=False)
    digest.update(content)
    digests.add(digest.hexdigest())
    return np.frombuffer(content, np.uint8).reshape(shape)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open a file without waiting for the writer of a pipe; with it comes the most that it may hold, unzipped."""
    with os.fdopen(
        os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
    ) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file) as unzipped:
                yield cast(IO[bytes], unzipped), status.st_size * DEFLATE_RATIO
        else:
            yield file, status.st_size


def _shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    """Read the dimensions of an IDX file of bytes."""
    if header[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is no IDX file of bytes in {dimensions} dimension{'s' * (dimensions > 1)}.")
    if len(header) < 4 + 4 * dimensions:
        raise DataError(f"{path} ends within its header: get the file again.")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if not all(shape):
        raise DataError(f"{path} has no {'images' if dimensions == 3 else 'labels'} ({'x'.join(map(str, shape))}).")
    if math.prod(shape) > MOST_BYTES:
        raise DataError(
            f"{path} should hold {'x'.join(map(str, shape))} bytes by its header, and at most {MOST_BYTES >> 30} GiB "
            f"can be imported: get the file again, or import it in parts."
        )
    return shape


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
    try:
        with ProcessPoolExecutor(allowed_cpus(), fork, start_helper, (die_with_parent(),)) as pool:
            list(pool.map(_write_chunk, jobs))
    except BrokenProcessPool:
        raise WorkerError(
            "A process that was writing images was killed, perhaps because memory ran out: free some, or use fewer "
            "CPUs at once (taskset), and start the command again."
        ) from None


def _write_chunk(job: tuple[Path, int, NDArray[np.uint8], NDArray[np.uint8], list[str]]) -> None:
    folder, start, images, labels, classes = job
    for number, (image, label) in enumerate(zip(images, labels, strict=True), start):
        Image.fromarray(image).save(folder / classes[label] / f"{number:05}.png", compress_level=1)
