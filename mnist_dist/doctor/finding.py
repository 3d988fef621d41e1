"""The result of a check, also of one that the machine breaks off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]

OF_THE_MACHINE = (OSError, RuntimeError, ValueError)
"""What the operating system, torch and malformed files raise; anything else is a bug and keeps its traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    check: str
    state: State
    """`warning`: a run may be slower or other than expected; `problem`: some run will fail."""
    found: str
    advice: str = ""
    """One line; empty only where the state is `ok`."""


def examine(check: str, look: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """Return the findings of one check; a failure of the check itself becomes its finding.

    Args:
        check: Its name, for that case.
        look: The check.
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
    """Return a number of bytes as text."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
