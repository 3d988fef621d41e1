"""Training images a second, ours beside other libraries on the same images, network and batch.

Each is a process of its own, in rounds (A B C ... A B C ...), so that a machine that is slower for a while is slower
for all of them:

    python benchmarks/compare.py --data Dataset --output docs/speed
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

from chart import Bar, bar_chart
from commands import run_command
from summary import describe_machine, machine_text, markdown_table, spread_of, steady_rate, versions_text

from mnist_dist.machine import allowed_cpus

SCRIPTS = Path(__file__).parent / "peers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A script beside which ours is measured."""

    script: str
    workers: int = 0
    arguments: tuple[str, ...] = ()
    decodes_once: bool = False
    """As ours does; it then goes through all images in no time."""

    def threads(self, cores: int) -> int:
        """Share the cores: the arithmetic has those that the workers leave; one core for two threads is slower."""
        return max(1, cores - self.workers)


OURS = "mnist-dist train"
PEERS = {
    "PyTorch, ImageFolder, 0 workers": Peer(script="plain.py"),
    "PyTorch, ImageFolder, 2 workers": Peer(script="plain.py", workers=2),
    "Accelerate, ImageFolder, 0 workers": Peer(script="accelerate_loop.py"),
    "Accelerate, ImageFolder, 2 workers": Peer(script="accelerate_loop.py", workers=2),
    "Lightning, ImageFolder, 0 workers": Peer(script="lightning_loop.py"),
    "Lightning, ImageFolder, 2 workers": Peer(script="lightning_loop.py", workers=2),
    "PyTorch, tensors in memory": Peer(script="tensors.py", decodes_once=True),
    "PyTorch, tensors, channels_last": Peer(script="tensors.py", arguments=("--channels-last",), decodes_once=True),
}
NAMES = [OURS, *PEERS]
SAME = {
    "model.name": "small_cnn",
    "model.dropout": 0.25,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.03,
    "optimizer.momentum": 0.9,
    "schedule.name": "constant",
    "train.precision": "fp32",
}
"""Our config keys that make the arithmetic that of the peers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One process, ended."""

    name: str
    batch: int
    round: int
    images_per_second: float
    """Over its steady epochs: the second and later."""
    peak_bytes: int | None
    device: str | None
    """Where a peer computed; ours takes the same."""


def main() -> None:
    """Measure in rounds, and write what is known after each."""
    options = _parse()
    command = shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]])
    machine = describe_machine()
    measurements: list[Measurement] = []
    for round_ in range(1, options.rounds + 1):
        for batch in options.batches:
            for name in options.only:
                measured = measure(name, batch, round_, options)
                measurements.append(measured)
                memory = f", {measured.peak_bytes / 2**20:,.0f} MiB" if measured.peak_bytes else ""
                print(
                    f"round {round_}/{options.rounds}, batch {batch}, {name}: "
                    f"{measured.images_per_second:,.0f} images/s{memory}",
                    file=sys.stderr,
                )
        notes = describe(options, machine, measurements)
        if options.output:
            write(options.output, measurements, notes, {"command": command, "machine": machine})
    if options.json:
        print(json.dumps(summarise(measurements)))
    else:
        print(f"{table(measurements)}\n\n{' '.join(notes)}\n\n    {command}")


def measure(name: str, batch: int, round_: int, options: argparse.Namespace) -> Measurement:
    """Train in a process of its own."""
    if name == OURS:
        return _measure_ours(batch, round_, options)
    peer = PEERS[name]
    words: list[object] = [sys.executable, SCRIPTS / peer.script, "--data", options.data, "--batch", batch]
    words += ["--epochs", options.epochs, "--seed", round_, "--workers", peer.workers, *peer.arguments]
    words += ["--threads", options.threads or peer.threads(allowed_cpus())]
    words += ["--limit", options.limit] if options.limit and not peer.decodes_once else []
    ended = run_command(words, watch_memory=True)
    report = json.loads(ended.out.splitlines()[-1])
    rate = steady_rate(report["images_per_second"])
    return Measurement(
        name=name, batch=batch, round=round_, images_per_second=rate, peak_bytes=ended.peak_bytes,
        device=report["device"],
    )  # fmt: skip


def _measure_ours(batch: int, round_: int, options: argparse.Namespace) -> Measurement:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words: list[object] = [sys.executable, "-m", "mnist_dist", "train", "--data", options.data, "--run", run]
        words += ["--epochs", options.epochs, "--seed", round_, "--set", f"train.global_batch={batch}"]
        words += [word for key, value in SAME.items() for word in ("--set", f"{key}={value}")]
        words += ["--set", f"train.threads={options.threads}"] if options.threads else []
        ended = run_command(words, watch_memory=True)
        rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        rates = [row["images_per_second"] for row in rows if row["kind"] == "epoch"]
    return Measurement(
        name=OURS, batch=batch, round=round_, images_per_second=steady_rate(rates), peak_bytes=ended.peak_bytes,
        device=None,
    )  # fmt: skip


