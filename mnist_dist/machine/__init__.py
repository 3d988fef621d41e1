"""The CPUs, GPUs and network of this machine, and processes that end with their parent. Needs no torch."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mnist_dist.errors import ConfigError, StorageError

PR_SET_PDEATHSIG = 1
SIOCGIFADDR = 0x8915
SOMEWHERE = "192.0.2.1"
"""An address that no host has (RFC 5737): the route to it is the default route."""
NVIDIA_SECONDS = 30.0
"""nvidia-smi counts as hung after this time."""
CGROUPS = Path("/sys/fs/cgroup")
"""Where the kernel shows the resource limits of control groups."""


def visible_gpus() -> int:
    """Return how many of the NVIDIA GPUs that nvidia-smi lists a new process would see.

    CUDA_VISIBLE_DEVICES is read as torch reads it. The list ends at the first entry that names no GPU, or that mixes
    numbers and UUIDs. If an entry occurs twice, no GPU is visible. If a GPU is divided (MIG), a process sees one part
    of it and no other GPU.
    """
    gpus = _listed_gpus()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return _count(range(len(gpus)), gpus)
    entries = names.split(",")
    if entries[0].startswith("MIG-"):
        return int(any(part.startswith(entries[0]) for _, parts in gpus for part in parts))
    found: list[int] = []
    for entry in entries:
        if entry.startswith("GPU-") != entries[0].startswith("GPU-"):
            break
        index = _index_of(entry, [name for name, _ in gpus])
        if index is None:
            break
        found.append(index)
    return 0 if len(set(found)) < len(found) else _count(found, gpus)


def _listed_gpus() -> list[tuple[str, list[str]]]:
    """Return the UUID (GPU-...) of each GPU that nvidia-smi lists, with those of its parts (MIG-...)."""
    gpus: list[tuple[str, list[str]]] = []
    for line in _nvidia_smi("-L"):
        name = line.rpartition("(UUID: ")[2].rstrip(") ")
        if line.startswith("GPU "):
            gpus.append((name, []))
        elif line.lstrip().startswith("MIG ") and gpus:
            gpus[-1][1].append(name)
    return gpus


def driver_version() -> str:
    """Return the version of the NVIDIA driver, "unknown" where nvidia-smi does not say."""
    return next(iter(_nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")), "unknown")


def _nvidia_smi(*words: str) -> list[str]:
    """Return the lines that nvidia-smi prints; none where it is absent, or its driver does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        ended = subprocess.run([program, *words], capture_output=True, timeout=NVIDIA_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return ended.stdout.decode(errors="replace").splitlines()


def _index_of(entry: str, names: list[str]) -> int | None:
    """Find the GPU that an entry of CUDA_VISIBLE_DEVICES names, by its number or the beginning of its name."""
    if entry.startswith("GPU-"):
        matching = [index for index, name in enumerate(names) if name.startswith(entry)]
        return matching[0] if len(matching) == 1 else None
    number = re.match(r"\+?([0-9]+)", entry.strip())  # as C's strtoul: `0gpu` is 0
    return int(number[1]) if number and int(number[1]) < len(names) else None


def _count(indices: Iterable[int], gpus: list[tuple[str, list[str]]]) -> int:
    chosen = [gpus[index] for index in indices]
    return 1 if any(parts for _, parts in chosen) else len(chosen)


def allowed_cpus(cgroups: Path = CGROUPS) -> int:
    """Count the CPUs that this process may use: those of its affinity, and no more than its cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cpus, math.floor(cgroup_quota(cgroups) or cpus)))


def asked_threads(environment: Mapping[str, str]) -> int | None:
    """Return the threads that OMP_NUM_THREADS gives a process; None where it holds no number that OpenMP takes."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list is for nested threads
    is_number = first.isascii() and first.isdigit() and len(first) < 10
    return int(first) or None if is_number else None


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
    """Return a function for a new process to call, so that the kernel kills it when this process ends.

    Returns:
        None except on Linux, which has prctl(PR_SET_PDEATHSIG).
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(128 + signal.SIGKILL)

    return in_child


def check_loopback() -> None:
    """Raise if processes of this machine cannot communicate.

    Raises:
        ConfigError: The loopback interface is down, as in a new network namespace.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            probe.connect(("127.0.0.1", 9))  # sends nothing
    except OSError as error:
        raise ConfigError(
            f"The loopback interface (127.0.0.1) of this machine cannot be used ({error.strerror}), and processes "
            f"here need it to communicate: run `ip link set lo up`."
        ) from None


@contextlib.contextmanager
def temporary_folder(prefix: str = "mnist-dist-") -> Iterator[Path]:
    """Create a folder that only this user can read, and remove it at the end of the context.

    Args:
        prefix: What its name begins with.

    Raises:
        StorageError: There is no folder for temporary files in which this user may write.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=os.path.abspath(tempfile.gettempdir()))  # noqa: PTH100
    except OSError:  # its words are a list of all folders that Python has tried
        raise StorageError(
            "No folder for temporary files is writable: set TMPDIR to one that has free space."
        ) from None
    with folder as path:
        yield Path(path)


def route_to(host: str) -> tuple[str, str | None]:
    """Return the address and, on Linux, the interface of this machine on the route to a host.

    A machine's own name is often 127.0.1.1 on that machine; then it is the way out of it that counts.

    Raises:
        OSError: There is no such host, or no route to it.
    """
    address, interface = _way_to(host)
    if address.startswith("127.") and host not in ("localhost", "127.0.0.1"):
        return _way_to(SOMEWHERE)
    return address, interface


def _way_to(host: str) -> tuple[str, str | None]:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    except UnicodeError:  # a label that is empty or too long
        raise OSError(errno.EINVAL, "not a host name") from None
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        own = probe.getsockname()[0].partition("%")[0]
        if sys.platform != "linux":
            return own, None
        names = [name for _, name in socket.if_nameindex()]
        found = _with_ipv6(own) if family == socket.AF_INET6 else None
        return own, found or next((name for name in names if _address_of(probe, name) == own), None)


def _with_ipv6(address: str) -> str | None:
    """Return the interface that has an IPv6 address, from Linux's list."""
    try:
        wanted = socket.inet_pton(socket.AF_INET6, address).hex()
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((line.split()[-1] for line in lines if line.split()[0] == wanted), None)


def _address_of(probe: socket.socket, interface: str) -> str | None:
    import fcntl  # not on Windows

    request = struct.pack("256s", interface.encode()[:15])
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
    except OSError:  # it has no IPv4 address
        return None


def start_helper(ends_with_parent: Callable[[], None] | None) -> None:
    """Set up a process of a pool: it ends with its parent and ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if ends_with_parent is not None:
        ends_with_parent()
