"""The optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache

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
    exact,
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


def lr_at(step: int, schedule: AnySchedule, *, peak: float, total_steps: int, epoch_steps: Fraction | float) -> float:
    """Return the learning rate of a step.

    Where one piece of a schedule ends and the next begins is exact: `every_epochs` 0.1 of 30 steps is 3 steps.

    Args:
        step: The first is 0.
        schedule: Its shape.
        peak: The highest rate.
        total_steps: Steps of the whole run.
        epoch_steps: Steps of an epoch, not necessarily whole.
    """
    share, of = _ratio(schedule.warmup_fraction)
    warmup_steps = schedule.warmup_fraction * total_steps
    if step * of < share * total_steps:
        if isinstance(schedule, OneCycle):
            return _cosine(step / warmup_steps, peak * schedule.start_fraction, peak)
        return peak * (step + 1) / (share * total_steps // of + 1)
    progress = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
    match schedule:
        case Constant():
            return peak
        case Step():
            epochs, over = _ratio(schedule.every_epochs)
            steps, parts = epoch_steps.as_integer_ratio()
            return peak * schedule.factor ** (step * over * parts // (epochs * steps))
        case Cosine() | OneCycle():
            return _cosine(progress, peak, peak * schedule.final_fraction)


@lru_cache
def _ratio(value: float) -> tuple[int, int]:
    return exact(value).as_integer_ratio()


def _cosine(progress: float, start: float, end: float) -> float:
    """Go from `start` to `end` along half a cosine as `progress` goes from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
