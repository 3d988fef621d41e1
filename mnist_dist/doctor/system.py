"""Checks of the operating system: CPUs, shared memory, open files, network. Without torch."""

from __future__ import annotations

import ipaddress
import os
import platform
import shutil
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mnist_dist import __version__
from mnist_dist.doctor.finding import Finding, gibibytes
from mnist_dist.machine import CGROUPS, allowed_cpus, cgroup_quota

PACKAGES = ("accelerate", "torchvision", "numpy", "safetensors")
LEAST_SHARED_MEMORY = 256 * 2**20
"""NCCL takes tens of MiB of it for each pair of GPUs; Docker grants 64 MiB in all unless told otherwise."""
LEAST_OPEN_FILES = 1024
"""What Linux grants by default. macOS grants 256."""


def python() -> Finding:
    """Report the interpreter and the system."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    return Finding(check="Python", state="ok", found=found)


def packages(names: tuple[str, ...] = PACKAGES) -> Finding:
    """Report the versions of the packages that a run needs, without torch, which has its own check."""
    versions, missing = [], []
    for name in names:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(
            check="packages",
            state="problem",
            found=f"not installed: {', '.join(missing)}",
            advice=f"pip install {' '.join(missing)}",
        )
    return Finding(check="packages", state="ok", found=", ".join([f"mnist-dist {__version__}", *versions]))


def cpus(cgroups: Path = CGROUPS) -> Finding:
    """Compare the CPUs that this process may use with all CPUs.

    Args:
        cgroups: Where the kernel shows the limits of this process's group.
    """
    cores, quota = os.cpu_count() or 1, cgroup_quota(cgroups)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    limit = "no cgroup quota" if quota is None else f"cgroup quota {quota:g} CPUs"
    found = f"{affinity} of {cores} cores allowed by affinity, {limit}"
    if quota is None or quota >= affinity:
        return Finding(check="CPUs", state="ok", found=found)
    threads = allowed_cpus(cgroups)
    advice = f"Programs that count cores are throttled: export OMP_NUM_THREADS={threads}, or raise the quota."
    return Finding(check="CPUs", state="warning", found=found, advice=advice)


def shared_memory(folder: Path = Path("/dev/shm"), least: int = LEAST_SHARED_MEMORY) -> Finding:
    """Check the shared memory through which GPUs of one machine exchange gradients.

    Args:
        folder: Where it is mounted.
        least: Bytes that should be free.
    """
    if not folder.is_dir():
        return Finding(check=str(folder), state="ok", found="none on this system, and none needed")
    usage = shutil.disk_usage(folder)
    found = f"{gibibytes(usage.free)} free of {gibibytes(usage.total)}"
    if usage.free >= least:
        return Finding(check=str(folder), state="ok", found=found)
    advice = "Too little for NCCL between several GPUs: `docker run --shm-size=1g`, or remove what fills it."
    return Finding(check=str(folder), state="warning", found=found, advice=advice)


def open_files(least: int = LEAST_OPEN_FILES) -> Finding:
    """Check the number of files that a process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return Finding(check="open files", state="ok", found="no such limit on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = {limit: f"{limit:,}" for limit in (soft, hard)} | {resource.RLIM_INFINITY: "unlimited"}
    found = f"limit {words[soft]} (at most {words[hard]})"
    if soft == resource.RLIM_INFINITY or soft >= least:
        return Finding(check="open files", state="ok", found=found)
    advice = f"Low for sockets and memory-mapped files: `ulimit -n {4 * least}` before the run."
    return Finding(check="open files", state="warning", found=found, advice=advice)


def host_name(name: str | None = None) -> Finding:
    """Resolve this machine's own name, as torchrun, Slurm's recipes and gloo do.

    Args:
        name: Another machine's name.
    """
    name = name or socket.gethostname()
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        advice = f"Add `127.0.0.1 {name}` to /etc/hosts; `mnist-dist train` on one machine works without."
        return Finding(check="host name", state="warning", found=f"{name} does not resolve ({reason})", advice=advice)
    found = f"{name} is {', '.join(sorted(addresses))}"
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):  # fe80::1%eth0
        found += ", for this machine alone"
    return Finding(check="host name", state="ok", found=found)


def loopback_port(address: str = "127.0.0.1") -> Finding:
    """Open a free TCP port on this machine, and connect to it.

    Args:
        address: The loopback interface's.
    """
    try:
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection((address, port), timeout=5).close()
    except OSError as error:
        advice = "Processes need it to meet: look for a firewall or sandbox, or `ip link set lo up`."
        return Finding(check="TCP port", state="problem", found=f"{address}: {error}", advice=advice)
    return Finding(check="TCP port", state="ok", found=f"{address}:{port} was free and takes connections")


def memory() -> int | None:
    """Return this machine's memory in bytes, or its cgroup's limit if that is smaller; `None` if unknown."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups v2 and v1
        try:
            total = min(total, int((CGROUPS / file).read_text(encoding="ascii")))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return total
