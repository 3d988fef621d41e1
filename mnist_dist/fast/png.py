"""Saves most of the work per file when many plain PNG files of the wanted size are decoded.

Each image costs three system calls, a few comparisons, a checksum and zlib. The row filters are undone for all images
of a chunk at once. `png_chunks` and Pillow decode every other file: another size, depth or colour type, interlaced,
transparent, animated, rotated or damaged.

Format: Portable Network Graphics (PNG) Specification, W3C Recommendation, third edition; its section 9 has the filters.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

COLOUR_TYPES = {1: 0, 3: 2}
"""PNG's colour type by number of channels: grayscale or RGB."""
HARMLESS = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}
"""Chunks that change no pixel, with their lengths in bytes."""
OVERHEAD = 1024
"""A plain file is at most this many bytes longer than its pixels. Longer files are not read to their end."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"
FIRST_CHUNK, LAST_CHUNK = b"IHDR", b"IEND"
READ = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)  # Windows would translate line ends
    | getattr(os, "O_NONBLOCK", 0)  # a named pipe is not waited for
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
)
"""Flags to open a file that may be anything."""


def decode_plain(paths: Sequence[str], image_size: int, channels: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Decode the files that are plain PNGs.

    Args:
        paths: The files; they need not be PNGs, nor be there.
        image_size: Height and width that an image must have.
        channels: 1 for 8-bit grayscale, 3 for 8-bit colour.

    Returns:
        `(K,)` which of the files were decoded, ascending, and their `(K, channels, image_size, image_size)` pixels.
    """
    header = struct.pack(">IIBBBBB", image_size, image_size, 8, COLOUR_TYPES[channels], 0, 0, 0)
    start = SIGNATURE + chunk(FIRST_CHUNK, header)
    length = image_size * (1 + image_size * channels)  # each row's filter stands before it
    scanlines = [_scanlines(path, start, length) for path in paths]
    decoded = np.array([row for row, lines in enumerate(scanlines) if lines], np.int64)
    filtered = np.frombuffer(bytearray().join(filter(None, scanlines)), np.uint8).reshape(
        -1, image_size, 1 + image_size * channels
    )
    known = (filtered[:, :, 0] < 1 + len(_UNDO)).all(axis=1)
    if not known.all():
        decoded, filtered = decoded[known], filtered[known]
    pixels = _unfilter(filtered, channels)  # (K, image_size, image_size x channels)
    return decoded, pixels.reshape(-1, image_size, image_size, channels).transpose(0, 3, 1, 2)


def _scanlines(path: str, start: bytes, length: int) -> bytes | None:
    """Return a plain image's filtered rows; None for any other file."""
    try:
        file = os.open(path, READ)
        try:
            content = _read_start(file, length + OVERHEAD)
        finally:
            os.close(file)
    except OSError:  # it will be opened once more, and say the same
        return None
    if not (content.startswith(start) and content.endswith(_END)):
        return None
    compressed = _image_data(content, len(start), len(content) - len(_END))
    if compressed is None:
        return None
    stream = zlib.decompressobj()
    try:
        lines = stream.decompress(compressed, length + 1)
    except zlib.error:
        return None
    return lines if len(lines) == length and stream.eof and not stream.unused_data else None


def _image_data(content: bytes, start: int, end: int) -> bytes | None:
    """Return the image data between the first and the last chunk; None if there is any other chunk."""
    data: list[bytes] = []
    while start < end:
        kind, stop = content[start + 4 : start + 8], start + 8 + int.from_bytes(content[start : start + 4], "big")
        if stop + 4 > end or zlib.crc32(content[start + 4 : stop]) != int.from_bytes(content[stop : stop + 4], "big"):
            return None
        if kind == b"IDAT":
            data.append(content[start + 8 : stop])
        elif data or HARMLESS.get(kind) != stop - start - 8:
            return None
        start = stop + 4
    return b"".join(data)


def _unfilter(filtered: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Undo the filters of all images, row by row and filter by filter, in place.

    Args:
        filtered: `(K, H, 1 + W x C)`: each row's filter, then its bytes.
        channels: C.

    Returns:
        `(K, H, W x C)` view of the rows without their filters.
    """
    filters = np.ascontiguousarray(filtered[:, :, 0].T)  # (H, K)
    rows = filtered[:, :, 1:]
    for y in range(len(filters)):
        for number, undo in enumerate(_UNDO, 1):
            chosen = np.flatnonzero(filters[y] == number)
            if len(chosen):
                row = rows[chosen, y]  # (k, W x C)
                above = rows[chosen, y - 1] if y else np.zeros_like(row)
                rows[chosen, y] = undo(row, above, channels)
    return rows


def _undo_sub(row: NDArray[np.uint8], above: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    pixels = row.reshape(len(row), -1, channels)
    return pixels.cumsum(axis=1, dtype=np.uint8).reshape(row.shape)


def _undo_up(row: NDArray[np.uint8], above: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    return row + above


def _undo_average(row: NDArray[np.uint8], above: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    columns = _columns(row, channels)
    left = np.zeros_like(columns[0])
    for column, up in zip(columns, _columns(above, channels), strict=True):
        column += (left + up) >> 1
        column &= 255
        left = column
    return _rows(columns)


def _undo_paeth(row: NDArray[np.uint8], above: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    columns, ups = _columns(row, channels), _columns(above, channels)
    corners = np.concatenate([np.zeros_like(ups[:1]), ups[:-1]])
    left = corners[0]
    for column, up, corner, rise in zip(columns, ups, corners, ups - corners, strict=True):
        run = left - corner
        off_left, off_up, off_corner = np.abs(rise), np.abs(run), np.abs(rise + run)  # of left + up - corner
        nearest = np.where(off_up <= off_corner, up, corner)
        column += np.where((off_left <= off_up) & (off_left <= off_corner), left, nearest)
        column &= 255
        left = column
    return _rows(columns)


def _columns(row: NDArray[np.uint8], channels: int) -> NDArray[np.int16]:
    """Return rows as `(W, k, C)`, so that each pixel is undone for all images at once."""
    return row.reshape(len(row), -1, channels).transpose(1, 0, 2).astype(np.int16, order="C")


def _rows(columns: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Undo `_columns`."""
    return columns.transpose(1, 0, 2).astype(np.uint8, order="C").reshape(columns.shape[1], -1)


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk with its length and checksum."""
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def _read_first(file: int, length: int) -> bytes:
    return os.pread(file, length, 0)  # OSError for pipes, from which nothing is taken


_read_start = _read_first if hasattr(os, "pread") else os.read
_END = chunk(LAST_CHUNK, b"")
_Undo = Callable[[NDArray[np.uint8], NDArray[np.uint8], int], NDArray[np.uint8]]
_UNDO: tuple[_Undo, ...] = (_undo_sub, _undo_up, _undo_average, _undo_paeth)
"""The inverse of each filter, by its number from 1. Number 0 means no filter."""
