"""Join the process group that the environment describes, and leave it."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import itertools
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

import accelerate.state
import torch
import torch.distributed
import torch.distributed.nn  # its functions' defaults would keep the group that exists as DDP first imports it
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from mnist_dist import errors
from mnist_dist.config.schema import Device, Precision
from mnist_dist.errors import ConfigError, memory
from mnist_dist.group import foreign, signals
from mnist_dist.group.place import PLACE, Worker, group_folder_of, timeout_of, worker_of
from mnist_dist.machine import route_to
from mnist_dist.runtime import cards
from mnist_dist.runtime.device import choose_device, choose_precision, gpu_of
from mnist_dist.runtime.rank import Runtime, replaced
from mnist_dist.runtime.tf32 import without_tf32

_distributed: Any = torch.distributed
"""Typed as Any: its type stubs lack the stores."""
_store: Any = None
"""The store that ranks join through. One per process, because an address can serve a store only once."""
_joins = itertools.count()
"""Counts the groups that this process has joined."""
_joined: Any = None
"""The current group. A process stays in it if its run failed."""
_left: list[Any] = []
"""The groups that this process has left."""


def has_backend(name: Literal["gloo", "nccl"]) -> bool:
    """Return whether this build of torch has that backend."""
    return torch.distributed.is_available() and torch.distributed.is_backend_available(name)


@contextlib.contextmanager
def start(
    *,
    device: Device,
    precision: Precision,
    threads: int | None,
    deterministic: bool = False,
) -> Iterator[Runtime]:
    """Join the process group that the environment describes, or run alone if it describes none.

    Every rank. RANK, LOCAL_RANK and WORLD_SIZE are read by Accelerate, as torchrun and others set them.

    Args:
        device: `auto` takes CUDA, else MPS, else the CPU.
        precision: `auto` takes what suits the device.
        threads: CPU threads of this process. None keeps the number that the environment set.
        deterministic: Use only CUDA kernels that give the same bits every time.

    Raises:
        ConfigError: The device or the precision is not available here, an Accelerate variable contradicts our
            settings, the ranks cannot reach each other, or two of them share a GPU.
        WorkerError: The other ranks did not join in time.
    """
    worker = worker_of(os.environ) or Worker(rank=0, ranks=1)
    ranks = worker.ranks
    device_choice = choose_device(device, worker.local_rank)
    if device_choice.value == "cuda":
        torch.cuda.set_device(gpu_of(worker.local_rank))
    precision_choice = choose_precision(precision, device_choice.value)
    foreign.refuse(os.environ)
    if device_choice.value == "mps" and ranks > 1:
        raise ConfigError(f"MPS serves one process, not {ranks}: use --processes 1 or --device cpu.")
    former_threads = torch.get_num_threads()
    shown: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_tf32())
        if deterministic and device_choice.value == "cuda":
            stack.enter_context(_deterministic_cuda())
        if ranks > 1:
            stack.enter_context(signals.heard_in_native_code())
            _join_group(device_choice.value, worker)
            # A rank that fails alone must exit with its message. Leaving would deadlock with NCCL's kernels.
            stack.push(lambda failure, *_: None if failure else _leave_group())
            if device_choice.value == "cuda":
                native_bf16 = cards.settle(cards.Card.current(worker.local_rank), ranks)
                precision_choice = choose_precision(precision, "cuda", native_bf16=native_bf16)
                shown = {"LOCAL_RANK": str(gpu_of(worker.local_rank))}  # Accelerate gives it to DDP as the GPU's index
        else:
            stack.enter_context(_without(PLACE))  # one process needs neither group nor DDP
        stack.enter_context(_without(foreign.HIDDEN))  # it looks again later
        # It would start nvidia-smi on every rank, and stop at cards for which `settle` has set the variables.
        with _with(shown), replaced(accelerate.state, "check_cuda_p2p_ib_support", lambda: True):
            accelerator = Accelerator(
                cpu=device_choice.value == "cpu",
                mixed_precision="no" if precision_choice.value == "fp32" else precision_choice.value,
                kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            )
        assert accelerator.device.type == device_choice.value
        torch.set_num_threads(threads or former_threads)
        runtime = Runtime(accelerator, device_choice, precision_choice, torch.get_num_threads())
        try:
            yield runtime
        except RuntimeError as error:
            if runtime.ranks > 1 and _is_lost_peer(error):
                raise errors.WorkerError(
                    f"Rank {runtime.rank} lost the connection to another rank: see that rank's message."
                ) from error
            raise
        finally:
            runtime.close()
            torch.set_num_threads(former_threads)


@contextlib.contextmanager
def _deterministic_cuda() -> Iterator[None]:
    """Make CUDA compute the same bits every time, at some cost in speed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    former = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # it costs a kernel for each new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = fills
        torch.backends.cudnn.benchmark = former


