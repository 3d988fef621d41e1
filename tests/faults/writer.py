"""Imports torch once; for each folder named on standard input, forks a process that writes a checkpoint there.

Prints the process's pid; the process is stopped until it gets SIGCONT. Prints how it ended.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from mnist_dist import checkpoint
from mnist_dist.models import build_model

model = build_model("small_cnn", classes=10, channels=1, image_size=28)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.zeros(1, 1, 28, 28)).sum().backward()
optimizer.step()

for line in sys.stdin:
    folder = Path(line.strip())
    checkpoint.write(folder, 1, model, optimizer, {})
    checkpoint.write(folder, 2, model, optimizer, {})
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGSTOP)
        checkpoint.write(folder, 3, model, optimizer, {})
        checkpoint.prune(folder, keep=2, best=None)
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
