"""The checkpoints of a run as files: their names, their manifests, and which of them are whole. Without torch.

A checkpoint is the folder `step-00000938` with `model.safetensors`, `optimizer.safetensors`, `meta.json` and
`MANIFEST.json`, which has the SHA-256 of the others. Nothing in it is believed before it is verified: it may come from
a stranger, or from a disk that failed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from mnist_dist.disk.storage import ContentError, entries, named, obstacle, open_plain, parse_record, read_plain
from mnist_dist.errors import CheckpointError, DamagedError

FORMAT = 1
MANIFEST = "MANIFEST.json"
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
FILES = (*TENSOR_FILES, "meta.json")
HEADER_BYTES = 1 << 25
"""More than the header of a safetensors file has: it names some hundred thousand tensors."""
UNCHECKED_BYTES = 1 << 30
"""A longer file is hashed only if its header fits its length and the network to fill."""

STEP_DIGITS = 18
"""At most, in a checkpoint's name."""

_NAME = re.compile(rf"(replaced-|writing-)?step-([0-9]{{8,{STEP_DIGITS}}})")


def _as_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("it is no text")
    return value


Name = Annotated[str, PlainValidator(_as_text)]
"""A folder's name, which may have bytes that are no text: pydantic's own strings take none, nor does its JSON."""


class Preprocessing(BaseModel):
    """What happened to each image before the network saw it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    image_size: int = Field(ge=1)
    channels: Literal[1, 3]
    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(strict=False)


class Meta(BaseModel):
    """A checkpoint's `meta.json`; keys that a later version adds are passed over."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    step: int = Field(ge=0)
    progress: dict[str, Any]
    sizes: dict[str, Annotated[int, Field(ge=0)]]
    scaler: dict[str, int | float] | None
    classes: tuple[Name, ...] = Field(min_length=1, strict=False)
    preprocessing: Preprocessing
    data_sha256: str
    config_sha256: str | None = None
    """Of the run's config; None in a checkpoint of version 0.1.0's first days."""
    journal_sha256: str | None = None
    """Of the journal up to its size in `sizes`."""

    @classmethod
    def from_json(cls, content: bytes) -> Meta:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is not valid; a `ValidationError` names the key.
        """
        return cls.model_validate(parse_record(content, "it"))

    def to_json(self) -> bytes:
        """Return the record as JSON in ASCII."""
        return json.dumps(self.model_dump()).encode()


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's name; None for any other name, such as that of a copy beside it."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] is not None or name != name_of(int(match[2])):
        return None
    return int(match[2])


def steps(folder: Path) -> dict[int, Path]:
    """List the checkpoints of a run by their steps, the oldest first.

    Args:
        folder: The run's `checkpoints`.

    Raises:
        CheckpointError: It is a link, or no folder.
        OSError: It cannot be read.
    """
    kind = obstacle(folder, folder=True)
    if kind is not None:
        raise CheckpointError(
            f"{folder} is a {kind}: links inside a run folder are not followed. Move the checkpoints there."
        )
    found: dict[int, Path] = {}
    for name in entries(folder):
        step = step_of(name.removeprefix("replaced-"))
        # A `replaced-step-N` without its step-N: a kill between the two renames of `checkpoint.write`.
        if step is not None and (step not in found or name == name_of(step)):
            found[step] = folder / name
    return dict(sorted(found.items()))


def leftovers(folder: Path) -> list[Path]:
    """List what killed writes have left behind in a run's `checkpoints`."""
    whole = steps(folder).values()
    return [
        folder / name
        for name in entries(folder)
        if (match := _NAME.fullmatch(name)) and match[1] is not None and folder / name not in whole
    ]


Check = Callable[[Path], None]
"""Raises an error for a checkpoint."""


