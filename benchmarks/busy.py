"""Training on a busy machine: images a second, quiet and beside busy programs.

Ours with `train.threads=auto`, each fixed number of threads with many, few and no spins, and a plain PyTorch loop over
tensors in memory, in turns. `begins` starts the busy program when a third of the time is over. The row `fast` is the
whole command, from its start to its end:

    python benchmarks/busy.py --data Dataset --rounds 3 --output docs/speed
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from summary import describe_machine, machine_text, markdown_table, spread_of, versions_text
from torch import nn
from torch.nn import functional

from mnist_dist import cli
from mnist_dist.group import threads
from mnist_dist.launch.group import KEEP_MEMORY
from mnist_dist.machine import allowed_cpus
from mnist_dist.models import CATALOGUE, Network, build_model

HOG = "while True: pass"
WARM_SECONDS = 1.0
"""Of training, left out."""
BEGINS = 1 / 3
"""The share of the time after which the busy program begins."""
START_SECONDS = 120
RESNET_MULTIPLY_ADDS = 37_000_000
"""ResNet-18 at 32x32 pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is trained."""

    model: str
    batch: int
    log_every: int
    size: int = 28
    channels: int = 1
    whole: bool = False
    """The preset `fast`, timed from the command's start to its end."""


WORKS = {
    "small_cnn, batch 64": Work(model="small_cnn", batch=64, log_every=20),
    "small_cnn, batch 256": Work(model="small_cnn", batch=256, log_every=10),
    "fast": Work(model="fast_cnn", batch=128, log_every=50, whole=True),
    "large_cnn, batch 64": Work(model="large_cnn", batch=64, log_every=5),
    "ResNet-18, 32x32, batch 64": Work(model="resnet18", batch=64, log_every=1, size=32, channels=3),
}
CONDITIONS = {"quiet": (0, False), "one busy": (1, False), "two busy": (2, False), "begins": (1, True)}
"""How many programs are busy, and whether they begin in the middle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How threads are set."""

    threads: int | None = None
    """`None`: ours chooses."""
    spins: int | None = None
    plain: bool = False


OURS, PLAIN = "ours", "plain PyTorch"


def settings() -> dict[str, Setting]:
    """List ours, plain PyTorch, and each fixed setting."""
    counts = sorted({1, 2, allowed_cpus()} & set(range(1, allowed_cpus() + 1)))
    fixed = {
        f"{count} thread{'s' * (count > 1)}" + (f", {spins:,} spins" if count > 1 else ""): Setting(
            threads=count, spins=spins
        )
        for count in counts
        for spins in ((threads.SPINS, threads.FEW_SPINS, 0) if count > 1 else (0,))
    }
    return {OURS: Setting(), PLAIN: Setting(plain=True), **fixed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One process, ended."""

    work: str
    condition: str
    setting: str
    round: int
    images_per_second: float


def measure(work: Work, condition: str, setting: Setting, options: argparse.Namespace) -> float:
    """Train in a process of its own, and return its images a second."""
    busy, begins = CONDITIONS[condition]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as hogs:
        run = Path(folder) / "run"
        words = _words(work, setting, run, options)
        spins = setting.spins
        if spins is None and work.model == "resnet18" and not setting.plain:
            spins = threads.FEW_SPINS  # what a rank sets before it imports torch, which this script has done by then
        environment = os.environ | ({} if spins is None else {"GOMP_SPINCOUNT": str(spins)})
        if not begins:
            hogs.enter_context(_hogs(busy))
        began = time.monotonic()
        output = Path(folder) / "output"
        with output.open("w") as file:
            process = subprocess.Popen(words, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        try:
            if work.whole:
                if begins:
                    time.sleep(options.begins_after)
                    hogs.enter_context(_hogs(busy))
                code = process.wait(timeout=600)
                if code:
                    raise SystemExit(f"{shlex.join(map(str, words))} ended with {code}:\n{output.read_text()}")
                return options.whole_images / (time.monotonic() - began)
            _wait_for(run / "metrics.jsonl", process, output)
            if begins:
                time.sleep(WARM_SECONDS + BEGINS * options.seconds)
                hogs.enter_context(_hogs(busy))
                time.sleep((1 - BEGINS) * options.seconds)
            else:
                time.sleep(WARM_SECONDS + options.seconds)
            return _rate(run / "metrics.jsonl", work.log_every * work.batch)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _words(work: Work, setting: Setting, run: Path, options: argparse.Namespace) -> list[str]:
    script = [sys.executable, str(Path(__file__).resolve())]
    if setting.plain:
        return [*script, "plain", json.dumps(asdict(work)), str(run)]
    values: dict[str, object] = {"train.threads": setting.threads or "auto", "data.root": options.data}
    if work.whole:
        command = [sys.executable, "-m", "mnist_dist", "train", "--config", "fast"]
    else:
        command = [sys.executable, "-m", "mnist_dist", "launch", "local", "-n", "1", "--max-restarts", "0", "--"]
        command += [*script, "train"]
        values |= {
            "model.name": "small_cnn" if work.model == "resnet18" else work.model,  # see `become_resnet`
            "train.global_batch": work.batch,
            "train.log_every": work.log_every,
            "train.epochs": 1000,
            "data.image_size": work.size,
            "data.channels": work.channels,
            "optimizer.learning_rate": 1e-3,
        }
    values |= {"train.device": "cpu"}
    command += [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    return [*command, "--run-dir", str(run)]


@contextlib.contextmanager
def _hogs(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", HOG]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait_for(journal: Path, process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait for the first line."""
    deadline = time.monotonic() + START_SECONDS
    while not (journal.exists() and journal.stat().st_size):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"no step was taken:\n{output.read_text()}")
        time.sleep(0.02)


