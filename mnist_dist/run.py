"""Builds the parts of a run from its config and runs them: the one place that knows all parts."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from mnist_dist import checkpoint
from mnist_dist import train as loop
from mnist_dist.config import Config, Resolved
from mnist_dist.data import Dataset, Sampler, open_dataset
from mnist_dist.data.transforms import Batches
from mnist_dist.errors import DeviceMemoryError
from mnist_dist.folder import RunFolder, default_run_folder, write_json
from mnist_dist.models import build_model, count_parameters
from mnist_dist.observe import Observers
from mnist_dist.observe.console import TrainingConsole
from mnist_dist.observe.journal import Journal
from mnist_dist.observe.tensorboard import TensorBoard
from mnist_dist.optim import build_optimizer
from mnist_dist.reports import EpochReport, Plan, Result
from mnist_dist.runtime import Runtime, start


def train(resolved: Resolved, *, run: Path | None = None, console: Console | None = None) -> Result:
    """Train in this process, together with the other ranks where the environment describes a group.

    Args:
        resolved: The experiment, from `mnist_dist.config.load`.
        run: A new folder for everything that the run writes; None makes one below `runs/`.
        console: Where rank 0 shows what happens; None is standard output, `Console(quiet=True)` shows nothing.

    Returns:
        What `result.json` says.

    Raises:
        MnistDistError: Its kind says what went wrong; `result.json` says so too if training had begun.
    """
    console = console or Console()
    options = resolved.config.train
    dataset = open_dataset(
        resolved.config.data, seed=options.seed, announce=lambda line: console.print(line, soft_wrap=True)
    )
    with (
        start(device=options.device, precision=options.precision, threads=options.threads) as runtime,
        contextlib.ExitStack() as stack,
    ):
        resolved = _settle(resolved, runtime)
        runtime.agree({"config": resolved.to_yaml(), "data": dataset.sha256, **_versions()})
        options.split_batch(runtime.ranks)
        sampler = Sampler(images=len(dataset.train), global_batch=options.global_batch, seed=options.seed)
        folder = RunFolder(Path(runtime.broadcast(str(run or default_run_folder("run")))))
        observers = runtime.on_first_rank(lambda: _open_folder(folder, resolved, runtime, dataset, console, stack))
        return _train(resolved.config, dataset, sampler, runtime, folder, observers or Observers())


def _train(
    config: Config,
    dataset: Dataset,
    sampler: Sampler,
    runtime: Runtime,
    folder: RunFolder,
    observers: Observers,
) -> Result:
    torch.manual_seed(config.train.seed)
    model = build_model(
        config.model.name,
        classes=len(dataset.classes),
        channels=config.data.channels,
        image_size=config.data.image_size,
        dropout=config.model.dropout,
    )
    prepared = runtime.prepare(model)
    optimizer = build_optimizer(config.optimizer, model.parameters(), fused=runtime.precision.value != "fp16")
    keeper = _Keeper(config, dataset, runtime, folder, model, optimizer)
    parts = loop.Parts(
        config=config,
        dataset=dataset,
        runtime=runtime,
        sampler=sampler,
        batches={
            name: Batches(
                split,
                mean=dataset.mean,
                std=dataset.std,
                device=runtime.device,
                augmentation=config.data.augment if name == "train" else None,
                seed=config.train.seed,
            )
            for name, split in dataset.splits.items()
        },
        model=prepared,
        optimizer=optimizer,
        observers=observers,
        save=keeper.save,
    )
    observers.plan(_plan(config, dataset, runtime, folder, count_parameters(model)))
    try:
        loop.train(parts)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        with contextlib.suppress(OSError):  # the disk may be full, and the first error is the one to show
            keeper.write_result("stopped" if stopped else "failed", error=f"{type(error).__name__}: {error}")
        if _is_out_of_memory(error):
            micro_batch, _ = config.train.split_batch(runtime.ranks)
            raise DeviceMemoryError(
                f"{runtime.device} has not enough memory for micro-batches of {micro_batch} pictures: set "
                f"train.micro_batch lower (the result stays that of train.global_batch {config.train.global_batch})."
            ) from error
        raise
    result = keeper.write_result("finished")
    observers.result(result)
    return result


class _Keeper:
    """Keeps what a run leaves behind: checkpoints and `result.json`."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        runtime: Runtime,
        folder: RunFolder,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._config, self._dataset, self._runtime, self._folder = config, dataset, runtime, folder
        self._model, self._optimizer = model, optimizer
        self._started = time.perf_counter()
        self._last: EpochReport | None = None
        self._best: dict[str, float] | None = None

    def save(self, report: EpochReport) -> None:
        """Write a checkpoint and remove those no longer wanted. Every rank."""
        self._last = report
        accuracy = report.validation_accuracy
        if accuracy is not None and (self._best is None or accuracy > self._best["validation_accuracy"]):
            self._best = {"epoch": report.epoch, "step": report.step, "validation_accuracy": accuracy}
        self._runtime.on_first_rank(lambda: self._write(report))

    def write_result(self, status: Literal["finished", "stopped", "failed"], error: str | None = None) -> Result:
        """Make the run's result and, on rank 0, write it."""
        last = self._last
        result = Result(
            status=status,
            run=str(self._folder.path),
            step=last.step if last else 0,
            epochs=last.step * self._config.train.global_batch / len(self._dataset.train) if last else 0,
            seconds=time.perf_counter() - self._started,
            evaluated=f"{last.test_images}/{len(self._dataset.test)}" if last else None,
            metrics=last.metrics() if last else {},
            best=self._best,
            weights_sha256=checkpoint.weights_sha256(self._model) if status == "finished" else None,
            error=error,
        )
        if self._runtime.rank == 0:
            self._folder.write_result(result)
        return result

    def _write(self, report: EpochReport) -> None:
        data, folder = self._config.data, self._folder.checkpoints
        meta: dict[str, Any] = {
            "epoch": report.epoch,
            "metrics": report.metrics(),
            "best": self._best,
            "seconds": time.perf_counter() - self._started,
            "scaler": self._runtime.scaler_state(),
            "classes": self._dataset.classes,
            "model": self._config.model.model_dump(),
            "preprocessing": {
                "image_size": data.image_size,
                "channels": data.channels,
                "mean": self._dataset.mean,
                "std": self._dataset.std,
            },
            "data_sha256": self._dataset.sha256,
            "versions": _versions(),
        }
        checkpoint.write(folder, report.step, self._model, self._optimizer, meta)
        best = int(self._best["step"]) if self._best else None
        checkpoint.prune(folder, keep=self._config.checkpoint.keep, best=best)


