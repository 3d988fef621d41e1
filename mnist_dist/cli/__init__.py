"""The commands: parse, call, print. The only place that turns an error into an exit code."""

from __future__ import annotations

import errno
import os
import sys

from mnist_dist import signals
from mnist_dist.errors import MnistDistError, StorageError, WorkerError
from mnist_dist.worker import RENDEZVOUS


def main() -> None:
    """Run the command line and exit with the code that the contract gives the outcome."""
    signals.install()
    code = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        os._exit(code)  # gloo's threads sometimes abort a process that ends in the usual way
    sys.exit(code)


def _run() -> int:
    from mnist_dist.cli.app import app

    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except MnistDistError as error:
        _complain(error)
        return error.exit_code
    except BrokenPipeError:  # the reader of `mnist-dist ... | head` has gone
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        return 1
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _complain(StorageError(f"{error.filename or 'The disk'}: {error.strerror}."))
        return StorageError.exit_code
    return 0


def _complain(error: MnistDistError) -> None:
    if isinstance(error, WorkerError) and RENDEZVOUS in os.environ:
        return  # an echo: our launcher, which started this rank, shows the cause
    print(f"error: {error}", file=sys.stderr)
