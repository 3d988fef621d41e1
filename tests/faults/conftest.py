from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from watched import Watched


@pytest.fixture
def ranks_of() -> Callable[[subprocess.Popen[str]], list[int]]:
    """Find the ranks that a launcher has started, in their order."""
    return lambda launcher: [
        int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ]


@pytest.fixture
def watched(tmp_path: Path) -> Callable[[str], Watched]:
    return lambda name: Watched(tmp_path / name)
