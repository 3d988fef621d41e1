from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Machines, Slurm
from watched import Watched

TRAIN = ["train", "--epochs", "2", "--set", "train.reduction=exact", "--set", "train.log_every=5",
         "--set", "model.name=large_cnn", "--set", "checkpoint.every_steps=20"]  # fmt: skip


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two nodes of a real Slurm."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Debian's packages slurm-wlm and munge; missing: {', '.join(missing) or 'root'}")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """Two machines without a common disk."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and Debian's package iproute2")
    pair = Machines(tmp_path)
    try:
        pair.connect()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr}")
    yield pair
    pair.disconnect()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The bits of the local run, on one process, to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "mnist_dist", *TRAIN, "--run", "run"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    return Watched(folder / "run").bits()


@pytest.fixture
def run(tmp_path: Path) -> Watched:
    """The run of a test."""
    return Watched(tmp_path / "run")
