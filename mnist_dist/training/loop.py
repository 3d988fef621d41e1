"""The training loop. Read `train` from top to bottom.

One round of the loop is one step: finish the epoch if it ended, train on one global batch, read the vote of the round
before, report, save, stop, and cast the next vote. Every rank runs the same lines in the same order. The host waits for
the device only to report and to save; under fp16 it waits at every step.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mnist_dist.errors import NonFiniteError, StoppedError
from mnist_dist.group import heartbeat, signals
from mnist_dist.keyed import dropout_seed
from mnist_dist.observe.records import EpochReport, Event
from mnist_dist.runtime import Vote
from mnist_dist.training.evaluate import evaluate
from mnist_dist.training.graph import prepare
from mnist_dist.training.optimizers import lr_at
from mnist_dist.training.parts import Parts
from mnist_dist.training.reduction import learn
from mnist_dist.training.state import Clock, Progress

SAVE = 1 << 16
"""A vote to save. Smaller votes are signal numbers: they save too, then stop."""
FEWER_THREADS = 1 << 20
"""A vote for n threads is `FEWER_THREADS - n`. The largest vote wins, so the fewest threads do."""

SMALLEST_LOSS_SCALE = 1.0
"""If gradients still overflow at this scale, fp16's range is not the cause."""


def train(parts: Parts, progress: Progress) -> None:
    """Train from `progress.step` to the last step. Evaluate and save at the end of each epoch. Every rank.

    Args:
        parts: What the run is made of.
        progress: Where to start. It is updated in place.

    Raises:
        NonFiniteError: A loss is infinite or NaN, or a gradient is at the smallest loss scale of fp16. Nothing more
            is saved: the newest checkpoint is from before the failure.
        StoppedError: A signal arrived. A checkpoint is saved.
    """
    config, runtime, sampler, reduction = parts.config.train, parts.runtime, parts.sampler, parts.reduction
    micro_batch, accumulation = config.split_batch(runtime.ranks)
    total_steps = config.total_steps(sampler.images)
    mine = {"rank": runtime.rank, "ranks": runtime.ranks, "micro_batch": micro_batch}
    losses: list[Tensor] = []  # one for each micro-batch of this rank, on the device
    sums: list[tuple[Tensor, Tensor]] = []  # loss and number correct of each step, on the device
    vote, clock, crowding = Vote(runtime), Clock(parts.config.checkpoint.every_minutes), parts.crowding
    prepared = prepare(parts, partial(_rate_at, parts, total_steps=total_steps), total_steps)

    while True:
        # Finish an epoch whose last step is done. This comes first, so a run that resumes there still evaluates.
        ends = (sampler.epoch_end(sampler.epoch_of(progress.step - 1)), total_steps)
        if progress.epoch.images and progress.step in ends:
            with crowding.paused():
                _finish_epoch(parts, progress, _set_rate(parts, progress.step - 1, total_steps))
            clock.restart()

        # After the last epoch, take the vote that is still under way, so that no collective is left open.
        if progress.step == total_steps:
            vote.result()
            return

        # Train on one global batch. The seed and the step number decide on the learning rate, the images, their
        # augmentation and the dropout masks, so a resumed run computes the same numbers.
        step = progress.step
        rate = _set_rate(parts, step, total_steps)
        lowered_scale = None
        if prepared is not None:  # the input is on the device already (train.graph)
            sums.append(prepared.take(step))
            losses.append(sums[-1][0])
        else:
            images, epochs = sampler.share(step, **mine)  # (accumulation, micro_batch)
            for micro in range(accumulation):
                pixels, labels = parts.batches["train"].take(images[micro], epochs[micro])
                runtime.seed(dropout_seed(config.seed, step, runtime.rank * accumulation + micro))
                last = micro == accumulation - 1  # DDP averages gradients in the last backward pass only
                losses.append(learn(reduction, pixels, labels, label_smoothing=config.label_smoothing, last=last))
            sums.append(reduction.finish())
            lowered_scale = runtime.step(parts.stepper, clip_norm=config.clip_norm)

        # The step is counted before anything reads it: reports and checkpoints name the steps that are done.
        progress.step = done = step + 1
        heartbeat.beat(done)
        parts.observers.progress(done)
        overflows = lowered_scale is not None and lowered_scale < SMALLEST_LOSS_SCALE
        if lowered_scale is not None:
            parts.observers.event(Event(step=done, event="update_left_out", figures={"loss_scale": lowered_scale}))

        # Read the vote that every rank cast a round ago: the exchange ran during the step, and all ranks agree now.
        epoch = sampler.epoch_of(step)
        epoch_ends = done in (sampler.epoch_end(epoch), total_steps)
        decision = vote.result()
        stops = 0 < decision < SAVE  # a signal number
        saves = stops or (
            not epoch_ends and (decision == SAVE or done % (parts.config.checkpoint.every_steps or done + 1) == 0)
        )

        # Check the losses before anything is reported or saved, so that no checkpoint follows a bad loss.
        reports = epoch_ends or overflows or done % config.log_every == 0
        if reports or saves:
            rows = reduction.collect(sums)  # waits for the device and sums over ranks
            _refuse_non_finite(parts, rows, losses, done, rate)
            progress.add_steps(rows, images_per_step=config.global_batch, seconds=clock.lap())
            sums.clear()
            losses.clear()

        # Report before the run can fail or stop, so that the log holds the last step.
        if reports:
            parts.observers.step(progress.report_window(epoch=epoch + 1, learning_rate=rate))
        if overflows:
            raise NonFiniteError(_divergence(f"A gradient of step {done}, at fp16's smallest loss scale,", rate))

        # Save after the report: a resumed run must not report these steps again. Stop only after saving.
        if saves:
            reduction.settle()  # ranks agree on batch norm statistics
            with crowding.paused():
                parts.save(progress)
            clock.restart()
        if stops:
            raise StoppedError(f"Stopped by {signals.name_of(decision)} after step {done} of {total_steps}.", decision)

        # Change the threads between two steps, where every rank does so at the same step.
        if decision > SAVE:
            _take_fewer_threads(parts, progress, FEWER_THREADS - decision)

        # Cast the next vote last. It is exchanged on the CPUs during the next step, so no rank waits for it.
        fitting = crowding.look(total_steps - done)
        vote.cast(
            signals.pending() or (SAVE if clock.save_is_due() else 0) or (FEWER_THREADS - fitting if fitting else 0)
        )


