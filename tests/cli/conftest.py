from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the embedded digits with held-out validation images, made by the real command."""
    folder = tmp_path_factory.mktemp("trained")
    words = [
        "train",
        "--epochs",
        "4",
        "--run",
        "runs/digits",
        "--set",
        "data.validation_fraction=0.1",
        "--device",
        "cpu",
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "mnist_dist", *words], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    (folder / "output.txt").write_text(ended.stdout)
    return folder / "runs" / "digits"
