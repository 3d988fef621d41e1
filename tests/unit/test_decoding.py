import contextlib
import errno
import io
import itertools
import os
import signal
import struct
import zlib

import numpy as np
import pytest
from mutations import SIGNATURE, chunk, chunks_of, limited_memory, pictures, png, saved, smooth, tiff
from PIL import Image, ImageOps

from mnist_dist.data import formats
from mnist_dist.data.decode import Decoding, decode_all, discard, hand_over
from mnist_dist.data.formats import UnreadableError, decode
from mnist_dist.errors import DataError, DeviceMemoryError, StorageError

WHOLE = pictures(np.random.default_rng(5))


@pytest.fixture
def decoded(tmp_path):
    """Decode a file's content, without resizing it if it is square."""

    def run(content, size, channels=1, **options):
        (tmp_path / "image.png").write_bytes(content)
        return decode(tmp_path / "image.png", size, channels, **options)

    return run


def refusal(decoded, content, *, size=8, **options):
    verdicts = set()
    for channels in (1, 3):
        with pytest.raises(UnreadableError, match=r"image\.png cannot be read as an image") as raised:
            decoded(content, size, channels, **options)
        verdicts.add(raised.value.reason)
    assert len(verdicts) == 1
    return verdicts.pop()


@pytest.mark.parametrize("name", [name for name in WHOLE if "made-f4-big" not in name])
def test_whole_pictures_of_every_format_and_mode_are_read(decoded, name):
    gray, colour = decoded(WHOLE[name], 12, 1), decoded(WHOLE[name], 12, 3)
    assert gray.shape == (1, 12, 12)
    assert colour.shape == (3, 12, 12)
    assert abs(Image.fromarray(colour.transpose(1, 2, 0)).convert("L") - gray[0].astype(int)).max() <= 2
    assert gray.std() > 1


@pytest.mark.parametrize("name", [name for name in WHOLE if "made-f4-big" not in name])
def test_a_large_picture_is_converted_strip_by_strip_to_the_same_pixels(decoded, name, monkeypatch):
    whole = [decoded(WHOLE[name], 12, channels) for channels in (1, 3)]
    monkeypatch.setattr(formats, "STRIP_PIXELS", 40)
    for channels, pixels in zip((1, 3), whole, strict=True):
        assert np.array_equal(decoded(WHOLE[name], 12, channels), pixels)


LAYOUTS = list(itertools.product("<>", (False, True), (False, True), ({}, {"rows": 4}, {"tile": 16})))


@pytest.mark.parametrize(("order", "planes", "compressed", "parts"), LAYOUTS)
def test_tiff_samples_of_every_layout_are_those_in_the_file(decoded, order, planes, compressed, parts):
    generator = np.random.default_rng(0)
    layout = {"planes": planes, "compressed": compressed, **parts}
    for bits in (8, 16):
        values = generator.integers(0, 1 << bits, (20, 20, 4)).astype(f"{order}u{bits // 8}")
        for photometric, channels in ((1, 1), (2, 3)):
            content = tiff(values[:, :, :channels], photometric=photometric, **layout)
            expected = (
                values[:, :, :channels] // 257 if bits == 16 and channels == 1 else values[:, :, :channels] >> bits - 8
            )
            assert np.array_equal(decoded(content, 20, channels).transpose(1, 2, 0), expected)
        values[:, :, 3] = (1 << bits) - 1  # opaque
        content = tiff(values, photometric=2, extra=(2,), **layout)
        assert np.array_equal(decoded(content, 20, 3).transpose(1, 2, 0), values[:, :, :3] >> bits - 8)


@pytest.mark.parametrize(("order", "planes", "compressed", "parts"), LAYOUTS)
def test_floats_are_scaled_or_refused_and_never_misread(decoded, order, planes, compressed, parts):
    values = np.random.default_rng(0).random((20, 20, 1)).astype(f"{order}f4")
    content = tiff(values, planes=planes, compressed=compressed, **parts)
    if order == ">" and (planes or compressed):
        assert "big-endian floats" in refusal(decoded, content)
    else:
        assert np.array_equal(decoded(content, 20)[0], np.rint(values[:, :, 0] * 255))


@pytest.mark.parametrize("kind", ["<u1", "<u2", "<f4", ">f4"])
def test_white_is_0_where_a_tiff_says_so(decoded, kind):
    values = np.linspace(0, {"u1": 255, "u2": 65535, "f4": 1}[kind[1:]], 400).reshape(20, 20, 1).astype(kind)
    straight, inverted = decoded(tiff(values), 20), decoded(tiff(values, photometric=0), 20)
    assert abs(255 - straight.astype(int) - inverted).max() <= 1
    assert straight[0, 0, 0] == 0


