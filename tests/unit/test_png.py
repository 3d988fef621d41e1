import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mnist_dist.data.decode import Decoding, decode_all, hand_over
from mnist_dist.data.formats import UnreadableError, decode
from mnist_dist.fast.png import decode_plain

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header(size, channels, *, depth=8, colour=None, interlaced=0):
    colour = {1: 0, 3: 2}[channels] if colour is None else colour
    return chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, depth, colour, 0, 0, interlaced))


def filtered(pixels, filters):
    """Encode `(H, W, C)` pixels by the definition in the specification, byte after byte."""
    height, width, channels = pixels.shape
    lines = bytearray()
    flat = pixels.reshape(height, -1).astype(int)
    for y in range(height):
        lines.append(filters[y])
        for x in range(width * channels):
            left = flat[y, x - channels] if x >= channels else 0
            up = flat[y - 1, x] if y else 0
            corner = flat[y - 1, x - channels] if y and x >= channels else 0
            nearest = min((left, up, corner), key=lambda value: abs(left + up - corner - value))
            predicted = (0, left, up, (left + up) // 2, nearest, 0)[filters[y]]
            lines.append((flat[y, x] - predicted) % 256)
    return bytes(lines)


def png(pixels, filters, *, before=b"", after=b"", pieces=1):
    data = zlib.compress(filtered(pixels, filters))
    step = -(-len(data) // pieces)
    images = b"".join(chunk(b"IDAT", data[at : at + step]) for at in range(0, len(data), step))
    return SIGNATURE + header(len(pixels), pixels.shape[2]) + before + images + after + chunk(b"IEND", b"")


def random_pixels(generator, size, channels):
    """Draw pixels that are flat, smooth or wild, so that every choice of a filter comes up."""
    kind = generator.integers(3)
    if kind == 0:
        return np.full((size, size, channels), generator.integers(256), np.uint8)
    wild = generator.integers(0, 256, (size, size, channels), np.uint8)
    return wild if kind == 1 else (wild // 16 + np.arange(size)[:, None, None] * 5).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("filter_", [0, 1, 2, 3, 4, "mixed"])
def test_every_filter_is_undone_as_pillow_does(tmp_path, channels, filter_):
    generator = np.random.default_rng(channels)
    paths = []
    for number in range(30):
        pixels = random_pixels(generator, 9, channels)
        filters = generator.integers(0, 5, 9) if filter_ == "mixed" else np.full(9, filter_)
        path = tmp_path / f"{number}.png"
        path.write_bytes(png(pixels, filters, pieces=1 + number % 3))
        paths.append(str(path))
    decoded, images = decode_plain(paths, 9, channels)
    assert decoded.tolist() == list(range(30))
    for path, image in zip(paths, images, strict=True):
        assert np.array_equal(image, decode(path, 9, channels))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{}, {"compress_level": 1}, {"optimize": True}])
def test_what_pillow_writes_is_plain(tmp_path, mode, options):
    generator = np.random.default_rng(0)
    channels = len(mode) if mode == "RGB" else 1
    pixels = [random_pixels(generator, 28, channels) for _ in range(20)]
    paths = [str(tmp_path / f"{number}.png") for number in range(20)]
    for path, picture in zip(paths, pixels, strict=True):
        Image.fromarray(picture.squeeze()).save(path, **options)
    decoded, images = decode_plain(paths, 28, channels)
    assert len(decoded) == 20
    assert np.array_equal(images, np.stack(pixels).transpose(0, 3, 1, 2))


def broken(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


PIXELS = np.random.default_rng(1).integers(0, 256, (12, 12, 1), np.uint8)
WHOLE = png(PIXELS, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4, 4])
LINES = filtered(PIXELS, [1] * 12)


def single(lines, **changes):
    return SIGNATURE + header(12, 1, **changes) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def saved(tmp_path, picture, **options):
    picture.save(tmp_path / "made.png", **options)
    return (tmp_path / "made.png").read_bytes()


def orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(tmp_path, Image.fromarray(PIXELS[:, :, 0]), exif=exif)


def animation(tmp_path):
    frames = [Image.fromarray(PIXELS[:, :, 0]), Image.fromarray(255 - PIXELS[:, :, 0])]
    return saved(tmp_path, frames[0], save_all=True, append_images=frames[1:], default_image=True)


ODD = {
    "interlaced": lambda _: single(LINES, interlaced=1),
    "16-bit": lambda _: single(bytes(12 * 25), depth=16),
    "4-bit": lambda _: single(bytes(12 * 7), depth=4),
    "gray with alpha": lambda _: single(bytes(12 * 25), colour=4),
    "palette": lambda path: saved(path, Image.fromarray(PIXELS[:, :, 0]).convert("P")),
    "transparent gray": lambda _: png(PIXELS, [0] * 12, before=chunk(b"tRNS", struct.pack(">H", PIXELS[0, 0, 0]))),
    "colour": lambda path: saved(path, Image.fromarray(PIXELS[:, :, 0]).convert("RGB")),
    "another size": lambda path: saved(path, Image.fromarray(PIXELS[:9, :9, 0])),
    "turned": orientation,
    "animated": animation,
    "text": lambda _: png(PIXELS, [0] * 12, before=chunk(b"tEXt", b"Title\0digit")),
    "a chunk of the wrong length": lambda _: png(PIXELS, [0] * 12, before=chunk(b"gAMA", b"123")),
    "an unknown chunk": lambda _: png(PIXELS, [0] * 12, after=chunk(b"zzZz", b"")),
    "an unknown critical chunk": lambda _: png(PIXELS, [0] * 12, before=chunk(b"ZZZZ", b"")),
    "image data in two places": lambda _: png(
        PIXELS, [0] * 12, after=chunk(b"tIME", bytes(7)) + chunk(b"IDAT", b"more")
    ),
    "an unknown filter": lambda _: png(PIXELS, [0] * 11 + [5]),
    "too few rows": lambda _: single(LINES[:-13]),
    "too many rows": lambda _: single(LINES + LINES[:13]),
    "more after the image data": lambda _: (
        SIGNATURE + header(12, 1) + chunk(b"IDAT", zlib.compress(LINES) + b"more") + chunk(b"IEND", b"")
    ),
    "more after the end": lambda _: WHOLE + b"more",
    "no image data": lambda _: SIGNATURE + header(12, 1) + chunk(b"IEND", b""),
    "empty": lambda _: b"",
    "no image": lambda _: b"not an image",
    "wrong checksum of the header": lambda _: broken(WHOLE, 30),
    "wrong checksum of the image data": lambda _: broken(WHOLE, len(WHOLE) - 13),
    "wrong checksum of the end": lambda _: broken(WHOLE, len(WHOLE) - 1),
    "damaged image data": lambda _: broken(WHOLE, 60),
    **{f"cut after {part:.0%}": lambda _, part=part: WHOLE[: int(part * len(WHOLE))] for part in (0.1, 0.3, 0.6, 0.99)},
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_is_left_to_pillow(tmp_path, odd):
    content = ODD[odd](tmp_path)
    (tmp_path / "odd.png").write_bytes(content)
    (tmp_path / "whole.png").write_bytes(WHOLE)
    decoded, images = decode_plain([str(tmp_path / "odd.png"), str(tmp_path / "whole.png")], 12, 1)
    assert decoded.tolist() == [1]
    assert np.array_equal(images[0, 0], PIXELS[:, :, 0])
    (both,) = decode_all(tmp_path, ("odd.png", "whole.png"), Decoding(image_size=12, channels=1), hand_over)
    assert np.array_equal(both.kept[1, 0], PIXELS[:, :, 0])
    expected, reason = pillows(tmp_path / "odd.png")
    assert np.array_equal(both.kept[0], expected)
    assert both.unreadable == [("odd.png", reason)] * bool(reason)


def pillows(path):
    """Decode one by one: the pixels, or black and the reason."""
    try:
        return decode(path, 12, 1), None
    except UnreadableError as error:
        return np.zeros((1, 12, 12), np.uint8), error.reason


def test_chunks_that_change_no_pixel_are_harmless(tmp_path):
    before = b"".join(chunk(*pair) for pair in ((b"gAMA", b"\0\0\xb1\x8f"), (b"sRGB", b"\0"), (b"pHYs", bytes(9))))
    path = tmp_path / "a.png"
    path.write_bytes(png(PIXELS, [4] * 12, before=before))
    decoded, images = decode_plain([str(path)], 12, 1)
    assert decoded.tolist() == [0]
    assert np.array_equal(images[0], decode(path, 12, 1))


def test_files_that_are_missing_are_left_to_pillow(tmp_path):
    decoded, images = decode_plain([str(tmp_path / "none.png")], 12, 1)
    assert len(decoded) == len(images) == 0


def test_any_damage_to_a_byte_gives_what_pillow_gives(tmp_path):
    """An image that is accepted in spite of a flipped bit must be the one that Pillow makes of it."""
    for at in range(len(WHOLE)):
        path = tmp_path / "a.png"
        path.write_bytes(broken(WHOLE, at))
        decoded, images = decode_plain([str(path)], 12, 1)
        if len(decoded):
            assert np.array_equal(images[0], decode(path, 12, 1))
