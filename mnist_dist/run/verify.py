"""Train for a few steps and write down all that could differ between numbers of processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mnist_dist.config import Resolved
from mnist_dist.data import open_dataset
from mnist_dist.observe import Observer, Observers
from mnist_dist.observe.output import say
from mnist_dist.observe.records import EpochReport, Evaluation, StepReport
from mnist_dist.run.build import build_parts, join
from mnist_dist.training import loop
from mnist_dist.training.state import Progress


def probe(resolved: Resolved, output: Path) -> None:
    """Train for `train.max_steps` steps and write down all that could differ between process counts. Every rank.

    Args:
        resolved: The experiment; its `train.log_every` must be 1.
        output: A safetensors file that rank 0 writes: `loss` of each step, `gradients` of the last step and
            `weights` after it, both as one vector, and `metrics`: test loss and accuracy.
    """
    config = resolved.config
    dataset = open_dataset(config.data, seed=config.train.seed, announce=say)
    with join(config) as runtime:
        witness = Witness()
        parts = replace(build_parts(config, dataset, runtime), observers=Observers((witness,)))
        model = parts.model
        gradients: list[torch.Tensor] = []

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            gradients[:] = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]

        parts.optimizer.register_step_pre_hook(look)
        loop.train(parts, Progress())
        if runtime.rank == 0:
            record = {
                "loss": torch.tensor(witness.losses, dtype=torch.float64),
                "gradients": torch.cat(gradients),
                "weights": torch.cat([p.detach().flatten().cpu() for p in model.parameters()]),
                "metrics": torch.tensor(witness.metrics, dtype=torch.float64),
            }
            save_file(record, output)


class Witness(Observer):
    """Remembers the loss of each step, and the last test loss and accuracy."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.metrics: list[float] = []

    def step(self, report: StepReport) -> None:  # noqa: D102
        self.losses.append(report.loss)

    def epoch(self, report: EpochReport, test: Evaluation) -> None:  # noqa: D102
        self.metrics = [test.loss, test.accuracy]
