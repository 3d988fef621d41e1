"""What a run computes on, and in which arithmetic: decided once, with the reason."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import Literal

import torch

from mnist_dist.config.schema import Device, Precision
from mnist_dist.errors import ConfigError

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Something that was decided at the start, and why."""

    value: str
    reason: str


def choose_device(wanted: Device, local_ranks: int = 1) -> Choice:
    """Decide on the kind of device.

    Args:
        wanted: What the user asks for.
        local_ranks: Processes on this machine, each of which needs a GPU of its own.

    Raises:
        ConfigError: A GPU was asked for by name and there is none, or fewer than this machine's processes.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
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
        _refuse_sharing(torch.cuda.device_count(), local_ranks)
        return Choice(value="cuda", reason=torch.cuda.get_device_name())
    if wanted == "mps" or has_mps:
        return Choice(value="mps", reason="Apple GPU")
    return Choice(value="cpu", reason="no GPU found")


def choose_precision(wanted: Precision, device: str) -> Choice:
    """Decide on the arithmetic: under `auto` a pure function of the hardware.

    Raises:
        ConfigError: fp16 without CUDA, or a contradiction with ACCELERATE_MIXED_PRECISION.
    """
    reason = "as asked"
    ours: dict[str, Dtype] = {"fp16": "fp16", "bf16": "bf16", "no": "fp32", "": "fp32"}
    variable = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if variable not in ours:
        raise ConfigError(f"ACCELERATE_MIXED_PRECISION is {variable!r}, which this program has no use for: unset it.")
    if variable not in ("", "no"):
        if wanted not in ("auto", ours[variable]):
            raise ConfigError(
                f"train.precision is {wanted}, but ACCELERATE_MIXED_PRECISION is {variable}: give only one of them."
            )
        wanted, reason = ours[variable], "from ACCELERATE_MIXED_PRECISION"
    if wanted == "fp16" and device != "cuda":
        raise ConfigError(f"fp16 needs a CUDA GPU, and this run is on {device}: use --precision bf16, fp32 or auto.")
    if wanted != "auto":
        return Choice(value=wanted, reason=reason)
    if device != "cuda":
        return Choice(value="fp32", reason=f"the safe choice on {device}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice(value="bf16", reason="this GPU computes it natively")
    return Choice(value="fp16", reason="this GPU has no native bf16")


def _refuse_sharing(devices: int, local_ranks: int) -> None:
    """Accelerate would let two ranks share a GPU silently."""
    if local_ranks > devices:
        raise ConfigError(
            f"{local_ranks} processes on this machine cannot have a GPU each: {devices} visible. "
            f"Use --processes {devices}, or --device cpu."
        )


def default_generator(device: torch.device) -> torch.Generator:
    """Get the generator from which a device draws dropout masks."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


def refuse_without_compiler(device: str) -> None:
    """Make sure that `torch.compile` has what it needs on a device.

    Raises:
        ConfigError: It writes C++ for the CPU, and there is no compiler for that.
    """
    compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
    if device == "cpu" and not any(shutil.which(name) for name in compilers if name):
        raise ConfigError(
            "train.compile needs a C++ compiler for the CPU, and there is none: install g++ (or name yours in the "
            "environment variable CXX), or leave train.compile out."
        )