def test_12_bits_are_scaled_by_their_own_white(decoded):
    packed = np.packbits(np.tile([1] * 12 + [0] * 12, (8, 4)), axis=1)  # white and black in turns
    content = tiff(packed[:, :, None], tags={256: 8, 258: 12})
    assert decoded(content, 8)[0].tolist() == [[255, 0] * 4] * 8


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((8, 8, 1), 7, "<u4"), "32-bit or signed"),
        (np.full((8, 8, 1), 7, "<i4"), "32-bit or signed"),
        (np.full((8, 8, 1), 7, ">i4"), "32-bit or signed"),
        (np.full((8, 8, 1), 7, "<i2"), "32-bit or signed"),
        (np.full((8, 8, 1), 7, "<i1"), "32-bit or signed"),
        (np.full((8, 8, 1), 1.5, "<f4"), "from 1.5 to 1.5"),
        (np.full((8, 8, 1), -1e-3, ">f4"), "from -0.001"),
        (np.full((8, 8, 1), np.nan, "<f4"), "nan"),
        (np.full((8, 8, 1), np.inf, "<f4"), "inf"),
        (np.full((8, 8, 1), 0.5, "<f8"), ""),
        (np.full((8, 8, 1), 0.5, "<f2"), ""),
    ],
)
def test_values_whose_white_is_not_known_are_refused(decoded, values, reason):
    assert reason in refusal(decoded, tiff(values))


def test_transparency_in_a_plane_of_its_own_is_refused(decoded):
    values = np.full((8, 8, 2), 99, np.uint8)
    for compressed in (False, True):
        assert "plane of its own" in refusal(decoded, tiff(values, planes=True, extra=(2,), compressed=compressed))


@pytest.mark.parametrize(
    "tags",
    [{34665: 0x7FFFFFFF}, {34853: 5}, {700: 3}, {700: [1, 2]}, {274: 99}, {296: 77}, {296: [1, 1]}, {282: 0}, {330: 9}],
)
def test_odd_tags_on_which_no_pixel_depends_refuse_no_tiff(decoded, tags):
    values = np.random.default_rng(0).integers(0, 256, (9, 9, 1), np.uint8)
    for turned in (False, True):
        content = tiff(values, tags={274: 3 if turned else 1, **tags})
        expected = values[::-1, ::-1, 0] if turned and 274 not in tags else values[:, :, 0]
        assert np.array_equal(decoded(content, 9)[0], expected)


def test_what_libtiff_prints_is_a_reason_or_a_warning_with_the_pictures_name(decoded, capfd):
    content = bytearray(tiff(np.random.default_rng(0).integers(0, 256, (20, 20, 1), np.uint8), compressed=True))
    at = len(content) - 150
    content[at : at + 20] = bytes(20)
    assert "ZIPDecode" in refusal(decoded, bytes(content))
    said = []
    two = tiff(np.full((8, 8, 1), 7, np.uint8), tags={296: [1, 1]})
    decoded(two, 8, warn=said.append)
    assert any("296" in text for text in said)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_gray_or_colour_of_any_depth_lies_on_white(decoded, depth, channels):
    if channels == 3 and depth < 8:
        return
    generator = np.random.default_rng(depth)
    values = generator.integers(0, 1 << depth, (12, 12, channels))
    values[:6, :, :] = values[0, 0]
    values[6, 0] = values[0, 0] ^ 1  # only its last bit differs
    clear = chunk(b"tRNS", struct.pack(f">{channels}H", *values[0, 0].tolist()))
    got = decoded(png(values, depth=depth, colour=channels - 1, before=clear), 12, channels)
    top = (1 << depth) - 1
    expected = values >> 8 if depth == 16 and channels == 3 else values * 255 // top
    expected[(values == values[0, 0]).all(axis=2)] = 255
    assert np.array_equal(got.transpose(1, 2, 0), expected)


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
def test_a_transparency_chunk_without_content_changes_nothing(decoded, mode):
    content = saved(smooth(np.random.default_rng(0), "RGB").convert(mode), "PNG")
    at = content.index(b"IDAT") - 4
    clear = content[:at] + chunk(b"tRNS", b"") + content[at:]
    assert np.array_equal(decoded(clear, 16, 3), decoded(content, 16, 3))


