"""Steps whose input is prepared many at a time, so that CUDA can capture one and replay it: `train.graph`.

A step of a small network is a hundred kernels of a few microseconds each, and a fast GPU waits while Python names them.
Here all that differs between two steps (which images, how each is augmented, the learning rate) is written to tables on
the device for many steps at once; a step reads its row of them, at a place that the device itself counts. So nothing in
a step comes from the host, and CUDA records it once and replays it. Votes, reports, checkpoints and signals stay in the
loop, between one step and the next, so a run is stopped, saved and resumed at any step as without it.

Dropout needs no masks of our own: a replay reads the seed that the generator has by then (CUDAGeneratorImpl.cpp of
torch), so the loop's keyed seeds hold for replays too. That is one seed a replay, hence one micro-batch a step.

A CPU runs the same function step by step, with the bits of a run without it. On a GPU one thing differs: the fused
optimizers read a learning rate that lies on the device as float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mnist_dist.errors import ConfigError, memory
from mnist_dist.keyed import dropout_seed
from mnist_dist.training.parts import Parts
from mnist_dist.training.reduction import learn

STEPS = 256
IMAGES = 1 << 16
"""Tables hold the input of at most so many steps and images."""
EAGER_STEPS = 3
"""Taken before a step is captured: libraries choose kernels in them, and the optimizer makes its state."""


def prepare(parts: Parts, rate_at: Callable[[int], float], total_steps: int) -> PreparedSteps | None:
    """Return what takes prepared steps, or `None` where the loop is to take its steps one by one.

    Args:
        parts: Of the run.
        rate_at: Looks up the learning rate of a step.
        total_steps: Steps of the whole run.
    """
    if parts.config.train.graph == "off" or obstacle(parts) is not None:
        return None
    return PreparedSteps(parts, rate_at, total_steps)


def obstacle(parts: Parts) -> str | None:
    """Return why steps cannot be prepared: the host has a part in each. `None` where they can."""
    config, runtime, optimizer = parts.config.train, parts.runtime, parts.optimizer
    _, accumulation = config.split_batch(runtime.ranks)
    reasons = {
        "exact adds gradients in an order of its own": config.reduction == "exact",
        f"{runtime.ranks} processes exchange gradients": runtime.ranks > 1,
        f"a step has {accumulation} micro-batches, each with a seed of its own": accumulation > 1,
        "the loss scale of fp16 is asked for at each step": runtime.precision.value == "fp16",
        "torch.compile makes graphs of its own": config.compile,
        "Apple GPUs have no graphs": runtime.device.type == "mps",
        "the pixels are not in the GPU's memory": runtime.device.type == "cuda"
        and parts.batches["train"].residency == "host",
        "something looks at each step": bool(
            optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def describe(parts: Parts) -> str:
    """Return how steps are taken, for the plan; empty where `train.graph` is off."""
    if parts.config.train.graph == "off":
        return ""
    reason = obstacle(parts)
    if reason is not None:
        return f"steps one by one: {reason}"
    how = "one is captured and replayed" if parts.runtime.device.type == "cuda" else "run one by one on the CPU"
    return f"up to {_steps_at_once(parts)} steps prepared at a time, {how}"


class PreparedSteps:
    """Takes the steps of a run one after the other, from tables on the device."""

    def __init__(self, parts: Parts, rate_at: Callable[[int], float], total_steps: int) -> None:
        self._parts = parts
        self._batches = parts.batches["train"]
        self._rate_at = rate_at
        self._total_steps = total_steps
        self._device = parts.runtime.device
        self._steps_at_once = _steps_at_once(parts)
        self._tables: dict[str, Tensor] = {}  # a row for each step; they keep their places in memory
        self._place = torch.zeros(1, dtype=torch.int64, device=self._device)  # the next step's row
        self._next = self._end = -1  # the step of that row, and the first one that has none
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._sums: tuple[Tensor, Tensor] | None = None  # where the graph leaves them

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        """Start a step, which may still run on the device afterwards.

        Returns:
            `()` loss summed over the step's images and `()` number correct, which later steps leave alone.
        """
        if step != self._next or step == self._end:
            self._fill(step)
        self._next = step + 1
        self._parts.runtime.seed(dropout_seed(self._parts.config.train.seed, step, 0))
        if self._stream is None:
            return self._step()
        if self._eager_steps < EAGER_STEPS:
            self._eager_steps += 1
            return self._step_on(self._stream)
        if self._graph is None or self._sums is None:
            self._graph, self._sums = self._capture(self._stream)
        self._graph.replay()
        loss, correct = self._sums
        return loss.clone(), correct.clone()

    def _step(self) -> tuple[Tensor, Tensor]:
        """Run a step whose every number comes from the device."""
        parts, config = self._parts, self._parts.config.train
        drawn = {name: self._row(name) for name in self._tables}  # (micro_batch, ...)
        rate = drawn.pop("rates")[0]  # ()
        self._place.add_(1)
        for group in parts.optimizer.param_groups:
            group["lr"] = rate
        pixels, labels = self._batches.make(drawn)
        learn(parts.reduction, pixels, labels, label_smoothing=config.label_smoothing, last=True)
        sums = parts.reduction.finish()
        parts.runtime.step(parts.stepper, clip_norm=config.clip_norm)
        return sums

    def _row(self, name: str) -> Tensor:
        return self._tables[name].index_select(0, self._place)[0]

    def _fill(self, step: int) -> None:
        """Write what the next steps read, while the device may still be busy with earlier ones."""
        steps = range(step, min(step + self._steps_at_once, self._total_steps))
        images, epochs = (np.concatenate(column) for column in zip(*map(self._parts.sampler.batch, steps), strict=True))
        rate_dtype = torch.float64 if self._device.type == "cpu" else torch.float32  # as fused kernels read it
        rates = torch.tensor([self._rate_at(step) for step in steps], dtype=rate_dtype)
        values = {**self._batches.draw(images, epochs), "rates": rates}
        for name, column in values.items():
            table = column.view(len(steps), -1, *column.shape[1:])
            if name not in self._tables:
                shape = (self._steps_at_once, *table.shape[1:])
                self._tables[name] = torch.empty(shape, dtype=table.dtype, device=self._device)
            self._tables[name][: len(steps)].copy_(self._batches.send(table))
        self._place.zero_()
        self._end = steps.stop

    def _step_on(self, stream: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
        """Run a step on the stream on which one will be captured."""
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            sums = self._step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return sums

    def _capture(self, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
        """Record a step without taking it, and where it will leave its sums.

        Raises:
            ConfigError: CUDA cannot capture it.
        """
        for group in self._parts.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True  # Adam asks for it; its fused kernels do the same with and without
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                sums = self._step()
        except RuntimeError as error:
            if memory.refusal_of(error) is not None:
                raise
            words = str(error).partition("\n")[0].rstrip(".")
            raise ConfigError(
                f"train.graph is auto, and CUDA cannot capture a step ({words}): set it to off."
            ) from error
        return graph, sums


def _steps_at_once(parts: Parts) -> int:
    micro_batch, _ = parts.config.train.split_batch(parts.runtime.ranks)
    return max(1, min(STEPS, IMAGES // micro_batch))
