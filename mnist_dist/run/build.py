"""Build the parts of a run from its config and run them. Only this module knows all parts."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import nn

from mnist_dist.config import Config, Resolved, all_keys, flatten
from mnist_dist.data import Dataset, Sampler, open_dataset
from mnist_dist.data.batches import Batches, Gather
from mnist_dist.data.residency import bytes_of, choose_residency
from mnist_dist.errors import DeviceMemoryError, NonFiniteError, StoppedError, memory, typed
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.group import signals
from mnist_dist.group.place import group_folder_of
from mnist_dist.group.threads import Chosen, Cpus, Crowding, choose, crowded_by_itself, others_since_prepare
from mnist_dist.models import build_model, count_parameters
from mnist_dist.observe import Observers
from mnist_dist.observe.build import Watched
from mnist_dist.observe.build import build as watch
from mnist_dist.observe.output import open_console, print_line, tolerant
from mnist_dist.observe.records import Plan, Result
from mnist_dist.run import saving
from mnist_dist.run.folder import RunFolder, claim_run_folder
from mnist_dist.runtime import Runtime, start
from mnist_dist.runtime.device import refuse_without_compiler
from mnist_dist.training import graph, loop
from mnist_dist.training.optimizers import build_optimizer
from mnist_dist.training.parts import Parts
from mnist_dist.training.reduction import Ddp, Exact
from mnist_dist.training.state import Progress


def train(
    resolved: Resolved,
    *,
    run: Path | str | None = None,
    resume: bool = False,
    init_from: Path | None = None,
    console: Console | None = None,
) -> Result:
    """Train in this process, with the other ranks if the environment describes a group.

    Args:
        resolved: The experiment, from `mnist_dist.config.load`.
        run: A folder for everything that the run writes; None makes one below `runs/`.
        resume: Continue what the folder holds, from its newest whole checkpoint; else the folder must be new.
        init_from: A run whose last weights a new run starts from, instead of random ones.
        console: Where rank 0 shows what happens; None is standard output, `Console(quiet=True)` shows nothing.

    Returns:
        What `result.json` says.

    Raises:
        MnistDistError: Its kind says what went wrong; `result.json` says so too if training had begun.
    """
    console = console or open_console()
    config = resolved.config
    with contextlib.ExitStack() as stack:
        stack.enter_context(tolerant(console.file))
        dataset = open_dataset(
            config.data,
            seed=config.train.seed,
            announce=partial(print_line, console),
            group=group_folder_of(os.environ),
        )
        runtime = stack.enter_context(join(config))
        resolved = _settle(resolved, runtime)
        parts = build_parts(resolved.config, dataset, runtime)
        warn = functools.cache(lambda line: print_line(console, f"warning: {line}"))
        cpus = Cpus.of_this_rank(runtime.count_same(Cpus.name()))
        chosen = _choose_threads(config, runtime, cpus, warn)
        folder = _claim(Path(run) if run else None, runtime, stack, resume=resume)
        opened = runtime.on_first_rank(lambda: saving.open_folder(folder, resolved, runtime, dataset, init_from, warn))
        digest = opened.config_sha256 if opened else ""
        save = partial(saving.save, folder, config_sha256=digest, warn=warn)
        is_new = runtime.broadcast(opened and opened.is_new)
        progress = Progress() if is_new else saving.restore(folder, opened, parts, warn)
        chosen = _keep_threads(config, runtime, progress, chosen)
        if is_new:
            if init_from is not None:
                saving.take_weights(init_from, parts.model, runtime)
                save(parts, progress)  # before it is a run: a resume begins with these weights
            runtime.on_first_rank(lambda: saving.begin(folder, opened))
        observers = runtime.on_first_rank(
            lambda: _observe(folder, resolved, dataset, console, stack, first_step=progress.step)
        )
        observed = replace(parts, crowding=Crowding(cpus, progress.threads), observers=observers or Observers())
        parts = replace(observed, save=partial(save, observed))
        parts.observers.plan(_plan(parts, folder, first_step=progress.step, threads_reason=chosen.reason))
        return _train(parts, progress, folder)


def join(config: Config) -> contextlib.AbstractContextManager[Runtime]:
    """Join the process group with the config's settings. Every rank; errors as in `runtime.start`."""
    options = config.train
    exact = options.reduction == "exact"
    return start(device=options.device, precision=options.precision, threads=options.fixed_threads, deterministic=exact)


def _claim(run: Path | None, runtime: Runtime, stack: contextlib.ExitStack, *, resume: bool) -> RunFolder:
    """Lock the run's folder until the stack closes; without a name, create one below `runs/`. Every rank."""
    folder = RunFolder(Path(runtime.broadcast(runtime.on_first_rank(lambda: str(run or claim_run_folder("run"))))))
    folder.check_text()
    if resume:
        saving.refuse_run_elsewhere(folder, runtime)
    runtime.on_first_rank(lambda: saving.claim_folder(folder, stack, resume=resume))
    return folder


