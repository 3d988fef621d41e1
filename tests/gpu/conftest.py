"""What the tests of a device share. Each runs on the CPU in `make test-all`, and on GPUs in `make test-gpu`.

"one" is one process, "all" one for each GPU where there are several, or two on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from watched import Watched

from mnist_dist.machine import visible_gpus

SECONDS = 300
"""A command may take so long: the first on a machine reads torch and CUDA from its disk, and one compiles."""
MOST_RANKS_IN_EXACT = 4
ROWS = pytest.StashKey[list[tuple[str, ...]]]()
HEADINGS = pytest.StashKey[dict[str, None]]()
COLUMNS = ("training", "processes", "images/s", "host waits a step", "where")


@dataclass(frozen=True)
class Place:
    """A kind of device, and how many processes train on it."""

    device: str
    ranks: int

    @property
    def words(self) -> list[object]:
        return ["--device", self.device, "--processes", self.ranks]

    @property
    def batch(self) -> int:
        """A global batch near 32 that so many ranks share, in a quarter of their pieces too."""
        return 4 * self.ranks * max(1, 8 // self.ranks)

    @property
    def in_exact(self) -> Place:
        """The most of these processes that can train in `exact`."""
        return Place(self.device, min(MOST_RANKS_IN_EXACT, 1 << self.ranks.bit_length() - 1))


def _place(device: str, ranks: str) -> Place:
    if device == "cpu":
        return Place(device, 1 if ranks == "one" else 2)
    return Place(device, 1 if ranks == "one" else visible_gpus())


CPUS = pytest.param(("cpu", "all"), id="cpu-all")
ONE_GPU = pytest.param(("cuda", "one"), id="cuda", marks=pytest.mark.gpu)
ALL_GPUS = pytest.param(("cuda", "all"), id="cuda-all", marks=pytest.mark.gpu(2))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[CPUS, ONE_GPU, ALL_GPUS])
def place(request: pytest.FixtureRequest) -> Place:
    return _place(*request.param)


@pytest.fixture(params=[CPUS, ALL_GPUS])
def several(request: pytest.FixtureRequest) -> Place:
    return _place(*request.param)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Watched]:
    """Train with the real command, once for the same words, and give back the run."""
    found: dict[tuple[object, ...], Watched] = {}

    def train(*words: object) -> Watched:
        if words not in found:
            folder = tmp_path_factory.mktemp("run")
            command = [sys.executable, "-m", "mnist_dist", *map(str, words), "--run", "run"]
            ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
            assert ended.returncode == 0, ended.stderr
            found[words] = Watched(folder / "run")
        return found[words]

    return train


@pytest.fixture
def heading(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Return the heading of the table: the GPUs that were measured."""
    lines = pytestconfig.stash.setdefault(HEADINGS, {})
    return lambda line: lines.setdefault(line)


@pytest.fixture
def report(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Add a row to the table that is printed after the tests."""
    rows = pytestconfig.stash.setdefault(ROWS, [])

    def add(place: Place, training: str, images_per_second: float, waits: Mapping[str, float] | None = None) -> None:
        where = ", ".join(f"{line} {count:g}" for line, count in sorted((waits or {}).items()))
        total = "" if waits is None else f"{sum(waits.values()):g}"
        rows.append((training, f"{place.ranks} x {place.device}", f"{images_per_second:,.0f}", total, where))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was measured."""
    rows = config.stash.get(ROWS, [])
    if rows:
        terminalreporter.section("images/s and host waits")
        for line in [*config.stash.get(HEADINGS, {}), *_aligned([COLUMNS, *rows])]:
            terminalreporter.write_line(line)


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


@pytest.fixture
def script() -> Callable[[str], list[object]]:
    """Return the words that start a script of this folder."""
    return lambda name: [sys.executable, Path(__file__).with_name(name)]
