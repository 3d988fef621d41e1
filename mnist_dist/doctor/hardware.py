"""Checks of this machine's devices, with torch."""

from __future__ import annotations

import os
import warnings

import torch

from mnist_dist.doctor.finding import Finding, first_line, gibibytes
from mnist_dist.doctor.system import memory
from mnist_dist.errors import ConfigError
from mnist_dist.group import foreign
from mnist_dist.machine import visible_gpus
from mnist_dist.runtime import has_backend
from mnist_dist.runtime.device import choose_device, choose_precision

NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Capabilities of x86 and ARM processors; each computes products of bf16 itself."""
LEAST_FREE = 0.5
"""Another program uses a GPU with a smaller share of free memory."""


def usable_gpus() -> int:
    """Start CUDA, and return the number of GPUs that it shows to this process.

    Before CUDA has started, torch counts with NVML, which lists a GPU that is divided (MIG) and each other one; CUDA
    shows a process one part of it, and nothing else.

    Raises:
        RuntimeError: There are GPUs, and CUDA cannot start.
    """
    if not torch.cuda.is_available():
        return 0
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.device_count()


def cuda() -> Finding:
    """Compare the GPUs that the driver shows with those that torch can use."""
    built = torch.version.cuda or torch.version.hip
    shown = visible_gpus()
    if built is None:
        found = "this build of torch is without CUDA"
        if shown == 0:
            return Finding(check="CUDA", state="ok", found=f"{found}; no NVIDIA GPU here")
        advice = "Install a build that can use them: see https://pytorch.org/get-started/locally."
        return Finding(check="CUDA", state="warning", found=f"{found}, with {_gpus(shown)} here", advice=advice)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = usable_gpus()
    if usable >= shown:
        return Finding(check="CUDA", state="ok", found=f"{built}, {_gpus(usable)}")
    reason = f" ({first_line(caught[0].message)})" if caught and isinstance(caught[0].message, Exception) else ""
    return Finding(
        check="CUDA",
        state="problem",
        found=f"{built}, and torch can use {usable} of {_gpus(shown)}{reason}",
        advice="Look at nvidia-smi and CUDA_VISIBLE_DEVICES; a driver may be too old for this build of torch.",
    )


def backends() -> list[Finding]:
    """Check that this build of torch has the libraries for communication."""
    nccl, gloo, gpus = has_backend("nccl"), has_backend("gloo"), usable_gpus()
    version = ".".join(map(str, _nccl_version())) if nccl else "not in this build of torch"
    advice = "Another build of torch is needed: see https://pytorch.org/get-started/locally."
    return [
        Finding(check="NCCL", state="ok", found=version if gpus else f"{version}; not needed without GPUs")
        if nccl or gpus < 2
        else Finding(check="NCCL", state="problem", found=f"{version}, with {_gpus(gpus)}", advice=advice),
        Finding(check="gloo", state="ok", found="in this build of torch")
        if gloo
        else Finding(check="gloo", state="problem", found="not in this build of torch", advice=advice),
    ]


def processor() -> Finding:
    """Describe the CPU as a device."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # newer torch
    found = [name for name in NATIVE_BF16 if capabilities.get(name)]
    bf16 = f"bf16 native ({', '.join(found)})" if found else "bf16 emulated" if capabilities else "bf16 unknown"
    size = memory()
    parts = [
        str(capabilities.get("cpu_name", "")),
        torch.backends.cpu.get_cpu_capability(),
        "" if size is None else f"{gibibytes(size)} of memory",
        bf16,
    ]
    return Finding(check="cpu", state="ok", found=", ".join(filter(None, parts)))


def graphics() -> list[Finding]:
    """Describe each GPU, after a product of two small matrices on it."""
    findings = [_cuda_device(index) for index in range(usable_gpus())]
    if torch.backends.mps.is_available():
        bf16 = "bf16" if torch.backends.mps.is_macos_or_newer(14, 0) else "no bf16 before macOS 14"
        size = gibibytes(torch.mps.recommended_max_memory())
        findings.append(Finding(check="mps", state="ok", found=f"Apple GPU, up to {size}, {bf16}"))
    return findings


def train_choice() -> Finding:
    """Call the functions by which `train` chooses device and precision."""
    try:
        device = choose_device("auto")
        precision = choose_precision("auto", device.value)
        foreign.refuse(os.environ)
    except ConfigError as error:
        advice = "`train` stops with this message; follow it."
        return Finding(check="train takes", state="problem", found=str(error), advice=advice)
    found = f"{device.value} ({device.reason}), {precision.value} ({precision.reason})"
    return Finding(check="train takes", state="ok", found=found)


def _cuda_device(index: int) -> Finding:
    name = f"cuda:{index}"
    try:
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        square = torch.ones(8, 8, device=name)
        (square @ square).sum().item()
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # of the driver or a missing kernel; a full memory is one too
        advice = "This GPU cannot be used: look at nvidia-smi, or leave it out with CUDA_VISIBLE_DEVICES."
        return Finding(check=name, state="problem", found=first_line(error), advice=advice)
    bf16 = "bf16 native" if native else "bf16 emulated (`auto` takes fp16)"
    found = f"{properties.name}, {gibibytes(free)} free of {gibibytes(total)}, {bf16}"
    if free >= LEAST_FREE * total:
        return Finding(check=name, state="ok", found=found)
    advice = "Another program holds much of its memory: see nvidia-smi."
    return Finding(check=name, state="warning", found=found, advice=advice)


def _nccl_version() -> tuple[int | str, ...]:
    version: tuple[int | str, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return version


def _gpus(count: int) -> str:
    return f"{count} GPU" if count == 1 else f"{count} GPUs"
