"""What a run keeps in its folder, and how it comes back to it: config, environment, checkpoints, result."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from mnist_dist import checkpoint
from mnist_dist.config import Resolved
from mnist_dist.data import Dataset
from mnist_dist.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from mnist_dist.folder import RunFolder, write_json
from mnist_dist.observe.output import print_line
from mnist_dist.parts import Parts
from mnist_dist.progress import Progress
from mnist_dist.reports import Result
from mnist_dist.runtime import Runtime

CHECKPOINT_FILES = ("meta.json", "model.safetensors", "optimizer.safetensors")


def refuse_run_elsewhere(folder: RunFolder, runtime: Runtime) -> None:
    """Make sure that a run which is to go on lies where rank 0 can read it. Every rank.

    Raises:
        ConfigError: Another rank's machine has it, and rank 0's has not: it would begin anew there.
    """
    is_here = folder.config.exists()
    owner = runtime.maximum((runtime.rank + 1) * is_here) - 1
    if owner > 0 and not runtime.broadcast(is_here):
        raise ConfigError(
            f"The run {folder.path} lies on the machine of rank {owner}, and not on that of rank 0, which alone reads "
            f"it: keep runs on a disk that all machines share, or see to it that the same machine has rank 0 again."
        )


def open_folder(
    folder: RunFolder,
    resolved: Resolved,
    runtime: Runtime,
    dataset: Dataset,
    stack: contextlib.ExitStack,
    console: Console | None,
) -> None:
    """Make the run folder or come back to it, and lock it until the stack is undone. Rank 0 alone.

    Args:
        folder: It must be new, unless there is a console.
        resolved: Saved in a new folder.
        runtime: Described in `environment.json`.
        dataset: Likewise.
        stack: Releases the lock.
        console: Of a run that may be resumed: told what has changed that decides on its bits.
    """
    if console is None:
        folder.check_new()
    stack.callback(folder.lock().release)
    if not folder.config.exists():
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
        "versions": versions(),
    }
    if console is not None and folder.environment.exists():
        _warn_of_changes(json.loads(folder.environment.read_text(encoding="utf-8")), environment, console)
    write_json(folder.environment, environment)


def _warn_of_changes(was: dict[str, Any], now: dict[str, Any], console: Console) -> None:
    """Say what is not as it was, of all that decides on a run's bits besides its config."""
    facts = [(name, was.get(name), now[name]) for name in ("device_name", "precision", "ranks")]
    facts += [(name, was["versions"].get(name), version) for name, version in now["versions"].items()]
    for name, before, after in facts:
        if before != after:
            text = f"warning: {name} is {after}, and was {before}: the run goes on, but perhaps with other rounding"
            print_line(console, text)


def take_weights(run: Path, model: nn.Module, runtime: Runtime) -> None:
    """Start from another run's last weights. Every rank."""

    def read() -> bytes:
        RunFolder(run).check_run()
        path = checkpoint.find(RunFolder(run).checkpoints, "last")
        checkpoint.verify(path)
        return (path / "model.safetensors").read_bytes()

    checkpoint.restore_model(runtime.broadcast_bytes(runtime.on_first_rank(read) or b""), model, run)


def restore(
    folder: RunFolder,
    dataset: Dataset,
    runtime: Runtime,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    console: Console,
) -> Progress:
    """Take up the newest whole checkpoint, and forget what came after it. Every rank.

    Rank 0 reads and hands on, so that the others need no shared disk.

    Raises:
        CheckpointError: It is of another network or of other classes.
        DataError: It was trained on other pictures.
    """

    def read() -> dict[str, bytes]:
        path = checkpoint.newest_whole(folder.checkpoints, lambda line: print_line(console, f"warning: {line}"))
        return {} if path is None else {name: (path / name).read_bytes() for name in CHECKPOINT_FILES}

    files = runtime.on_first_rank(read) or {}
    meta_json, weights, state = (runtime.broadcast_bytes(files.get(name, b"")) for name in CHECKPOINT_FILES)
    if not meta_json:
        runtime.on_first_rank(lambda: folder.cut_back({}))
        return Progress()
    meta = json.loads(meta_json)
    if tuple(meta["classes"]) != dataset.classes:
        raise CheckpointError(
            f"{folder.path} was trained on other classes than {dataset.root} has: give it its own data."
        )
    if meta["data_sha256"] != dataset.sha256:
        raise DataError(
            f"The pictures in {dataset.root} are not those that {folder.path} was trained on: restore them, or start "
            f"a new run, with --init-from {folder.path} if you want its weights."
        )
    checkpoint.restore_model(weights, model, folder.path)
    checkpoint.restore_optimizer(state, optimizer, model)
    runtime.restore_scaler(meta["scaler"])
    runtime.on_first_rank(lambda: folder.cut_back(meta["sizes"]))  # a refused resume has changed nothing of it
    return Progress.from_json(meta["progress"])


def save(folder: RunFolder, parts: Parts, progress: Progress) -> None:
    """Write a checkpoint and remove those that are no longer wanted. Every rank.

    Raises:
        NonFiniteError: A weight is infinite or not a number; nothing is written.
        StorageError: The disk is full or read-only; earlier checkpoints are whole.
    """
    if not all(bool(weights.isfinite().all()) for weights in parts.model.state_dict().values()):
        raise NonFiniteError(
            f"After step {progress.step} there are weights that are not finite: a lower optimizer.learning_rate or "
            f"train.clip_norm usually helps."
        )

    def write() -> None:
        meta: dict[str, Any] = {
            "progress": progress.to_json(),
            "sizes": parts.observers.sizes(),
            "scaler": parts.runtime.scaler_state(),
            "classes": parts.dataset.classes,
            "model": parts.config.model.model_dump(),
            "preprocessing": {
                "image_size": parts.config.data.image_size,
                "channels": parts.config.data.channels,
                "mean": parts.dataset.mean,
                "std": parts.dataset.std,
            },
            "data_sha256": parts.dataset.sha256,
            "versions": versions(),
        }
        checkpoint.write(folder.checkpoints, progress.step, parts.model, parts.optimizer, meta)
        best = int(progress.best["step"]) if progress.best else None
        checkpoint.prune(folder.checkpoints, keep=parts.config.checkpoint.keep, best=best)

    parts.runtime.on_first_rank(write)


def write_result(
    parts: Parts,
    progress: Progress,
    folder: RunFolder,
    status: Literal["finished", "stopped", "failed"],
    error: BaseException | None = None,
) -> Result:
    """Make the run's result and, on rank 0, write it."""
    last, images = progress.last, parts.sampler.images
    result = Result(
        status=status,
        run=str(folder.path),
        step=progress.step,
        epochs=progress.step * parts.config.train.global_batch / images,
        seconds=progress.seconds,
        evaluated=f"{last.test_images}/{len(parts.dataset.test)}" if last else None,
        metrics=last.metrics() if last else {},
        best=progress.best,
        weights_sha256=checkpoint.weights_sha256(parts.model) if status == "finished" else None,
        error=f"{type(error).__name__}: {error}" if error else None,
    )
    if parts.runtime.rank == 0:
        folder.write_result(result)
    return result


def versions() -> dict[str, str]:
    """Tell the versions of all that a run's bits depend on."""
    packages = ("mnist-dist", "torch", "accelerate", "numpy", "safetensors")
    return {"Python": platform.python_version(), **{package: version(package) for package in packages}}
