"""Write and restore what a run folder holds: config, environment, checkpoints, result."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mnist_dist.config import Resolved
from mnist_dist.data import Dataset
from mnist_dist.disk.storage import write_whole
from mnist_dist.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from mnist_dist.observe.records import EpochReport, Result
from mnist_dist.run import checkpoint
from mnist_dist.run.checkpoint_files import TENSOR_FILES, Meta, damaged, free_name, steps
from mnist_dist.run.folder import RunFolder, config_content
from mnist_dist.runtime import Runtime
from mnist_dist.training.parts import Parts
from mnist_dist.training.state import Progress


def refuse_run_elsewhere(folder: RunFolder, runtime: Runtime) -> None:
    """Raise if rank 0 cannot read the run that is resumed. Every rank.

    Raises:
        ConfigError: Another rank's machine has it, and rank 0's has not: it would begin anew there.
    """
    is_here = folder.config.exists()
    owner = runtime.maximum((runtime.rank + 1) * is_here) - 1
    if owner > 0 and not runtime.broadcast(is_here):
        raise ConfigError(
            f"The run {folder.path} is on the machine of rank {owner} and not on that of rank 0, which reads it: "
            f"keep runs on a disk that all machines share, or start rank 0 on the same machine again."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A run folder that this process group has claimed."""

    is_new: bool
    """Whether there is no run in it yet."""
    config: bytes
    """Of a new run: what `config.yaml` will be."""
    config_sha256: str


def claim_folder(folder: RunFolder, stack: contextlib.ExitStack, *, resume: bool) -> None:
    """Create or reopen the run folder, and lock it until the stack closes. Rank 0 alone.

    Args:
        folder: It must be new, unless `resume`.
        stack: Releases the lock.
        resume: Whether a run may be there already.
    """
    if not resume:
        folder.check_new()
    stack.callback(folder.lock().release)
    if not resume:
        folder.refuse_run()  # another process may have been quicker


def open_folder(
    folder: RunFolder,
    resolved: Resolved,
    runtime: Runtime,
    dataset: Dataset,
    init_from: Path | None,
    warn: Callable[[str], None],
) -> Opened:
    """Read what a claimed run folder holds, and describe this machine in it. Rank 0 alone.

    A new folder becomes a run with its `config.yaml`, which is written last (`begin`): a kill before that leaves
    nothing that a resume could take for another run.

    Args:
        folder: Claimed.
        resolved: The config of a new run.
        runtime: Described in `environment.json`.
        dataset: Described there too.
        init_from: The run whose weights a new run begins with.
        warn: Gets a line for each change since the run was there that can alter its bits.

    Raises:
        CheckpointError: The config of the run that is there is damaged or edited.
    """
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
        "data_root": str(Path(dataset.root).absolute()) if Path(dataset.root).is_dir() else dataset.root,
        "data_sha256": dataset.sha256,
        "versions": versions(),
    }
    is_new = not folder.holds_run()
    if is_new:
        content, digest = config_content(resolved.to_yaml(), str(init_from.absolute()) if init_from else None)
        for path in steps(folder.initial).values():
            free_name(path)  # weights of step 0, of a run that was killed before it began
    else:
        folder.check_run()
        content, digest = b"", folder.config_sha256()
        _warn_of_changes(folder.read_environment(warn), environment, warn)
    folder.write_environment(environment)
    return Opened(is_new=is_new, config=content, config_sha256=digest)


def begin(folder: RunFolder, opened: Opened | None) -> None:
    """Write a new run's config, which makes the folder a run. Rank 0 alone."""
    assert opened is not None
    write_whole(folder.config, opened.config)


def _warn_of_changes(was: dict[str, Any], now: dict[str, Any], warn: Callable[[str], None]) -> None:
    """Warn about each environment change that can alter the run's bits."""
    former = was.get("versions")
    versions_then = former if isinstance(former, dict) else {}
    facts = [(name, was.get(name), now[name]) for name in ("device_name", "precision", "ranks")]
    facts += [(name, versions_then.get(name), version) for name, version in now["versions"].items()]
    for name, before, after in facts:
        if before != after and isinstance(before, str | int):
            warn(f"{name} is {after}, and was {before}: the run goes on, but perhaps with other rounding")


def take_weights(run: Path, model: nn.Module, runtime: Runtime) -> None:
    """Fill a network with another run's last weights. Every rank."""

    def read() -> bytes:
        RunFolder(run).check_run()
        return checkpoint.read_weights(checkpoint.find(RunFolder(run).checkpoints, "last"), model)

    checkpoint.restore_model(runtime.broadcast_bytes(runtime.on_first_rank(read) or b""), model, run)


