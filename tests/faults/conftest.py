from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
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
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder in which nothing of ours may be left at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert not list(folder.glob("mnist-dist*"))  # torch keeps a cache there


@pytest.fixture
def watched(tmp_path: Path) -> Callable[[str], Watched]:
    return lambda name: Watched(tmp_path / name)
