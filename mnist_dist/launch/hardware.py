"""What this machine offers, told without torch."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path


def visible_gpus() -> int:
    """Count the NVIDIA GPUs that a process started here would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        indices = [index.strip() for index in visible.split(",")]
        return len(indices[: indices.index("-1")] if "-1" in indices else [index for index in indices if index])
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listing = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def allowed_cpus() -> int:
    """Count the CPUs that this process may use: those of its affinity, and no more than its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, math.floor(_cgroup_quota() or cpus)))


def _cgroup_quota() -> float | None:
    """Read the CPU quota of cgroup v2, in CPUs."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)
