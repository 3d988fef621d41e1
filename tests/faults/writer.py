"""Imports torch once; for each folder named on standard input, forks a process that writes a checkpoint there.

Prints the process's pid, and lets it begin at the next line. When it has ended, prints how, what a resume would then
find, and what is there once that resume has written the same checkpoint again: one JSON object.
"""

import json
import os
import sys
from pathlib import Path

import torch

from mnist_dist import checkpoint
from mnist_dist.models import build_model

model = build_model("small_cnn", classes=10, channels=1, image_size=28)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.zeros(1, 1, 28, 28)).sum().backward()
optimizer.step()


def write_third(folder: Path) -> None:
    checkpoint.write(folder, 3, model, optimizer, {})
    checkpoint.prune(folder, keep=2, best=None)


while line := sys.stdin.readline():
    folder = Path(line.strip())
    checkpoint.write(folder, 1, model, optimizer, {})
    checkpoint.write(folder, 2, model, optimizer, {})
    gate, opener = os.pipe()
    child = os.fork()
    if not child:
        os.read(gate, 1)
        write_third(folder)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    os.write(opener, b"!")
    _, status = os.waitpid(child, 0)
    os.close(gate)
    os.close(opener)
    warnings: list[str] = []
    whole = checkpoint.newest_whole(folder, warnings.append)
    write_third(folder)
    outcome = {
        "code": os.waitstatus_to_exitcode(status),
        "newest_whole": whole and whole.name,
        "warnings": warnings,
        "after": sorted(path.name for path in folder.iterdir()),
    }
    print(json.dumps(outcome), flush=True)
