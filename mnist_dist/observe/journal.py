"""The journal: metrics.jsonl, one object a line."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnist_dist.disk.storage import named, open_append, read_pieces
from mnist_dist.observe import Observer
from mnist_dist.observe.columns import figures_of
from mnist_dist.observe.records import EpochReport, Evaluation, Event, StepReport


class Journal(Observer):
    """Appends a line with `kind` `step`, `epoch` or `event` for each report."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_append(path)
        self._digest = hashlib.sha256()
        for piece in read_pieces(path, os.fstat(self._file.fileno()).st_size):
            self._digest.update(piece)

    def step(self, report: StepReport) -> None:  # noqa: D102
        self._write("step", asdict(report))

    def event(self, event: Event) -> None:  # noqa: D102
        self._write("event", {"step": event.step, "event": event.event, **event.figures})

    def epoch(self, report: EpochReport, test: Evaluation) -> None:  # noqa: D102
        self._write("epoch", figures_of(report, test))

    def sizes(self) -> dict[str, int]:  # noqa: D102
        with named(self._path):
            os.fsync(self._file.fileno())
        return {self._path.name: os.fstat(self._file.fileno()).st_size}

    def journal_sha256(self) -> str:  # noqa: D102
        return self._digest.hexdigest()

    def close(self) -> None:  # noqa: D102
        self._file.close()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        line = (json.dumps({"kind": kind, **record}) + "\n").encode()
        with named(self._path):
            self._file.write(line)
            self._file.flush()  # a line is there at once
        self._digest.update(line)
