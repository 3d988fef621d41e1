"""Standard output and error that take any text: what their encoding lacks, and what would act, stands there escaped."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, TextIO

from mnist_dist.observe.names import shown, shown_lines

if TYPE_CHECKING:
    from rich.console import Console

ESCAPED = "backslashreplace"
"""How a stream writes a character that its encoding lacks."""
LEAST_WIDTH = 16
"""Columns that text and images get in any terminal."""
LEAST_TABLE_WIDTH = 64
"""Columns that tables get: a narrower terminal breaks their rows, and no figure or name is cut off."""
ENDLESS_WIDTH = 1000
"""Columns where no terminal limits a line."""


class Visible:
    """Passes text on to a stream as `shown_lines` returns it; it has no `buffer` that would lead around that."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":
            raise AttributeError(name)
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text; returns its own length, as any stream does."""
        if not isinstance(text, str):
            raise TypeError(f"write() takes str, not {type(text).__name__}")
        self.stream.write(shown_lines(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)


def make_visible() -> None:
    """Set this process's output up for any text, and forget a terminal's size that is no number. Once, in `main`."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "1")):
            del os.environ[name]
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)
            setattr(sys, name, Visible(stream))


@contextlib.contextmanager
def tolerant(stream: IO[str]) -> Iterator[None]:
    """Escape what a stream's encoding lacks, for as long as the context lasts."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    former = stream.errors or "strict"
    stream.reconfigure(errors=ESCAPED)
    try:
        yield
    finally:
        stream.reconfigure(errors=former)


def say(line: object, *, err: bool = False) -> None:
    """Print one line, with the names in it as visible text.

    Args:
        line: A line break in it is a name's own, and is escaped.
        err: Print to standard error.
    """
    print(shown(line), file=sys.stderr if err else sys.stdout, flush=True)


def open_console(*, stderr: bool = False, tables: bool = False) -> Console:
    """Open a console that takes text for text: no markup, no emoji codes, no colours of its own finding.

    Args:
        stderr: On standard error.
        tables: Where no terminal sets a width, give each row one line, for grep and logs.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    file = stream.stream if isinstance(stream, Visible) else stream  # colours go past it; names are shown before
    console = Console(file=file, stderr=stderr, markup=False, emoji=False, highlight=False)
    if tables and not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = ENDLESS_WIDTH
    least = LEAST_TABLE_WIDTH if tables else LEAST_WIDTH
    if console.width < least:
        console.width = least
    return console


def print_line(console: Console, line: object) -> None:
    """Print one line on a console, with the names in it as visible text, and let the terminal wrap it.

    Args:
        console: Any; a caller's own may read markup.
        line: A line break in it is a name's own, and is escaped.
    """
    from rich.text import Text

    console.print(Text(shown(line)), soft_wrap=True)


def written(console: Console, text: object) -> str:
    """Return a text as a console's stream will write it, so that a table has room for it."""
    return shown(text).encode(console.encoding, ESCAPED).decode(console.encoding)


def glyph(console: Console, sign: str, plain: str) -> str:
    """Return a character if the console's encoding has it, otherwise its replacement."""
    return sign if written(console, sign) == sign else plain