def _settle(resolved: Resolved, runtime: Runtime) -> Resolved:
    """Replace what was left to the hardware by what was chosen: it decides on the bits of the run."""
    chosen = {
        "precision": (runtime.precision.value, runtime.precision.reason),
        "threads": (runtime.threads, "what this process was given"),
    }
    options, origins = resolved.config.train, dict(resolved.origins)
    changed = {name: value for name, (value, _) in chosen.items() if getattr(options, name) != value}
    for name in changed:
        origins[f"train.{name}"] = f"{getattr(options, name) or 'default'}: {chosen[name][1]}"
    config = resolved.config.model_copy(update={"train": options.model_copy(update=changed)})
    return Resolved(config=config, origins=origins)


def _open_folder(
    folder: RunFolder,
    resolved: Resolved,
    runtime: Runtime,
    dataset: Dataset,
    console: Console,
    stack: contextlib.ExitStack,
) -> Observers:
    """Make the run folder, lock it and start observing; all is undone with the stack. Rank 0 alone."""
    folder.check_new()
    stack.callback(folder.lock().release)
    folder.config.write_text(resolved.to_yaml(), encoding="utf-8")
    environment = {
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": runtime.device_choice.value,
        "device_name": runtime.device_choice.reason,
        "precision": runtime.precision.value,
        "ranks": runtime.ranks,
        "threads": runtime.threads,
        "data_sha256": dataset.sha256,
        "versions": _versions(),
    }
    write_json(folder.environment, environment)
    page = TensorBoard(folder.tensorboard, config=resolved.config, config_yaml=resolved.to_yaml(), dataset=dataset)
    observers = Observers((TrainingConsole(console), Journal(folder.metrics), page))
    stack.callback(observers.close)
    return observers


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell what CUDA, MPS and the CPU raise when memory runs out."""
    words = ("out of memory", "can't allocate memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _plan(config: Config, dataset: Dataset, runtime: Runtime, folder: RunFolder, parameters: int) -> Plan:
    micro_batch, accumulation = config.train.split_batch(runtime.ranks)
    total_steps = config.train.total_steps(len(dataset.train))
    return Plan(
        run=str(folder.path),
        device=runtime.device_choice.value,
        device_reason=runtime.device_choice.reason,
        precision=runtime.precision.value,
        precision_reason=runtime.precision.reason,
        ranks=runtime.ranks,
        threads=runtime.threads,
        global_batch=config.train.global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        total_steps=total_steps,
        epochs=config.train.epochs,
        model=config.model.name,
        parameters=parameters,
        optimizer=f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        schedule=config.schedule.name,
        augmentation=", ".join(f"{name} {value:g}" for name, value in config.data.augment if value) or "none",
        data=dataset.root,
        classes=dataset.classes,
        train_images=len(dataset.train),
        validation_images=len(dataset.validation) if dataset.validation else 0,
        test_images=len(dataset.test),
        store=dataset.state,
    )


def _versions() -> dict[str, str]:
    packages = ("mnist-dist", "torch", "accelerate", "numpy", "safetensors")
    return {"Python": platform.python_version(), **{package: version(package) for package in packages}}
