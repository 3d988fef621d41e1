"""Files that a command writes because the user asks for them: refused before the work, and written whole or not."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_dist.disk.storage import write_whole
from mnist_dist.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from PIL import Image


def check_place(path: Path | None) -> None:
    """Check that a file can be created at a path; nothing is written.

    Raises:
        ConfigError: There is no such folder, or a folder is in its place.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}.")


def check_picture(path: Path | None) -> None:
    """Check that an image can be written to a file; nothing is written.

    Raises:
        ConfigError: Its place or its ending is not fit for that.
    """
    if path is None:
        return
    check_place(path)
    from PIL import Image

    try:  # Pillow lists endings for which it has no writer, and some that take no colours
        Image.new("RGB", (1, 1)).save(io.BytesIO(), format=_format(path))
    except (ValueError, OSError, KeyError, SystemError):
        ending = f"The ending of {path}" if path.suffix else f"{path} has no ending, which"
        raise ConfigError(f"{ending} names no image format that can be written: use .png or .jpg.") from None


def save_picture(picture: Image.Image, path: Path, *, follow: bool = True) -> None:
    """Draw an image into a file that `check_picture` has accepted.

    Args:
        picture: In RGB.
        path: A device or a pipe is written to as it is.
        follow: Write through a symbolic link, as the user has named it; else the link is replaced.

    Raises:
        ConfigError: The format does not take an image of this size.
        StorageError: The file cannot be written; then it is as it was.
    """
    content = io.BytesIO()
    try:
        picture.save(content, format=_format(path))
    except (ValueError, OSError, SystemError) as error:
        size = f"{picture.width} x {picture.height} pixels"
        raise ConfigError(f"{path} cannot be drawn with {size}: {error}. Use .png, or fewer images.") from None
    _write(path, content.getvalue(), follow=follow)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write rows in UTF-8; a file name that is no text keeps its bytes.

    Raises:
        StorageError: The file cannot be written; then it is as it was.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    _write(path, text.getvalue().encode("utf-8", "surrogateescape"), follow=True)


def _write(path: Path, content: bytes, *, follow: bool) -> None:
    try:
        if follow and path.exists() and not path.is_file():  # a device or a pipe
            path.write_bytes(content)
        else:
            write_whole(path.resolve() if follow else path, content)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}.") from None


def _format(path: Path) -> str:
    """Find Pillow's name of the format that an ending names; raises KeyError if there is none."""
    from PIL import Image

    return Image.registered_extensions()[path.suffix.lower()]
