"""Words as a shell reads them again, each on one line whatever is in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def quote(word: str) -> str:
    """Quote a word where it needs it; line breaks and other control characters stand escaped in `$'...'`."""
    if not CONTROL.search(word):
        return shlex.quote(word)
    text = word.replace("\\", "\\\\").replace("'", "\\'")
    escaped = CONTROL.sub(lambda match: "".join(f"\\x{byte:02x}" for byte in match[0].encode()), text)
    return f"$'{escaped}'"


def join(words: Iterable[str]) -> str:
    """Join words to a command line."""
    return " ".join(map(quote, words))
