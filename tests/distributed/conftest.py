from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist_dist.launch.group import Group
from mnist_dist.launch.supervise import run_local


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list]:
    """Run a task of `ranks.py` on real gloo processes and collect what each rank returned."""

    def run(ranks: int, task: str, **arguments: object) -> list:
        folder = tmp_path / f"{task}-{ranks}"
        folder.mkdir()
        script = str(Path(__file__).with_name("ranks.py"))
        command = [sys.executable, script, task, json.dumps(arguments), str(folder)]
        group = Group(command=tuple(command), ranks=ranks, log=lambda rank: folder / f"{rank}.log", threads=1)
        assert run_local(group) == 0
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]

    return run
