"""Where the pixels are kept: in the device's memory, or in the host's, which sends each batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from mnist_dist.config.schema import Residency
from mnist_dist.data.store_files import StoredSplit
from mnist_dist.errors import ConfigError

SHARE = 4
"""Pixels may take one part in so many of the memory that is free: the rest is for activations."""


def bytes_of(stored: Iterable[StoredSplit]) -> int:
    """Count the bytes of the pixels and labels of some splits, what they share counted once."""
    return sum({id(split): split.images.nbytes + split.labels.nbytes for split in stored}.values())


def choose_residency(
    asked: Residency, *, device: str, needed_bytes: int, least_free_bytes: int
) -> Literal["device", "host"]:
    """Decide where the pixels are kept, in the same way on all ranks.

    Args:
        asked: What the config says.
        device: The kind that the ranks compute on. On the CPU it makes no difference: the mapped store is its memory.
        needed_bytes: Of all splits together.
        least_free_bytes: Of memory, on the device of the rank that has least.

    Raises:
        ConfigError: The device was asked for, and has not enough memory.
    """
    if device == "cpu" or asked == "host":
        return "host"
    if asked == "auto":
        return "device" if needed_bytes * SHARE <= least_free_bytes else "host"
    if needed_bytes > least_free_bytes:
        raise ConfigError(
            f"data.residency is device, but the pixels take {needed_bytes:,} bytes and only {least_free_bytes:,} are "
            f"free there: use auto or host."
        )
    return "device"
