"""The loop: train, evaluate, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mnist_dist.config import Config
from mnist_dist.data import Dataset, Sampler, shares
from mnist_dist.data.transforms import Batches
from mnist_dist.errors import NonFiniteError
from mnist_dist.evaluate import evaluate
from mnist_dist.keyed import Purpose, keyed_hash
from mnist_dist.observe import Observers
from mnist_dist.optim import lr_at
from mnist_dist.reports import EpochReport, StepReport
from mnist_dist.runtime import Runtime


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a run is made of, ready to go; `run.py` builds it."""

    config: Config
    dataset: Dataset
    runtime: Runtime
    sampler: Sampler
    batches: dict[str, Batches]
    """By split."""
    model: nn.Module
    """Prepared: with several ranks it is wrapped in DDP."""
    optimizer: torch.optim.Optimizer
    observers: Observers
    save: Callable[[EpochReport], None]
    """Writes a checkpoint; every rank calls it."""


def train(parts: Parts) -> EpochReport:
    """Train from the first step to the last, evaluating and saving at each epoch's end. Every rank.

    Returns:
        The last epoch's report.

    Raises:
        NonFiniteError: A loss became infinite or not a number; nothing is saved from then on.
    """
    config, runtime, sampler = parts.config.train, parts.runtime, parts.sampler
    micro_batch, accumulation = config.split_batch(runtime.ranks)
    total_steps = config.total_steps(sampler.images)
    model, unwrapped, batches = parts.model, runtime.unwrap(parts.model), parts.batches["train"]
    window, epoch_totals = Totals(runtime), Totals(runtime)
    epoch_started = time.perf_counter()

    for step in range(total_steps):
        rate = lr_at(
            step,
            parts.config.schedule,
            peak=parts.config.optimizer.learning_rate,
            total_steps=total_steps,
            epoch_steps=sampler.images / config.global_batch,
        )
        for group in parts.optimizer.param_groups:
            group["lr"] = rate

        images, epochs = (
            shares(batch, rank=runtime.rank, ranks=runtime.ranks, micro_batch=micro_batch)
            for batch in sampler.batch(step)
        )  # (accumulation, micro_batch) each
        for micro in range(accumulation):
            pixels, labels = batches.take(images[micro], epochs[micro])
            runtime.seed(_dropout_seed(config.seed, step, runtime.rank * accumulation + micro))
            with runtime.accumulate(model, last=micro == accumulation - 1):
                logits = model(pixels)  # (micro_batch, K)
                loss = functional.cross_entropy(logits, labels, reduction="sum")
                runtime.backward(loss * (runtime.ranks / config.global_batch))  # DDP divides by ranks
            window.add(loss.detach(), (logits.argmax(dim=1) == labels).sum())
        runtime.step(parts.optimizer, clip_norm=config.clip_norm)

        done, epoch = step + 1, sampler.epoch_of(step)
        epoch_ends = done in (sampler.epoch_end(epoch), total_steps)
        parts.observers.progress(done)
        if not epoch_ends and done % config.log_every:
            continue

        window.close(images=(done - window.first_step) * config.global_batch)  # waits for the device
        epoch_totals.include(window)
        closed, window = window, Totals(runtime, first_step=done)
        if not math.isfinite(closed.loss):
            raise NonFiniteError(_divergence(f"The training loss of steps {closed.first_step + 1} to {done}", rate))
        parts.observers.step(
            StepReport(
                step=done,
                epoch=epoch + 1,
                loss=closed.loss,
                accuracy=closed.accuracy,
                learning_rate=rate,
                images_per_second=closed.images / closed.seconds,
            )
        )
        if epoch_ends:
            evaluations = {
                name: evaluate(unwrapped, parts.batches[name], split, runtime)
                for name, split in parts.dataset.splits.items()
                if name != "train"
            }
            test, validation = evaluations["test"], evaluations.get("validation")
            if not math.isfinite(test.loss):
                raise NonFiniteError(_divergence(f"The test loss after step {done}", rate))
            report = EpochReport(
                epoch=epoch + 1,
                step=done,
                images=epoch_totals.images,
                train_loss=epoch_totals.loss,
                train_accuracy=epoch_totals.accuracy,
                test_images=test.images,
                test_loss=test.loss,
                test_accuracy=test.accuracy,
                validation_loss=validation.loss if validation else None,
                validation_accuracy=validation.accuracy if validation else None,
                images_per_second=epoch_totals.images / epoch_totals.seconds,
                seconds=time.perf_counter() - epoch_started,
                learning_rate=rate,
            )
            epoch_started, epoch_totals = time.perf_counter(), Totals(runtime)
            parts.observers.epoch(report, test)
            parts.save(report)
            window = Totals(runtime, first_step=done)
    return report


class Totals:
    """Sums and counts of training over some steps; divided only when they are read."""

    def __init__(self, runtime: Runtime, *, first_step: int = 0) -> None:
        self.first_step = first_step
        self.images = 0
        self.seconds = 0.0
        self._runtime = runtime
        self._on_device = torch.zeros(2, dtype=runtime.sum_dtype, device=runtime.device)
        self._sums = [0.0, 0.0]
        self._started = time.perf_counter()

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self._sums[0] / self.images

    @property
    def accuracy(self) -> float:
        """Share classified correctly while training, in [0, 1]."""
        return self._sums[1] / self.images

    def add(self, loss: Tensor, correct: Tensor) -> None:
        """Add a micro-batch's summed loss and number correct, without waiting for the device."""
        self._on_device += torch.stack([loss, correct])

    def close(self, *, images: int) -> None:
        """Add up over ranks and stop the clock. Every rank; waits for the device."""
        self._sums = self._runtime.sum(self._on_device).tolist()
        self.images = images
        self.seconds = time.perf_counter() - self._started

    def include(self, other: Totals) -> None:
        """Add closed totals to these."""
        self._sums = [mine + theirs for mine, theirs in zip(self._sums, other._sums, strict=True)]
        self.images += other.images
        self.seconds += other.seconds


def _dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    return int(keyed_hash(Purpose.DROPOUT, seed, step, micro_batch)[0] >> 1)


def _divergence(what: str, rate: float) -> str:
    return (
        f"{what} is not finite. The learning rate was {rate:.3g}: a lower optimizer.learning_rate, a warm-up "
        f"(schedule.warmup_fraction) or train.clip_norm usually helps. Earlier checkpoints are whole."
    )
