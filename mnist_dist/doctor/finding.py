"""What a check hands out, and what becomes of a check that the machine does not let finish."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "warning", "problem"]

OF_THE_MACHINE = (OSError, RuntimeError, ValueError)
"""What the operating system, torch and malformed files raise; anything else is a bug and keeps its traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    state: State
    """`warning`: a run may be slower or other than expected; `problem`: some run will fail."""
    found: str
    advice: str = ""
    """One line; empty only where the state is `ok`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What rank 0 of an all-reduce measured."""

    ranks: int
    seconds: float
    """The median time of one all-reduce."""

    @classmethod
    def read(cls, file: Path) -> Measured:
        """Read what `all_reduce.measure` has written."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))


def examine(check: str, look: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """Do one check; where the machine breaks it off, that is its finding, and the other checks go on.

    Args:
        check: Its name, for that case.
        look: Does it.
    """
    try:
        found = look()
    except OF_THE_MACHINE as error:
        cause = f"{type(error).__name__}: {first_line(error)}"
        advice = "Find the cause of that; the other checks went on."
        return [Finding(check=check, state="problem", found=cause, advice=advice)]
    return found if isinstance(found, list) else [found]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message: torch's messages have many."""
    return next(iter(str(error).splitlines()), "")


def gibibytes(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
