"""Write and read the files of a store. Checksums show damage, and links and odd files are never followed.

A store may be cut by a full disk, have flipped bits, or come from a stranger in a data folder. So nothing is
opened through a link, no pipe is waited for, no file decides how much is read, and nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import random
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, magic, write_array_header_1_0
from numpy.typing import NDArray

MOST_JSON_BYTES = 1 << 27
BLOCK = 1 << 24
"""Bytes of an array that share a checksum."""
HEADER_START = 10
"""Bytes of a .npy file up to and including the length of its header (NumPy's format 1.0)."""


class DamagedStoreError(Exception):
    """A store or one of its files changed after it was written. Users never see this: stores are rebuilt."""


@contextlib.contextmanager
def array_file(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[IO[bytes]]:
    """Open a .npy file whose values are written afterwards, and sync it at the end."""
    with os.fdopen(os.open(path, _CREATE, 0o666), "wb") as file:
        write_array_header_1_0(file, header_data_from_array_1_0(np.empty(0, dtype)) | {"shape": shape})
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_array(path: Path, array: NDArray[Any]) -> list[int]:
    """Write a .npy file; returns the checksums of its blocks."""
    with array_file(path, array.shape, array.dtype) as file:
        file.write(array.data)
    return Sums().update(array.data).values


def map_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Map the values of a .npy file into memory, copy-on-write. The header is not read: dtype and shape are known.

    Raises:
        DamagedStoreError: The file is not there, no regular file, or of another size.
    """
    with open_regular(path) as file:
        start, size = file.read(HEADER_START), os.fstat(file.fileno()).st_size
        offset = HEADER_START + int.from_bytes(start[-2:], "little")
        if not start.startswith(magic(1, 0)) or size != offset + math.prod(shape) * dtype.itemsize:
            raise DamagedStoreError(f"{path.name} is {'cut, or no array of this store' if size else 'empty'}")
        return np.memmap(file, dtype, "c", offset, shape)


def verify_array(path: Path, sums: list[int], most_blocks: int | None = None) -> None:
    """Compare the blocks of a .npy file with their checksums.

    Args:
        path: The file, which `map_array` has taken.
        sums: One CRC-32 a block.
        most_blocks: Of more, so many are drawn anew at each call.

    Raises:
        DamagedStoreError: Bits have flipped.
    """
    blocks = range(len(sums))
    chosen = blocks if most_blocks is None or len(sums) <= most_blocks else sorted(random.sample(blocks, most_blocks))
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        offset = HEADER_START + int.from_bytes(file.read(HEADER_START)[-2:], "little")
        buffer = memoryview(bytearray(min(BLOCK, size)))
        for block in chosen:
            file.seek(offset + block * BLOCK)
            if zlib.crc32(buffer[: file.readinto(buffer)]) != sums[block]:  # type: ignore[attr-defined]
                raise DamagedStoreError(f"bits of {path.name} have flipped")
    if len(sums) != math.ceil((size - offset) / BLOCK):
        raise DamagedStoreError(f"{path.name} has a different number of blocks than of checksums")


class Sums:
    """CRC-32s of the blocks of an array, computed as it is written."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self._free = 0

    def update(self, content: memoryview) -> Sums:
        """Add the next bytes of the array."""
        content = content.cast("B")
        while content:
            if not self._free:
                self.values.append(0)
                self._free = BLOCK
            part, content = content[: self._free], content[self._free :]
            self.values[-1] = zlib.crc32(part, self.values[-1])
            self._free -= len(part)
        return self


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """Replace a JSON file that contains its own hash, atomically and synced."""
    text = json.dumps({"sha256": _seal(record), "record": record})
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, _CREATE, 0o666), "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    put(temporary, path)


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` has written; a file of an earlier version is returned as it is.

    Raises:
        DamagedStoreError: It is missing, too large, or not as it was written.
    """
    with open_regular(path) as file:
        content = file.read(MOST_JSON_BYTES + 1)
    try:
        if len(content) > MOST_JSON_BYTES:
            raise ValueError
        sealed = json.loads(content)
        if "format" in sealed:
            return dict(sealed)
        record: dict[str, Any] = sealed["record"]
        if not isinstance(record, dict) or sealed["sha256"] != _seal(record):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        what = "is empty" if not content else "has changed since it was written"
        raise DamagedStoreError(f"{path.name} {what}") from None
    return record


def open_regular(path: Path) -> IO[bytes]:
    """Open a file of a store to read it: never through a link, and without waiting for the writer of a pipe.

    Raises:
        DamagedStoreError: It is missing, or no regular file.
        OSError: It cannot be opened for another reason.
    """
    if not stat.S_ISREG(_status(path).st_mode):
        raise DamagedStoreError(f"{path.name} is no regular file")
    try:
        file = os.fdopen(os.open(path, _READ), "rb", buffering=0)
    except OSError as error:
        raise _missing(path, error) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # replaced since
        file.close()
        raise DamagedStoreError(f"{path.name} is no regular file")
    return file


def put(temporary: Path, path: Path) -> None:
    """Rename a file, replacing whatever has the new name."""
    if path.is_dir() and not path.is_symlink():
        remove(path)
    temporary.replace(path)


def remove(path: Path) -> None:
    """Remove a folder, or whatever has its name. A link is removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder and not a link to one.

    Raises:
        DamagedStoreError: It is not there.
    """
    return stat.S_ISDIR(_status(path).st_mode)


def _status(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except OSError as error:
        raise _missing(path, error) from None


def _missing(path: Path, error: OSError) -> Exception:
    """Return a DamagedStoreError for a file that is missing, else the error itself: it cannot be read now."""
    gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    return DamagedStoreError(f"{path.name} is missing") if gone else error


def _seal(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | _FLAGS
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS
