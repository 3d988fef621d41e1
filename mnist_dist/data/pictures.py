"""Decode picture files to arrays of one size, in parallel."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mnist_dist.machine import allowed_cpus, die_with_parent, start_helper

CHUNK = 128
CHUNK_BYTES = 1 << 25
"""What one process decodes before it hands it over: so many pictures or bytes at most."""

UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, zlib.error)
"""What Pillow's decoders raise for damaged files; UnidentifiedImageError is an OSError."""

Decoded = tuple[NDArray[np.uint8], list[tuple[str, str]]]


def decode(path: str | Path, image_size: int, channels: int) -> NDArray[np.uint8]:
    """Decode one picture: upright, on white where it is transparent, resized.

    Args:
        path: Any format that Pillow reads; 16-bit gray is scaled to 8 bits.
        image_size: Height and width of the result; the picture is stretched to it.
        channels: 1 for grayscale (ITU-R 601 luma), 3 for colour.

    Returns:
        `(channels, image_size, image_size)` uint8.

    Raises:
        OSError: and the rest of `UNREADABLE`: the file is missing, damaged or no picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as picture:
                picture.load()
                upright = ImageOps.exif_transpose(picture)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise OSError(f"it is too large: {error}") from None
    pixels = _to_8_bits(upright).convert("L" if channels == 1 else "RGB")
    if pixels.size != (image_size, image_size):
        pixels = pixels.resize((image_size, image_size), Image.Resampling.BILINEAR)
    array = np.asarray(pixels)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def decode_all(root: Path, files: tuple[str, ...], image_size: int, channels: int) -> Iterator[Decoded]:
    """Decode many pictures with all CPUs, in order, a chunk at a time.

    Yields:
        `(n, channels, image_size, image_size)` uint8 of the chunk, and a (file, reason) pair for each picture
        in it that cannot be read and is left black.
    """
    size = max(1, min(CHUNK, CHUNK_BYTES // (channels * image_size**2)))
    jobs = [(str(root), files[start : start + size], image_size, channels) for start in range(0, len(files), size)]
    processes = min(allowed_cpus(), len(jobs)) if sys.platform == "linux" else 1
    if processes == 1:
        yield from map(_decode_chunk, jobs)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, fork, start_helper, (die_with_parent(),)) as pool:
        yield from pool.map(_decode_chunk, jobs)


def _decode_chunk(job: tuple[str, tuple[str, ...], int, int]) -> Decoded:
    root, files, image_size, channels = job
    images = np.zeros((len(files), channels, image_size, image_size), np.uint8)
    unreadable = []
    for row, file in enumerate(files):
        try:
            images[row] = decode(f"{root}/{file}", image_size, channels)
        except UNREADABLE as error:
            reason = " ".join(str(error).split()).replace(f"{root}/{file}", "the file").strip("'\". ")
            unreadable.append((file, reason or type(error).__name__))
    return images, unreadable


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale 16-bit gray, which Pillow would clip, and lay transparent pictures on white."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    if picture.has_transparency_data:
        colour = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    return picture