def build_parts(config: Config, dataset: Dataset, runtime: Runtime) -> Parts:
    """Build the parts of the loop, without observers and without saving. Every rank."""
    sampler = _agree(config, dataset, runtime)
    model, reduction, optimizer = _build(config, dataset, runtime)
    return Parts(
        config=config,
        dataset=dataset,
        runtime=runtime,
        sampler=sampler,
        batches=_batches(config, dataset, runtime),
        model=model,
        reduction=reduction,
        optimizer=optimizer,
        stepper=Stepper(optimizer),
        crowding=Crowding(Cpus.of_this_rank(1), None),
        observers=Observers(),
        save=lambda progress: None,
    )


def _agree(config: Config, dataset: Dataset, runtime: Runtime) -> Sampler:
    """Raise if ranks disagree on the run, or if it cannot work. Every rank."""
    runtime.agree({**saving.versions(), "data": dataset.sha256})
    settings = dict(flatten(config.model_dump(mode="json", exclude={"data": {"root"}})))
    runtime.agree({key: str(settings.get(key, "absent")) for key in all_keys()})  # as many on every rank
    config.train.split_batch(runtime.ranks)
    return Sampler(images=len(dataset.train), global_batch=config.train.global_batch, seed=config.train.seed)


def _build(config: Config, dataset: Dataset, runtime: Runtime) -> tuple[nn.Module, Ddp | Exact, torch.optim.Optimizer]:
    """Build the network, the way its gradients are reduced, and its optimizer. Every rank."""
    torch.manual_seed(config.train.seed)
    size, channels = config.data.image_size, config.data.channels
    model = build_model(
        config.model.name,
        classes=len(dataset.classes),
        channels=channels,
        image_size=size,
        dropout=config.model.dropout,
    )
    kind = Exact if config.train.reduction == "exact" else Ddp
    reduction = kind(runtime, model, global_batch=config.train.global_batch)
    reduction.warm_up(torch.zeros(1, channels, size, size, device=runtime.device))
    if config.train.compile:
        refuse_without_compiler(runtime.device.type)
        reduction.model = cast("nn.Module", torch.compile(reduction.model))  # evaluation stays as it is
    optimizer = build_optimizer(config.optimizer, model.parameters(), fused=runtime.precision.value != "fp16")
    return model, reduction, optimizer


def _batches(config: Config, dataset: Dataset, runtime: Runtime) -> dict[str, Batches]:
    """Build the batches of every split. Every rank: all keep their pixels in the same kind of memory."""
    stored = {id(split.stored): split.stored for split in dataset.splits.values()}
    needed, free = bytes_of(stored.values()), -runtime.maximum(-runtime.free_bytes())
    residency = choose_residency(
        config.data.residency, device=runtime.device.type, needed_bytes=needed, least_free_bytes=free
    )
    gathers = {key: Gather(split, runtime.device, residency) for key, split in stored.items()}
    return {
        name: Batches(
            split,
            mean=dataset.mean,
            std=dataset.std,
            device=runtime.device,
            gather=gathers[id(split.stored)],
            augmentation=config.data.augment if name == "train" else None,
            seed=config.train.seed,
        )
        for name, split in dataset.splits.items()
    }


def _train(parts: Parts, progress: Progress, folder: RunFolder) -> Result:
    """Run the loop and write its result. Every rank."""
    with signals.deferred():  # until the result is written too
        try:
            loop.train(parts, progress)
        except BaseException as raised:
            error = _told(raised, parts, folder)
            stopped = isinstance(error, StoppedError | KeyboardInterrupt | SystemExit)
            with contextlib.suppress(OSError):  # the disk may be full, and the first error is the one to show
                saving.write_result(parts, progress, folder, "stopped" if stopped else "failed", error)
            if error is raised:
                raise
            raise error from (None if stopped else raised)
        result = saving.write_result(parts, progress, folder, "finished")
    parts.observers.result(result)
    return result


def _told(error: BaseException, parts: Parts, folder: RunFolder) -> BaseException:
    """Return an error with what the user needs to know of this run; the same error if there is nothing to add."""
    if (refusal := memory.refusal_of(error)) is not None:
        return DeviceMemoryError(_out_of_memory(parts, refusal))
    if isinstance(error, StoppedError):
        message = f"{str(error).rstrip('.')}: saved; go on with {typed('resume', folder.path)}."
        return StoppedError(message, error.exit_code - 128)
    if isinstance(error, NonFiniteError) and (saved := folder.saved_step()) is not None:
        return NonFiniteError(f"{error} The checkpoint of step {saved} is whole.")
    return error


