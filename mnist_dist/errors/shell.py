"""Quote words so that a shell reads them back, each on one line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

_NO_WIDTH = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
"""Invisible characters that Unicode counts as letters or marks: fillers, joiners, variation selectors, the empty
Braille cell. Other characters without width, or that change the direction of text, are not printable anyway."""


def is_visible(character: str) -> bool:
    """Return whether a person sees a character, and a terminal does not obey it."""
    return character.isprintable() and not _NO_WIDTH.match(character)


def quote(word: str) -> str:
    """Quote a word if it needs it; the bytes of invisible characters are escaped in `$'...'`."""
    if all(map(is_visible, word)):
        return shlex.quote(word)
    text = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{''.join(c if is_visible(c) else _escape(c) for c in text)}'"


def join(words: Iterable[str]) -> str:
    """Join words to a command line."""
    return " ".join(map(quote, words))


def _escape(character: str) -> str:
    """Return the bytes of a character as `$'...'` names them; a byte that is no text is one of them."""
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors))
