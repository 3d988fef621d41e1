"""The run folder: its files, and which process may write them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from mnist_dist.config.seal import is_whole, seal, sha256_of
from mnist_dist.disk import locks
from mnist_dist.disk.storage import (
    ContentError,
    cut,
    entries,
    is_real_folder,
    make_folder,
    obstacle,
    parse_record,
    read_pieces,
    read_plain,
    sync_folder,
    temporary_of,
    write_whole,
)
from mnist_dist.errors import CheckpointError, ConfigError, typed
from mnist_dist.observe import EVENTS_SUFFIX
from mnist_dist.run.checkpoint_files import steps

if TYPE_CHECKING:
    from mnist_dist.observe.records import Result  # brings numpy, which a launcher needs not

_OURS = re.compile(r"events\.out\.tfevents\..+")
_BEGAN = "# began with the weights of "


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of a run. Only rank 0 writes them, except the ranks' logs."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config, each value with its origin."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, machine and devices."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """The journal: one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def initial(self) -> Path:
        """The checkpoint of step 0 of a run that began with another run's weights."""
        return self.path / "initial"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def result(self) -> Path:
        """How the run ended."""
        return self.path / "result.json"

    def log(self, rank: int) -> Path:
        """What a rank printed; rank 0 prints to the terminal instead."""
        return self.path / "logs" / f"rank-{rank}.log"

    def saved_step(self) -> int | None:
        """Return the step of the newest checkpoint, None if there is none yet."""
        return max(steps(self.checkpoints), default=None)

    def holds_run(self) -> bool:
        """Return whether a run has started here. Initial weights alone do not count."""
        return os.path.lexists(self.config) or self.saved_step() is not None

    def check_text(self) -> None:
        """Raise if TensorBoard cannot write here: it needs a path in UTF-8.

        Raises:
            ConfigError: The path has other bytes.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"The run folder {self.path} is not text in UTF-8: rename it, or name it through a link."
            ) from None

    def check_new(self) -> None:
        """Check that nothing is here yet but logs that this run's own ranks have begun.

        Raises:
            ConfigError: The folder holds a run, which may still be going on, or anything else.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"--run {self.path} is a file: name a folder that does not exist yet.")
        lock, owner = map(self.path.joinpath, _LOCK)
        early = {self.environment, lock, owner, *map(temporary_of, (self.environment, self.config, owner))}
        names = set(entries(self.path)) - {"logs", "checkpoints", "initial", *(path.name for path in early)}
        if os.path.lexists(self.config):
            self.lock().release()  # says so if the run is still going on
        self.refuse_run()
        if names:
            raise ConfigError(f"{self.path} is not empty, and a new run never writes into it: choose another --run.")

    def refuse_run(self) -> None:
        """Raise a ConfigError if a run has begun here."""
        if self.holds_run():
            raise ConfigError(
                f"{self.path} holds a run already, and a new run never writes into it: choose another --run."
            )

    def lock(self) -> FileLock:
        """Claim the folder for this process, until the lock is released or the process dies.

        Raises:
            ConfigError: Another process has it; the message names its host and pid.
            CheckpointError: Something stands where the run's own files must be.
        """
        make_folder(self.path)
        self._refuse_obstacles()
        lock_name, owner_name = _LOCK
        owner = self.path / owner_name
        try:
            lock = locks.take(self.path / lock_name, blocking=False)
        except Timeout:
            name = "another process"
            with contextlib.suppress(ContentError, OSError):
                name = read_plain(owner, limit=1024).decode(errors="replace")
            raise ConfigError(f"{self.path} is in use by {name}: wait for it, or choose another --run.") from None
        write_whole(owner, f"process {os.getpid()} on {socket.gethostname()}".encode())
        if not lock.is_locked:
            print(f"warning: The disk of {self.path} has no file locks: start no second run there.", file=sys.stderr)
        return lock

    def _refuse_obstacles(self) -> None:
        """Raise if there is a link or another odd file where the run writes.

        The side files are not meant: they are replaced, and a link at their place is not followed.
        """
        files = (self.metrics, self.path / _LOCK[0])
        folders = (self.checkpoints, self.initial, self.tensorboard, self.log(0).parent)
        replaced = (self.environment, self.result, self.path / _LOCK[1])
        for place, kind in [
            *((path, obstacle(path, folder=False)) for path in files),
            *((path, obstacle(path, folder=True)) for path in folders),
            *((path, "folder") for path in replaced if is_real_folder(path)),
        ]:
            if kind is not None:
                wanted = "folder" if place in folders else "file"
                raise CheckpointError(
                    f"{place} is a {kind}, where the run writes a {wanted} of its own: move it away. ({self.path} "
                    f"itself may be a link.)"
                )

    def config_sha256(self) -> str:
        """Return the hash of the run's config, from which `check_run` tells whether it is as it was written."""
        return sha256_of(self._read_config())

    def began_with(self) -> str | None:
        """Return from which run's weights this run began, None if from random ones."""
        for line in self._read_config().decode(errors="replace").splitlines():
            if line.startswith(_BEGAN):
                return line.removeprefix(_BEGAN)
        return None

    def check_run(self) -> None:
        """Check that a run is here, with the config that it was started with.

        Raises:
            ConfigError: There is none.
            CheckpointError: Its config is missing, damaged or edited.
            OSError: It cannot be read now.
        """
        if not os.path.lexists(self.config):
            saved = self.saved_step()
            if saved is None:
                raise ConfigError(f"{self.path} is not a run: {self._instead_of_run()}")
            raise CheckpointError(
                f"{self.path} has a checkpoint of step {saved}, but no config.yaml: restore it from a copy."
            )
        if not is_whole(self._read_config()):
            raise CheckpointError(self.altered_config())

    def _instead_of_run(self) -> str:
        """Return what is here instead of a run, and the run that was probably meant."""
        run = next((above for above in self.path.absolute().parents if (above / "config.yaml").is_file()), None)
        if self.path.exists() and run is not None:  # one of its checkpoints or files
            return f"it is inside the run {os.path.relpath(run)}. Name that."
        if not self.path.exists():
            alike = next((path for path in self._runs_in(Path("runs")) if path.name == self.path.name), None)
            return (
                f"there is no such folder. {f'Did you mean {alike}?' if alike else 'Name a folder that `train` made.'}"
            )
        if not self.path.is_dir():
            return "it is a file. Name a folder that `train` made."
        runs = self._runs_in(self.path)
        if runs:
            return f"it holds {len(runs):,} run{'s' * (len(runs) > 1)}. Name one, e.g. {runs[-1]}."
        return "it has no config.yaml. Name a folder that `train` made."

    @staticmethod
    def _runs_in(folder: Path) -> list[Path]:
        """List the runs in a folder, the newest by its name last."""
        try:
            return sorted(path for path in folder.iterdir() if (path / "config.yaml").is_file())
        except OSError:
            return []

    def altered_config(self) -> str:
        """Return the message for a config that changed since the run started."""
        return (
            f"{self.config} is not as the run wrote it: it is damaged, or was edited. Restore it from a copy. "
            f"For other settings start a new run: {typed('train', '--config', self.config, '--run', 'NEW')}. "
            f"(--init-from takes weights from an untouched run.)"
        )

    def _read_config(self) -> bytes:
        try:
            return read_plain(self.config)
        except ContentError as error:
            raise CheckpointError(f"{error}: restore the run's config.yaml from a copy.") from None

    def cut_back(self, sizes: dict[str, int], journal_sha256: str | None = None) -> list[str]:
        """Forget what came after a checkpoint: cut journal and TensorBoard's files back, and remove the result.

        Args:
            sizes: In bytes, by path in this folder; files of the run that it doesn't name are emptied or removed.
            journal_sha256: Of the journal up to its size.

        Returns:
            Warnings: a line if the journal is not as it was.
        """
        warnings = []
        size = sizes.get(self.metrics.name, 0)
        has_journal = os.path.lexists(self.metrics)
        digest, length, end_of_lines = hashlib.sha256(), 0, 0
        for piece in read_pieces(self.metrics, size) if has_journal else ():
            digest.update(piece)
            if b"\n" in piece:
                end_of_lines = length + piece.rfind(b"\n") + 1
            length += len(piece)
        self.result.unlink(missing_ok=True)
        sync_folder(self.path)
        if length < size:
            warnings.append(f"{self.metrics} is shorter than it was: lines of it are lost.")
            size = end_of_lines
        elif journal_sha256 not in (None, digest.hexdigest()):
            warnings.append(f"{self.metrics} is not as the run wrote it: lines of it are damaged.")
        if has_journal:
            cut(self.metrics, size)
        for name in entries(self.tensorboard):
            file, size = self.tensorboard / name, sizes.get(f"{self.tensorboard.name}/{name}", -1)
            ours = _OURS.fullmatch(name) and (size >= 0 or name.endswith(EVENTS_SUFFIX))
            if not ours or obstacle(file, folder=False) is not None:
                continue
            if size < 0:
                file.unlink()
            else:
                cut(file, size)
        return warnings

    def remove_unstarted(self) -> None:
        """Remove what the logs of ranks leave behind where no run ever started, unless one is starting there now."""
        logs, lock = self.log(0).parent, self.path / _LOCK[0]
        with contextlib.ExitStack() as stack:
            if os.path.lexists(lock):  # a rank 0 has come so far as to claim the folder
                try:
                    stack.enter_context(locks.held(lock, blocking=False))
                except (Timeout, OSError):
                    return
            if self.path.is_dir() and not os.path.lexists(self.config):
                for name in entries(logs) if is_real_folder(logs) else ():
                    if re.fullmatch(r"rank-[0-9]+\.log", name):
                        (logs / name).unlink()
                for folder in (logs, self.path):
                    with contextlib.suppress(OSError):  # there is something else in it
                        folder.rmdir()

    def write_environment(self, record: dict[str, Any]) -> None:
        """Replace `environment.json`."""
        write_record(self.environment, record)

    def read_environment(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Read `environment.json`.

        Args:
            say: Gets a line if it is missing or damaged: a run goes on without it.

        Returns:
            The record, empty then.

        Raises:
            OSError: It cannot be read now.
        """
        return _read_record(self.environment, say) or {}

    def write_result(self, result: Result) -> None:
        """Replace `result.json`."""
        write_record(self.result, result.to_json())

    def read_result(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Read `result.json`.

        Args:
            say: Gets a line if it is damaged.

        Returns:
            None if the run has not ended, as far as is known.

        Raises:
            OSError: It cannot be read now.
        """
        return _read_record(self.result, say) if os.path.lexists(self.result) else None

    def find_data(self, root: str) -> str:
        """Find the run's images: where they were when it was started, or else where the config says.

        Args:
            root: The config's `data.root`; a relative one was meant from the folder in which the run was started.
        """
        there = self.read_environment(lambda line: None).get("data_root")
        if not isinstance(there, str) or Path(root).is_absolute() or not Path(there).is_absolute():
            return root
        return there if there != str(Path(root).absolute()) and Path(there).is_dir() else root


_LOCK = (".lock", ".lock-owner")


def config_content(text: str, began_with: str | None) -> tuple[bytes, str]:
    """Return a config with its hash in front, so that later changes are noticed.

    Args:
        text: YAML.
        began_with: The run whose weights this one began with.

    Returns:
        The content of `config.yaml`, and the hash.
    """
    content = seal(f"{_BEGAN}{json.dumps(began_with)}\n{text}" if began_with is not None else text)
    return content, sha256_of(content)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace a JSON file atomically. A checksum in it shows later damage."""
    write_whole(path, (json.dumps(record | {"checksum": _checksum(record)}, indent=1) + "\n").encode())


def claim_run_folder(name: str) -> Path:
    """Create a folder below `runs/`, named after the config and the time, for this process alone."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        path = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        with contextlib.suppress(FileExistsError):
            make_folder(path, exist_ok=False)
            return path
    raise AssertionError  # there is always a next number


def _read_record(path: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Read a JSON file that `write_record` or version 0.1.0's first days wrote; None if it is missing or damaged."""
    try:
        record = parse_record(read_plain(path), str(path))
        checksum = record.pop("checksum", None)
        if checksum is not None and checksum != _checksum(record):
            raise ContentError(f"{path} is damaged")
    except ContentError as error:
        say(f"{error}: going on without it.")
        return None
    return record


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
