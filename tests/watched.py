"""A run folder, seen from a test that disturbs the run."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


class Watched:
    """A run folder, and what it says of the run so far."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def result(self) -> dict:
        return json.loads((self.path / "result.json").read_text())

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, the oldest first."""
        return sorted(int(path.name[5:]) for path in (self.path / "checkpoints").glob("step-*"))

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint; `None`: there is none."""
        return max(self.steps, default=None)

    def losses(self) -> list[float]:
        """Training loss of each report."""
        return [record["loss"] for record in self.journal() if record["kind"] == "step"]

    def journal(self) -> list[dict]:
        """The journal without times, which differ from run to run."""
        timeless = []
        for line in (self.path / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            timeless.append({key: record[key] for key in record if key not in ("images_per_second", "seconds")})
        return timeless

    def bits(self) -> dict[str, object]:
        """What must be the same however often a run was killed."""
        last = self.path / "checkpoints" / f"step-{self.steps[-1]:08}"
        manifest = json.loads((last / "MANIFEST.json").read_text())
        return {
            "weights": self.result["weights_sha256"],
            "optimizer": manifest["optimizer.safetensors"],
            "journal": self.journal(),
        }

    def wait_for(self, condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60) -> None:
        """Wait until something is there; the process must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