@pytest.mark.parametrize("name", [name for name in WHOLE if WHOLE[name].startswith(SIGNATURE)])
def test_a_wrong_checksum_of_any_chunk_is_refused(decoded, name):
    content = WHOLE[name]
    at = len(SIGNATURE)
    for kind, data in chunks_of(content):
        at += 12 + len(data)
        wrong = bytearray(content)
        wrong[at - 1] ^= 1
        assert f"checksum of its chunk {kind.decode()} is wrong" in refusal(decoded, bytes(wrong))
        if data:
            wrong = bytearray(content)
            wrong[at - 5] ^= 1
            assert "damaged" in refusal(decoded, bytes(wrong))


@pytest.mark.parametrize("name", [name for name in WHOLE if "GIF" not in name and "many" not in name])
def test_a_file_that_is_cut_off_is_refused(decoded, name):
    half = WHOLE[name][: len(WHOLE[name]) // 2]
    assert refusal(decoded, half)


def test_a_png_without_its_end_is_cut_off(decoded):
    assert "cut off" in refusal(decoded, WHOLE["L.png"][:-12])


def test_texts_and_profiles_of_any_size_change_nothing(decoded):
    bomb = zlib.compress(bytes(1 << 28))
    before = (
        chunk(b"zTXt", b"Comment\0\0" + bomb) + chunk(b"iTXt", b"a\0\1\0\0\0" + bomb) + chunk(b"iCCP", b"p\0\0" + bomb)
    )
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 1))
    with limited_memory(100 << 20):
        assert np.array_equal(decoded(png(values, before=before), 8)[0], values[:, :, 0])
        forged = chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb)
        assert refusal(decoded, png(values, before=forged))


CORNER = Image.fromarray(np.pad(np.full((4, 4), 250, np.uint8), ((0, 12), (0, 12))))
"""Bright at the left of the top."""


def exif(entries, order="<"):
    """Make EXIF data by hand: (tag, type, count, value in four bytes) each."""
    table = b"".join(struct.pack(f"{order}HHI4s", *entry) for entry in entries)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, len(entries)) + table + bytes(4) + struct.pack("<II", 2, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_orientation_is_turned_upright(decoded, orientation, kind):
    told = Image.Exif()
    told[274] = orientation
    content = saved(CORNER.convert("RGB"), kind, exif=told)
    told_and_turned = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("L")
    assert abs(decoded(content, 16)[0].astype(int) - np.asarray(told_and_turned)).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("data", "turned"),
    [
        (exif([(274, 3, 1, b"\x03\0\0\0"), (296, 5, 1, struct.pack("<I", 38))]), True),
        (exif([(274, 3, 1, b"\x03\0\0\0"), (34665, 4, 1, b"\xff\xff\xff\x7f")]), True),
        (exif([(274, 3, 1, b"\x03\0\0\0"), (270, 2, 5, b"\xff\xff\xff\x7f")]), True),
        (exif([(274, 3, 1, b"\0\x03\0\0")], ">"), True),
        (exif([(274, 3, 1, b"\0\0\0\0")]), False),
        (exif([(274, 3, 1, b"\x09\0\0\0")]), False),
        (exif([(274, 2, 2, b"3\0\0\0")]), False),
        (exif([(274, 3, 2, b"\x03\0\x03\0")]), True),
        (exif([(274, 5, 1, b"\xff\0\0\0")]), False),
        (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", False),
        (b"Exif\0\0", False),
        (b"Exif\0\0XX*\0\x08\0\0\0", False),
        (b"nothing of the kind", False),
    ],
)
def test_odd_exif_data_refuses_no_picture(decoded, kind, data, turned):
    content = saved(CORNER.convert("RGB"), kind, exif=data)
    expected = np.asarray(CORNER)[::-1, ::-1] if turned else np.asarray(CORNER)
    assert abs(decoded(content, 16)[0].astype(int) - expected).mean() < 3


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PCX", "TGA", "SGI", "ICNS", "JPEG2000", "XBM", "MSP", "DDS"])
def test_other_formats_are_refused_and_start_no_program(decoded, tmp_path, monkeypatch, kind):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    content = saved(smooth(np.random.default_rng(0), "1" if kind in ("XBM", "MSP") else "RGB"), kind)
    assert "none of PNG, JPEG, TIFF, WEBP, BMP, PPM, GIF, AVIF" in refusal(decoded, content)
    assert not (tmp_path / "started").exists()


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "terminal.png").symlink_to("/dev/zero")
    (tmp_path / "empty.png").touch()
    names = ("pipe.png", "folder.png", "terminal.png", "empty.png", "missing.png")
    (chunk_,) = decode_all(tmp_path, names, Decoding(image_size=8, channels=1), hand_over)
    assert [file for file, _ in chunk_.unreadable] == list(names)
    assert [reason for _, reason in chunk_.unreadable][-2:] == ["it is empty", "No such file or directory"]


