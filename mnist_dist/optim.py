"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn, optim

from mnist_dist.config.schema import (
    Adam,
    AdamW,
    AnyOptimizer,
    AnySchedule,
    Constant,
    Cosine,
    OneCycle,
    Sgd,
    Step,
)


def build_optimizer(
    optimizer: AnyOptimizer, parameters: Iterable[nn.Parameter], *, fused: bool = True
) -> optim.Optimizer:
    """Build the optimizer that a config names; the loop sets its learning rate before every step.

    Args:
        optimizer: The config's section.
        parameters: What it updates.
        fused: One kernel for all parameters. Not under fp16: where the gradient scaler skips the very first
            update, the fused SGD of torch 2.14 goes on from momentum in uninitialised memory.
    """
    rate, decay = optimizer.learning_rate, optimizer.weight_decay
    match optimizer:
        case Sgd():
            return optim.SGD(
                parameters,
                lr=rate,
                momentum=optimizer.momentum,
                nesterov=optimizer.nesterov,
                weight_decay=decay,
                fused=fused,
            )
        case AdamW() | Adam():
            kind = optim.AdamW if isinstance(optimizer, AdamW) else optim.Adam
            return kind(parameters, lr=rate, betas=(optimizer.beta1, optimizer.beta2), weight_decay=decay, fused=fused)


def lr_at(step: int, schedule: AnySchedule, *, peak: float, total_steps: int, epoch_steps: float) -> float:
    """Look up the learning rate of a step.

    Args:
        step: The first is 0.
        schedule: Its shape.
        peak: The highest rate.
        total_steps: Steps of the whole run.
        epoch_steps: Steps of an epoch, not necessarily whole.
    """
    warmup_steps = schedule.warmup_fraction * total_steps
    if step < warmup_steps:
        if isinstance(schedule, OneCycle):
            return _cosine(step / warmup_steps, peak * schedule.start_fraction, peak)
        return peak * (step + 1) / (math.floor(warmup_steps) + 1)
    progress = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
    match schedule:
        case Constant():
            return peak
        case Step():
            return peak * schedule.factor ** math.floor(step / (schedule.every_epochs * epoch_steps))
        case Cosine() | OneCycle():
            return _cosine(progress, peak, peak * schedule.final_fraction)


def _cosine(progress: float, start: float, end: float) -> float:
    """Go from `start` to `end` along half a cosine as `progress` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
