"""The run folder: where everything about one run lies, and who may write there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from mnist_dist import locks
from mnist_dist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from mnist_dist.reports import Result  # brings numpy, which a launcher needs not


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of a run; only rank 0 writes them, but for the ranks' logs."""

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
        """Tell the step of the newest checkpoint, None if there is none yet."""
        steps = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")]
        return max((int(step) for step in steps if step.isdecimal()), default=None)

    def check_new(self) -> None:
        """Make sure that nothing is here yet, but perhaps the logs of this run's own ranks.

        Raises:
            ConfigError: The folder holds a run, which may still be going on, or anything else.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"--run {self.path} is a file: name a folder that does not exist yet.")
        if {entry.name for entry in self.path.iterdir()} - {"logs", ".lock", ".lock-owner"}:
            if self.config.exists():
                self.lock().release()  # says so if the run is still going on
            what = "holds a run already" if self.config.exists() else "is not empty"
            raise ConfigError(f"{self.path} {what}, and a new run never writes into it: choose another --run.")

    def lock(self) -> FileLock:
        """Claim the folder for this process, until the lock is released or the process dies.

        Raises:
            ConfigError: Another process has it; the message names its host and pid.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        owner = self.path / ".lock-owner"
        try:
            lock = locks.take(self.path / ".lock", blocking=False)
        except Timeout:
            name = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
            raise ConfigError(f"{self.path} is in use by {name}: wait for it, or choose another --run.") from None
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        if not lock.is_locked:
            print(f"warning: The disk of {self.path} has no file locks: start no second run there.", file=sys.stderr)
        return lock

    def cut_back(self, sizes: dict[str, int]) -> None:
        """Forget what came after a checkpoint: cut journal and TensorBoard's files back, and remove the result.

        Args:
            sizes: In bytes, by path in this folder; files that it doesn't name are emptied or removed.
        """
        self.result.unlink(missing_ok=True)
        if self.metrics.exists():
            os.truncate(self.metrics, min(sizes.get(self.metrics.name, 0), self.metrics.stat().st_size))
        for file in self.tensorboard.iterdir() if self.tensorboard.is_dir() else ():
            size = sizes.get(f"{self.tensorboard.name}/{file.name}")
            if size is None:
                file.unlink()
            else:
                os.truncate(file, min(size, file.stat().st_size))

    def remove_unstarted(self) -> None:
        """Remove what the logs of ranks leave behind where no run ever started."""
        if self.path.is_dir() and not self.config.exists():
            shutil.rmtree(self.path / "logs", ignore_errors=True)
            with contextlib.suppress(OSError):  # there is something else in it
                self.path.rmdir()

    def check_run(self) -> None:
        """Make sure that a run is here.

        Raises:
            ConfigError: There is none.
        """
        if not self.config.is_file():
            raise ConfigError(f"{self.path} is not a run: {self._instead_of_run()}")

    def _instead_of_run(self) -> str:
        """Describe what is here in place of a run, and name the run that was probably meant."""
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
            return f"it holds {len(runs):,} of them. Name one, e.g. {runs[-1]}."
        return "it has no config.yaml. Name a folder that `train` made."

    @staticmethod
    def _runs_in(folder: Path) -> list[Path]:
        """List the runs in a folder, the newest by its name last."""
        try:
            return sorted(path for path in folder.iterdir() if (path / "config.yaml").is_file())
        except OSError:
            return []

    def write_result(self, result: Result) -> None:
        """Replace `result.json`."""
        write_json(self.result, result.to_json())

    def read_result(self) -> dict[str, Any]:
        """Read `result.json`.

        Raises:
            CheckpointError: The run has not ended yet.
        """
        if not self.result.is_file():
            raise CheckpointError(f"{self.path} has no result.json: the run has not ended.")
        record: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return record


def write_json(path: Path, record: Any) -> None:
    """Replace a JSON file at one stroke."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def default_run_folder(name: str) -> Path:
    """Name a new folder below `runs/` after the config and the time."""
    stem = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = stem, 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path
