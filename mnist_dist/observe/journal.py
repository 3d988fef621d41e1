"""The journal: metrics.jsonl, one object a line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnist_dist.observe import Observer
from mnist_dist.reports import EpochReport, Evaluation, Event, StepReport


class Journal(Observer):
    """Appends a line with `kind` `step`, `epoch` or `event` for each report."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1, encoding="utf-8")  # a line is there as soon as it is written

    def step(self, report: StepReport) -> None:  # noqa: D102
        self._write("step", asdict(report))

    def event(self, event: Event) -> None:  # noqa: D102
        self._write("event", {"step": event.step, "event": event.event, **event.figures})

    def epoch(self, report: EpochReport, test: Evaluation) -> None:  # noqa: D102
        self._write("epoch", report.metrics())

    def sizes(self) -> dict[str, int]:  # noqa: D102
        self._file.flush()
        os.fsync(self._file.fileno())
        return {Path(self._file.name).name: self._file.tell()}

    def close(self) -> None:  # noqa: D102
        self._file.close()

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, **record}) + "\n")
