"""What the tests share: tiny image folders, the real command, and groups of real processes."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from watched import Watched

from mnist_dist.machine import visible_gpus

DEADLINE = 120
OWNER = f"TESTED_BY={os.getpid()}"
"""Marks the processes of this session of tests, through their environment."""
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


os.environ |= [OWNER.split("=")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all unit tests as quick, so that `make test` runs them, and skip tests that lack their GPUs."""
    for item in items:
        if "unit" in item.path.parts:
            item.add_marker("quick")
        for marker in item.iter_markers("gpu"):
            needed = marker.args[0] if marker.args else 1
            if _gpus() < needed:
                there = "none is" if _gpus() == 0 else f"{_gpus()} is" if _gpus() == 1 else f"{_gpus()} are"
                wanted = "a CUDA GPU" if needed == 1 else f"{needed} CUDA GPUs"
                item.add_marker(pytest.mark.skip(f"needs {wanted}, and {there} visible (nvidia-smi -L)"))


@functools.cache
def _gpus() -> int:
    return visible_gpus()


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self):
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep launcher variables out, and caches and colours inside the test."""
    for name in [n for n in os.environ if n in LAUNCH_VARIABLES or n.startswith(("ACCELERATE_", "MNIST_DIST_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(autouse=True)
def _no_process_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process of this program running."""
    before = _own_processes()
    yield
    deadline = time.monotonic() + 5
    while (left := _own_processes() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"left running: {left}"


def _own_processes() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            ours = b"mnist_dist" in words and OWNER.encode() in (folder / "environ").read_bytes().split(b"\0")
            if ours and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Outcome]:
    """Run the real command in an empty folder and give back how it ended."""

    def run(*words: object, cwd: Path = tmp_path, timeout: float = DEADLINE, **environment: str) -> Outcome:
        ended = subprocess.run(
            [sys.executable, "-m", "mnist_dist", *map(str, words)],
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return Outcome(ended.returncode, ended.stdout, ended.stderr)

    return run


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the real command and leave it running; it is killed when the test ends."""
    running: list[subprocess.Popen[str]] = []

    def start(*words: object, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mnist_dist", *map(str, words)],
            cwd=tmp_path,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture
def ranks_of() -> Callable[[subprocess.Popen[str]], list[int]]:
    """Find the ranks that a launcher has started, in their order."""
    return lambda launcher: [
        int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ]


@pytest.fixture
def watched(tmp_path: Path) -> Callable[[str], Watched]:
    return lambda name: Watched(tmp_path / name)


@pytest.fixture
def kill_and_resume(
    started: Callable[..., subprocess.Popen[str]], ranks_of: Callable[[subprocess.Popen[str]], list[int]]
) -> Callable[..., tuple[int, int]]:
    """Run to the end through many kills; gives how many hit, and how many of them hit a checkpoint being written."""

    def run(
        run: Watched, first_words: list[object], *, counts: tuple[int, ...], kills: int, seed: int
    ) -> tuple[int, int]:
        draw = random.Random(seed)
        hits = in_write = attempt = 0
        while True:
            words = ["resume", run.path] if (run.path / "config.yaml").exists() else [*first_words, "--run", run.path]
            words += ["--processes", draw.choice(counts), "--max-restarts", 0]
            process = started(*words, OMP_NUM_THREADS="1")
            attempt += 1
            assert attempt < 3 * kills + 10
            if hits < kills:
                before = run.newest or 0
                deadline = time.monotonic() + 60
                # Wait for real progress, then strike after a moment drawn at random: in a step, a write, an evaluation.
                while process.poll() is None and (run.newest or 0) <= before:
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
                time.sleep(draw.uniform(0, 0.1))
                victims = [process.pid, *ranks_of(process)] if process.poll() is None else []
                if victims:
                    os.kill(draw.choice(victims), signal.SIGKILL)
                    process.communicate(timeout=60)
                    if process.returncode == 0:  # it was at its end already
                        return hits, in_write
                    assert process.returncode in (7, -signal.SIGKILL)
                    in_write += bool(list(run.path.glob("checkpoints/writing-*")))
                    hits += 1
                    continue
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            return hits, in_write

    return run


@pytest.fixture
def folder_of() -> Callable[..., Path]:
    """Make an image folder of bars: the class is the row or column at which a bright bar lies."""

    def make(root: Path, *, classes: int = 3, train: int = 20, test: int = 7, val: int = 0, size: int = 28) -> Path:
        generator = np.random.default_rng(0)
        for split, count in (("train", train), ("test", test), ("val", val)):
            for label in range(classes) if count else ():
                folder = root / split / f"class-{label}"
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = generator.integers(0, 60, (size, size), dtype=np.uint8)
                    start = 2 + label * (size - 4) // classes
                    pixels[start : start + 4] += 180
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        return root

    return make


@pytest.fixture(scope="session")
def mnist_idx() -> Path:
    """The folder with MNIST's four files; skips where there is none."""
    folder = Path(os.environ.get("MNIST_DIST_TEST_MNIST", Path(__file__).parents[2] / "shared" / "data" / "mnist"))
    if not folder.is_dir():
        pytest.skip(f"needs MNIST's four IDX files: set MNIST_DIST_TEST_MNIST (looked in {folder})")
    return folder


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
