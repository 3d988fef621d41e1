"""Decode one image file to pixels: which formats are read, what is refused, and what its values become.

The file's first bytes choose a decoder out of a fixed list: no file makes Pillow start another program. Whatever a
decoder raises, prints or warns of is told with the image's name.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from mnist_dist.errors import STORAGE, DataError, DeviceMemoryError, storage_error
from mnist_dist.fast import png_chunks
from mnist_dist.fast.png import READ, SIGNATURE

MAX_MEGAPIXELS = 256
"""Larger images are refused unless the config says otherwise; phones take up to 200 megapixels."""
LARGE_PIXELS = 64_000_000
"""Larger images are decoded one at a time, and larger JPEG images at a half, a quarter or an eighth of their size,
never below twice the wanted size. That takes a fraction of the memory and the time; a value may differ from a full
decode's by a few of 255 levels."""
STRIP_PIXELS = 1 << 24
"""So many pixels are converted at once: the steps in between take memory too."""
SIGNATURES = (
    ("PNG", re.compile(re.escape(SIGNATURE))),
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]")),
    ("WEBP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("BMP", re.compile(rb"BM")),
    ("PPM", re.compile(rb"P[1-6f]\s")),
    ("GIF", re.compile(rb"GIF8[79]a")),
    ("AVIF", re.compile(rb"....ftyp(avi[fs]|m[is]f1)", re.DOTALL)),
)
"""The formats that are read, with the bytes that their files begin with."""
DECODER_BYTES = 16
"""Memory that the decoders which take most need for a pixel."""
READ_WHOLE = {"WEBP", "AVIF"}
"""Formats whose decoders read the whole file before they look at the image's size."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""
ORIENTATION, BITS, PHOTOMETRIC, PLANAR, TILE_WIDTH, TILE_LENGTH, SAMPLE_FORMAT = 274, 258, 262, 284, 322, 323, 339
"""Tags of TIFF."""
UNSIGNED, FLOATS = 1, 3
"""Kinds of values in TIFF."""
OF_THE_DISK = STORAGE - {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
"""Numbers of system errors that say nothing of the image."""
HARMLESS = re.compile(r'_TIFFVSetField: .* "(Orientation|ResolutionUnit|[XY]Resolution)" tag')
"""Errors of libtiff about tags on which no pixel depends."""

COLOUR = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
"""Pillow's modes of colour images. A palette (`P`) may hold gray alone, and is not among them."""
Mode = Literal["L", "RGB"]
Warn = Callable[[str], None]
Convert = Callable[[Image.Image], Image.Image]
"""Makes 8-bit gray or colour, without transparency, of an image or of some of its rows."""


