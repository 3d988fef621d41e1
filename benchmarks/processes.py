"""Images a second of one process with all CPU threads against several that share them, in turns.

Real training runs of which the second epoch and later ones count, as the journal has them:

    python benchmarks/processes.py --data Dataset --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def images_per_second(options: argparse.Namespace, processes: int) -> float:
    """Train and take the median of the epochs after the first."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["train", "--config", options.config, "--data", options.data, "--run-dir", run, "--device", "cpu"]
        words += ["--epochs", options.epochs, "--processes", processes, "--max-restarts", 0]
        words += ["--set", f"train.global_batch={options.global_batch}"]
        words += ["--set", f"train.threads={options.threads // processes}"]
        ended = subprocess.run(
            [sys.executable, "-m", "mnist_dist", *map(str, words)], capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise SystemExit(ended.stderr)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["images_per_second"] for row in rows if row["kind"] == "epoch" and row["epoch"] > 1)


def main() -> None:
    """Measure in turns and print medians with their ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="baseline")
    parser.add_argument("--data", default="Dataset")
    parser.add_argument("--global-batch", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="over all processes")
    parser.add_argument("--processes", type=int, default=2, help="against one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], options.processes: []}
    for _ in range(options.rounds):
        for processes, found in rates.items():
            found.append(images_per_second(options, processes))
    if options.json:
        print(json.dumps(rates))
        return
    print(f"images/s with steps of {options.global_batch}, median of {options.rounds} runs in turns (range)")
    for processes, found in rates.items():
        name = f"{processes} x {options.threads // processes} threads"
        print(f"{name:16}{statistics.median(found):10,.0f}  ({min(found):,.0f} to {max(found):,.0f})")
    ratios = [many / one for one, many in zip(*rates.values(), strict=True)]
    print(f"ratio in each round: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
