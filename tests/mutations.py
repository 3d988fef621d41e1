"""Small images in every format and mode that is read, and ways to damage them."""

from __future__ import annotations

import contextlib
import io
import itertools
import resource
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TYPES = {"u": 1, "i": 2, "f": 3}
"""TIFF's sample formats, by the kind of a numpy type."""


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values: np.ndarray, *, depth: int = 8, colour: int = 0, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a PNG file of `(H, W, C)` values, without filters."""
    height, width, _ = values.shape
    bits = [np.unpackbits(values.astype(">u2").view(np.uint8).reshape(*values.shape, 2), axis=-1)[..., 16 - depth :]]
    lines = np.packbits(bits[0].reshape(height, -1), axis=1)
    data = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + before + chunk(b"IDAT", data) + after + chunk(b"IEND", b"")


def tiff(
    values: np.ndarray,
    *,
    photometric: int = 1,
    planes: bool = False,
    rows: int | None = None,
    tile: int | None = None,
    compressed: bool = False,
    extra: tuple[int, ...] = (),
    tags: dict[int, int | list[int]] | None = None,
) -> bytes:
    """Return a TIFF file of `(H, W, C)` values, in the byte order of their type."""
    order, kind, bits = values.dtype.byteorder, values.dtype.kind, 8 * values.dtype.itemsize
    order = ">" if order == ">" else "<"
    height, width, samples = values.shape
    parts = np.split(values, samples, axis=2) if planes else [values]
    blocks = [block.tobytes() for part in parts for block in _blocks(part, rows or height, tile)]
    blocks = [zlib.compress(block) for block in blocks] if compressed else blocks
    lengths = [len(block) for block in blocks]
    entries: dict[int, list[int]] = {
        256: [width],
        257: [height],
        258: [bits] * samples,
        259: [8 if compressed else 1],
        262: [photometric],
        277: [samples],
        284: [2 if planes else 1],
        339: [TYPES[kind]] * samples,
        **({338: list(extra)} if extra else {}),
        **({322: [tile], 323: [tile], 324: lengths, 325: lengths} if tile else {}),
        **({} if tile else {273: lengths, 278: [rows or height], 279: lengths}),
        **{tag: value if isinstance(value, list) else [value] for tag, value in (tags or {}).items()},
    }
    start = 8 + 2 + 12 * len(entries) + 4
    place = start + sum(4 * len(value) for value in entries.values() if len(value) > 1)
    entries[324 if tile else 273] = [place + sum(lengths[:number]) for number in range(len(lengths))]
    table, beyond = b"", b""
    for tag, value in sorted(entries.items()):
        content = struct.pack(f"{order}{len(value)}I", *value)
        if len(value) > 1:
            beyond, content = beyond + content, struct.pack(f"{order}I", start + len(beyond))
        table += struct.pack(f"{order}HHI", tag, 4, len(value)) + content
    head = b"MM\0*" if order == ">" else b"II*\0"
    head += struct.pack(f"{order}IH", 8, len(entries)) + table + struct.pack(f"{order}I", 0)
    return head + beyond + b"".join(blocks)


def _blocks(part: np.ndarray, rows: int, tile: int | None) -> Iterator[np.ndarray]:
    if tile is None:
        yield from (part[top : top + rows] for top in range(0, len(part), rows))
        return
    for top, left in itertools.product(range(0, part.shape[0], tile), range(0, part.shape[1], tile)):
        block = np.zeros((tile, tile, part.shape[2]), part.dtype)
        inside = part[top : top + tile, left : left + tile]
        block[: inside.shape[0], : inside.shape[1]] = inside
        yield block


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    """Return an image as Pillow writes it."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@contextlib.contextmanager
def limited_memory(length: int) -> Iterator[None]:
    """Leave so many bytes to this process, and to those that it forks."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def smooth(generator: Generator, mode: str, size: tuple[int, int] = (14, 11)) -> Image.Image:
    """Draw an image that is neither flat nor noise."""
    coarse = generator.integers(0, 256, (4, 5, 4), np.uint8)
    picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    if mode in ("F", "I"):
        return picture.convert("L").convert(mode).point(lambda value: value * (1 / 256 if mode == "F" else 256) + 0)
    if mode == "LAB":
        return picture.convert("RGB").convert("LAB")
    return (
        picture if mode == "RGBA" else picture.convert("RGB").convert(mode) if mode != "LA" else picture.convert("LA")
    )


def pictures(generator: Generator) -> dict[str, bytes]:
    """Return whole images by name; each name ends in an ending that data sets have."""
    made = {}
    turned = Image.Exif()
    turned[274] = 6
    profile = {"icc_profile": bytes(500)}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        picture = smooth(generator, mode)
        made[f"{mode}.png"] = saved(picture, "PNG")
        made[f"{mode}-more.png"] = saved(picture, "PNG", exif=turned, **profile)
    for mode, channels in (("L", 1), ("RGB", 3)):
        for number in range(4):
            made[f"plain-{mode}-{number}.png"] = saved(smooth(generator, mode, (12, 12)), "PNG")
        for depth in (2, 4, 8, 16) if channels == 1 else (8, 16):
            values = generator.integers(0, 1 << depth, (11, 14, channels))
            clear = chunk(b"tRNS", struct.pack(f">{channels}H", *values[0, 0].tolist()))
            made[f"clear-{mode}-{depth}.png"] = png(values, depth=depth, colour=channels - 1, before=clear)
    animated = [smooth(generator, "RGB") for _ in range(3)]
    for kind, ending in (("PNG", "png"), ("GIF", "jpg"), ("WEBP", "webp"), ("TIFF", "tiff"), ("MPO", "jpg")):
        made[f"many-{kind}.{ending}"] = saved(animated[0], kind, save_all=True, append_images=animated[1:])
    for mode in ("L", "RGB", "CMYK"):
        made[f"{mode}.jpg"] = saved(smooth(generator, mode), "JPEG")
        made[f"{mode}-more.jpeg"] = saved(smooth(generator, mode), "JPEG", progressive=True, exif=turned)
    for mode, ending in (("1", "ppm"), ("L", "pgm"), ("RGB", "ppm"), ("I", "pgm"), ("F", "pgm")):
        made[f"{mode}.{ending}"] = saved(smooth(generator, mode), "PPM")
    for kind, most in (("P1", 2), ("P2", 256), ("P3", 101)):
        values = generator.integers(0, most, (4, 5, 3 if kind == "P3" else 1)).ravel().tolist()
        white = f"{most - 1}\n" if kind != "P1" else ""
        made[f"{kind}.ppm"] = f"{kind}\n# text\n5 4\n{white}{' '.join(map(str, values))}\n".encode()
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        made[f"{mode}.bmp"] = saved(smooth(generator, mode), "BMP")
    for mode in ("L", "P", "RGB"):
        made[f"{mode}-gif.png"] = saved(smooth(generator, mode), "GIF", transparency=3)
    for mode in ("RGB", "RGBA"):
        made[f"{mode}.webp"] = saved(smooth(generator, mode), "WEBP", exif=turned)
        made[f"{mode}-lossless.webp"] = saved(smooth(generator, mode), "WEBP", lossless=True)
        made[f"{mode}-avif.jpg"] = saved(smooth(generator, mode), "AVIF", exif=turned)
    for mode, compression in itertools.product(
        ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB"), (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")
    ):
        made[f"{mode}-{compression}.tif"] = saved(smooth(generator, mode), "TIFF", compression=compression)
    for mode, compression in (("1", "group4"), ("1", "group3"), ("L", "jpeg"), ("RGB", "jpeg"), ("YCbCr", None)):
        made[f"{mode}-{compression}.tiff"] = saved(smooth(generator, mode), "TIFF", compression=compression)
    for kind, planes, compressed, tile in itertools.product(
        ("<u1", "<u2", ">u2", "<f4", ">f4"), (False, True), (False, True), (None, 16)
    ):
        samples = 1 if kind.endswith("f4") else 3
        values = generator.random((11, 14, samples)) * (1 if samples == 1 else 1 << 8 * int(kind[2]))
        content = tiff(
            values.astype(kind), photometric=1 if samples == 1 else 2, planes=planes, compressed=compressed, tile=tile
        )
        made[f"made-{kind[1:]}{'-big' * (kind[0] == '>')}-{planes:d}{compressed:d}{tile or 0}.tif"] = content
    return made


def damaged(generator: Generator, content: bytes, other: bytes) -> bytes:
    """Damage a file in one of the ways in which files are damaged or forged.

    Args:
        generator: Draws which way, and where.
        content: The file.
        other: Another file, from which pieces may come.
    """
    ways = [_keep, _keep, _flip, _flip, _overwrite, _cut, _insert, _remove, _swap, _splice, _forge_number]
    if content.startswith(SIGNATURE):
        ways += [_forge_chunks] * 4
    return ways[generator.integers(len(ways))](generator, bytearray(content), other)


def _keep(generator: Generator, content: bytearray, other: bytes) -> bytes:
    return bytes(content)


def _flip(generator: Generator, content: bytearray, other: bytes) -> bytes:
    for _ in range(generator.choice([1, 1, 1, 2, 8])):
        content[_place(generator, content)] ^= 1 << generator.integers(8)
    return bytes(content)


def _overwrite(generator: Generator, content: bytearray, other: bytes) -> bytes:
    at, length = generator.integers(len(content)), generator.choice([1, 4, 16, 200])
    value = generator.choice([0, 255, -1])
    for place in range(at, min(at + length, len(content))):
        content[place] = value if value >= 0 else generator.integers(256)
    return bytes(content)


def _cut(generator: Generator, content: bytearray, other: bytes) -> bytes:
    return bytes(content[: generator.integers(len(content))])


def _insert(generator: Generator, content: bytearray, other: bytes) -> bytes:
    at = _place(generator, content)
    return bytes(content[:at]) + generator.bytes(generator.choice([1, 2, 16])) + bytes(content[at:])


def _remove(generator: Generator, content: bytearray, other: bytes) -> bytes:
    at = _place(generator, content)
    del content[at : at + generator.choice([1, 2, 16])]
    return bytes(content)


def _swap(generator: Generator, content: bytearray, other: bytes) -> bytes:
    one, two = sorted(generator.integers(len(content), size=2))
    length = min(generator.choice([4, 32]), two - one)
    first, second = content[one : one + length], content[two : two + length]
    return bytes(content[:one] + second + content[one + len(second) : two] + first + content[two + length :])


def _splice(generator: Generator, content: bytearray, other: bytes) -> bytes:
    return bytes(content[: generator.integers(len(content))]) + other[generator.integers(len(other)) :]


def _forge_number(generator: Generator, content: bytearray, other: bytes) -> bytes:
    """Write a number that decoders stumble over where a header may have one."""
    number = int(generator.choice([0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
    layout = str(generator.choice(["<H", ">H", "<I", ">I"]))
    at = generator.integers(max(1, min(len(content), 300) - 4))
    width = struct.calcsize(layout)
    content[at : at + width] = struct.pack(layout, number & ((1 << 8 * width) - 1))
    return bytes(content)


def _forge_chunks(generator: Generator, content: bytearray, other: bytes) -> bytes:
    """Change a PNG file's chunks, and write the right checksums."""
    chunks = chunks_of(bytes(content))
    at = int(generator.integers(len(chunks)))
    kind, data = chunks[at]
    way = generator.integers(5)
    if way == 0:
        del chunks[at]
    elif way == 1:
        chunks.insert(int(generator.integers(len(chunks))), (kind, data))
    elif way == 2:
        chunks[at] = (kind, _flip(generator, bytearray(data), b"") if data else b"x")
    elif way == 3:
        new = [
            b"tEXt",
            b"zTXt",
            b"iCCP",
            b"eXIf",
            b"tRNS",
            b"PLTE",
            b"acTL",
            b"fcTL",
            b"fdAT",
            b"IDAT",
            b"abcd",
            b"ABCD",
        ]
        name = new[generator.integers(len(new))]
        chunks.insert(at, (name, generator.bytes(int(generator.choice([0, 2, 6, 26, 300])))))
    else:
        half = len(data) // 2
        chunks[at : at + 1] = [(kind, data[:half]), (kind, data[half:])]
    return SIGNATURE + b"".join(chunk(*pair) for pair in chunks)


def chunks_of(content: bytes) -> list[tuple[bytes, bytes]]:
    """List the chunks of a whole PNG file: their kinds and contents."""
    chunks, at = [], len(SIGNATURE)
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def checksums_are_right(content: bytes) -> bool:
    """Return whether all chunks of a PNG file, up to its end chunk, have the right checksums."""
    at = len(SIGNATURE)
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        body = content[at + 4 : at + 8 + length]
        if content[at + 8 + length : at + 12 + length] != zlib.crc32(body).to_bytes(4, "big"):
            return False
        if kind == b"IEND":
            return True
        at += 12 + length
    return False


def _place(generator: Generator, content: bytearray) -> int:
    """Draw a place in a file; headers, where most decisions are taken, come up more often."""
    return int(generator.integers(len(content) if generator.random() < 0.5 else min(len(content), 100)))