@contextlib.contextmanager
def _without(patterns: tuple[str, ...]) -> Iterator[None]:
    """Hide environment variables from Accelerate for a while."""
    hidden = {name: os.environ.pop(name) for name in foreign.matching(os.environ, patterns)}
    try:
        yield
    finally:
        os.environ |= hidden


@contextlib.contextmanager
def _with(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    former = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _leave_group() -> None:
    """Leave this process's group, if it is in one. Waits until the devices have finished their reductions."""
    global _joined
    if _joined is not None and torch.distributed.is_initialized():
        _left.append(_joined)
        torch.distributed.destroy_process_group()
    _joined = None


def _end_threads() -> None:
    """Wait for the threads of the groups that this process has left.

    A thread of gloo that lets go of a tensor while Python ends aborts the process. A group's threads end with its last
    reference, which is ours: torch drops it without the GIL, for which such a thread may be waiting.
    """
    if _left:
        gc.collect()  # DDP is part of cycles
        _left.clear()


@atexit.register
def _end() -> None:
    """Leave the group of a run that failed in a program of the user's; not NCCL's, which could hang."""
    if torch.distributed.is_initialized() and "nccl" not in torch.distributed.get_backend_config():
        _leave_group()
    _end_threads()


def _join_group(device: str, worker: Worker) -> None:
    """Meet the other ranks; Accelerate takes the group as it finds it."""
    global _joined, _store
    _leave_group()
    _end_threads()
    seconds = timeout_of(os.environ)
    timeout = datetime.timedelta(seconds=seconds)
    folder = group_folder_of(os.environ)
    if folder is None:
        with contextlib.suppress(OSError):
            _, interface = route_to(os.environ["MASTER_ADDR"])
            _choose_interface(interface, worker)
    try:
        if _store is not None:
            pass
        elif folder is not None:
            # No URI: torch does not decode one. As bytes, since a path need not be UTF-8.
            _store = _distributed.FileStore(os.fsencode(folder.rendezvous), worker.ranks)
        else:
            meeting = _distributed.rendezvous("env://", worker.rank, worker.ranks, timeout=timeout)
            _store, _, _ = next(meeting)
        _store.set_timeout(timeout)
        join = next(_joins)
        compare_devices(_distributed.PrefixStore(f"device-{join}", _store), worker.rank, device)
        torch.distributed.init_process_group(
            "cuda:nccl,cpu:gloo" if device == "cuda" else "gloo",
            store=_distributed.PrefixStore(f"group-{join}", _store),
            rank=worker.rank,
            world_size=worker.ranks,
            timeout=timeout,
        )
        _joined = torch.distributed.group.WORLD
    except ValueError as error:  # of NCCL
        raise ConfigError(
            f"Rank {worker.rank} of {worker.ranks} cannot use NCCL: {error} Use --device cpu, or see nvidia-smi."
        ) from error
    except RuntimeError as error:
        words = re.sub(r"^\[[^]]*\] ", "", str(error).partition("\n")[0])
        if "timed out" in words.lower() or "timeout" in words.lower():
            raise errors.WorkerError(
                f"Rank {worker.rank} waited {seconds:g} s, but not all {worker.ranks} ranks joined: see their messages."
            ) from error
        raise ConfigError(
            f"Rank {worker.rank} of {worker.ranks} cannot reach the other ranks: {words}. Check MASTER_ADDR, "
            f"MASTER_PORT and GLOO_SOCKET_IFNAME; `mnist-dist doctor` tries the interfaces of this machine."
        ) from error


def compare_devices(store: Any, rank: int, device: str) -> None:
    """Check that a rank computes on the kind of device that rank 0 computes on: other ranks' collectives would hang.

    Args:
        store: Where the ranks of this join meet.
        rank: This rank.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: Rank 0 has another kind.
    """
    if rank == 0:
        store.set("device", device)
    elif (first := store.get("device").decode()) != device:
        raise ConfigError(
            f"Rank {rank} computes on {device} and rank 0 on {first}: all ranks need the same kind of device. Set "
            f"--device cpu or --device cuda for all, and see `mnist-dist doctor` on each machine."
        )


def _choose_interface(interface: str | None, worker: Worker) -> None:
    """Set the interface that leads to rank 0 for gloo, and on several machines for NCCL; none if unknown.

    gloo would take what the host's name resolves to, often 127.0.1.1, and NCCL the first that is not lo or docker.
    What is set already stays as it is.
    """
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if worker.local_ranks < worker.ranks:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without `=`, eth1 is eth10 too


def _is_lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank is gone."""
    of_a_collective = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    return of_a_collective and memory.refusal_of(error) is None