def restore(folder: RunFolder, opened: Opened | None, parts: Parts, warn: Callable[[str], None]) -> Progress:
    """Load the newest whole checkpoint, and remove what was written after it. Every rank.

    Rank 0 reads and hands on, so that the others need no shared disk.

    Args:
        folder: The run's.
        opened: Rank 0 alone has it.
        parts: The network and its optimizer are filled.
        warn: Gets a line for each file that is not as it was.

    Raises:
        CheckpointError: It is of another network, of other classes or of another config.
        DataError: It was trained on other images.
        StorageError: A checkpoint cannot be read now; nothing has changed.
    """
    dataset, runtime, model, optimizer = parts.dataset, parts.runtime, parts.model, parts.optimizer

    def read() -> dict[str, bytes]:
        assert opened is not None  # rank 0
        refuse_unfit = partial(checkpoint.refuse_unfit, model=model, optimizer=optimizer)
        homes = (folder.checkpoints, folder.initial)
        found = (checkpoint.newest_whole(home, warn, refuse_unfit=refuse_unfit) for home in homes)
        path = next(filter(None, found), None)
        if path is None:
            _begin_again(folder, warn)
            return {}
        meta = checkpoint.read_meta(path)
        if meta.config_sha256 not in (None, opened.config_sha256):
            raise CheckpointError(folder.altered_config())
        refuse_unfit(path)
        tensors = {name: checkpoint.read_tensors(path, name) for name in TENSOR_FILES}
        return {"meta.json": meta.to_json(), **tensors}

    files = runtime.on_first_rank(read) or {}
    meta_json, weights, state = (runtime.broadcast_bytes(files.get(name, b"")) for name in ("meta.json", *TENSOR_FILES))
    if not meta_json:
        runtime.on_first_rank(lambda: folder.cut_back({}))
        return Progress()
    meta = Meta.from_json(meta_json)
    if meta.classes != dataset.classes:
        raise CheckpointError(
            f"{folder.path} was trained on other classes than {dataset.root} has: give it its own data."
        )
    if meta.data_sha256 != dataset.sha256:
        raise DataError(
            f"The images in {dataset.root} are not those that {folder.path} was trained on: restore them, or start "
            f"a new run, with --init-from {folder.path} if you want its weights."
        )
    progress = _progress(meta, folder, parts.config.train.total_steps(parts.sampler.images))
    checkpoint.restore_model(weights, model, folder.path)
    checkpoint.restore_optimizer(state, optimizer, model, folder.path)
    runtime.restore_scaler(meta.scaler)
    # A refused resume has changed nothing of it.
    for line in runtime.on_first_rank(lambda: folder.cut_back(meta.sizes, meta.journal_sha256)) or ():
        warn(line)
    return progress


def _begin_again(folder: RunFolder, warn: Callable[[str], None]) -> None:
    """Announce that a run starts again from step 0.

    Raises:
        CheckpointError: It cannot: it began with another run's weights, which are lost.
    """
    damaged_ones = [path.name for path in damaged(folder.checkpoints)]
    origin = folder.began_with()
    if origin is not None:
        raise CheckpointError(
            f"{folder.path} began with the weights of {origin}, and no checkpoint of it is whole: start a new run with "
            f"--init-from."
        )
    if damaged_ones:
        warn(
            f"No checkpoint in {folder.checkpoints} is whole: the run begins again at step 0. "
            f"({', '.join(damaged_ones)} stay there.)"
        )
    else:
        warn(f"{folder.path} has no checkpoint yet: it begins again at step 0.")


def _progress(meta: Meta, folder: RunFolder, total_steps: int) -> Progress:
    try:
        progress = Progress.from_json(meta.progress)
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"A checkpoint in {folder.path} is not valid: {reason}.") from None
    if progress.step != meta.step or progress.step > total_steps:
        raise CheckpointError(
            f"A checkpoint in {folder.path} of step {meta.step} says that {progress.step} of {total_steps} steps are "
            f"done: use another one."
        )
    return progress


def save(
    folder: RunFolder, parts: Parts, progress: Progress, *, config_sha256: str, warn: Callable[[str], None]
) -> None:
    """Write a checkpoint and remove the old ones. Every rank.

    Args:
        folder: The run's.
        parts: The network, its optimizer, and what else a checkpoint tells of.
        progress: Where the run stands.
        config_sha256: Of the run's config.
        warn: Gets a line for each old checkpoint that cannot be removed.

    Raises:
        NonFiniteError: A weight is infinite or not a number; nothing is written.
        StorageError: The disk is full or read-only; earlier checkpoints are whole.
    """
    if not all(bool(weights.isfinite().all()) for weights in parts.model.state_dict().values()):
        raise NonFiniteError(
            f"Some weights are not finite after step {progress.step}: a lower optimizer.learning_rate or "
            f"train.clip_norm usually helps."
        )

    def write() -> None:
        meta: dict[str, Any] = {
            "progress": progress.to_json(),
            "sizes": parts.observers.sizes(),
            "journal_sha256": parts.observers.journal_sha256(),
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
            "config_sha256": config_sha256,
            "versions": versions(),
        }
        home = folder.checkpoints if progress.step else folder.initial
        checkpoint.write(home, progress.step, parts.model, parts.optimizer, meta)
        best = int(progress.best["step"]) if progress.best else None
        checkpoint.prune(folder.checkpoints, keep=parts.config.checkpoint.keep, best=best, warn=warn)

    parts.runtime.on_first_rank(write)


def write_result(
    parts: Parts,
    progress: Progress,
    folder: RunFolder,
    status: Literal["finished", "stopped", "failed"],
    error: BaseException | None = None,
) -> Result:
    """Build the run's result and, on rank 0, write it."""
    last, images = progress.last, parts.sampler.images
    result = Result(
        status=status,
        run=str(folder.path),
        step=progress.step,
        epochs=progress.step * parts.config.train.global_batch / images,
        seconds=progress.seconds,
        evaluated=_evaluated(last, parts.dataset) if last else None,
        metrics=last.metrics() if last else {},
        best=progress.best,
        weights_sha256=checkpoint.weights_sha256(parts.model) if status == "finished" else None,
        error=f"{type(error).__name__}: {error}" if error else None,
    )
    if parts.runtime.rank == 0:
        folder.write_result(result)
    return result


def _evaluated(last: EpochReport, dataset: Dataset) -> str:
    """Return how many images of the reported split were counted, and of how many; a wrong count ends a run before."""
    images = len(dataset.reported)
    return f"{last.test_images if dataset.test else images}/{images}"


def versions() -> dict[str, str]:
    """Return the versions of everything that the run's bits depend on."""
    packages = ("mnist-dist", "torch", "accelerate", "numpy", "safetensors")
    return {"Python": platform.python_version(), **{package: version(package) for package in packages}}
