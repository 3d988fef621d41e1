"""The standard streams of this process: there is always something to write to, whatever it was started with."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer


def prepare() -> None:
    """Open the standard streams that are closed, and keep writes to a terminal harmless after it is gone.

    A daemon may start this program without them. The next file that is opened would take the number of a missing one:
    all that is printed, here or by a child, would go into that file.
    """
    missing = [number for number in range(3) if not _is_open(number)]
    for number in missing:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)
    sys.stdout = _replacement(sys.stdout, 1)
    sys.stderr = _replacement(sys.stderr, 2)


def settle() -> None:
    """Write out what the standard streams still hold; what can't be written, now or later, is lost."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)  # Python writes the rest there as it ends
            os.close(null)


class Terminal(io.FileIO):
    """A terminal; what is written after it has gone is lost, and that is no error."""

    def write(self, content: Buffer) -> int:
        """Write bytes.

        Returns:
            How many are done with.
        """
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENXIO):
                raise
            return memoryview(content).nbytes


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _replacement(stream: TextIO | None, number: int) -> TextIO:
    """Return a stream, or its replacement."""
    if stream is None:
        return io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="utf-8", write_through=True)
    # A terminal that has gone no longer says that it is one, but is a device still.
    if not isinstance(stream, io.TextIOWrapper) or not stat.S_ISCHR(os.fstat(number).st_mode):
        return stream
    terminal = io.BufferedWriter(Terminal(number, "w", closefd=False))
    return io.TextIOWrapper(
        terminal, encoding=stream.encoding, errors=stream.errors, line_buffering=True, write_through=number == 2
    )