def _rate(journal: Path, images: int) -> float:
    """Divide the images of all windows but those of the first second by their seconds."""
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    seconds = [images / row["images_per_second"] for row in rows if row["kind"] == "step"]
    first, warm = 0, 0.0
    while warm < WARM_SECONDS and first < len(seconds) - 1:
        warm += seconds[first]
        first += 1
    return images * len(seconds[first:]) / sum(seconds[first:])


class ResNet18(nn.Module):
    """torchvision's, for our images."""

    def __init__(self, *, classes: int, channels: int, image_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.network = resnet18(num_classes=classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Score `(B, 3, H, W)` images as `(B, K)` logits."""
        logits: torch.Tensor = self.network(x)
        return logits


def train_as_rank() -> None:
    """Be `mnist-dist train`; at 32 pixels, `small_cnn` is a ResNet-18."""
    if "data.image_size=32" in sys.argv:
        CATALOGUE["small_cnn"] = Network(
            cls="__main__:ResNet18",
            summary="torchvision's",
            smallest=32,
            multiply_adds=lambda channels, size: RESNET_MULTIPLY_ADDS,
        )
    cli.main()


def train_plainly(work: Work, run: Path) -> None:
    """Train on tensors in memory with torch's defaults, and write a journal."""
    shape = {"classes": 10, "channels": work.channels, "image_size": work.size}
    model: nn.Module = ResNet18(**shape) if work.model == "resnet18" else build_model(work.model, **shape)
    pictures = torch.randn(8192, work.channels, work.size, work.size)
    labels = torch.randint(10, (8192,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    run.mkdir()
    with (run / "metrics.jsonl").open("w", buffering=1) as journal:
        while True:
            began = time.perf_counter()
            for _ in range(work.log_every):
                rows = torch.randint(8192, (work.batch,))
                optimizer.zero_grad()
                functional.cross_entropy(model(pictures[rows]), labels[rows]).backward()
                optimizer.step()
            rate = work.log_every * work.batch / (time.perf_counter() - began)
            journal.write(json.dumps({"kind": "step", "images_per_second": rate}) + "\n")


def table(measurements: Sequence[Measurement]) -> str:
    """Write a row for each work and condition: ours, plain PyTorch, each fixed setting, and ours by the best one."""
    names = [name for name in settings() if any(one.setting == name for one in measurements)]
    rows = []
    for work, condition in dict.fromkeys((one.work, one.condition) for one in measurements):
        rates = {
            name: [
                one.images_per_second
                for one in measurements
                if (one.work, one.condition, one.setting) == (work, condition, name)
            ]
            for name in names
        }
        medians = {name: statistics.median(values) for name, values in rates.items() if values}
        best = max((rate for name, rate in medians.items() if name not in (OURS, PLAIN)), default=0)
        cells = [spread_of(rates[name]).to_text(",.0f") if rates[name] else "" for name in names]
        rows.append([work, condition, *cells, f"{medians[OURS] / best:.2f}" if best and OURS in medians else ""])
    return markdown_table(["training, images/s", "machine", *names, "ours / best fixed"], rows)


def main() -> None:
    """Measure in rounds, and write what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Dataset", help="MNIST as an image folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=9.0, help="of each measurement, after a second to warm up")
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--settings", nargs="+", default=list(settings()), choices=list(settings()))
    parser.add_argument("--output", type=Path, help="folder for busy.md and busy.json")
    options = parser.parse_args()
    options.data = str(Path(options.data).resolve())
    options.whole_images, options.begins_after = 36_000, 2.5  # 0.6 epochs of MNIST
    command = shlex.join(["python", "benchmarks/busy.py", *sys.argv[1:]])
    os.environ |= KEEP_MEMORY  # for plain PyTorch as well
    measurements: list[Measurement] = []
    for number in range(1, options.rounds + 1):
        for name in options.works:
            for condition in options.conditions:
                for key in options.settings:
                    setting = settings()[key]
                    if setting.plain and WORKS[name].whole:
                        continue
                    rate = measure(WORKS[name], condition, setting, options)
                    measurements.append(
                        Measurement(work=name, condition=condition, setting=key, round=number, images_per_second=rate)
                    )
                    print(f"round {number}, {name}, {condition}, {key}: {rate:,.0f} images/s", file=sys.stderr)
        if options.output:
            _write(options.output, measurements, command)
    print(table(measurements))


def _write(folder: Path, measurements: Sequence[Measurement], command: str) -> None:
    machine = describe_machine()
    folder.mkdir(parents=True, exist_ok=True)
    rounds = max(one.round for one in measurements)
    notes = (
        f"Median of {rounds} rounds in turns (least to most). {machine_text(machine)}; {versions_text(machine)}. "
        f"`fast` is the whole command: 36,000 images by the seconds from its start to its end."
    )
    text = f"{table(measurements)}\n\n{notes}\n\n    {command}\n"
    (folder / "busy.md").write_text(text, encoding="utf-8")
    record = {"command": command, "machine": machine, "measurements": [asdict(one) for one in measurements]}
    (folder / "busy.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_as_rank()
    elif sys.argv[1:2] == ["plain"]:
        train_plainly(Work(**json.loads(sys.argv[2])), Path(sys.argv[3]))
    else:
        main()