def summarise(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Sum up each name at each batch: median, range, number, peak memory, and how many times as fast ours is.

    `ours_over_this` divides the medians; it and `peak_bytes`, the median of the peaks, are None where not known.
    """
    rows = []
    for name, batch in dict.fromkeys((one.name, one.batch) for one in measurements):
        rates = _rates(measurements, name, batch)
        ours = _rates(measurements, OURS, batch)
        peaks = [one.peak_bytes for one in measurements if (one.name, one.batch) == (name, batch) and one.peak_bytes]
        rows.append(
            {
                "name": name,
                "batch": batch,
                "images_per_second": asdict(spread_of(rates)),
                "ours_over_this": statistics.median(ours) / statistics.median(rates) if ours else None,
                "peak_bytes": statistics.median(peaks) if peaks else None,
            }
        )
    return rows


def table(measurements: Sequence[Measurement]) -> str:
    """Write the table in Markdown: a row for each name, and for each batch its speed, our ratio and its memory."""
    rows = {(row["name"], row["batch"]): row for row in summarise(measurements)}
    batches = list(dict.fromkeys(batch for _, batch in rows))
    head = ["training, images/s"]
    for batch in batches:
        head += [f"batch {batch}", "ours / this", "memory"]
    lines = []
    for name in dict.fromkeys(name for name, _ in rows):
        cells = [f"**`{name}`**" if name == OURS else name]
        for batch in batches:
            row = rows[name, batch]
            ratio, peak = row["ours_over_this"], row["peak_bytes"]
            cells.append(spread_of(_rates(measurements, name, batch)).to_text(",.0f"))
            cells.append(f"{ratio:.2f}" if ratio and name != OURS else "")
            cells.append(f"{peak / 2**20:,.0f} MiB" if peak else "")
        lines.append(cells)
    return markdown_table(head, lines)


def describe(options: argparse.Namespace, machine: dict[str, Any], measurements: Sequence[Measurement]) -> list[str]:
    """Say in sentences what the figures are and where they were taken; the first two are enough for the chart."""
    count = max(one.round for one in measurements)
    rounds = "One round" if count == 1 else f"Median of {count} rounds in turns (least to most)"
    device = next((one.device for one in measurements if one.device), "cpu")
    epochs = f"epochs 2 to {options.epochs}" if options.epochs > 2 else f"epoch {options.epochs}"
    limit = (
        f"Each epoch of ImageFolder's rows decodes the same {options.limit:,} random training images from files in "
        "the system's cache"
        if options.limit
        else "Each epoch of ImageFolder's rows decodes all training images from files in the system's cache"
    )
    return [
        f"{rounds}; training part of {epochs}, without evaluation.",
        f"{machine_text(machine, device)}.",
        f"{versions_text(machine)}.",
        f"{limit}; the other rows go through all, decoded once, which is not counted.",
        *([] if options.threads else ["With workers, the arithmetic has the cores that they leave, at least one."]),
        "Memory: the most that all processes of the command used at once (PSS), median over the rounds.",
    ]


def write(folder: Path, measurements: Sequence[Measurement], notes: list[str], about: dict[str, Any]) -> None:
    """Write the table, the chart and all measurements into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page = f"# Training speed\n\n![images a second](speed.svg)\n\n{table(measurements)}\n\n{' '.join(notes)}\n\n"
    (folder / "speed.md").write_text(f"{page}```sh\n{about['command']}\n```\n", encoding="utf-8")
    panels: dict[str, list[Bar]] = {}
    for name, batch in dict.fromkeys((one.name, one.batch) for one in measurements):
        spread = spread_of(_rates(measurements, name, batch))
        panels.setdefault(f"Batch {batch}", []).append(Bar(label=name, spread=spread, ours=name == OURS))
    chart = bar_chart("Training speed, images a second (more is better)", notes[:2], panels)
    (folder / "speed.svg").write_text(chart, encoding="utf-8")
    record = about | {"summary": summarise(measurements), "measurements": [asdict(one) for one in measurements]}
    (folder / "speed.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _rates(measurements: Sequence[Measurement], name: str, batch: int) -> list[float]:
    return [one.images_per_second for one in measurements if (one.name, one.batch) == (name, batch)]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("Dataset"), help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--output", type=Path, help="folder for speed.md, speed.svg and speed.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--epochs", type=int, default=2, help="of each process; the first is not counted")
    parser.add_argument("--limit", type=int, default=6_400, help="images in an epoch of ImageFolder's rows; 0: all")
    parser.add_argument("--threads", type=int, help="of the arithmetic (default: all cores that workers leave)")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="NAME", help=f"of: {'; '.join(NAMES)}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if not (options.data / "train").is_dir():
        parser.error(f"{options.data} has no folder train: name another with --data, or `mnist-dist data import` one")
    options.only = [name for name in NAMES if not options.only or name in options.only]
    return options


if __name__ == "__main__":
    main()
