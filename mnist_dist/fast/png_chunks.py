"""Saves the images that Pillow would refuse or misread: it passes on only the chunks that make the pixels, checked.

Pillow ignores the checksums of the image data, refuses some images for their texts and colour profiles, and reads a
transparent gray or colour as 8 bits at any depth.

Format: Portable Network Graphics (PNG) Specification, W3C Recommendation, third edition.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from mnist_dist.fast.png import FIRST_CHUNK, LAST_CHUNK, SIGNATURE, chunk

HEADER_LENGTH = 13
PIECE = 1 << 20
"""Bytes read at once."""
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Values per pixel, by colour type."""
VALUES = {0: 1, 2: 3}
"""Values of the transparent gray or colour, by the colour types that may have one."""
ANCILLARY = 0x20
"""The bit of a chunk's first letter that says that readers may skip it."""
IMAGE_DATA = b"IDAT"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
MOST = {b"PLTE": 768, b"tRNS": 256, LAST_CHUNK: 0, b"eXIf": PIECE, **dict.fromkeys(TEXTS, PIECE)}
"""Other chunks that may change the image, with the most bytes that are read. Longer ones are skipped."""
TURNING = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""First bytes of texts that may hold the image's orientation. Other texts are skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The parts of a PNG file that make its pixels."""

    content: bytes
    """A PNG file of its own."""
    transparent: tuple[int, ...]
    """The gray, or red, green and blue, of 16 bits that is transparent; it is not in `content`. Else empty."""


def check_size(width: int, height: int, most: int) -> None:
    """Raise if an image has too many pixels.

    Raises:
        ValueError: It has more than `most`.
    """
    if width * height > most:
        raise ValueError(
            f"it has {width} x {height} pixels, more than the {most / 1e6:.0f} megapixels of data.max_megapixels "
            f"(--max-megapixels)"
        )


def read_picture(file: BinaryIO, most: int) -> Picture:
    """Read a PNG file, checking the checksum of every chunk.

    Args:
        file: At its beginning.
        most: Pixels that the image may have.

    Raises:
        ValueError: It is damaged, cut off, or larger than `most`.
    """
    if file.read(len(SIGNATURE)) != SIGNATURE:
        raise ValueError("it is no PNG file")
    kind, header = _read_chunk(file, {FIRST_CHUNK: HEADER_LENGTH})
    if kind != FIRST_CHUNK or header is None or len(header) != HEADER_LENGTH:
        raise ValueError("its first chunk is no PNG header")
    width, height, depth, colour = struct.unpack(">IIBB", header[:10])
    check_size(width, height, most)
    line = 1 + (width * depth * SAMPLES.get(colour, 4) + 7) // 8
    most_of = MOST | {IMAGE_DATA: 2 * height * line + PIECE}  # more than that inflates to more than the image
    kept = bytearray(SIGNATURE + chunk(kind, header))
    transparent: tuple[int, ...] = ()
    begun = ended = False
    while kind != LAST_CHUNK:
        kind, content = _read_chunk(file, most_of)
        if content is None:  # passed over
            continue
        if kind == IMAGE_DATA:
            if ended:
                raise ValueError("its image data is in two places")
            begun = True
            most_of[IMAGE_DATA] -= len(content)
        else:
            ended = begun
        if kind == b"tRNS" and colour in VALUES and len(content) >= 2 * VALUES[colour]:
            content, transparent = _transparent(content, depth, VALUES[colour])
        if content is not None:
            kept += chunk(kind, content)
    return Picture(content=bytes(kept), transparent=transparent)


def _read_chunk(file: BinaryIO, most_of: dict[bytes, int]) -> tuple[bytes, bytes | None]:
    """Read and check a chunk. Its content is None if it does not change the image."""
    start = file.read(8)
    length, kind = struct.unpack(">I4s", start.ljust(8, b"\0"))
    if len(start) < 8:
        raise ValueError("it is cut off")
    if not kind.isalpha():
        raise ValueError("a chunk has no name: it is damaged")
    if kind[0] & ANCILLARY == 0 and length > most_of.get(kind, -1):
        raise ValueError(f"its chunk {kind.decode()} is not known, or too long")
    keep = length <= most_of.get(kind, -1)
    content, checksum = bytearray(), zlib.crc32(kind)
    while length:
        piece = file.read(min(length, PIECE))
        if not piece:
            raise ValueError("it is cut off")
        length, checksum = length - len(piece), zlib.crc32(piece, checksum)
        if keep:
            content += piece
    if file.read(4) != checksum.to_bytes(4, "big"):
        raise ValueError(f"the checksum of its chunk {kind.decode()} is wrong: it is damaged")
    if kind in TEXTS and not content.startswith(TURNING):
        keep = False
    return kind, bytes(content) if keep else None


def _transparent(content: bytes, depth: int, values: int) -> tuple[bytes | None, tuple[int, ...]]:
    """Scale what is transparent to the 8 bits to which Pillow scales the image; 16 bits are taken out."""
    white = (1 << depth) - 1
    exact = tuple(value & white for value in struct.unpack(f">{values}H", content[: 2 * values]))
    if depth == 16:
        return None, exact
    scaled = (value * 255 // white if depth > 1 else value for value in exact)  # Pillow scales 1 bit itself
    return struct.pack(f">{values}H", *scaled), ()
