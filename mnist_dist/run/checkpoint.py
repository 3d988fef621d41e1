"""Write and read checkpoints: safetensors and JSON, whole or absent.

A checkpoint is written under a temporary name: each file is synced, the manifest last, then the folder, then it is
renamed and its parent synced. Only then are older ones removed. `checkpoint_files` says what it is made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from mnist_dist.disk.storage import (
    ContentError,
    exchange,
    is_real_folder,
    make_folder,
    open_plain,
    read_plain,
    sync_folder,
    write_new,
)
from mnist_dist.errors import CheckpointError, DamagedError
from mnist_dist.group import heartbeat
from mnist_dist.run.checkpoint_files import (
    FORMAT,
    MANIFEST,
    STEP_DIGITS,
    free_name,
    name_of,
    newest_whole,
    prune,
    read_meta,
    remove,
    steps,
    tensor_table,
    verify,
)

__all__ = ["newest_whole", "prune", "read_meta", "steps"]  # with what is defined here


def write(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint so that after any kill it is there whole or not at all. Rank 0 alone.

    Args:
        folder: The run's `checkpoints`.
        step: Steps done.
        model: Unwrapped.
        optimizer: Of the model's parameters, in their order.
        meta: JSON types: everything else that a resume needs.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: The disk is full or read-only; earlier checkpoints are untouched.
    """
    final = folder / name_of(step)
    temporary = folder / f"writing-{final.name}"
    make_folder(folder)
    free_name(temporary)  # left by a kill
    temporary.mkdir()
    contents = {
        "model.safetensors": dump_tensors(_to_host(model.state_dict())),
        "optimizer.safetensors": dump_tensors(_to_host(_flatten(optimizer, model))),
        "meta.json": _to_json({"format": FORMAT, "step": step, **meta}),
    }
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, content in (contents | {MANIFEST: _to_json(manifest)}).items():
        write_new(temporary / name, content)
        heartbeat.beat()
    sync_folder(temporary)
    if is_real_folder(final):  # a run that stopped in an evaluation saves its step again
        _replace(final, temporary)
    else:
        temporary.rename(final)
        sync_folder(folder)
    return final


def _replace(final: Path, temporary: Path) -> None:
    """Put a new checkpoint in the place of one of the same step; at every moment one of them is whole and found."""
    former = temporary
    if not exchange(final, temporary):
        former = final.with_name(f"replaced-{final.name}")  # found by `steps` while there is no other
        free_name(former)  # left by a kill after both renames: `final` is whole
        final.rename(former)
        temporary.rename(final)
    sync_folder(final.parent)
    with contextlib.suppress(OSError):  # `prune` tries again, and warns
        remove(former)


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
        return list(found.values())[-1]
    if which == "best":
        best = read_meta(list(found.values())[-1]).progress.get("best")
        if best is None:
            raise CheckpointError(
                "There is no best checkpoint: it needs validation images (a `val` folder, or "
                "data.validation_fraction). Use --checkpoint last."
            )
        which = str(best.get("step")) if isinstance(best, dict) else repr(best)
    if which.isdecimal() and len(which) <= STEP_DIGITS and int(which) in found:
        return found[int(which)]
    available = ", ".join(map(str, found))
    raise CheckpointError(f"There is no checkpoint {which!r} in {folder}: use best, last or one of {available}.")