@pytest.mark.parametrize("name", ["RGB.png", "RGB.jpg", "RGB.ppm", "RGB.bmp", "RGB-None.tif", "RGB.webp", "P3.ppm"])
def test_a_picture_that_is_too_large_says_how_to_let_it_in(decoded, name, monkeypatch):
    size, kind = (1001, 1000), Image.open(io.BytesIO(WHOLE[name])).format
    content = saved(Image.new("RGB", size), kind)
    assert "1001 x 1000 pixels, more than the 1 megapixels of data.max_megapixels" in refusal(
        decoded, content, max_megapixels=1
    )
    assert decoded(content, 8, max_megapixels=2).shape == (1, 8, 8)


def test_large_pictures_are_decoded_one_at_a_time(decoded, monkeypatch):
    alone = Counted()
    for name in ("RGB.png", "RGB.jpg", "RGB-None.tif"):
        decoded(WHOLE[name], 8, alone=alone)
    assert alone.times == 0
    monkeypatch.setattr(formats, "LARGE_PIXELS", 100)
    for name in ("RGB.png", "RGB.bmp", "RGB-None.tif"):
        decoded(WHOLE[name], 8, alone=alone)
    assert alone.times == 3


class Counted(contextlib.AbstractContextManager):
    times = 0

    def __exit__(self, *failure):
        self.times += 1


def test_a_large_jpeg_is_decoded_smaller(decoded, monkeypatch):
    picture = smooth(np.random.default_rng(0), "RGB", (1216, 896))
    content = saved(picture, "JPEG")
    whole = decoded(content, 28, 3)
    monkeypatch.setattr(formats, "LARGE_PIXELS", 1_000_000)
    smaller = decoded(content, 28, 3)
    assert not np.array_equal(whole, smaller)
    assert abs(whole.astype(int) - smaller).max() <= 3


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"progressive": True}), ("WEBP", {"method": 0}), ("BMP", {})]
)
def test_a_lack_of_memory_names_the_picture_and_is_no_damage(tmp_path, kind, options):
    Image.new("RGB", (5000, 5000)).save(tmp_path / "large.png", kind, **options)
    with limited_memory(64 << 20), pytest.raises(DeviceMemoryError, match=r"Memory ran out while .*large\.png"):
        list(decode_all(tmp_path, ("large.png",), Decoding(image_size=8, channels=1), discard))


def kill(number, start, images):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (signal.SIGKILL, DeviceMemoryError, r"The system killed .* decoding .*b\.jpg \(SIGKILL\).*memory"),
        (signal.SIGSEGV, DataError, r"b\.jpg made the decoder crash \(SIGSEGV\)"),
        (signal.SIGBUS, DataError, r"b\.jpg made the decoder crash \(SIGBUS\)"),
    ],
)
def test_a_decoding_process_that_dies_names_its_image(tmp_path, number, error, words):
    from functools import partial

    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(WHOLE["RGB.jpg"])
    with pytest.raises(error, match=words):
        list(decode_all(tmp_path, ("a.jpg", "b.jpg"), Decoding(image_size=8, channels=1), partial(kill, number)))


def test_a_decoding_process_that_dies_among_very_many_images_names_its_image(tmp_path, monkeypatch):
    from functools import partial

    monkeypatch.setattr("mnist_dist.data.decode.CHUNK", 1)
    (tmp_path / "a.jpg").write_bytes(WHOLE["RGB.jpg"])
    files = ("a.jpg",) * 20_000
    with pytest.raises(DataError, match=r"a\.jpg made the decoder crash \(SIGSEGV\)"):
        list(decode_all(tmp_path, files, Decoding(image_size=8, channels=1), partial(kill, signal.SIGSEGV)))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_picture_that_cannot_be_read_now_is_the_disks_fault_and_not_damaged(tmp_path, monkeypatch, number):
    def refuse(path, *words):
        raise OSError(number, os.strerror(number), path)

    (tmp_path / "a.png").write_bytes(WHOLE["RGB.png"])
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=rf"a\.png: {os.strerror(number)}: "):
        decode(tmp_path / "a.png", 8, 1)
