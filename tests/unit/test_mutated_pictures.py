"""Damaged images of every format: each has the pixels that Pillow finds, or is refused by name."""

import collections
import re
import time
import warnings

import numpy as np
import pytest
from mutations import SIGNATURE, checksums_are_right, damaged, limited_memory, pictures
from PIL import Image, TiffImagePlugin

from mnist_dist.data.decode import Decoding, decode_all, hand_over
from mnist_dist.data.formats import UnreadableError, decode
from mnist_dist.fast.png import decode_plain

SIZE = 12
MEMORY = 1 << 30
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF")


def pillows(path, channels, monkeypatch):
    """Decode as Pillow alone does; None where it refuses, or where its pixels are known to be others."""
    monkeypatch.setattr(TiffImagePlugin, "READ_LIBTIFF", True)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            picture.load()
            if picture.mode[0] in "IF" or (picture.format == "PNG" and "transparency" in picture.info):
                return None
            turn = decode.__globals__["TURNS"].get(picture.getexif().get(274, 1)) if picture.format != "TIFF" else None
            upright = picture.transpose(turn) if turn is not None else picture
            if upright.has_transparency_data:
                colour = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
            if upright.mode == "LAB":
                upright = upright.convert("RGB")
            flat = upright.convert("L" if channels == 1 else "RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    except Exception:
        return None
    return np.asarray(flat).reshape(SIZE, SIZE, channels).transpose(2, 0, 1)


def check_all(tmp_path, monkeypatch, capfd, *, count, seed):
    """Damage images, decode them in every way, and count what became of them."""
    generator = np.random.default_rng(seed)
    whole = pictures(generator)
    names, contents = list(whole), list(whole.values())
    plain_rows = [row for row, name in enumerate(names) if name.startswith("plain")]
    files = []
    for number in range(count):
        rows = plain_rows if number % 8 == 0 else range(len(names))
        row = int(generator.choice(rows))
        files.append(f"{number}-{names[row]}")
        content = damaged(generator, contents[row], contents[generator.integers(len(contents))])
        (tmp_path / files[-1]).write_bytes(content)
    figures = collections.Counter()
    slowest = 0.0
    for channels in (1, 3):
        decoding = Decoding(image_size=SIZE, channels=channels, max_megapixels=1)
        with limited_memory(MEMORY):
            chunks = list(decode_all(tmp_path, tuple(files), decoding, hand_over))
        pixels = np.concatenate([chunk.kept for chunk in chunks])
        refused = {file: reason for chunk in chunks for file, reason in chunk.unreadable}
        warned = {file: text for chunk in chunks for file, text in chunk.warnings.items()}
        assert refused.keys() | warned.keys() <= set(files)
        if channels == 1:
            verdicts = refused.keys()
        assert refused.keys() == verdicts
        plain = set()
        for file, image in zip(files, pixels, strict=True):
            path = tmp_path / file
            fast = decode_plain([str(path)], SIZE, channels)[1]
            started = time.monotonic()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if file in refused:
                    with pytest.raises(UnreadableError, match=re.escape(str(path))) as raised:
                        decode(path, SIZE, channels, max_megapixels=1)
                    assert raised.value.reason == refused[file]
                    assert raised.value.reason.isprintable()
                    assert not len(fast), file
                    continue
                slow = decode(path, SIZE, channels, max_megapixels=1)
            slowest = max(slowest, time.monotonic() - started)
            assert np.array_equal(image, slow), file
            if len(fast):
                assert np.array_equal(fast[0], slow), file
                plain.add(file)
        said = capfd.readouterr()
        assert not said.out + said.err
        figures += collections.Counter(refused=len(refused), warned=len(warned), fast=len(plain))
        for file, image in zip(files, pixels, strict=True):
            if file in refused:
                continue
            content = (tmp_path / file).read_bytes()
            if content.startswith(SIGNATURE):
                assert checksums_are_right(content), file
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = pillows(tmp_path / file, channels, monkeypatch)
            if expected is not None:
                assert np.array_equal(image, expected), file
            figures["as Pillow" if expected is not None else "alone"] += 1
        capfd.readouterr()  # libtiff's own words, for the reference
    with capfd.disabled():
        print(dict(figures), f"slowest {slowest:.2f} s")
    return figures


def test_a_damaged_picture_is_what_pillow_finds_or_is_refused(tmp_path, monkeypatch, capfd):
    figures = check_all(tmp_path, monkeypatch, capfd, count=400, seed=0)
    assert min(figures["refused"], figures["as Pillow"]) > 100
    assert figures["fast"] > 0


@pytest.mark.slow
def test_10_000_damaged_pictures_are_what_pillow_finds_or_are_refused(tmp_path, monkeypatch, capfd):
    figures = check_all(tmp_path, monkeypatch, capfd, count=10_000, seed=1)
    assert min(figures["refused"], figures["as Pillow"]) > 3000
    assert figures["fast"] > 30