class UnreadableError(DataError):
    """A file is no image, is damaged, or is of a kind that is not read. `reason` says which."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as an image ({reason}): repair or remove it.")
        self.reason = reason


def decode(
    path: str | Path,
    image_size: int,
    channels: int,
    *,
    max_megapixels: int = MAX_MEGAPIXELS,
    warn: Warn = lambda text: None,
    alone: AbstractContextManager[object] = contextlib.nullcontext(),  # noqa: B008 - it has no state
) -> NDArray[np.uint8]:
    """Decode one image: upright, on white where it is transparent, resized.

    A file with several images gives its first. 16-bit gray is divided by 257. Floats must lie in [0, 1] and are
    multiplied by 255. 32-bit and signed integers are refused: they have no defined white.

    Args:
        path: Of one of the formats of `SIGNATURES`, whatever its ending.
        image_size: Height and width of the result; the image is stretched to it.
        channels: 1 for grayscale (ITU-R 601 luma), 3 for colour.
        max_megapixels: Larger images are refused before they are decoded.
        warn: Gets each complaint of the decoder about an image that it reads nevertheless.
        alone: Held while an image of more than `LARGE_PIXELS` is in memory.

    Returns:
        `(channels, image_size, image_size)` uint8.

    Raises:
        UnreadableError: The file is missing, damaged, no image, or of a kind that is not read.
        StorageError: The disk or its permissions do not let it be read now, which says nothing of the image.
        DeviceMemoryError: Memory does not hold the image.
    """
    try:
        with _pillow(max_megapixels * 1_000_000, warn), _open_regular(path) as file:
            picture, convert = _open(file, image_size, max_megapixels * 1_000_000)
            with alone if picture.width * picture.height > LARGE_PIXELS else contextlib.nullcontext():
                pixels = _decode(picture, convert, image_size, "L" if channels == 1 else "RGB")
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        if _is_out_of_memory(error):
            raise DeviceMemoryError(
                f"Memory ran out while {path} was decoded: free some, decode on fewer CPUs at once (taskset), or make "
                f"the image smaller."
            ) from None
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            raise storage_error(OSError(error.errno, error.strerror, str(path))) from None
        raise UnreadableError(path, _reason(error, str(path))) from None
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def look_at(path: str | Path, *, max_megapixels: int = MAX_MEGAPIXELS) -> tuple[int, int, bool] | None:
    """Return an image's width and height in pixels, and whether it is stored in colour, from its header alone.

    Returns:
        `None` for a file that `decode` would refuse.
    """
    try:
        with _pillow(max_megapixels * 1_000_000, lambda text: None), _open_regular(path) as file:
            picture, _ = _open(file, 1 << 14, max_megapixels * 1_000_000)
            return picture.width, picture.height, picture.mode in COLOUR
    except Exception:  # decoders raise whatever a damaged file leads them to; `decode` names it
        return None


@cache
def decoders() -> dict[str, Callable[[BinaryIO], ImageFile.ImageFile]]:
    """Import Pillow's decoders of the formats that are read. Call it before forking: each process needs them."""
    from PIL import (
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        JpegImagePlugin,
        PngImagePlugin,
        PpmImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs, it raises too
    return {
        "PNG": PngImagePlugin.PngImageFile,
        "JPEG": JpegImagePlugin.JpegImageFile,
        "TIFF": TiffImagePlugin.TiffImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "PPM": PpmImagePlugin.PpmImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "AVIF": AvifImagePlugin.AvifImageFile,
    }


def _open(file: BinaryIO, image_size: int, most: int) -> tuple[ImageFile.ImageFile, Convert]:
    """Read an image's header, and refuse what is not read or too large."""
    kind = _kind(file, most)
    if kind == "PNG":
        return _open_png(file, most)
    if kind == "TIFF":
        return _open_tiff(file, most)
    width, height = _canvas_of_webp(file) if kind == "WEBP" else (0, 0)
    png_chunks.check_size(width, height, most)
    with _enough_memory(width * height):
        picture = decoders()[kind](file)
    png_chunks.check_size(*picture.size, most)
    if kind == "JPEG" and picture.width * picture.height > LARGE_PIXELS:
        picture.draft(None, (2 * image_size, 2 * image_size))
    return picture, _to_8_bits


def _decode(picture: ImageFile.ImageFile, convert: Convert, image_size: int, mode: Mode) -> NDArray[np.uint8]:
    """Read an image's values, turn it upright and resize it: `(H, W)` or `(H, W, 3)`."""
    printing = _complaints() if picture.format == "TIFF" else contextlib.nullcontext()
    with _enough_memory(picture.width * picture.height), printing:
        picture.load()
    turn = _turn(picture)
    upright = _convert_in_strips(picture, convert, mode)
    if turn is not None:
        upright = upright.transpose(turn)
    if upright.size != (image_size, image_size):
        upright = upright.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(upright)


def _kind(file: BinaryIO, most: int) -> str:
    """Find a file's format by its first bytes."""
    start = file.read(16)
    file.seek(0)
    kind = next((name for name, signature in SIGNATURES if signature.match(start)), None)
    if kind is None:
        names = ", ".join(name for name, _ in SIGNATURES)
        raise ValueError(f"it is none of {names}" if start else "it is empty")
    if kind in READ_WHOLE and os.fstat(file.fileno()).st_size > 4 * most:
        raise ValueError("the file is larger than any image of data.max_megapixels")
    return kind


def _open_png(file: BinaryIO, most: int) -> tuple[ImageFile.ImageFile, Convert]:
    """Open a PNG file, with the transparent gray or colour of 16 bits that Pillow does not find."""
    png = png_chunks.read_picture(file, most)
    read = decoders()["PNG"]
    picture = read(io.BytesIO(png.content))
    if len(png.transparent) == 3:  # Pillow reads the high bytes of 16-bit colour; both are needed
        low = read(io.BytesIO(png.content))
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        high = [value >> 8 for value in png.transparent]
        clear = (np.asarray(picture) == high).all(axis=2)
        clear &= (np.asarray(low) == [value & 255 for value in png.transparent]).all(axis=2)
        picture.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return picture, partial(_to_8_bits, transparent=png.transparent[0] if len(png.transparent) == 1 else None)


def _open_tiff(file: BinaryIO, most: int) -> tuple[ImageFile.ImageFile, Convert]:
    """Open a TIFF file, and refuse those of which Pillow is known to return other pixels than they hold."""
    from PIL import TiffImagePlugin

    picture = TiffImagePlugin.TiffImageFile(file)
    png_chunks.check_size(*picture.size, most)
    tags = picture.tag_v2
    kinds = tags.get(SAMPLE_FORMAT, 1)
    known = FLOATS if picture.mode == "F" else UNSIGNED
    if picture.mode == "I" or set(kinds if isinstance(kinds, tuple) else (kinds,)) != {known}:
        raise ValueError("its 32-bit or signed values have no defined white: save it with 8 or 16 bits")
    if tags.get(PLANAR) == 2 and picture.mode in ("LA", "La", "PA"):
        raise ValueError("its transparency is in a plane of its own: save it with interleaved samples")
    if tags.get(TILE_WIDTH, 1) * tags.get(TILE_LENGTH, 1) > 4 * picture.width * picture.height + STRIP_PIXELS:
        raise ValueError("its tiles are larger than the image: it is damaged")
    if picture.mode == "F" and tags.prefix == b"MM":  # libtiff swaps the bytes, and Pillow does so again
        if picture.info["compression"] != "raw" or tags.get(PLANAR) == 2:
            raise ValueError("its big-endian floats are compressed or in planes: save it otherwise, or with 8 bits")
        TiffImagePlugin.READ_LIBTIFF = False
        file.seek(0)
        picture = TiffImagePlugin.TiffImageFile(file)
    if not isinstance(picture.info.get("xmp", b""), bytes):  # Pillow would stumble over it
        del picture.info["xmp"]
    white = 4095 if tags.get(BITS) == (12,) else 65535
    return picture, partial(_to_8_bits, white=white, inverted=tags.get(PHOTOMETRIC) == 0)


def _to_8_bits(
    rows: Image.Image, *, white: int = 65535, inverted: bool = False, transparent: int | None = None
) -> Image.Image:
    """Convert a loaded image, or some of its rows, to 8-bit gray or colour without transparency.

    Args:
        rows: Of any mode.
        white: Of more than 8 bits, the value that is white.
        inverted: Whether that value is black, which Pillow heeds for 8 bits alone.
        transparent: Of 16 bits, the value to lay on white.
    """
    if rows.mode.startswith("I"):
        return _from_integers(rows, white=white, inverted=inverted, transparent=transparent)
    if rows.mode == "F":
        return _from_floats(rows, inverted=inverted)
    if rows.has_transparency_data:
        return _on_white(rows)
    return rows.convert("RGB") if rows.mode == "LAB" else rows  # Pillow makes no gray of it


def _from_integers(rows: Image.Image, *, white: int, inverted: bool, transparent: int | None) -> Image.Image:
    values = np.asarray(rows).astype(np.int64)
    levels = (white - values if inverted else values) * 255 // white
    if transparent is not None:
        levels[values == transparent] = 255
    return Image.fromarray(levels.astype(np.uint8))


def _from_floats(rows: Image.Image, *, inverted: bool) -> Image.Image:
    values = np.asarray(rows)
    if not ((values >= 0) & (values <= 1)).all():  # NaN neither
        low, high = float(values.min()), float(values.max())
        raise ValueError(f"its floats go from {low:g} to {high:g}: scale them to 0 to 1, or save it with 8 or 16 bits")
    return Image.fromarray(np.rint((1 - values if inverted else values) * 255).astype(np.uint8))


def _on_white(rows: Image.Image) -> Image.Image:
    colour = rows.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)