def refuse_unfit(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Compare the names, types and shapes of a checkpoint's tensors with a network's, from the files' headers alone.

    What they say of sizes is believed only then. The network may be on the `meta` device.

    Raises:
        DamagedError: A file is missing, or has another length than its header says.
        CheckpointError: It is of another network, or of another optimizer.
        OSError: It cannot be read now.
    """
    wanted = {"model.safetensors": _described(model.state_dict())}
    if optimizer is not None:
        wanted["optimizer.safetensors"] = _slots(optimizer, model)
    for name, tensors in wanted.items():
        try:
            with open_plain(path / name) as file:
                table, size = tensor_table(file)
                if file.seek(0, io.SEEK_END) != size:
                    raise ContentError("its length is not that of its tensors")
        except ContentError as error:
            raise DamagedError(f"The checkpoint {path} cannot be read: {name}: {error}. Use another one.") from None
        if name == "optimizer.safetensors" and not table:
            continue  # of step 0, before the optimizer has a state
        difference = _difference(table, tensors)
        if difference is not None:
            what = "network" if name == "model.safetensors" else "optimizer"
            raise CheckpointError(f"The checkpoint {path} is of another {what}: {difference}.")


def read_weights(path: Path, model: nn.Module) -> bytes:
    """Read a checkpoint's `model.safetensors`, once it is known to be whole and of this network.

    Args:
        path: The checkpoint.
        model: May be on the `meta` device.

    Raises:
        DamagedError: It is not whole.
        CheckpointError: It is of another network, or a newer version of this program wrote it.
        OSError: It cannot be read now.
    """
    verify(path, ["model.safetensors"], refuse_unfit=partial(refuse_unfit, model=model))
    refuse_unfit(path, model)
    return read_tensors(path, "model.safetensors")


def read_tensors(path: Path, name: str) -> bytes:
    """Read a file of a checkpoint whose header `refuse_unfit` has looked at; `read_plain` has the errors."""
    return read_plain(path / name, limit=float("inf"))


def restore_model(content: bytes, model: nn.Module, path: Path) -> None:
    """Load a network's weights from the bytes of a `model.safetensors`; `path` is for the message.

    Raises:
        CheckpointError: They are of another network, or not finite.
    """
    weights = _load(content, path)
    difference = _difference(_described(weights), _described(model.state_dict()))
    if difference is not None:
        raise CheckpointError(f"The checkpoint {path} is of another network: {difference}.")
    _refuse_non_finite(weights, path)
    model.load_state_dict(weights)


def restore_optimizer(content: bytes, optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Load an optimizer's state from the bytes of an `optimizer.safetensors`; `path` is for the message.

    Raises:
        CheckpointError: They are of another optimizer, or not finite.
    """
    tensors = _load(content, path)
    difference = _difference(_described(tensors), _slots(optimizer, model)) if tensors else None
    if difference is not None:
        raise CheckpointError(f"The checkpoint {path} is of another optimizer: {difference}.")
    _refuse_non_finite(tensors, path)
    indices = {name: index for index, (name, _) in enumerate(model.named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
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


Table = dict[str, tuple[str, tuple[int, ...]]]
"""dtype, as safetensors names it, and shape of each tensor."""

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _described(tensors: Mapping[str, Tensor]) -> Table:
    return {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def _slots(optimizer: torch.optim.Optimizer, model: nn.Module) -> Table:
    """Describe the state that an optimizer of ours has after its first step."""
    if isinstance(optimizer, torch.optim.SGD):
        slots = ["momentum_buffer"] if optimizer.defaults["momentum"] else []
    else:
        slots = ["exp_avg", "exp_avg_sq", "step"]
    return {
        f"{name}/{slot}": (_DTYPES[weights.dtype], () if slot == "step" else tuple(weights.shape))
        for name, weights in model.named_parameters()
        for slot in slots
    }


def _difference(found: Table, wanted: Table) -> str | None:
    """Return the first difference between two sets of tensors in words; None if they are equal."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted:
            return f"it has {name!r}, which is not wanted"
        if name not in found:
            return f"{name} is missing"
        if found[name] != wanted[name]:
            (dtype, shape), (wanted_dtype, wanted_shape) = found[name], wanted[name]
            return f"{name} is {dtype} {list(shape)}, not {wanted_dtype} {list(wanted_shape)}"
    return None


def _load(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}. Use another one.") from None


def _refuse_non_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise CheckpointError(f"The checkpoint {path} has numbers that are not finite, in {bad[0]}. Use another one.")
