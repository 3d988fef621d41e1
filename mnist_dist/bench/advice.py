"""What holds a training back, and the one thing to try, from figures that were measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Limit = Literal["another process", "input", "communication", "small steps", "compute"]

WORTH_IT = 1.15
"""A smaller gain than this may be noise, and is no reason to change anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Something else that was measured, against the config as it is with the usual number of processes."""

    setting: str
    """As a user writes it: `train.global_batch=256`."""
    gain: float
    """How many times as many images a second."""
    caution: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What the advice rests on, for the usual number of processes."""

    global_batch: int
    step_seconds: float
    compute_seconds: float
    input_seconds: float
    communication_seconds: float
    attained: float
    """Share of the rate of a matrix product."""
    needed_cpus: float
    """What the processes would use if they got it: nothing to speak of where a GPU computes."""
    free_cpus: float | None
    """What others left of the machine; None where the system doesn't say."""
    larger_batch: Choice | None
    others: tuple[Choice, ...]
    """Precisions and numbers of processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A limit and a way past it."""

    limit: Limit
    reason: str
    suggestion: str


def advise(figures: Figures) -> Advice:
    """Find the nearest limit: what would gain most if it was gone, or compute if nothing would gain much."""
    step, larger = figures.step_seconds, figures.larger_batch
    lacking = figures.free_cpus is not None and figures.free_cpus < figures.needed_cpus
    gains: dict[Limit, float] = {
        "another process": figures.needed_cpus / max(figures.free_cpus or 1.0, 0.1) if lacking else 1.0,
        "input": step / (step - figures.input_seconds),
        "communication": step / (step - figures.communication_seconds),
        "small steps": larger.gain if larger else 1.0,
        "compute": max([WORTH_IT, *(choice.gain for choice in figures.others)]),  # less of it, or on more devices
    }
    limit = max(gains, key=lambda name: gains[name])
    return Advice(limit=limit, reason=_reason(limit, figures), suggestion=_suggestion(limit, figures))


def _reason(limit: Limit, figures: Figures) -> str:
    step = f"a step of {figures.global_batch} images takes {1000 * figures.step_seconds:.3g} ms"
    if limit == "another process":
        free = max(figures.free_cpus or 0.0, 0.0)
        return f"others left {free:.1f} of the {figures.needed_cpus:.0f} CPUs that were wanted; all figures are too low"
    if limit == "small steps":
        assert figures.larger_batch is not None
        saved = _percent(1 - 1 / figures.larger_batch.gain)
        return f"{step}; with {figures.larger_batch.setting} an image takes {saved} less time"
    if limit == "compute":
        compute = _percent(figures.compute_seconds / figures.step_seconds)
        return f"{step}, {compute} of it for compute at {_percent(figures.attained)} of the rate of a matrix product"
    seconds = figures.input_seconds if limit == "input" else figures.communication_seconds
    return f"{step}, {1000 * seconds:.3g} ms of it for {limit}"


def _suggestion(limit: Limit, figures: Figures) -> str:
    """Name the best of what was measured, or what follows from the figures where nothing of it helps."""
    if limit == "another process":
        return "Measure again when the machine is quiet, or give this program CPUs of its own."
    measured = [choice for choice in (figures.larger_batch, *figures.others) if choice and choice.gain >= WORTH_IT]
    if measured:
        best = max(measured, key=lambda choice: choice.gain)
        return f"{best.setting} trained {best.gain:.2f} times as many images a second here{best.caution}."
    if limit == "input":
        most = figures.step_seconds / (figures.step_seconds - figures.input_seconds)
        return f"Less augmentation or a smaller data.image_size: at most {most:.2f} times as many images a second."
    if limit == "communication":
        return "Fewer processes for this run, and several runs (seeds, settings) side by side."
    return "Nothing that was measured is faster by more than noise: a faster device, or a smaller network."


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
