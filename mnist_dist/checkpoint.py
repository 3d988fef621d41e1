"""Checkpoints: safetensors and JSON alone, whole or not there at all.

A checkpoint is the folder `step-00000938` with `model.safetensors`, `optimizer.safetensors`, `meta.json` and
`MANIFEST.json`, which has the SHA-256 of the others. It is written under a temporary name: each file is synced,
the manifest last, then the folder, then it is renamed and its parent synced. Only then are older ones removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from mnist_dist import heartbeat
from mnist_dist.errors import CheckpointError

FORMAT = 1
MANIFEST = "MANIFEST.json"


def write(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint so that after any kill it is there whole or not at all. Rank 0 alone.

    Args:
        folder: The run's `checkpoints`.
        step: Steps done.
        model: Unwrapped.
        optimizer: Of the model's parameters, in their order.
        meta: JSON types: whatever else a resume needs.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: The disk is full or read-only; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:08}"
    temporary = folder / f"writing-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    contents = {
        "model.safetensors": dump_tensors(_to_host(model.state_dict())),
        "optimizer.safetensors": dump_tensors(_to_host(_flatten(optimizer, model))),
        "meta.json": _to_json({"format": FORMAT, "step": step, **meta}),
    }
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, content in (contents | {MANIFEST: _to_json(manifest)}).items():
        with (temporary / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        heartbeat.beat()
    _sync_folder(temporary)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync_folder(folder)
    return final


def prune(folder: Path, *, keep: int, best: int | None) -> None:
    """Remove all but the `keep` newest checkpoints and the one of step `best`. Rank 0 alone."""
    for path in steps(folder)[:-keep]:
        if best is None or _step_of(path) != best:
            shutil.rmtree(path)


def steps(folder: Path) -> list[Path]:
    """List the checkpoints of a run, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def find(folder: Path, which: str) -> Path:
    """Find one checkpoint.

    Args:
        folder: The run's `checkpoints`.
        which: `last`, `best` or a step.

    Raises:
        CheckpointError: There is none, or not that one.
    """
    found = steps(folder)
    if not found:
        raise CheckpointError(f"{folder} has no checkpoint yet: the first is written when an epoch ends.")
    if which == "last":
        return found[-1]
    if which == "best":
        best = read_meta(found[-1])["progress"]["best"]
        if best is None:
            raise CheckpointError(
                "There is no best checkpoint: it needs validation pictures (a `val` folder, or "
                "data.validation_fraction). Use --checkpoint last."
            )
        which = str(best["step"])
    for path in found:
        if which.isdecimal() and _step_of(path) == int(which):
            return path
    available = ", ".join(str(_step_of(path)) for path in found)
    raise CheckpointError(f"There is no checkpoint {which!r} in {folder}: use best, last or one of {available}.")


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: A file is missing or differs.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        damaged = [name for name, digest in manifest.items() if _sha256(path / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint {path} is not whole: {error}. Use another one.") from None
    if damaged:
        raise CheckpointError(f"The checkpoint {path} is damaged: {', '.join(damaged)} differ. Use another one.")


def read_meta(path: Path) -> dict[str, Any]:
    """Read a checkpoint's `meta.json`.

    Raises:
        CheckpointError: It is missing or no JSON.
    """
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}. Use another one.") from None
    return meta


def newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Find the newest checkpoint that is whole; damaged ones are moved aside. Rank 0 alone.

    Args:
        folder: The run's `checkpoints`.
        warn: Gets a line for each that is moved aside.
    """
    for path in reversed(steps(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            aside = path.with_name(f"corrupt-{path.name}-{time.time_ns()}")
            path.rename(aside)
            warn(f"{error} It was moved to {aside}.")
        else:
            return path
    return None


def load_model(path: Path, model: nn.Module) -> None:
    """Fill a network with a checkpoint's weights, after verifying it.

    Raises:
        CheckpointError: It is damaged, or of another network.
    """
    verify(path)
    restore_model((path / "model.safetensors").read_bytes(), model, path)


def restore_model(content: bytes, model: nn.Module, path: Path) -> None:
    """Fill a network with the bytes of a `model.safetensors`; `path` is for the message.

    Raises:
        CheckpointError: They are of another network.
    """
    weights = load_tensors(content)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"The checkpoint {path} is of another network: {reason}") from None


def restore_optimizer(content: bytes, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give an optimizer the state in the bytes of an `optimizer.safetensors`."""
    indices = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_tensors(content).items():
        name, _, slot = key.rpartition("/")
        state.setdefault(indices[name], {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def weights_sha256(model: nn.Module) -> str:
    """Hash a network's weights: over name, dtype, shape and raw bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_to_host(model.state_dict()).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flatten(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Name an optimizer's tensors by parameter and slot, e.g. `fc1.weight/momentum_buffer`."""
    names = [name for name, _ in model.named_parameters()]
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{slot}": value
        for index, slots in state.items()
        for slot, value in slots.items()
        if isinstance(value, Tensor)
    }


def _to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _to_json(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sync_folder(folder: Path) -> None:
    """Make a folder's entries last; Windows can't and needn't."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