def verify(path: Path, names: Collection[str] = TENSOR_FILES, *, refuse_unfit: Check = lambda path: None) -> None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        path: The checkpoint.
        names: Those of the tensor files that are going to be read.
        refuse_unfit: Raises an error, which is passed on, if it is of another network than the one to fill; called
            before a very long file is hashed.

    Raises:
        DamagedError: A file is missing or differs.
        CheckpointError: A newer version of this program wrote it, or it is another step's.
        OSError: It cannot be read now, which says nothing about whether it is whole.
    """
    _verified_meta(path, names, refuse_unfit)


def read_meta(path: Path) -> Meta:
    """Read a checkpoint's `meta.json`, compared with its manifest.

    Raises:
        DamagedError: It or the manifest is missing or differs.
        CheckpointError: A newer version of this program wrote it, or it is not valid.
        OSError: It cannot be read now.
    """
    content = _verified_meta(path)
    try:
        meta = Meta.from_json(content)
    except ValueError as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            detail = error.errors()[0]
            reason = f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}"
        raise CheckpointError(f"{path / 'meta.json'} is not valid ({reason}): use another checkpoint.") from None
    if not len(meta.preprocessing.mean) == len(meta.preprocessing.std) == meta.preprocessing.channels:
        raise CheckpointError(f"{path / 'meta.json'} has not one mean and std a channel: use another checkpoint.")
    return meta


def newest_whole(folder: Path, warn: Callable[[str], None], *, refuse_unfit: Check = lambda path: None) -> Path | None:
    """Find the newest checkpoint that is whole; damaged ones are moved aside. Rank 0 alone.

    Args:
        folder: The run's `checkpoints`.
        warn: Gets a line for each that is moved aside.
        refuse_unfit: As in `verify`.

    Raises:
        CheckpointError: A newer version of this program wrote it.
        OSError: One cannot be read now; all stay where they are.
    """
    while found := steps(folder):  # again after each: `replaced-step-N` may take the place of step-N
        path = found[max(found)]
        try:
            verify(path, refuse_unfit=refuse_unfit)
        except DamagedError as error:
            aside = path.with_name(f"corrupt-{path.name}-{time.time_ns()}")
            path.rename(aside)
            warn(f"{error} It was moved to {aside}.")
        else:
            return path
    return None


def damaged(folder: Path) -> list[Path]:
    """List the damaged checkpoints that were moved aside."""
    return [folder / name for name in sorted(entries(folder)) if name.startswith("corrupt-")]


def remove(path: Path) -> None:
    """Remove a checkpoint's own files and its folder.

    Raises:
        OSError: It is a link, or no folder; a file cannot be removed; or the folder holds a file that is not the
            checkpoint's. That one stays.
    """
    kind = obstacle(path, folder=True)
    if kind is not None:  # through a link, files outside the run would be removed
        raise NotADirectoryError(errno.ENOTDIR, f"it is a {kind}, not a folder", str(path))
    for name in (MANIFEST, *FILES):  # without its manifest it is no checkpoint any more
        (path / name).unlink(missing_ok=True)
    path.rmdir()


def free_name(path: Path) -> None:
    """Remove what a killed write left at a path; what is not a checkpoint's own is kept beside it, as `kept-...`.

    Raises:
        OSError: The folder around it cannot be written.
    """
    if not os.path.lexists(path):
        return
    try:
        remove(path)
    except OSError:
        path.rename(path.with_name(f"kept-{path.name}-{time.time_ns()}"))


def prune(folder: Path, *, keep: int, best: int | None, warn: Callable[[str], None] = lambda line: None) -> None:
    """Remove all but the `keep` newest checkpoints and the one of step `best`. Rank 0 alone.

    Args:
        folder: The run's `checkpoints`.
        keep: How many.
        best: Kept besides.
        warn: Gets a line for each that cannot be removed: the new checkpoint is whole, so the run goes on.
    """
    old = [path for step, path in list(steps(folder).items())[:-keep] if step != best]
    for path in [*old, *leftovers(folder)]:
        try:
            remove(path)
        except OSError as error:
            warn(f"{path} is no longer needed and cannot be removed ({error.strerror}). The run goes on.")


def tensor_table(content: BinaryIO) -> tuple[dict[str, tuple[str, tuple[int, ...]]], int]:
    """Read the header of a safetensors file.

    Args:
        content: The file, from its beginning.

    Returns:
        dtype (as safetensors names it) and shape of each tensor, and how many bytes the file must have.

    Raises:
        ContentError: It is no such header.
    """
    length = int.from_bytes(content.read(8), "little")
    if not 2 <= length <= HEADER_BYTES:
        raise ContentError("it has no header")
    header = parse_record(content.read(length), "its header")
    table, end = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, offsets = tuple(map(int, entry["shape"])), tuple(map(int, entry["data_offsets"]))
            table[name], end = (str(entry["dtype"]), shape), max(end, offsets[1])
        except (TypeError, ValueError, KeyError, IndexError, OverflowError):
            raise ContentError(f"its header does not describe the tensor {name!r}") from None
    return table, 8 + length + end


def _verified_meta(path: Path, names: Collection[str] = (), refuse_unfit: Check = lambda path: None) -> bytes:
    """Return `meta.json`, compared with the manifest; the tensor files `names` are compared too."""
    kind = obstacle(path, folder=True)
    if kind is not None:
        raise DamagedError(f"The checkpoint {path} is not whole: it is a {kind}, not a folder. Use another one.")
    try:
        manifest = _manifest(path)
        content = read_plain(path / "meta.json")
        if hashlib.sha256(content).hexdigest() != manifest.get("meta.json"):
            raise DamagedError(f"The checkpoint {path} is damaged: meta.json differs. Use another one.")
        meta = parse_record(content, "meta.json")
        _refuse_foreign(path, meta)
        if set(manifest) != set(FILES):
            raise ContentError(f"{MANIFEST} names other files than {', '.join(FILES)}")
        differ = [name for name in names if _sha256(path / name, refuse_unfit) != manifest[name]]
    except ContentError as error:
        raise DamagedError(f"The checkpoint {path} is not whole: {error}. Use another one.") from None
    if differ:
        raise DamagedError(f"The checkpoint {path} is damaged: {', '.join(differ)} differ. Use another one.")
    return content


def _manifest(path: Path) -> dict[str, str]:
    manifest = parse_record(read_plain(path / MANIFEST), MANIFEST)
    if not all(isinstance(digest, str) for digest in manifest.values()):
        raise ContentError(f"{MANIFEST} holds no hashes")
    return manifest


def _refuse_foreign(path: Path, meta: dict[str, Any]) -> None:
    """Raise an error for a checkpoint that is whole, and not to be read as this step of this version."""
    number, step = meta.get("format"), meta.get("step")
    if type(number) is not int or number < 1:
        raise ContentError("meta.json has no format")
    if number > FORMAT:
        raise CheckpointError(
            f"The checkpoint {path} has format {number}, and this version of mnist-dist reads formats up to {FORMAT}: "
            f"install a newer mnist-dist."
        )
    named_step = step_of(path.name.removeprefix("replaced-"))
    if named_step is not None and step != named_step:
        raise CheckpointError(f"The checkpoint {path} is that of step {step}, not of {named_step}: rename it back.")


def _sha256(path: Path, refuse_unfit: Check) -> str:
    """Hash a tensor file; one that is very long and does not fit its header counts as another file."""
    with named(path), open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        declared = None
        with contextlib.suppress(ContentError):
            declared = tensor_table(file)[1]
        if size > UNCHECKED_BYTES:
            if declared != size:
                return ""
            refuse_unfit(path.parent)
        file.seek(0)
        return hashlib.file_digest(cast("io.BufferedReader", file), "sha256").hexdigest()
