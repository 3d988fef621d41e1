"""The commands: parse, call, print. The only place that turns an error into an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from mnist_dist.cli import streams
from mnist_dist.errors import (
    STORAGE,
    ConfigError,
    DeviceMemoryError,
    MnistDistError,
    StoppedError,
    memory,
    storage_error,
)
from mnist_dist.group import signals
from mnist_dist.group.place import PLACE, GroupFolder, group_folder_of, worker_of
from mnist_dist.observe.names import message_of
from mnist_dist.observe.output import make_visible

SIGPIPE = 13


def main() -> None:
    """Run the command line and exit with the code that the contract gives the outcome."""
    streams.prepare()
    signals.install()
    make_visible()
    is_rank = os.environ.keys() >= set(PLACE)
    try:
        code = _run()
    except Exception as bug:
        if not is_rank:
            raise
        sys.excepthook(type(bug), bug, bug.__traceback__)
        code = 1
    streams.settle()
    if is_rank:
        os._exit(code)  # in the usual way gloo's threads sometimes abort it, and NCCL's kernels can hold it up
    sys.exit(code)


def _run() -> int:
    """Run the command line; a rank of our launcher reports its error to it, and it prints one for all."""
    import typer

    from mnist_dist.cli import usage

    group = None
    try:
        _check_folder()
        usage.check_words(sys.argv[1:])
        if (found := _own_group()) is not None:
            from mnist_dist.cli import supervised

            supervised.begin(found)
            group = found
        from mnist_dist.cli.app import app

        code = app(standalone_mode=False)
        sys.stdout.flush()  # the disk behind it may be full
    except (Exception, SystemExit) as caught:
        raised = caught.__context__ if isinstance(caught, SystemExit) else caught
        if isinstance(caught, SystemExit) and not isinstance(raised, BrokenPipeError):  # else Typer's or Rich's word
            return caught.code if isinstance(caught.code, int) else 0 if caught.code is None else 1
        assert isinstance(raised, Exception)
        if isinstance(raised, typer.TyperException) and usage.is_help(raised):
            print(raised, file=sys.stderr)
            return ConfigError.exit_code
        error = _as_ours(raised)
        if signals.leaving() and not isinstance(error, MnistDistError):
            return 128 + signals.leaving()  # a module whose import the signal interrupted fails in any way
        if group is not None:
            return _leave_word(group, error)
        if not isinstance(error, MnistDistError):
            streams.settle()
            raise  # a bug keeps its traceback
        if error.exit_code != 128 + SIGPIPE:
            stopped = error.exit_code > 128  # as the user wished
            with contextlib.suppress(OSError):  # it may be full too
                print(message_of(error) if stopped else f"error: {message_of(error)}", file=sys.stderr)
        return error.exit_code
    return code if isinstance(code, int) else 0


def _own_group() -> GroupFolder | None:
    """Find the group for which our launcher started this process; `None` if its variables are invalid."""
    try:
        return group_folder_of(os.environ) if worker_of(os.environ) is not None else None
    except ConfigError:  # a command that reads them says so
        return None


def _check_folder() -> None:
    """Check that the working folder still exists.

    Raises:
        ConfigError: Somebody has removed it.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError("The working folder has been removed: change to a folder that exists.") from None


def _leave_word(group: GroupFolder, error: Exception) -> int:
    from mnist_dist.cli import supervised

    return supervised.leave_word(group, error)


def _as_ours(error: Exception) -> Exception:
    """Turn usage errors, full disks, lack of memory and closed pipes into errors of our tree."""
    import typer

    if isinstance(error, typer.TyperException):
        from mnist_dist.cli import usage

        return usage.explain(error)
    if isinstance(error, BrokenPipeError):  # the reader of `mnist-dist ... | head` has gone
        return StoppedError("The program that read the output has ended.", SIGPIPE)
    if (refusal := memory.refusal_of(error)) is not None:
        return DeviceMemoryError(memory.WORDS[refusal])
    if isinstance(error, OSError):
        known = error.filename is not None or error.errno in STORAGE
        return storage_error(error) if known else error
    return error
