"""Imports torch once; for each line on standard input, forks a process that writes into a folder.

The line is `MODE FOLDER`: `third` writes a checkpoint behind two others, `again` the second one once more, and `side`
a run's config, environment and result anew. Prints the process's pid, and lets it begin at the next line. When it has
ended, prints how, what a resume would then find, and what is there once the same has been written again: one JSON
object.
"""

import json
import os
import sys
from pathlib import Path

import torch

from mnist_dist.disk.storage import write_whole
from mnist_dist.errors import MnistDistError
from mnist_dist.models import build_model
from mnist_dist.run import checkpoint
from mnist_dist.run.folder import RunFolder, config_content, write_record

model = build_model("small_cnn", classes=10, channels=1, image_size=28)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.zeros(1, 1, 28, 28)).sum().backward()
optimizer.step()


def write_checkpoint(folder: Path, step: int) -> None:
    checkpoint.write(folder, step, model, optimizer, {})
    checkpoint.prune(folder, keep=2, best=None)


def write_side_files(folder: Path, version: int) -> None:
    run = RunFolder(folder)
    write_record(run.environment, {"version": version})
    write_record(run.result, {"version": version})
    write_whole(run.config, config_content(f"version: {version}\n", None)[0])


def prepare(mode: str, folder: Path) -> None:
    if mode == "side":
        folder.mkdir()
        write_side_files(folder, 1)
    else:
        write_checkpoint(folder, 1)
        write_checkpoint(folder, 2)


def write(mode: str, folder: Path) -> None:
    if mode == "side":
        write_side_files(folder, 2)
    else:
        write_checkpoint(folder, 3 if mode == "third" else 2)


def find(mode: str, folder: Path, warnings: list[str]) -> object:
    if mode != "side":
        whole = checkpoint.newest_whole(folder, warnings.append)
        return whole and whole.name
    run = RunFolder(folder)
    try:
        run.check_run()
    except MnistDistError as error:
        warnings.append(str(error))
    records = run.read_environment(warnings.append), run.read_result(warnings.append)
    return [*(record["version"] for record in records if record), int(run.config.read_text().split()[-1])]


while line := sys.stdin.readline():
    mode, _, path = line.strip().partition(" ")
    folder = Path(path)
    prepare(mode, folder)
    gate, opener = os.pipe()
    child = os.fork()
    if not child:
        os.read(gate, 1)
        write(mode, folder)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()
    os.write(opener, b"!")
    _, status = os.waitpid(child, 0)
    os.close(gate)
    os.close(opener)
    warnings: list[str] = []
    found = find(mode, folder, warnings)
    write(mode, folder)
    outcome = {
        "code": os.waitstatus_to_exitcode(status),
        "found": found,
        "warnings": warnings,
        "after": sorted(path.name for path in folder.iterdir()),
    }
    print(json.dumps(outcome), flush=True)