def _finish_epoch(parts: Parts, progress: Progress, rate: float) -> None:
    """Evaluate the epoch that just ended, report it and save a checkpoint. Every rank."""
    parts.reduction.settle()  # before the evaluation: ranks must evaluate the same network
    try:
        evaluations = {
            name: evaluate(parts.model, parts.batches[name], split, parts.runtime, signals.pending)
            for name, split in parts.dataset.splits.items()
            if name != "train"
        }
    except StoppedError as stopped:
        parts.save(progress)  # the epoch is still open in it, so a resume evaluates first
        raise StoppedError(f"{stopped} A resume starts with it.", stopped.exit_code - 128) from None
    test, validation = evaluations["test"], evaluations.get("validation")
    if not math.isfinite(test.loss):
        raise NonFiniteError(_divergence(f"The test loss after step {progress.step}", rate))
    report = EpochReport(
        epoch=parts.sampler.epoch_of(progress.step - 1) + 1,
        step=progress.step,
        images=progress.epoch.images,
        train_loss=progress.epoch.loss,
        train_accuracy=progress.epoch.accuracy,
        test_images=test.images,
        test_loss=test.loss,
        test_accuracy=test.accuracy,
        validation_loss=validation.loss if validation else None,
        validation_accuracy=validation.accuracy if validation else None,
        images_per_second=progress.epoch.images_per_second,
        seconds=progress.seconds_of_epoch(),
        learning_rate=rate,
    )
    progress.finish_epoch(report)  # before saving, so that the checkpoint knows that the epoch is over
    parts.observers.epoch(report, test)
    parts.save(progress)


def _take_fewer_threads(parts: Parts, progress: Progress, threads: int) -> None:
    """Set fewer CPU threads for the rest of the run and record the change. Every rank."""
    if threads < parts.runtime.threads:  # another rank may ask for the same a step later
        parts.runtime.set_threads(threads)
        parts.crowding.lower(threads)
        progress.threads = threads
        parts.observers.event(Event(step=progress.step, event="fewer_threads", figures={"threads": threads}))


def _set_rate(parts: Parts, step: int, total_steps: int) -> float:
    rate = _rate_at(parts, step, total_steps=total_steps)
    for group in parts.optimizer.param_groups:
        group["lr"] = rate
    return rate


def _rate_at(parts: Parts, step: int, *, total_steps: int) -> float:
    return lr_at(
        step,
        parts.config.schedule,
        peak=parts.config.optimizer.learning_rate,
        total_steps=total_steps,
        epoch_steps=parts.sampler.epoch_steps,
    )


def _refuse_non_finite(parts: Parts, rows: list[list[float]], losses: list[Tensor], done: int, rate: float) -> None:
    """Raise if a loss is not finite, naming the step and the images of its first bad micro-batch. Every rank."""
    bad = next((row for row, (loss, _) in enumerate(rows) if not math.isfinite(loss)), None)
    if bad is None:
        return
    micro_batch, accumulation = parts.config.train.split_batch(parts.runtime.ranks)
    pieces = parts.runtime.ranks * accumulation
    mine = torch.stack(losses[bad * accumulation : (bad + 1) * accumulation]).isfinite().tolist()
    first = mine.index(False) if False in mine else pieces
    piece = pieces - parts.runtime.maximum(pieces - min(pieces, parts.runtime.rank * accumulation + first))
    step = done - len(rows) + bad
    images, _ = parts.sampler.batch(step)
    files = [parts.dataset.train.file(image) for image in images[piece * micro_batch : (piece + 1) * micro_batch]]
    more = f" and {len(files) - 8} more" if len(files) > 8 else ""
    where = f" (first in micro-batch {piece} of {pieces}: {', '.join(files[:8])}{more})"
    raise NonFiniteError(_divergence(f"The training loss of step {step + 1}{where}", rate))


def _divergence(what: str, rate: float) -> str:
    return (
        f"{what} is not finite. The learning rate was {rate:.3g}: a lower optimizer.learning_rate, a warm-up "
        f"(schedule.warmup_fraction) or train.clip_norm usually helps."
    )
