"""What a Python program does with runs: `mnist_dist.load`, `mnist_dist.train`, `mnist_dist.open_run`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_dist import config
from mnist_dist.config import Resolved, Setting
from mnist_dist.run.build import train
from mnist_dist.run.predictor import open_run

__all__ = ["load", "open_run", "train"]


def load(source: str | Path | None = None, settings: Mapping[str, Any] | None = None) -> Resolved:
    """Resolve an experiment.

    Args:
        source: A preset's name, a YAML file, a run folder, or None for the defaults.
        settings: Values by dotted key, e.g. `{"train.epochs": 2}`; they win over the source's.

    Raises:
        ConfigError: Unknown preset, unreadable file, unknown key, or a value out of its range.
    """
    given = (settings or {}).items()
    return config.load(source, tuple(Setting(key=key, value=value, origin="Python") for key, value in given))
