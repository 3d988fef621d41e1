"""The loop: train, evaluate, save."""

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
"""A vote to save; smaller ones are the numbers of signals, which save as well."""
FEWER_THREADS = 1 << 20
"""A vote to go on with n threads is this less n: of several votes the fewest threads win."""

SMALLEST_LOSS_SCALE = 1.0
"""If gradients still overflow at this scale, fp16's range is not the cause."""


def train(parts: Parts, progress: Progress) -> None:
    """Train from where `progress` stands to the last step, evaluating and saving at each epoch's end. Every rank.

    Raises:
        NonFiniteError: A loss or, at the smallest scale of fp16, a gradient became infinite or not a number;
            nothing is saved from then on.
        StoppedError: A signal came; a checkpoint is saved.
    """
    config, runtime, sampler, reduction = parts.config.train, parts.runtime, parts.sampler, parts.reduction
    micro_batch, accumulation = config.split_batch(runtime.ranks)
    total_steps = config.total_steps(sampler.images)
    mine = {"rank": runtime.rank, "ranks": runtime.ranks, "micro_batch": micro_batch}
    losses: list[Tensor] = []  # of each micro-batch of this rank, on the device, since the last report
    sums: list[tuple[Tensor, Tensor]] = []  # loss and number correct of each step since then, on the device
    vote, clock, crowding = Vote(runtime), Clock(parts.config.checkpoint.every_minutes), parts.crowding
    prepared = prepare(parts, partial(_rate_at, parts, total_steps=total_steps), total_steps)

    while True:
        # An epoch is evaluated and saved before its next step: a resume that begins here starts with the evaluation.
        ends = (sampler.epoch_end(sampler.epoch_of(progress.step - 1)), total_steps)
        if progress.epoch.images and progress.step in ends:
            with crowding.paused():
                _finish_epoch(parts, progress, _set_rate(parts, progress.step - 1, total_steps))
            clock.restart()
        if progress.step == total_steps:
            vote.result()  # every rank ends the vote that was cast after the last step
            return

        # The step: which images, how each is augmented, and the rate depend on its number alone.
        step = progress.step
        rate = _set_rate(parts, step, total_steps)
        lowered_scale = None
        if prepared is not None:  # its input lies on the device already
            sums.append(prepared.take(step))
            losses.append(sums[-1][0])
        else:
            images, epochs = sampler.share(step, **mine)  # (accumulation, micro_batch)
            for micro in range(accumulation):
                pixels, labels = parts.batches["train"].take(images[micro], epochs[micro])
                runtime.seed(dropout_seed(config.seed, step, runtime.rank * accumulation + micro))
                last = micro == accumulation - 1
                losses.append(learn(reduction, pixels, labels, label_smoothing=config.label_smoothing, last=last))
            sums.append(reduction.finish())  # here the ranks exchange gradients
            lowered_scale = runtime.step(parts.stepper, clip_norm=config.clip_norm)

        # The step is done. Nothing so far has waited for the device.
        progress.step = done = step + 1
        heartbeat.beat(done)
        parts.observers.progress(done)
        overflows = lowered_scale is not None and lowered_scale < SMALLEST_LOSS_SCALE
        if lowered_scale is not None:
            parts.observers.event(Event(step=done, event="update_left_out", figures={"loss_scale": lowered_scale}))

        # What all ranks decided together a step ago: stop, save, or compute with fewer threads.
        epoch = sampler.epoch_of(step)
        epoch_ends = done in (sampler.epoch_end(epoch), total_steps)
        decision = vote.result()
        stops = 0 < decision < SAVE
        saves = stops or (
            not epoch_ends and (decision == SAVE or done % (parts.config.checkpoint.every_steps or done + 1) == 0)
        )

        # Now and then, look at the losses: this waits for the device, and adds up over ranks.
        reports = epoch_ends or overflows or done % config.log_every == 0
        if reports or saves:
            rows = reduction.collect(sums)
            _refuse_non_finite(parts, rows, losses, done, rate)
            progress.add_steps(rows, images_per_step=config.global_batch, seconds=clock.lap())
            sums.clear()
            losses.clear()
        if reports:
            parts.observers.step(progress.report_window(epoch=epoch + 1, learning_rate=rate))
        if overflows:
            raise NonFiniteError(_divergence(f"A gradient of step {done}, at fp16's smallest loss scale,", rate))

        # A checkpoint comes after the check for non-finite numbers, and before the run may stop.
        if saves:
            reduction.settle()
            with crowding.paused():
                parts.save(progress)
            clock.restart()
        if stops:
            raise StoppedError(f"Stopped by {signals.name_of(decision)} after step {done} of {total_steps}.", decision)
        if decision > SAVE:
            _take_fewer_threads(parts, progress, FEWER_THREADS - decision)

        # Vote for the next step: the largest number of any rank wins, while the device computes.
        fitting = crowding.look(total_steps - done)
        vote.cast(
            signals.pending() or (SAVE if clock.save_is_due() else 0) or (FEWER_THREADS - fitting if fitting else 0)
        )


def _finish_epoch(parts: Parts, progress: Progress, rate: float) -> None:
    """Evaluate, report and save an epoch whose last step is done. Every rank."""
    parts.reduction.settle()
    try:
        evaluations = {
            name: evaluate(parts.model, parts.batches[name], split, parts.runtime, signals.pending)
            for name, split in parts.dataset.splits.items()
            if name != "train"
        }
    except StoppedError as stopped:
        parts.save(progress)  # a resume begins with the evaluation
        raise StoppedError(f"{stopped} A resume does it first.", stopped.exit_code - 128) from None
    test, validation = evaluations.get("test"), evaluations.get("validation")
    reported = evaluations[parts.dataset.reported.name]
    if not math.isfinite(reported.loss):
        raise NonFiniteError(_divergence(f"The {reported.split} loss after step {progress.step}", rate))
    report = EpochReport(
        epoch=parts.sampler.epoch_of(progress.step - 1) + 1,
        step=progress.step,
        images=progress.epoch.images,
        train_loss=progress.epoch.loss,
        train_accuracy=progress.epoch.accuracy,
        test_images=test.images if test else None,
        test_loss=test.loss if test else None,
        test_accuracy=test.accuracy if test else None,
        validation_loss=validation.loss if validation else None,
        validation_accuracy=validation.accuracy if validation else None,
        images_per_second=progress.epoch.images_per_second,
        seconds=progress.seconds_of_epoch(),
        learning_rate=rate,
    )
    progress.finish_epoch(report)
    parts.observers.epoch(report, reported)
    parts.save(progress)


def _take_fewer_threads(parts: Parts, progress: Progress, threads: int) -> None:
    """Compute with fewer threads for the rest of the run, and note it. Every rank."""
    if threads < parts.runtime.threads:  # not the vote of a rank that has found out a step later
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
    """Find the first step whose loss is not finite, and the micro-batch that it comes from. Every rank."""
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
