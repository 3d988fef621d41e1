"""Choose the device and the precision of a run, each with its reason."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Literal

import torch

from mnist_dist.config.schema import Device, Precision
from mnist_dist.errors import ConfigError
from mnist_dist.machine import driver_version, visible_gpus

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Something that was decided at the start, and why."""

    value: str
    reason: str


def choose_device(wanted: Device, local_rank: int = 0) -> Choice:
    """Return the kind of device to use.

    Args:
        wanted: What the user asks for.
        local_rank: This process's number on its machine.

    Raises:
        ConfigError: A GPU was asked for by name and there is none, or there are GPUs that torch cannot use.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "cuda" and not has_cuda:
        _refuse_unusable_gpus()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: no CUDA GPU is visible here. Use --device auto or cpu, or see nvidia-smi.")
    if wanted == "mps" and not has_mps:
        raise ConfigError("--device mps: there is no Apple GPU here. Use --device auto or cpu.")
    if wanted == "cpu":
        return Choice(value="cpu", reason="as asked")
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        if wanted != "auto":
            raise ConfigError(f"--device is {wanted}, but ACCELERATE_USE_CPU is set: give only one of them.")
        return Choice(value="cpu", reason="from ACCELERATE_USE_CPU")
    if wanted == "cuda" or (wanted == "auto" and has_cuda):
        return Choice(value="cuda", reason=torch.cuda.get_device_name(gpu_of(local_rank)))
    if wanted == "mps" or has_mps:
        return Choice(value="mps", reason="Apple GPU")
    _refuse_unusable_gpus()
    return Choice(value="cpu", reason="no GPU found")


def gpu_of(local_rank: int) -> int:
    """Return the index of a process's GPU, which Accelerate takes too: its number, among the GPUs that it sees.

    Where each process is shown only its own GPU (Slurm's `--gpus-per-task`), that is 0 on all of them.
    """
    return local_rank % torch.cuda.device_count()


def choose_precision(wanted: Precision, device: str, *, native_bf16: bool | None = None) -> Choice:
    """Return the precision: under `auto` a pure function of the hardware.

    Args:
        wanted: What the user asks for.
        device: The kind of device.
        native_bf16: Whether the GPUs of all ranks compute bf16 natively. `None`: ask the current GPU.

    Raises:
        ConfigError: fp16 without CUDA, bf16 on a GPU that has no form of it, or a contradiction with
            ACCELERATE_MIXED_PRECISION.
    """
    reason = "as asked"
    ours: dict[str, Dtype] = {"fp16": "fp16", "bf16": "bf16", "no": "fp32", "": "fp32"}
    variable = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if variable not in ours:
        raise ConfigError(f"ACCELERATE_MIXED_PRECISION is {variable!r}, which mnist-dist does not support: unset it.")
    if variable not in ("", "no"):
        if wanted not in ("auto", ours[variable]):
            raise ConfigError(
                f"train.precision is {wanted}, but ACCELERATE_MIXED_PRECISION is {variable}: give only one of them."
            )
        wanted, reason = ours[variable], "from ACCELERATE_MIXED_PRECISION"
    if wanted == "fp16" and device != "cuda":
        raise ConfigError(f"fp16 needs a CUDA GPU, and this run is on {device}: use --precision bf16, fp32 or auto.")
    if wanted == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "bf16 needs a GPU that supports it, and this one does not: use --precision fp16, fp32 or auto."
        )
    if wanted != "auto":
        return Choice(value=wanted, reason=reason)
    if device != "cuda":
        return Choice(value="fp32", reason=f"the safe choice on {device}")
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice(value="fp16", reason="this GPU has no native bf16")
    if native_bf16 is False:
        return Choice(value="fp16", reason="another rank's GPU has no native bf16")
    return Choice(value="bf16", reason="this GPU computes it natively")


def _refuse_unusable_gpus() -> None:
    """Raise if there is a GPU that torch should support and cannot use, rather than train on the CPU.

    Raises:
        ConfigError: There is one; the usual cause is a driver older than this build of torch needs.
    """
    gpus = visible_gpus() if torch.version.cuda else 0
    if not gpus:
        return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        words = "it gives no reason"
    except (RuntimeError, AssertionError) as error:
        words = str(error).partition("\n")[0].partition(". ")[0]
    listed, them = ("1 GPU", "it") if gpus == 1 else (f"{gpus} GPUs", "them")
    raise ConfigError(
        f"nvidia-smi lists {listed} with driver {driver_version()}, and torch {torch.__version__}, built for CUDA "
        f"{torch.version.cuda}, cannot use {them}: {words}. "
        f"Update the driver, install a build of torch for this driver (https://pytorch.org/get-started/locally), or "
        f"use --device cpu."
    )


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator from which a device draws dropout masks."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


def refuse_without_compiler(device: str) -> None:
    """Raise if `torch.compile` lacks what it needs on a device.

    Raises:
        ConfigError: It writes C++ for the CPU, and there is no compiler for that.
    """
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    if device == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise ConfigError(
            "train.compile needs a C++ compiler for the CPU, and there is none: install g++ (or name yours in the "
            "environment variable CXX), or leave train.compile out."
        )
