"""What this machine offers, and processes that end with the one that started them; without torch."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PR_SET_PDEATHSIG = 1
SIOCGIFADDR = 0x8915
SOMEWHERE = "192.0.2.1"
"""An address of nobody (RFC 5737), to which only the way out leads."""
CGROUPS = Path("/sys/fs/cgroup")
"""Where the kernel shows the limits of this process's group."""


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


def allowed_cpus(cgroups: Path = CGROUPS) -> int:
    """Count the CPUs that this process may use: those of its affinity, and no more than its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, math.floor(cgroup_quota(cgroups) or cpus)))


def cgroup_quota(cgroups: Path = CGROUPS) -> float | None:
    """Read the CPU quota of the cgroup, version 2 or 1, in CPUs; None where there is none."""
    try:
        if (cgroups / "cpu.max").exists():
            quota, period = (cgroups / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = ((cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None  # -1: none, in version 1
    except (OSError, ValueError):  # absent, or "max"
        return None


def die_with_parent() -> Callable[[], None] | None:
    """Make what a new process must call so that the kernel kills it when this one ends, however it ends.

    Returns:
        None where the kernel can't: this is Linux's prctl(PR_SET_PDEATHSIG).
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(128 + signal.SIGKILL)

    return in_child


def route_to(host: str) -> tuple[str, str | None]:
    """Find the address and, on Linux, the interface with which this machine speaks to others, of which one is a host.

    A machine's own name is often 127.0.1.1 on that machine; then it is the way out of it that counts.

    Raises:
        OSError: There is no such host, or no way to it.
    """
    address, interface = _way_to(host)
    if address.startswith("127.") and host not in ("localhost", "127.0.0.1"):
        return _way_to(SOMEWHERE)
    return address, interface


def _way_to(host: str) -> tuple[str, str | None]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address = probe.getsockname()[0]
        names = [name for _, name in socket.if_nameindex()] if sys.platform == "linux" else []
        return address, next((name for name in names if _address_of(probe, name) == address), None)


def _address_of(probe: socket.socket, interface: str) -> str | None:
    import fcntl  # not on Windows

    request = struct.pack("256s", interface.encode()[:15])
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
    except OSError:  # it has no IPv4 address
        return None


def start_helper(ends_with_parent: Callable[[], None] | None) -> None:
    """Prepare a helper of a process pool: it ends with its parent, and leaves signals to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if ends_with_parent is not None:
        ends_with_parent()
