"""All that `bench` tells, put together from what the groups of processes have measured; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mnist_dist.bench.advice import Advice, Choice, Figures, advise
from mnist_dist.bench.cost import Exchange, StepCost
from mnist_dist.bench.fitting import fit_line
from mnist_dist.bench.plan import Plan
from mnist_dist.bench.records import Arithmetic, Case, Measured, Memory, Record, Split
from mnist_dist.config import Config
from mnist_dist.machine.cpu_time import Others


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """Training with some number of processes."""

    processes: int
    threads: int
    """Of each."""
    images_per_second: float
    least: float
    most: float
    windows: int
    speedup: float
    """Against one process with all threads."""
    efficiency: float
    """Against `processes` times what one process alone does with as many threads as each of these has."""
    step: Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another way of training that was measured, with the usual number of processes or with one."""

    precision: str
    global_batch: int
    processes: int
    images_per_second: float
    speedup: float
    """Against the config as it is, with as many processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attained:
    """How much of the device's arithmetic one process puts to use."""

    flop_per_image: float
    matrix_flop_per_second: float
    threads: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """How the exchange of gradients was measured, and what line fits."""

    processes: int
    seconds_by_bytes: tuple[tuple[int, float], ...]
    largest_error: float
    exchange: Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the cost model expects of a number of processes, if each has what each had here."""

    processes: int
    images_per_second: float
    efficiency: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The cost model of a step, docs/scaling.md."""

    threads: int
    processes: int
    """Of the group that it rests on."""
    seconds_by_images: tuple[tuple[int, float], ...]
    fixed_seconds: float
    seconds_per_image: float
    largest_error: float
    overhead_seconds: float
    """What communication took in the measured steps, beyond the exchange of the gradient by itself."""
    predictions: tuple[Prediction, ...]
    pays_up_to: int
    """The most processes, up to the last prediction, with an efficiency of a half or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one `bench` has found out; its fields are the keys of `--json`."""

    model: str
    parameters: int
    reduction: str
    global_batch: int
    device: str
    device_reason: str
    precision: str
    cpus: int
    seconds_each: float
    """For which each measurement was planned."""
    others: Others | None
    scaling: tuple[Scaling, ...]
    alternatives: tuple[Alternative, ...]
    arithmetic: Attained
    memory: Memory
    collective: Collective | None
    """None with one process."""
    prediction: Model | None
    """None with one process, or where the images are too few for another size of batch."""
    advice: Advice


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Where it was measured."""

    cpus: int
    machine_cpus: int
    others: Others | None
    seconds_each: float


def assemble(config: Config, plan: Plan, records: Mapping[int, Record], surroundings: Surroundings) -> Report:
    """Put a report together.

    Args:
        config: The user's.
        plan: What was measured.
        records: What each group has found, by number of processes.
        surroundings: Where.
    """
    alone = records[1]
    assert alone.memory is not None
    assert alone.arithmetic is not None
    scaling = tuple(_scaling(ranks, plan, records) for ranks in plan.counts)
    alternatives = _alternatives(plan, records)
    attained = _attained(alone.arithmetic, scaling[0])
    collective = _collective(records[plan.modelled], plan.modelled)
    modelled = next(row for row in scaling if row.processes == plan.modelled)
    return Report(
        model=config.model.name,
        parameters=alone.parameters,
        reduction=config.train.reduction,
        global_batch=config.train.global_batch,
        device=alone.device,
        device_reason=alone.device_reason,
        precision=alone.precision,
        cpus=surroundings.cpus,
        seconds_each=surroundings.seconds_each,
        others=surroundings.others,
        scaling=scaling,
        alternatives=alternatives,
        arithmetic=attained,
        memory=alone.memory,
        collective=collective,
        prediction=_model(plan, alone, collective, modelled.step.communication),
        advice=_advice(plan, alone.device, scaling, alternatives, attained, surroundings),
    )


def _measured(record: Record, case: Case) -> Measured:
    found = record.find(case)
    assert found is not None, case
    return found


def _scaling(ranks: int, plan: Plan, records: Mapping[int, Record]) -> Scaling:
    measured = _measured(records[ranks], plan.base[ranks])
    one, peer = (_measured(records[1], plan.base[count]).rate.images_per_second for count in (1, ranks))
    rate = measured.rate
    return Scaling(
        processes=ranks,
        threads=measured.case.threads,
        images_per_second=rate.images_per_second,
        least=rate.least,
        most=rate.most,
        windows=rate.windows,
        speedup=rate.images_per_second / one,
        efficiency=rate.images_per_second / (ranks * peer),
        step=measured.step,
    )


def _alternatives(plan: Plan, records: Mapping[int, Record]) -> tuple[Alternative, ...]:
    wanted = [(1, case) for case in plan.precisions] + [(plan.usual, plan.larger)]
    found = []
    for ranks, case in wanted:
        measured = records[ranks].find(case) if case else None
        base = _measured(records[ranks], plan.base[ranks])
        if measured is not None and measured.case != base.case:
            rate = measured.rate.images_per_second
            found.append(
                Alternative(
                    precision=measured.case.precision,
                    global_batch=measured.case.global_batch,
                    processes=ranks,
                    images_per_second=rate,
                    speedup=rate / base.rate.images_per_second,
                )
            )
    return tuple(found)


def _attained(arithmetic: Arithmetic, one: Scaling) -> Attained:
    return Attained(
        flop_per_image=arithmetic.flop_per_image,
        matrix_flop_per_second=arithmetic.matrix_flop_per_second,
        threads=one.threads,
        share=one.images_per_second * arithmetic.flop_per_image / arithmetic.matrix_flop_per_second,
    )


def _collective(record: Record, ranks: int) -> Collective | None:
    if not record.exchanges:
        return None
    line = fit_line(record.exchanges)
    return Collective(
        processes=ranks,
        seconds_by_bytes=record.exchanges,
        largest_error=line.largest_error,
        exchange=Exchange.from_line(line, record.collective, ranks=ranks, gradient_bytes=record.gradient_bytes),
    )


def _model(plan: Plan, alone: Record, collective: Collective | None, communication: float) -> Model | None:
    found = [measured for measured in map(alone.find, plan.sizes) if measured is not None]
    points = tuple((one.case.global_batch, one.case.global_batch / one.rate.images_per_second) for one in found)
    if collective is None or len(points) < 2 or not plan.possible:
        return None
    line = fit_line(points)
    overhead = max(0.0, communication - collective.exchange.seconds(collective.processes))
    cost = StepCost(alone=line, exchange=collective.exchange, overhead_seconds=overhead)
    batch = plan.base[1].global_batch
    return Model(
        threads=found[0].case.threads,
        processes=collective.processes,
        seconds_by_images=points,
        fixed_seconds=line.fixed,
        seconds_per_image=line.each,
        largest_error=line.largest_error,
        overhead_seconds=overhead,
        predictions=tuple(
            Prediction(
                processes=ranks,
                images_per_second=cost.images_per_second(batch, ranks),
                efficiency=cost.efficiency(batch, ranks),
            )
            for ranks in plan.possible
        ),
        pays_up_to=cost.pays_up_to(batch, plan.possible[-1]),
    )


def _advice(
    plan: Plan,
    device: str,
    scaling: tuple[Scaling, ...],
    alternatives: tuple[Alternative, ...],
    attained: Attained,
    surroundings: Surroundings,
) -> Advice:
    usual = next(row for row in scaling if row.processes == plan.usual)
    larger, others = None, []
    for other in alternatives:
        if other.global_batch != plan.base[1].global_batch:
            setting, caution = f"train.global_batch={other.global_batch}", ", with a learning rate to be chosen anew"
            larger = Choice(setting=setting, gain=other.speedup, caution=caution)
        else:
            caution = " with one process; look at the accuracy too"
            others.append(Choice(setting=f"--precision {other.precision}", gain=other.speedup, caution=caution))
    for row in scaling:
        gain = row.images_per_second / usual.images_per_second
        others.append(Choice(setting=f"--processes {row.processes}", gain=gain))
    taken = surroundings.others
    return advise(
        Figures(
            global_batch=plan.base[1].global_batch,
            step_seconds=usual.step.seconds,
            compute_seconds=usual.step.compute,
            input_seconds=usual.step.input,
            communication_seconds=usual.step.communication,
            attained=attained.share,
            needed_cpus=usual.processes * usual.threads if device == "cpu" else usual.processes,
            free_cpus=None if taken is None else surroundings.machine_cpus - taken.busy - taken.stolen,
            larger_batch=larger,
            others=tuple(others),
        )
    )
