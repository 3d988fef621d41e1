"""Names as text: every character is visible, and none of them controls a terminal."""

from __future__ import annotations

import re

from mnist_dist.errors import MnistDistError
from mnist_dist.errors.shell import is_visible


def shown(text: object) -> str:
    r"""Return a name, or a message with names in it, as one line of visible characters.

    Characters that a terminal would obey, or that are invisible, are escaped: control characters and line breaks,
    marks that turn the direction of writing, characters without width, spaces other than the usual one, and bytes that
    are no text (`\udce9`). A backslash stays as it is, so that a text that was shown already comes back unchanged.

    Args:
        text: Anything; its `str` counts.
    """
    line = str(text)
    if line.isascii() and line.isprintable():
        return line
    return "".join(c if is_visible(c) else c.encode("unicode_escape").decode() for c in line)


def shown_lines(text: object) -> str:
    """Return a text of several lines, each as `shown` returns it; line feeds and tabs alone lay it out."""
    return "".join(part if part in ("\n", "\t") else shown(part) for part in re.split("([\n\t])", str(text)))


def message_of(error: BaseException) -> str:
    """Return an error's message: the lines that it has by itself, each shown."""
    return "\n".join(map(shown, error.args)) if isinstance(error, MnistDistError) else shown(error)
