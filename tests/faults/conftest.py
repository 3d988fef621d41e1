from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from watched import Watched


@pytest.fixture
def watched(tmp_path: Path) -> Callable[[str], Watched]:
    return lambda name: Watched(tmp_path / name)
