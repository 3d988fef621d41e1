"""The report of `bench`, with the nearest limit and one suggestion. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mnist_dist.bench.cases import Cases
from mnist_dist.bench.records import Arithmetic, Case, ExchangeTimes, GroupResult, PeakMemory, Speed
from mnist_dist.config import Config
from mnist_dist.machine.cpu_time import Others

Limit = Literal["another process", "input", "communication", "small steps", "compute"]

WORTH_IT = 1.15
"""A smaller gain may be noise, and is no reason to change anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The nearest limit and what to try."""

    limit: Limit
    reason: str
    suggestion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All results of one `bench`; its fields are the keys of `--json`."""

    model: str
    parameters: int
    reduction: str
    global_batch: int
    device: str
    device_reason: str
    precision: str
    cpus: int
    seconds_each: float
    """Planned for each measurement."""
    others: Others | None
    scaling: tuple[Speed, ...]
    """The config as it is, by number of processes."""
    alternatives: tuple[Speed, ...]
    """Other precisions and a larger batch."""
    parts_of_batch: tuple[Speed, ...]
    """One process alone with parts of the batch: `benchmarks/cost_model.py` reads them."""
    arithmetic: Arithmetic
    memory: PeakMemory
    collective: ExchangeTimes | None
    """`None` with one process."""
    advice: Advice


def assemble(
    config: Config,
    cases: Cases,
    results: Mapping[int, GroupResult],
    *,
    cpus: int,
    machine_cpus: int,
    others: Others | None,
    seconds_each: float,
) -> Report:
    """Build the report.

    Args:
        config: The user's.
        cases: What was measured.
        results: Of each group, by number of processes.
        cpus: CPUs that this program may use.
        machine_cpus: All CPUs of the machine.
        others: CPUs that other programs took meanwhile; `None` if the system does not say.
        seconds_each: Planned for each measurement.
    """
    alone = results[1]
    assert alone.memory is not None
    assert alone.arithmetic is not None
    scaling = tuple(_scaling(ranks, cases, results) for ranks in cases.counts)
    alternatives = _alternatives(cases, results)
    usual = next(row for row in scaling if row.processes == cases.usual)
    free_cpus = None if others is None else machine_cpus - others.cpus
    needed_cpus = usual.processes * (usual.threads if alone.device == "cpu" else 1)
    return Report(
        model=config.model.name,
        parameters=alone.parameters,
        reduction=config.train.reduction,
        global_batch=config.train.global_batch,
        device=alone.device,
        device_reason=alone.device_reason,
        precision=alone.precision,
        cpus=cpus,
        seconds_each=seconds_each,
        others=others,
        scaling=scaling,
        alternatives=alternatives,
        parts_of_batch=tuple(filter(None, map(alone.find, cases.sizes))),
        arithmetic=alone.arithmetic,
        memory=alone.memory,
        collective=results[cases.grouped].collective,
        advice=advice_for(usual, scaling, alternatives, alone.arithmetic.share, needed_cpus, free_cpus),
    )


def advice_for(
    usual: Speed,
    scaling: tuple[Speed, ...],
    alternatives: tuple[Speed, ...],
    share: float,
    needed_cpus: int,
    free_cpus: float | None,
) -> Advice:
    """Return the limit whose removal gains most, or compute if none gains much, and one suggestion.

    Args:
        usual: The config as it is, with the number of processes that `train` starts.
        scaling: The config as it is, with other numbers of processes.
        alternatives: Other precisions and a larger batch.
        share: Of the rate of a matrix product that one process reaches.
        needed_cpus: CPUs that the processes use if they get them.
        free_cpus: CPUs that other programs left; `None` if the system does not say.
    """
    step = usual.step
    larger = {
        f"train.global_batch={other.global_batch}": other.speedup
        for other in alternatives
        if other.global_batch != usual.global_batch
    }
    precisions = {
        f"--precision {other.precision}": other.speedup
        for other in alternatives
        if other.global_batch == usual.global_batch
    }
    counts = {f"--processes {row.processes}": row.images_per_second / usual.images_per_second for row in scaling}
    lacking = free_cpus is not None and free_cpus < needed_cpus
    gains: dict[Limit, float] = {
        "another process": needed_cpus / max(free_cpus or 1.0, 0.1) if lacking else 1.0,
        "input": step.seconds / (step.seconds - step.input),
        "communication": step.seconds / (step.seconds - step.communication),
        "small steps": max(larger.values(), default=1.0),
        "compute": max([WORTH_IT, *precisions.values(), *counts.values()]),
    }
    limit = max(gains, key=lambda name: gains[name])

    reason = f"a step of {usual.global_batch} images takes {1000 * step.seconds:.3g} ms"
    if limit == "another process":
        left = max(free_cpus or 0.0, 0.0)
        reason = f"other programs left {left:.1f} of the {needed_cpus} CPUs needed; all figures are too low"
    elif limit == "small steps":
        saved = 1 - 1 / gains["small steps"]
        reason += f"; with {next(iter(larger))} an image takes {saved:.0%} less time"
    elif limit == "compute":
        part = step.compute / step.seconds
        reason += f", {part:.0%} of it for compute at {share:.0%} of the rate of a matrix product"
    else:
        reason += f", {1000 * (step.input if limit == 'input' else step.communication):.3g} ms of it for {limit}"

    measured = larger | precisions | counts
    best = max(measured, key=lambda setting: measured[setting])
    if limit == "another process":
        suggestion = "Measure again when the machine is quiet, or give this program CPUs of its own."
    elif measured[best] >= WORTH_IT:
        caution = ", with a learning rate to be chosen anew" if best in larger else ""
        caution = " with one process; check the accuracy too" if best in precisions else caution
        suggestion = f"{best} trained {measured[best]:.2f} times as many images a second here{caution}."
    elif limit == "input":
        suggestion = (
            f"Less augmentation or a smaller data.image_size: at most {gains['input']:.2f} times as many images "
            f"a second."
        )
    elif limit == "communication":
        suggestion = "Use fewer processes for this run, and train several runs (seeds, settings) side by side."
    else:
        suggestion = "Nothing that was measured is faster by more than noise: a faster device, or a smaller network."
    return Advice(limit=limit, reason=reason, suggestion=suggestion)


def _found(result: GroupResult, case: Case) -> Speed:
    found = result.find(case)
    assert found is not None, case
    return found


def _scaling(ranks: int, cases: Cases, results: Mapping[int, GroupResult]) -> Speed:
    speed = _found(results[ranks], cases.base[ranks])
    one, peer = (_found(results[1], cases.base[count]).images_per_second for count in (1, ranks))
    rate = speed.images_per_second
    return replace(speed, speedup=rate / one, efficiency=rate / (ranks * peer))


def _alternatives(cases: Cases, results: Mapping[int, GroupResult]) -> tuple[Speed, ...]:
    wanted = [*((1, case) for case in cases.precisions), *([(cases.usual, cases.larger)] if cases.larger else [])]
    found = []
    for ranks, case in wanted:
        speed, base = results[ranks].find(case), _found(results[ranks], cases.base[ranks])
        if speed is not None and speed != base:
            found.append(replace(speed, speedup=speed.images_per_second / base.images_per_second))
    return tuple(found)
