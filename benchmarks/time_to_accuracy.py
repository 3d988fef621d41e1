"""Seconds from a command's start to its test accuracy, images not decoded yet, beside an epoch of plain PyTorch.

Every time is of a whole process, from before its start to after its end, evaluation included, with the pictures'
files in the system's cache. What earlier runs decoded is not used and stays where it is: each run of ours gets a new
folder of links to the pictures, and decodes into that.

    python benchmarks/time_to_accuracy.py --data Dataset --config fast --output docs/speed
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commands import run_command
from summary import describe_machine, machine_text, markdown_table, mean_interval, spread_of, versions_text

from mnist_dist.machine import allowed_cpus

PLAIN_SCRIPT = Path(__file__).parent / "peers" / "plain.py"
PLAIN = "plain PyTorch, one epoch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One process, ended."""

    name: str
    """The config, or `PLAIN`."""
    seed: int
    seconds: float
    test_accuracy: float
    evaluation_seconds: float | None = None
    """How much of that the evaluation took; None for ours."""


def main() -> None:
    """Measure in turns, and write what is known after each."""
    options = _parse()
    command = shlex.join(["python", "benchmarks/time_to_accuracy.py", *sys.argv[1:]])
    machine = describe_machine()
    measurements: list[Measurement] = []
    _train_plain(0, options)  # fills the page cache; not counted
    for seed in range(options.seeds):
        measured = [_train_ours(config, seed, options) for config in options.config]
        if plain_is_due(seed, options.seeds, options.plain_runs):
            measured.append(_train_plain(seed, options))
        measurements += measured
        for one in measured:
            print(f"{one.name}, seed {seed}: {one.seconds:.2f} s, {one.test_accuracy:.2%}", file=sys.stderr)
        if options.output:
            _write(options.output, measurements, {"command": command, "machine": machine})
    if options.json:
        print(json.dumps(summarise(measurements)))
    else:
        print(f"{table(measurements)}\n\n{describe(machine, measurements)}\n\n    {command}")


def plain_is_due(seed: int, seeds: int, runs: int) -> bool:
    """Spread `runs` of the plain loop evenly over the seeds; at most one after each."""
    return (seed + 1) * runs // seeds > seed * runs // seeds


def summarise(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Sum up each config and the plain loop.

    `plain_over_this` divides the median times: how many of ours fit into one of plain's; None without plain runs.
    `mean_interval` holds the mean accuracy of all seeds with 95 % confidence; None for a single run.
    """
    rows = []
    plain = [one.seconds for one in measurements if one.name == PLAIN]
    for name in dict.fromkeys(one.name for one in measurements):
        runs = [one for one in measurements if one.name == name]
        seconds = spread_of([one.seconds for one in runs])
        accuracies = [one.test_accuracy for one in runs]
        worst = min(runs, key=lambda one: one.test_accuracy)
        rows.append(
            {
                "name": name,
                "seconds": asdict(seconds),
                "plain_over_this": statistics.median(plain) / seconds.median if plain else None,
                "mean_accuracy": statistics.fmean(accuracies),
                "mean_interval": mean_interval(accuracies) if len(runs) > 1 else None,
                "least_accuracy": worst.test_accuracy,
                "least_seed": worst.seed,
            }
        )
    return rows


def table(measurements: Sequence[Measurement]) -> str:
    """Write the table in Markdown: a row for each config, and one for the plain loop."""
    head = ["whole command", "seconds", "plain / this", "test accuracy, mean (95 % interval)", "least", "runs"]
    lines = []
    for row in sorted(summarise(measurements), key=lambda row: row["name"] == PLAIN):
        ratio, interval = row["plain_over_this"], row["mean_interval"]
        spread = spread_of([one.seconds for one in measurements if one.name == row["name"]])
        between = f" ({interval[0]:.2%} to {interval[1]:.2%})" if interval else ""
        lines.append(
            [
                row["name"] if row["name"] == PLAIN else f"`mnist-dist train --config {row['name']}`",
                spread.to_text(".2f"),
                f"{ratio:.2f}" if ratio and row["name"] != PLAIN else "",
                f"{row['mean_accuracy']:.2%}{between}",
                f"{row['least_accuracy']:.2%} (seed {row['least_seed']})",
                str(spread.count),
            ]
        )
    return markdown_table(head, lines)


def describe(machine: dict[str, Any], measurements: Sequence[Measurement]) -> str:
    """Say in sentences what the figures are and where they were taken."""
    evaluations = [one.evaluation_seconds for one in measurements if one.evaluation_seconds is not None]
    of_plain = f" ({statistics.median(evaluations):.2f} s of plain PyTorch's)" if evaluations else ""
    return (
        f"Median (least to most) of whole processes run in turns, start, decoding and evaluation{of_plain} included; "
        "files in the system's cache. Interval of the mean by Student's t. "
        f"{machine_text(machine)}. {versions_text(machine)}."
    )


def _train_ours(config: str, seed: int, options: argparse.Namespace) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        data.mkdir()
        for split in options.data.resolve().iterdir():
            if split.name in ("train", "test", "val"):  # not the pictures that are decoded already
                (data / split.name).symlink_to(split)
        words: list[object] = [sys.executable, "-m", "mnist_dist", "train", "--config", config, "--data", data]
        words += ["--set", "data.follow_links=true", "--run", run, "--seed", seed]
        words += [*(word for setting in options.set for word in ("--set", setting))]
        ended = run_command(words)
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return Measurement(name=config, seed=seed, seconds=ended.seconds, test_accuracy=result["metrics"]["test_accuracy"])


def _train_plain(seed: int, options: argparse.Namespace) -> Measurement:
    workers = options.plain_workers
    words = [sys.executable, PLAIN_SCRIPT, "--data", options.data, "--seed", seed, "--evaluate", "--workers", workers]
    ended = run_command([*words, "--threads", max(1, allowed_cpus() - workers)])
    report = json.loads(ended.out.splitlines()[-1])
    return Measurement(
        name=PLAIN,
        seed=seed,
        seconds=ended.seconds,
        test_accuracy=report["test_accuracy"],
        evaluation_seconds=report["evaluation_seconds"],
    )


def _write(folder: Path, measurements: Sequence[Measurement], about: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    page = f"# Time to accuracy\n\n{table(measurements)}\n\n{describe(about['machine'], measurements)}\n\n"
    (folder / "time-to-accuracy.md").write_text(f"{page}```sh\n{about['command']}\n```\n", encoding="utf-8")
    record = about | {"summary": summarise(measurements), "measurements": [asdict(one) for one in measurements]}
    (folder / "time-to-accuracy.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("Dataset"), help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--output", type=Path, help="folder for time-to-accuracy.md and time-to-accuracy.json")
    parser.add_argument("--config", action="append", required=True, help="a preset or a YAML file; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any config key; repeatable")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each config, with seeds 0, 1, 2, ...")
    parser.add_argument("--plain-runs", type=int, default=5, help="of the plain loop, at most one for each seed")
    parser.add_argument(
        "--plain-workers", type=int, default=0, help="its decoding processes; they get cores of their own"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if not (options.data / "train").is_dir():
        parser.error(f"{options.data} has no folder train: name another with --data, or `mnist-dist data import` one")
    return options


if __name__ == "__main__":
    main()
