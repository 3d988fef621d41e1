"""What people add has one place.

A network, an augmentation, a figure, a watcher and a launch target are added to a copy of the package as
docs/architecture.md says, and a run uses them. The number of files that each takes is held here.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[2]

NETWORK = '''"""A linear classifier."""

from torch import Tensor, nn


class Linear(nn.Module):
    """One layer."""

    def __init__(self, *, classes: int, channels: int, image_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(channels * image_size**2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Score `(B, C, H, W)` images as `(B, K)` logits."""
        logits: Tensor = self.layer(x.flatten(1))
        return logits
'''
WATCHER = '''"""Writes the number of each finished epoch to a file."""

from mnist_dist.observe import Observer


class Diary(Observer):
    """A line for each epoch."""

    def __init__(self, path):
        self._path = path

    def epoch(self, report, test):
        with self._path.open("a") as file:
            print(f"epoch {report.epoch}: {test.images} images", file=file)
'''
TARGET = '''"""Renders a job for a made-up scheduler from its recipe."""

from mnist_dist.launch.engines import recipes


def render(words):
    """Return the job file."""
    return (recipes() / "toy" / "train.job").read_text().replace("COMMAND", " ".join(words))
'''
COMMAND = '''

@app.command()
def toy(command: Command) -> None:
    """Print a job for a made-up scheduler."""
    from mnist_dist.launch.toy import render

    print(render(command), end="")
'''


class Copy:
    """A copy of the package that a test changes, and the files that it has changed or added."""

    def __init__(self, root):
        self.root = root
        shutil.copytree(ROOT / "mnist_dist", root / "mnist_dist", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("configs", "launch"):
            shutil.copytree(ROOT / name, root / name)
        self.touched = set()

    def add(self, name, content):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        self.touched.add(name)

    def insert(self, name, before, line):
        path = self.root / name
        text = path.read_text()
        assert text.count(before) == 1, f"{name} has {before!r} {text.count(before)} times"
        path.write_text(text.replace(before, line + before))
        self.touched.add(name)

    def run(self, *words):
        environment = os.environ | {"PYTHONPATH": str(self.root)}
        done = subprocess.run([sys.executable, "-P", "-m", "mnist_dist", *map(str, words)], cwd=self.root, text=True,
                              env=environment, capture_output=True, timeout=200)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def package(tmp_path):
    return Copy(tmp_path)


def test_a_network_an_augmentation_a_figure_and_a_watcher_are_a_few_lines_each(package):
    # A network: its class, and one row of the catalogue.
    package.add("mnist_dist/models/linear.py", NETWORK)
    row = '    "linear": Network(cls="mnist_dist.models.linear:Linear", summary="one layer", smallest=8),\n'
    package.insert("mnist_dist/models/catalogue.py", "}\n\n\ndef build_model(", row)
    assert len(package.touched) == 2

    # An augmentation: its field, and one row with its function.
    package.touched.clear()
    field = "    invert: Number = Field(0.0, ge=0, le=1)\n"
    package.insert("mnist_dist/config/schema.py", "    horizontal_flip: Number", field)
    function = (
        "def invert(pixels, draws, probability):\n"
        "    return torch.where(draws.view(-1, 1, 1, 1) < probability, 255 - pixels, pixels)\n\n\n"
    )
    package.insert("mnist_dist/data/augment.py", "GEOMETRY = (\n", function)
    row = '    Values(field="invert", draws=slice(100, 101), apply=invert),\n'
    package.insert("mnist_dist/data/augment.py", '    Values(field="brightness"', row)
    assert len(package.touched) == 2

    # A figure: one row.
    package.touched.clear()
    row = '    Column(name="test_error", title="error", value=lambda report, test: 1 - test.accuracy),\n'
    package.insert("mnist_dist/observe/columns.py", '    Column(name="images_per_second"', row)
    assert len(package.touched) == 1

    # A watcher: its class, and one line.
    package.touched.clear()
    package.add("mnist_dist/observe/diary.py", WATCHER)
    package.insert("mnist_dist/observe/build.py", "            Journal(run.journal),\n",
                   '            Diary(run.journal.with_name("diary.txt")),\n')  # fmt: skip
    package.insert("mnist_dist/observe/build.py", "from mnist_dist.observe.journal import Journal\n",
                   "from mnist_dist.observe.diary import Diary\n")  # fmt: skip
    assert len(package.touched) == 2

    package.run("train", "--config", "quick", "--epochs", 1, "--model", "linear", "--set", "data.augment.invert=0.5",
                "--device", "cpu", "--run", "run")  # fmt: skip
    run = package.root / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (epoch,) = [line for line in lines if line["kind"] == "epoch"]
    assert epoch["test_error"] == pytest.approx(1 - epoch["test_accuracy"])
    assert (run / "diary.txt").read_text() == "epoch 1: 359 images\n"
    config = (run / "config.yaml").read_text()
    assert "name: linear" in config
    assert "invert: 0.5" in config
    assert "test_error" in _tags(run / "tensorboard")


def test_a_launch_target_is_a_recipe_a_renderer_and_a_command(package):
    package.add("launch/toy/train.job", "#!job\nrun COMMAND\n")
    package.add("mnist_dist/launch/toy.py", TARGET)
    cli = (ROOT / "mnist_dist/cli/launch.py").read_text()
    package.add("mnist_dist/cli/launch.py", cli + COMMAND)
    assert package.run("launch", "toy", "--", "train", "--epochs", 1) == "#!job\nrun train --epochs 1\n"


def _tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag.rpartition("/")[2] for tag in events.Tags()["scalars"]}
