"""Files of a run folder: written whole or not at all, read up to a limit, and never through a link.

A run folder may come from somebody else. Nothing in it is believed to be a plain file of a sensible size before it is
opened, and nothing is written through a link that lies in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

SIDE_FILE_BYTES = 1 << 24
"""More than any config, record or manifest has."""

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer never blocks the open
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_PIECE_BYTES = 1 << 20


class ContentError(ValueError):
    """A file is missing, is not a plain file, or has the wrong length or content.

    An `OSError` is different: the file may be whole, but the system cannot read it now.
    """


def write_whole(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Replace a file so that after any kill or power cut the old or the new one is there, whole.

    Args:
        path: A link there is replaced, not followed.
        content: All of the new file, perhaps in pieces.

    Raises:
        OSError: The disk is full or read-only, or `path` is a folder; the old file is untouched.
    """
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)  # left by a kill
    try:
        write_new(temporary, content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """Name the file that `write_whole` writes before it takes the place of `path`."""
    return path.with_name(f".{path.name}.writing")


def write_new(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write and sync a file that must not exist yet.

    Raises:
        OSError: There is something at `path`, a link too, or the disk is full or read-only.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CLOEXEC | _BINARY
    with named(path), os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())


def open_plain(path: Path, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a plain file, without following a link at its place.

    Args:
        path: The file.
        flags: `os.O_RDONLY`, or `os.O_WRONLY | os.O_APPEND | os.O_CREAT`, which creates a missing file.

    Raises:
        ContentError: There is no such file, or it is a link, a folder, a pipe or a device.
        OSError: The system cannot open it.
    """
    try:
        descriptor = os.open(path, flags | _NOFOLLOW | _NONBLOCK | _CLOEXEC | _BINARY, 0o666)
    except FileNotFoundError:
        raise ContentError(f"{path} is missing") from None
    except OSError as error:
        kind = _kind_of(path)
        if kind is None:
            raise
        raise ContentError(f"{path} is a {kind}, not a file") from error
    kind = _kind(os.fstat(descriptor).st_mode)
    if kind is not None:
        os.close(descriptor)
        raise ContentError(f"{path} is a {kind}, not a file")
    return os.fdopen(descriptor, "rb" if flags == os.O_RDONLY else "ab")


def open_append(path: Path) -> BinaryIO:
    """Open a plain file to write at its end, or make it; `open_plain` has the errors."""
    return open_plain(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def read_plain(path: Path, limit: float = SIDE_FILE_BYTES) -> bytes:
    """Read a plain file of at most `limit` bytes.

    Raises:
        ContentError: There is no such file, it is a link, a folder, a pipe or a device, or it is longer.
        OSError: The system cannot read it.
    """
    with named(path), open_plain(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise ContentError(f"{path} is longer than {limit:,} bytes")
        return file.read()


def read_pieces(path: Path, size: int) -> Iterator[bytes]:
    """Read the first `size` bytes of a plain file a megabyte at a time: it may be of any length.

    Raises:
        ContentError: There is no such file, or it is a link, a folder, a pipe or a device.
        OSError: The system cannot read it.
    """
    with named(path), open_plain(path) as file:
        while piece := file.read(min(_PIECE_BYTES, size)):
            size -= len(piece)
            yield piece


def parse_record(content: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        content: The JSON.
        what: Names it in the message.

    Raises:
        ContentError: It is not one.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise ContentError(f"{what} is {'not JSON' if content else 'empty'}") from None
    if not isinstance(record, dict):
        raise ContentError(f"{what} is not a JSON object")
    return record


def cut(path: Path, size: int) -> None:
    """Keep the first `size` bytes of a plain file; a copy that shares its disk space (a hard link) stays as it is.

    Raises:
        ContentError: It is no plain file.
        OSError: The system cannot write it.
    """
    with named(path), open_plain(path) as file:
        status = os.fstat(file.fileno())
        if status.st_size <= size:
            return
        if status.st_nlink > 1:
            write_whole(path, read_pieces(path, size))
            return
    with named(path), open_plain(path, os.O_WRONLY | os.O_APPEND) as file:
        os.ftruncate(file.fileno(), size)


def entries(folder: Path) -> list[str]:
    """List the names in a folder; none where there is no such folder.

    Raises:
        OSError: The folder cannot be read. (`Path.glob` would list nothing then.)
    """
    try:
        return os.listdir(folder)  # noqa: PTH208 - names alone
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_real_folder(path: Path) -> bool:
    """Return whether there is a folder at a path, and not a link to one."""
    return stat.S_ISDIR(_mode(path) or 0)


def obstacle(path: Path, *, folder: bool) -> str | None:
    """Return the kind of what blocks the place of a plain file or folder; None if nothing does.

    Returns:
        `link`, `folder`, `pipe`, `device`, `socket` or `file`; None where nothing is in the way.
    """
    mode = _mode(path)
    if mode is None:
        return None
    if folder:
        return None if stat.S_ISDIR(mode) else _kind(mode) or "file"
    return _kind(mode)


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders atomically.

    Returns:
        False where the system or the file system cannot; nothing has changed then.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    code = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(code == 0)


def make_folder(path: Path, *, exist_ok: bool = True) -> None:
    """Create a folder and its missing parents, synced so that they survive a power cut.

    Args:
        path: The folder.
        exist_ok: Whether it may be there already.

    Raises:
        FileExistsError: It may not, or there is a file at its place.
        OSError: The disk is full or read-only.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=exist_ok)
    for folder in missing:
        with contextlib.suppress(PermissionError):  # one that may be written and not listed cannot be synced
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk. Windows cannot and need not."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY | _CLOEXEC)
        try:
            with named(folder):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Add a file's name to errors of system calls on the open file, which lack it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _kind_of(path: Path) -> str | None:
    mode = _mode(path)
    return None if mode is None else _kind(mode)


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _kind(mode: int) -> str | None:
    """Name a kind of file; None for a plain one."""
    kinds: dict[str, Callable[[int], bool]] = {
        "link": stat.S_ISLNK,
        "folder": stat.S_ISDIR,
        "pipe": stat.S_ISFIFO,
        "socket": stat.S_ISSOCK,
        "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    return next((name for name, matches in kinds.items() if matches(mode)), None)
