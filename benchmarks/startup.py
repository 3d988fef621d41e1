"""Seconds from a command's start to the end of the first training step, with two CPU processes.

The same training through our own launcher, through torchrun and through `accelerate launch`, in turns with two bare
processes that import torch and end:

    python benchmarks/startup.py --rounds 7
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

BIN = Path(sys.executable).parent
TRAIN = ["train", "--config", "quick", "--run-dir", "run", "--set", "train.log_every=1", "--set", "train.max_steps=3"]
MODULE = ["-m", "mnist_dist", *TRAIN]
LAUNCHERS = {
    "mnist-dist train": [sys.executable, "-m", "mnist_dist", *TRAIN, "--processes", "2"],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", *MODULE],
    "accelerate launch": [
        *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
        *MODULE,
    ],
}


IMPORTS = "twice import torch"


def seconds_to_first_step(words: list[object]) -> float:
    """Run a training and read its journal until the first step appears."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        journal = Path(folder) / "run" / "metrics.jsonl"
        began = time.perf_counter()
        process = subprocess.Popen(
            list(map(str, words)), cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while not (journal.exists() and journal.stat().st_size):
            if process.poll() is not None:
                raise SystemExit((process.communicate()[1] or b"").decode())
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        process.communicate()
    return seconds


def seconds_of_imports() -> float:
    """Start two processes that import torch at once."""
    began = time.perf_counter()
    processes = [subprocess.Popen([sys.executable, "-c", "import torch"]) for _ in range(2)]
    for process in processes:
        process.wait()
    return time.perf_counter() - began


def main() -> None:
    """Measure in turns and print medians with their ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in (*LAUNCHERS, IMPORTS)}
    for words in LAUNCHERS.values():
        seconds_to_first_step(words)  # fills the page cache
    for _ in range(options.rounds):
        for name, words in LAUNCHERS.items():
            seconds[name].append(seconds_to_first_step(words))
        seconds[IMPORTS].append(seconds_of_imports())
    ours = statistics.median(seconds["mnist-dist train"])
    rows = {
        name: {"median": statistics.median(times), "least": min(times), "most": max(times),
               "ours": ours / statistics.median(times)}
        for name, times in seconds.items()
    }  # fmt: skip
    if options.json:
        print(json.dumps(rows))
        return
    print(f"seconds to the end of the first step, 2 processes, median of {options.rounds} (range)")
    for name, row in rows.items():
        print(
            f"{name:18}{row['median']:6.2f}  ({row['least']:.2f} to {row['most']:.2f})  ours / this {row['ours']:.2f}"
        )


if __name__ == "__main__":
    main()