def _out_of_memory(parts: Parts, refusal: memory.Refusal) -> str:
    options, runtime = parts.config.train, parts.runtime
    if refusal != "tensors":
        return f"{runtime.device}: {memory.WORDS[refusal]}"
    micro_batch, _ = options.split_batch(runtime.ranks)
    what = f"{runtime.device} has not enough memory for micro-batches of {micro_batch} images"
    if micro_batch == 1:
        return f"{what}: set data.image_size lower, or take a smaller network."
    same = f"each step still takes train.global_batch {options.global_batch} images"
    # Dropout is keyed by step and micro-batch.
    change = "other dropout is drawn, as with another seed" if parts.config.model.dropout else "only rounding changes"
    return f"{what}: set train.micro_batch lower ({same}; {change})."


def _settle(resolved: Resolved, runtime: Runtime) -> Resolved:
    """Replace the precision that was left to the hardware by the chosen one: it decides on the bits of the run."""
    options, value = resolved.config.train, runtime.precision.value
    if options.precision == value:
        return resolved
    config = resolved.config.model_copy(update={"train": options.model_copy(update={"precision": value})})
    origin = f"{options.precision}: {runtime.precision.reason}"
    return Resolved(config=config, origins={**resolved.origins, "train.precision": origin})


def _choose_threads(config: Config, runtime: Runtime, cpus: Cpus, warn: Callable[[str], None]) -> Chosen:
    """Choose the threads of each rank where the config leaves them open. Every rank."""
    options, given = config.train, runtime.threads
    if runtime.rank == 0 and runtime.device.type == "cpu":
        warning = crowded_by_itself(options.fixed_threads, os.environ, cpus)
        if warning:
            warn(warning)
    if options.fixed_threads is not None:
        return Chosen(threads=given, reason="as asked" if options.threads else "as exact needs")
    if runtime.device.type != "cpu":
        return Chosen(threads=given, reason="")
    # The least that any rank has seen: a rank that decoded images looks like another program to the others.
    others = -runtime.maximum(-round(100 * others_since_prepare(cpus.ranks))) / 100
    chosen = choose(config, cpus, ranks=runtime.ranks, most=given, others=others)
    least = -runtime.maximum(-chosen.threads)  # one number is saved, with which all go on after a resume
    if least < chosen.threads:
        chosen = Chosen(threads=least, reason="as many as fit for every rank")
    runtime.set_threads(chosen.threads)
    return chosen


def _keep_threads(config: Config, runtime: Runtime, progress: Progress, chosen: Chosen) -> Chosen:
    """Keep the threads that a resumed run chose for as many ranks: its bits depend on them. Every rank."""
    if config.train.fixed_threads is not None or runtime.device.type != "cpu":
        progress.threads = progress.ranks = None
        return chosen
    if progress.threads not in (None, chosen.threads) and progress.ranks in (None, runtime.ranks):
        runtime.set_threads(progress.threads)
        chosen = Chosen(threads=progress.threads, reason="as before")
    progress.threads, progress.ranks = chosen.threads, runtime.ranks
    return chosen


def _observe(
    folder: RunFolder,
    resolved: Resolved,
    dataset: Dataset,
    console: Console,
    stack: contextlib.ExitStack,
    *,
    first_step: int,
) -> Observers:
    """Start observing until the stack is undone. Rank 0 alone."""
    observers = watch(
        Watched(
            console=console,
            journal=folder.metrics,
            tensorboard=folder.tensorboard,
            resolved=resolved,
            dataset=dataset,
            first_step=first_step,
        )
    )
    stack.callback(observers.close)
    return observers


def _plan(parts: Parts, folder: RunFolder, *, first_step: int, threads_reason: str) -> Plan:
    config, dataset, runtime = parts.config, parts.dataset, parts.runtime
    micro_batch, accumulation = config.train.split_batch(runtime.ranks)
    place = "" if runtime.device.type == "cpu" else f"; pixels in {parts.batches['train'].residency} memory"
    return Plan(
        run=str(folder.path),
        device=runtime.device_choice.value,
        device_reason=runtime.device_choice.reason,
        precision=runtime.precision.value,
        precision_reason=runtime.precision.reason,
        ranks=runtime.ranks,
        threads=runtime.threads,
        threads_reason=threads_reason,
        global_batch=config.train.global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        reduction=config.train.reduction,
        first_step=first_step,
        total_steps=config.train.total_steps(len(dataset.train)),
        epochs=config.train.epochs,
        model=config.model.name,
        parameters=count_parameters(parts.model),
        optimizer=f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        schedule=config.schedule.name,
        augmentation=", ".join(f"{name} {value:g}" for name, value in config.data.augment if value) or "none",
        data=dataset.root,
        classes=dataset.classes,
        train_images=len(dataset.train),
        validation_images=len(dataset.validation) if dataset.validation else 0,
        test_images=len(dataset.test) if dataset.test else 0,
        store=dataset.state + place,
        graph=graph.describe(parts),
    )
