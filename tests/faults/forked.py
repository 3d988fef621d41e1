"""Imports torch once; for each JSON line on standard input, forks a process that runs a command as a rank of its own.

The line has `words`, `cwd` and `output`, a file for all that the command prints. Prints how it ended: an exit code, or
minus the signal; SIGALRM is that of a command that hangs.
"""

import json
import os
import signal
import sys

SECONDS = 100

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

from mnist_dist.fast.imports import leave_out_compiler  # noqa: E402

leave_out_compiler()

from mnist_dist.cli import app, main  # noqa: E402, F401
from mnist_dist.run import build, predictor  # noqa: E402, F401

while line := sys.stdin.readline():
    job = json.loads(line)
    child = os.fork()
    if not child:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(job["cwd"])
        sys.argv = ["mnist-dist", *job["words"]]
        signal.alarm(SECONDS)
        try:
            main()
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
