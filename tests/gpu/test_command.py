"""`make test-gpu` itself, on machines that lack what it looks for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LISTING = "GPU 0: NVIDIA H100 (UUID: GPU-11aa0000-0000-0000-0000-000000000000)"
WITHOUT_EXTRAS = "import sys\nfor name in ('psutil', 'lightning'):\n    sys.modules[name] = None\n"
"""What only the extra `benchmark` brings cannot be imported."""


@pytest.mark.parametrize(
    ("gpus", "words", "reason"),
    [
        (0, [], "needs a CUDA GPU, and none is visible"),
        (1, ["-k", "cuda-all"], "needs 2 CUDA GPUs, and 1 is visible"),
    ],
)
def test_each_test_says_which_gpus_it_lacks_and_needs_no_other_extra(tmp_path, gpus, words, reason):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_EXTRAS)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{LISTING if gpus else 'No devices were found'}'\n")
    program.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", *words],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout
    skipped = re.findall(r"SKIPPED \[(\d+)\] tests/\S+ (.*)", ended.stdout)
    assert sum(int(count) for count, _ in skipped) >= 10
    assert reason in {why.removesuffix(" (nvidia-smi -L)") for _, why in skipped}
    assert not re.search(r"\d (passed|failed|error)", ended.stdout)
