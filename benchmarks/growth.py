"""What a training costs as its data set grows: opening, first step, each step, and memory, at 60,000 and 6,000,000.

The images are stores of 28x28 pixels made up on the spot (sparse files, random labels); one CPU process trains
`small_cnn` on them as a rank of our launcher does. In turns, with medians and ranges:

    python benchmarks/growth.py --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from mnist_dist.data.approval import approve
from numpy.lib.format import open_memmap

from mnist_dist.data.files import write_sealed
from mnist_dist.data.store_files import FORMAT, INDEX, VERIFIED, array_path
from mnist_dist.group.heartbeat import Pulses
from mnist_dist.group.place import GROUP_FOLDER, GroupFolder

SIZES = (60_000, 6_000_000)
CLASSES = 10
TEST = 1000
SHA256 = "0" * 64
OPEN = """
import os, time
from mnist_dist.config.schema import Data
from mnist_dist.data import open_dataset
from mnist_dist.group.place import group_folder_of
began = time.perf_counter()
open_dataset(Data(), seed=0, announce=print, group=group_folder_of(os.environ))
print(time.perf_counter() - began)
"""
MEASURES = {
    "open": "opening, milliseconds",
    "first_step": "process start to end of first step, seconds",
    "step": "each later step, milliseconds",
    "memory": "peak resident memory, MB",
}


def make_store(folder: Path, images: int) -> None:
    """Write a store with this many training images."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", images), ("test", TEST)):
        arrays = {
            "images": ((count, 1, 28, 28), np.uint8),
            "moments": ((count, 1, 2), np.uint64),
            "ends": ((count,), np.int64),
            "names": ((1,), np.uint8),
        }
        for name, (shape, dtype) in arrays.items():
            open_memmap(array_path(folder, split, name), "w+", dtype, shape)
        np.save(array_path(folder, split, "labels"), generator.integers(0, CLASSES, count))
        splits[split] = {
            "images": count,
            "names": 1,
            "totals": [[33 * 784 * count, 7000 * 784 * count]],  # about MNIST's
            "crc32": {name: [] for name in VERIFIED},  # only a launcher verifies
        }
    index = {"format": FORMAT, "channels": 1, "image_size": 28, "classes": list("0123456789"), "splits": splits}
    write_sealed(folder / INDEX, index | {"sha256": SHA256})


def measure(store: Path, steps: int) -> dict[str, float]:
    """Open a store in one process, and train on it in another."""
    with tempfile.TemporaryDirectory() as folder:
        group = GroupFolder(Path(folder))
        approve(group, store, "made up", SHA256)
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", GROUP_FOLDER: folder}
        opened = subprocess.run([sys.executable, "-c", OPEN], env=os.environ | ranks, capture_output=True, check=True)
        pulses = Pulses(group.heartbeats, 1)
        settings = ("train.max_steps", steps), ("train.device", "cpu"), ("train.log_every", steps)
        words = [word for key, value in settings for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "mnist_dist", "train", "--data", "made-up", "--run-dir", "run", *words]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | ranks, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        first = first_step = last = 0.0
        while (step := pulses.read()[0].step) < steps:
            if step >= 1 and not first:
                first, first_step = time.perf_counter(), step
            if process.poll() is not None:
                raise SystemExit((group.failure(0)).read_text(encoding="utf-8"))
            time.sleep(0.0005)
        last = time.perf_counter()
        _, _, usage = os.wait4(process.pid, 0)
        pulses.close()
    return {
        "open": 1000 * float(opened.stdout),
        "first_step": first - began,
        "step": 1000 * (last - first) / (steps - first_step),
        "memory": usage.ru_maxrss / 1024,
    }


def main() -> None:
    """Measure in turns and print medians with their ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        stores = {size: Path(folder) / str(size) for size in SIZES}
        for size, store in stores.items():
            make_store(store, size)
            measure(store, options.steps)  # fills the page cache
        for _ in range(options.rounds):
            for size, store in stores.items():
                found[size].append(measure(store, options.steps))
    rows = {
        name: {
            str(size): {"median": statistics.median(values), "least": min(values), "most": max(values)}
            for size, values in ((size, [row[name] for row in records]) for size, records in found.items())
        }
        for name in MEASURES
    }
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'median of ' + str(options.rounds) + ' (range)':46}" + "".join(f"{size:>26,}" for size in SIZES))
    for name, words in MEASURES.items():
        cells = (f"{row['median']:.2f} ({row['least']:.2f} to {row['most']:.2f})" for row in rows[name].values())
        print(f"{words:46}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
