"""What the loop works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mnist_dist.config import Config
from mnist_dist.data import Dataset, Sampler
from mnist_dist.data.batches import Batches
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.group.threads import Crowding
from mnist_dist.observe import Observers
from mnist_dist.runtime import Runtime
from mnist_dist.training.reduction import Ddp, Exact
from mnist_dist.training.state import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of a run, which `run/build.py` builds."""

    config: Config
    dataset: Dataset
    runtime: Runtime
    sampler: Sampler
    batches: dict[str, Batches]
    """By split."""
    model: nn.Module
    """As it is evaluated and saved."""
    reduction: Ddp | Exact
    optimizer: torch.optim.Optimizer
    stepper: Stepper
    """Of the optimizer."""
    crowding: Crowding
    """Whether other programs leave the run fewer CPUs than it has threads."""
    observers: Observers
    save: Callable[[Progress], None]
    """Writes a checkpoint; every rank calls it."""
