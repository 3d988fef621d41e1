"""Environment variables of other tools that override Accelerate's arguments: refused by name, or hidden from it.

A test compares the table with the source of Accelerate, so that a new name is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from mnist_dist.errors import ConfigError

OFF = ("", "0", "n", "no", "f", "false", "off")
ANOTHER_WAY = "it asks for another way of training than this program's"

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "it would change the batch: set train.micro_batch instead"),
    "ACCELERATE_DYNAMO_BACKEND": ((), "it would compile the network: set train.compile instead"),
    "ACCELERATE_TORCH_DEVICE": ((), "it would choose the device: use --device instead"),
    "ACCELERATE_USE_DEEPSPEED": ((), ANOTHER_WAY),
    "ACCELERATE_USE_FSDP": ((), ANOTHER_WAY),
    "ACCELERATE_USE_MEGATRON_LM": ((), ANOTHER_WAY),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ((), ANOTHER_WAY),
    "ACCELERATE_USE_SAGEMAKER": ((), ANOTHER_WAY),
}
"""What a user would miss if it were hidden: each with the values that ask for nothing, beside `OFF`, and the reason."""

TAKEN = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU")
"""What this program reads itself."""

SHOWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
         "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "PYTORCH_ENABLE_MPS_FALLBACK", "USE_TORCH_XLA")  # fmt: skip
"""What Accelerate may read: the place that this program has checked, what others than Accelerate obey too, and what it
has read before anything could be hidden from it (USE_TORCH_XLA, which matters where torch_xla is installed)."""

HIDDEN = ("ACCELERATE_*", "FSDP_*", "MEGATRON_LM_*", "PARALLELISM_CONFIG_*", "PMI_*", "OMPI_COMM_WORLD_*",
          "MV2_COMM_WORLD_*", "MPI_LOCALNRANKS", "MPI_LOCALRANKID", "FORK_LAUNCHED", "XLA_*", "DEEPSPEED_USE_HPU",
          "PT_HPU_LAZY_MODE")  # fmt: skip
"""Patterns of names that Accelerate would obey or fail on. It gets everything that it needs as arguments."""


def matching(variables: Mapping[str, str], patterns: tuple[str, ...]) -> list[str]:
    """List the variables whose names match one of the patterns, sorted."""
    return sorted(name for name in variables if any(fnmatchcase(name, pattern) for pattern in patterns))


def refused(variables: Mapping[str, str]) -> dict[str, str]:
    """Find the variables under which no run starts, each with the reason."""
    return {
        name: reason
        for name, (neutral, reason) in REFUSED.items()
        if variables.get(name, "").strip().lower() not in (*OFF, *neutral)
    }


def refuse(variables: Mapping[str, str]) -> None:
    """Raise an error if a variable asks Accelerate for another way of training.

    Raises:
        ConfigError: One does.
    """
    for name, reason in refused(variables).items():
        raise ConfigError(f"{name} is {variables[name]}, and {reason}: unset it.")
