"""Decode picture files to arrays of one size, in parallel."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mnist_dist.data.png import decode_plain
from mnist_dist.machine import allowed_cpus, die_with_parent, start_helper

CHUNK = 128
PLAIN_CHUNK = 2048
CHUNK_BYTES = 1 << 25
"""What one process decodes before it hands it over: so many pictures or bytes at most. Filters of plain PNG files are
undone for a whole chunk together; other pictures may take a while each."""

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, zlib.error)
"""What Pillow's decoders raise for damaged files; UnidentifiedImageError is an OSError."""

T = TypeVar("T")
Keep = Callable[[int, NDArray[np.uint8]], T]
"""Gets a chunk's first picture and `(n, C, H, W)` pixels in the process that has decoded them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """What pictures are decoded to."""

    image_size: int
    """Height and width of the result; a picture is stretched to it."""
    channels: int
    """1 for grayscale (ITU-R 601 luma), 3 for colour."""
    max_megapixels: int = 256
    """Larger pictures are refused before they are decoded."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of each picture."""
        return self.channels, self.image_size, self.image_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk(Generic[T]):
    """Some pictures that follow each other, decoded."""

    start: int
    """The first of them."""
    pictures: int
    kept: T
    unreadable: list[tuple[str, str]]
    """A (file, reason) pair for each picture that cannot be read and is left black."""


def decode(path: str | Path, image_size: int, channels: int, *, max_megapixels: int = 256) -> NDArray[np.uint8]:
    """Decode one picture: upright, on white where it is transparent, resized.

    Args:
        path: Any format that Pillow reads; 16-bit gray is scaled to 8 bits.
        image_size: Height and width of the result; the picture is stretched to it.
        channels: 1 for grayscale (ITU-R 601 luma), 3 for colour.
        max_megapixels: Larger pictures are refused.

    Returns:
        `(channels, image_size, image_size)` uint8.

    Raises:
        OSError: and the rest of `UNREADABLE`: the file is missing, damaged or no picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with _at_most(max_megapixels), Image.open(path) as picture:
                picture.load()
                upright = ImageOps.exif_transpose(picture)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise OSError(f"it is too large: {error}") from None
    pixels = _to_8_bits(upright).convert("L" if channels == 1 else "RGB")
    if pixels.size != (image_size, image_size):
        pixels = pixels.resize((image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(pixels)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def decode_all(root: Path, files: tuple[str, ...], decoding: Decoding, keep: Keep[T]) -> Iterator[Chunk[T]]:
    """Decode many pictures with all CPUs, in order, a chunk at a time.

    Args:
        root: What the files are relative to.
        files: The pictures.
        decoding: What they are decoded to.
        keep: Must be picklable: it is called where a chunk was decoded, and what it returns travels here.
    """
    plain, _ = decode_plain(
        [f"{root}/{file}" for file in files[:1]], decoding.image_size, decoding.channels
    )  # as the others likely are
    most = PLAIN_CHUNK if len(plain) else CHUNK
    size = max(1, min(most, CHUNK_BYTES // math.prod(decoding.shape)))
    starts = range(0, len(files), size)
    decode_chunk = partial(_decode_chunk, str(root), decoding, keep)
    chunks = [files[start : start + size] for start in starts]
    processes = min(allowed_cpus(), len(chunks)) if sys.platform == "linux" else 1
    if processes == 1:
        yield from map(decode_chunk, starts, chunks)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, start_helper, (die_with_parent(),)) as pool:
        yield from pool.map(decode_chunk, starts, chunks)


def discard(start: int, images: NDArray[np.uint8]) -> None:
    """Keep nothing of a chunk."""


def hand_over(start: int, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep a chunk's pixels."""
    return images


def _decode_chunk(root: str, decoding: Decoding, keep: Keep[T], start: int, files: tuple[str, ...]) -> Chunk[T]:
    paths = [f"{root}/{file}" for file in files]
    images = np.zeros((len(files), *decoding.shape), np.uint8)
    plain, pixels = decode_plain(paths, decoding.image_size, decoding.channels)
    images[plain] = pixels
    unreadable = []
    for row in sorted(set(range(len(files))).difference(plain.tolist())):
        try:
            images[row] = decode(
                paths[row], decoding.image_size, decoding.channels, max_megapixels=decoding.max_megapixels
            )
        except UNREADABLE as error:
            reason = " ".join(str(error).split()).replace(paths[row], "the file").strip("'\". ")
            unreadable.append((files[row], reason or type(error).__name__))
    return Chunk(start=start, pictures=len(files), kept=keep(start, images), unreadable=unreadable)


@contextlib.contextmanager
def _at_most(megapixels: int) -> Iterator[None]:
    """Let Pillow refuse larger pictures; its own limit is half of what phones take."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, megapixels * 1_000_000
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit gray, which Pillow would clip, and lay transparent pictures on white."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        colour = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    return picture