def _convert_in_strips(picture: Image.Image, convert: Convert, mode: Mode) -> Image.Image:
    rows = max(1, STRIP_PIXELS // picture.width)
    if rows >= picture.height:
        converted = convert(picture)
        return converted if converted.mode == mode else converted.convert(mode)  # which copies in any case
    whole = Image.new(mode, picture.size)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        whole.paste(convert(strip).convert(mode), (0, top))
    return whole


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Find how to turn an image upright. EXIF data that cannot be read turns nothing; pixels do not depend on it."""
    try:
        return TURNS.get(picture.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:
        return None


@contextlib.contextmanager
def _open_regular(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file without waiting for a pipe, and refuse all but regular files."""
    descriptor = os.open(path, READ)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        yield file


@contextlib.contextmanager
def _pillow(most: int, warn: Warn) -> Iterator[None]:
    """Set Pillow's limit and switches for one image, and hand its warnings over."""
    from PIL import AvifImagePlugin, TiffImagePlugin

    switches: list[tuple[Any, str, object]] = [
        (Image, "MAX_IMAGE_PIXELS", most),
        (TiffImagePlugin, "READ_LIBTIFF", True),  # Pillow's own way reads some planes of 16 bits wrongly
        (AvifImagePlugin, "DEFAULT_MAX_THREADS", 1),  # all CPUs decode already
    ]
    before = [getattr(module, name) for module, name, _ in switches]
    for module, name, value in switches:
        setattr(module, name, value)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for (module, name, _), value in zip(switches, before, strict=True):
            setattr(module, name, value)
    for text in dict.fromkeys(_one_line(str(warning.message)) for warning in caught):
        warn(text)


@contextlib.contextmanager
def _enough_memory(pixels: int) -> Iterator[None]:
    """Raise a MemoryError for a failed decode if so many pixels do not fit in memory: not every decoder says so.

    Raises:
        MemoryError: Memory ran out.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception:
        np.empty(DECODER_BYTES * pixels, np.uint8)  # MemoryError
        raise


def _canvas_of_webp(file: BinaryIO) -> tuple[int, int]:
    """Read the width and height for which WebP's decoder takes memory before it says how large the image is."""
    start = file.read(30)
    file.seek(0)
    numbers = int.from_bytes(start[21:25], "little"), int.from_bytes(start[24:27], "little")
    sizes = {
        b"VP8 ": (int.from_bytes(start[26:28], "little") & 0x3FFF, int.from_bytes(start[28:30], "little") & 0x3FFF),
        b"VP8L": ((numbers[0] & 0x3FFF) + 1, (numbers[0] >> 14 & 0x3FFF) + 1),
        b"VP8X": (numbers[1] + 1, int.from_bytes(start[27:30], "little") + 1),
    }
    return sizes.get(start[12:16], (0, 0))


@contextlib.contextmanager
def _complaints() -> Iterator[None]:
    """Raise or report what libtiff prints: errors, after which Pillow may continue, and warnings."""
    saved = os.dup(2)
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)  # text that does not fit into the pipe is dropped: no write may block
    os.dup2(writer, 2)
    os.close(writer)
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        try:
            said = os.read(reader, 1 << 16)
        except BlockingIOError:
            said = b""
        os.close(reader)
    for line in said.decode(errors="replace").replace("tempfile.tif: ", "").splitlines():  # Pillow's name for it
        if ": Warning, " not in line and not HARMLESS.search(line):
            raise ValueError(line)
        warnings.warn(line.rpartition(": Warning, ")[2], stacklevel=2)
    if failure is not None:
        raise failure


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and str(error).startswith("out of memory"))


def _reason(error: Exception, path: str) -> str:
    """Return in one line why an image cannot be read, without its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = _one_line(str(error)).replace(path, "the file").strip("'\". ")
    plain = isinstance(error, OSError | ValueError | SyntaxError | EOFError | RuntimeError)
    return text if text and plain else f"{type(error).__name__} {text}".strip()


def _one_line(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split())[:200]
