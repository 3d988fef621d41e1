"""What the processes do that measure: one by itself, or several together."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from mnist_dist.bench.arithmetic import flop_per_image, matrix_flop_per_second, peak_memory
from mnist_dist.bench.cost import Collective
from mnist_dist.bench.records import (
    TURNS,
    WINDOWS,
    Arithmetic,
    Case,
    Measured,
    Memory,
    Record,
    Window,
    divide,
    rate_of,
    split_of,
)
from mnist_dist.bench.windows import Series, WithoutExchange, config_of, seconds_of_step, synchronise, take_turns
from mnist_dist.config import Config
from mnist_dist.config.schema import Precision
from mnist_dist.data import Dataset, open_dataset
from mnist_dist.errors import ConfigError
from mnist_dist.group import heartbeat
from mnist_dist.group.place import group_folder_of
from mnist_dist.models import count_parameters
from mnist_dist.observe.output import say
from mnist_dist.run.build import join
from mnist_dist.runtime import Runtime
from mnist_dist.runtime.device import choose_precision

SIZES = tuple(4096 * 8**power for power in range(5))
"""Bytes of the tensors that are exchanged: 4 KiB to 16 MiB, and besides them the gradient's."""
EXCHANGED = 2**22
"""Bytes over all repeats of a size, within bounds."""
LEAST_REPEATS, MOST_REPEATS = 7, 101


def measure_alone(config: Config, cases: Sequence[Case], seconds: float, output: Path) -> None:
    """Measure cases in this process alone, and what it has in memory and could compute for the first of them.

    Args:
        config: The user's.
        cases: What to vary.
        seconds: For each case.
        output: A JSON file to write, with a `Record`.
    """
    imports = peak_memory()
    dataset = _open(config)
    first = config_of(config, cases[0])
    with join(first) as runtime:
        series = Series(first, dataset, runtime)
        seconds_of_step(series, runtime, seconds / WINDOWS)
        memory = _memory(imports)
        arithmetic = Arithmetic(
            matrix_flop_per_second=matrix_flop_per_second(runtime.device, runtime.precision.value),
            flop_per_image=flop_per_image(series.parts),
        )
        record = _describe(series, runtime)
    chosen = dict.fromkeys(
        replace(case, precision=record.precision) if case.precision == "auto" else case for case in cases
    )
    possible = [case for case in chosen if _computes(case.precision, record.device)]
    measured = _measure(config, possible, dataset, seconds, lambda case: join(config_of(config, case)))
    replace(record, measured=measured, memory=memory, arithmetic=arithmetic).write(output)


def measure_together(config: Config, cases: Sequence[Case], seconds: float, output: Path) -> None:
    """Measure cases in a group of processes, and how long they take to exchange tensors. Every rank.

    Args:
        config: The user's.
        cases: What to vary; of one precision and number of threads.
        seconds: For each case.
        output: A JSON file that rank 0 writes, with a `Record`.
    """
    dataset = _open(config)
    first = config_of(config, cases[0])
    with join(first) as runtime:
        chosen = [replace(case, precision=runtime.precision.value) for case in cases]
        measured = _measure(config, chosen, dataset, seconds, lambda case: nullcontext(runtime))
        record = _describe(Series(first, dataset, runtime), runtime)
        collective: Collective = "all-gather" if config.train.reduction == "exact" else "all-reduce"
        sizes = sorted({*SIZES, record.gradient_bytes})
        exchanges = tuple((size, _seconds_of_exchange(runtime, collective, size)) for size in sizes)
        if runtime.rank == 0:
            replace(record, measured=measured, collective=collective, exchanges=exchanges).write(output)


def _measure(
    config: Config,
    cases: Sequence[Case],
    dataset: Dataset,
    seconds: float,
    enter: Callable[[Case], AbstractContextManager[Runtime]],
) -> tuple[Measured, ...]:
    """Measure cases in turns; those with too few images are left out. Every rank."""
    found = {case: _Windows() for case in cases if case.global_batch <= len(dataset.train)}
    for _ in range(TURNS):
        for case, windows in found.items():
            with enter(case) as runtime:
                _take_turn(config_of(config, case), dataset, runtime, seconds, windows)
    return tuple(
        Measured(
            case=case,
            rate=rate_of(windows.free),
            step=split_of(windows.watched, case.global_batch, windows.without_exchange),
        )
        for case, windows in found.items()
    )


@dataclass(slots=True)
class _Windows:
    """The windows of one case so far."""

    steps: int = 0
    """Of each; 0 before the first."""
    number: int = 0
    """Of them in each turn."""
    free: list[Window] = field(default_factory=list)
    watched: list[Window] = field(default_factory=list)
    """The same on a CPU; elsewhere with a wait for the device between the parts of a step."""
    without_exchange: list[Window] = field(default_factory=list)
    """Likewise; none for one rank."""


def _take_turn(config: Config, dataset: Dataset, runtime: Runtime, seconds: float, windows: _Windows) -> None:
    """Take a third of a case's windows, with several ranks in turns with the same without exchange. Every rank."""
    runtimes = [runtime] if runtime.ranks == 1 else [runtime, WithoutExchange(runtime)]
    if windows.steps == 0:
        a_step = seconds_of_step(Series(config, dataset, runtime), runtime, seconds / WINDOWS)
        windows.steps, windows.number = divide(seconds, a_step, config.train.log_every)
    queued = runtime.device.type != "cpu"  # then a stopwatch sees work that is only asked for
    if queued:
        windows.free += take_turns([Series(config, dataset, runtime)], windows.steps, windows.number)[0]
    series = [Series(config, dataset, one, synchronised=queued) for one in runtimes]
    watched, *without = take_turns(series, windows.steps, windows.number)
    windows.watched += watched
    windows.without_exchange += without[0] if without else []
    if not queued:
        windows.free += watched


def _describe(series: Series, runtime: Runtime) -> Record:
    parameters = count_parameters(series.parts.model)
    return Record(
        device=runtime.device_choice.value,
        device_reason=runtime.device_choice.reason,
        precision=runtime.precision.value,
        parameters=parameters,
        gradient_bytes=4 * parameters,
        measured=(),
    )


def _open(config: Config) -> Dataset:
    return open_dataset(
        config.data,
        seed=config.train.seed,
        announce=partial(say, err=True),
        group=group_folder_of(os.environ),
    )


def _computes(precision: str, device: str) -> bool:
    """Tell whether a run can have a precision here and the device computes it itself; a CPU may have bf16 anyhow."""
    try:
        choose_precision(cast("Precision", precision), device)
    except ConfigError:  # fp16 without CUDA, or Accelerate's variable asks for another one
        return False
    if precision == "bf16" and device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return precision != "bf16" or device != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def _memory(imports: int) -> Memory:
    allocated = torch.cuda.max_memory_allocated()  # 0 without CUDA
    return Memory(peak=peak_memory(), imports=imports, cuda_peak=allocated or None)


def _seconds_of_exchange(runtime: Runtime, collective: Collective, size: int) -> float:
    """Time a collective by itself, as the reduction calls it: the median of some. Every rank."""
    values = torch.zeros(size // 4, device=runtime.device)
    seconds = []
    for _ in range(max(LEAST_REPEATS, min(MOST_REPEATS, EXCHANGED // size))):
        began = time.perf_counter()
        if collective == "all-reduce":
            runtime.sum_in_place(values)
        else:
            runtime.gather(values)
        synchronise(runtime.device)
        seconds.append(time.perf_counter() - began)
        heartbeat.beat()
    return statistics.median(seconds)
