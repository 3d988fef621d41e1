"""The letters in figures: Latin, Greek and Cyrillic are drawn, and what the font lacks is escaped, never boxed."""

from __future__ import annotations

import io
import re
import unicodedata
from functools import lru_cache
from importlib.resources import files

from PIL import ImageFont

from mnist_dist.observe.names import shown

SIZE = 15
LINE = 19
"""Pixels from one line of text to the next."""
MOST_LINES = 8
NOWHERE = "\uffff"
"""No character, so that a font draws the box that stands for what it lacks."""


@lru_cache(maxsize=1)
def letters() -> ImageFont.FreeTypeFont:
    """Return the font of all figures; `DejaVuSansCondensed.LICENSE` says what it is."""
    content = files("mnist_dist.observe").joinpath("DejaVuSansCondensed.ttf").read_bytes()
    # Without the layout library, which not every build of Pillow has: a figure looks the same everywhere.
    return ImageFont.truetype(io.BytesIO(content), SIZE, layout_engine=ImageFont.Layout.BASIC)


def drawable(text: str) -> str:
    r"""Return a text as `shown` does, with all that the font lacks escaped too (`\u6771`)."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(c if c.isascii() or _is_drawn(c) else c.encode("unicode_escape").decode() for c in shown(composed))


def wrap(text: str, width: int) -> list[str]:
    """Break a drawable text into lines of a width in pixels, at spaces where there are any.

    Args:
        text: What comes after `MOST_LINES` is left out, with an ellipsis.
        width: At least that of a letter.
    """
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        if not _fits(lines[-1] + word, width) and lines[-1]:
            lines.append("")
        for letter in word:
            if not _fits(lines[-1] + letter, width):
                lines.append("")
            lines[-1] += letter
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1][:-1] + "…"]
    return lines


def _fits(text: str, width: int) -> bool:
    return letters().getlength(text.rstrip()) <= width


@lru_cache(maxsize=4096)
def _is_drawn(character: str) -> bool:
    return bytes(letters().getmask(character)) != bytes(letters().getmask(NOWHERE))
