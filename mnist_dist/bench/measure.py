"""The measurements: one process alone, or several together; arithmetic, memory and the exchange of tensors."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from mnist_dist.bench.records import (
    TURNS,
    WINDOWS,
    Arithmetic,
    Case,
    ExchangeTimes,
    GroupResult,
    PeakMemory,
    Speed,
    Window,
    divide_time,
    speed_of,
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
from mnist_dist.training.parts import Parts

SIZES = tuple(4096 * 8**power for power in range(5))
"""Bytes of the exchanged tensors: 4 KiB to 16 MiB. The size of the gradient is measured too."""
EXCHANGED = 2**22
"""Bytes over all repeats of a size, within the limits below."""
LEAST_REPEATS, MOST_REPEATS = 7, 101
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX_SIDES = (512, 1024, 2048, 4096, 8192)
"""Of square matrices: a device reaches its full rate only with large ones."""
LONGEST_PRODUCT = 0.1
"""Seconds: after a slower product, larger ones are not tried."""
PRODUCTS = 5


def measure_alone(config: Config, cases: Sequence[Case], seconds: float, output: Path) -> None:
    """Measure cases in this process alone, and its memory and arithmetic for the first of them.

    Args:
        config: The user's.
        cases: What to vary.
        seconds: For each case.
        output: A JSON file to write, with a `GroupResult`.
    """
    imports = peak_memory()
    dataset = _open(config)
    first = config_of(config, cases[0])
    with join(first) as runtime:
        series = Series(first, dataset, runtime)
        seconds_of_step(series, runtime, seconds / WINDOWS)
        memory = PeakMemory(
            peak=peak_memory(),
            imports=imports,
            cuda_peak=torch.cuda.max_memory_allocated() or None,  # 0 without CUDA
        )
        products, flop = matrix_flop_per_second(runtime.device, runtime.precision.value), flop_per_image(series.parts)
        result = _describe(series, runtime)
    chosen = dict.fromkeys(
        replace(case, precision=result.precision) if case.precision == "auto" else case for case in cases
    )
    possible = [case for case in chosen if _computes(case.precision, result.device)]
    speeds = _measure(config, possible, dataset, seconds, lambda case: join(config_of(config, case)))
    arithmetic = Arithmetic(
        flop_per_image=flop,
        matrix_flop_per_second=products,
        threads=speeds[0].threads,
        share=speeds[0].images_per_second * flop / products,
    )
    replace(result, speeds=speeds, memory=memory, arithmetic=arithmetic).write(output)


def measure_together(config: Config, cases: Sequence[Case], seconds: float, output: Path) -> None:
    """Measure cases in a group of processes, and how long an exchange of tensors takes. Every rank.

    Args:
        config: The user's.
        cases: What to vary; of one precision and number of threads.
        seconds: For each case.
        output: A JSON file that rank 0 writes, with a `GroupResult`.
    """
    dataset = _open(config)
    first = config_of(config, cases[0])
    with join(first) as runtime:
        chosen = [replace(case, precision=runtime.precision.value) for case in cases]
        speeds = _measure(config, chosen, dataset, seconds, lambda case: nullcontext(runtime))
        result = _describe(Series(first, dataset, runtime), runtime)
        collective = "all-gather" if config.train.reduction == "exact" else "all-reduce"
        gradient_bytes = 4 * result.parameters
        exchange = ExchangeTimes(
            collective=collective,
            processes=runtime.ranks,
            gradient_bytes=gradient_bytes,
            seconds_by_bytes=tuple(
                (size, _seconds_of_exchange(runtime, collective, size)) for size in sorted({*SIZES, gradient_bytes})
            ),
        )
        if runtime.rank == 0:
            replace(result, speeds=speeds, collective=exchange).write(output)


def _measure(
    config: Config,
    cases: Sequence[Case],
    dataset: Dataset,
    seconds: float,
    enter: Callable[[Case], AbstractContextManager[Runtime]],
) -> tuple[Speed, ...]:
    """Measure cases in turns, without those whose batch is larger than the training set. Every rank."""
    found = {case: _Windows() for case in cases if case.global_batch <= len(dataset.train)}
    ranks = 1
    for _ in range(TURNS):
        for case, windows in found.items():
            with enter(case) as runtime:
                ranks = runtime.ranks
                _take_turn(config_of(config, case), dataset, runtime, seconds, windows)
    return tuple(
        speed_of(case, ranks, windows.free, windows.watched, windows.without_exchange)
        for case, windows in found.items()
    )


@dataclass(slots=True)
class _Windows:
    """The windows of one case."""

    steps: int = 0
    """Of each window; 0 before the first."""
    number: int = 0
    """Windows of each turn."""
    free: list[Window] = field(default_factory=list)
    watched: list[Window] = field(default_factory=list)
    """On a CPU the same windows; elsewhere windows with a wait for the device between the parts of a step."""
    without_exchange: list[Window] = field(default_factory=list)
    """Empty for one rank."""


def _take_turn(config: Config, dataset: Dataset, runtime: Runtime, seconds: float, windows: _Windows) -> None:
    """Take one turn of a case; several ranks alternate with windows without exchange. Every rank."""
    runtimes = [runtime] if runtime.ranks == 1 else [runtime, WithoutExchange(runtime)]
    if windows.steps == 0:
        a_step = seconds_of_step(Series(config, dataset, runtime), runtime, seconds / WINDOWS)
        windows.steps, windows.number = divide_time(seconds, a_step, config.train.log_every)
    queued = runtime.device.type != "cpu"  # then a stopwatch sees work that is only asked for
    if queued:
        windows.free += take_turns([Series(config, dataset, runtime)], windows.steps, windows.number)[0]
    series = [Series(config, dataset, one, synchronised=queued) for one in runtimes]
    watched, *without = take_turns(series, windows.steps, windows.number)
    windows.watched += watched
    windows.without_exchange += without[0] if without else []
    if not queued:
        windows.free += watched


def _describe(series: Series, runtime: Runtime) -> GroupResult:
    return GroupResult(
        device=runtime.device_choice.value,
        device_reason=runtime.device_choice.reason,
        precision=runtime.precision.value,
        parameters=count_parameters(series.parts.model),
        speeds=(),
    )


def _open(config: Config) -> Dataset:
    return open_dataset(
        config.data,
        seed=config.train.seed,
        announce=partial(say, err=True),
        group=group_folder_of(os.environ),
    )


def _computes(precision: str, device: str) -> bool:
    """Return whether the device computes in a precision itself; bf16 always counts on a CPU."""
    try:
        choose_precision(cast("Precision", precision), device)
    except ConfigError:  # fp16 without CUDA, or Accelerate's variable asks for another one
        return False
    if precision == "bf16" and device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return precision != "bf16" or device != "mps" or torch.backends.mps.is_macos_or_newer(14, 0)


def _seconds_of_exchange(runtime: Runtime, collective: str, size: int) -> float:
    """Return the median time of a collective by itself, called as the reduction calls it. Every rank."""
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


def matrix_flop_per_second(device: torch.device, precision: str) -> float:
    """Return the best rate of products of square matrices; a multiplication and an addition are two operations.

    Args:
        device: Where.
        precision: Of the matrices' values.
    """
    best = 0.0
    for side in MATRIX_SIDES:
        square = torch.rand(side, side, device=device).to(DTYPES[precision])
        fastest = min(_seconds_of_product(square) for _ in range(PRODUCTS))
        best = max(best, 2 * side**3 / fastest)
        if fastest > LONGEST_PRODUCT:
            break
    return best


def _seconds_of_product(square: torch.Tensor) -> float:
    synchronise(square.device)
    began = time.perf_counter()
    torch.mm(square, square)
    synchronise(square.device)
    return time.perf_counter() - began


def flop_per_image(parts: Parts) -> float:
    """Return the operations of forward and backward pass for one image: convolutions and matrix products. One rank."""
    micro_batch, _ = parts.config.train.split_batch(1)
    return sum(flop_by_operator(parts).values()) / micro_batch


def flop_by_operator(parts: Parts) -> dict[str, int]:
    """Return the operations of forward and backward pass of a micro-batch, by torch's operators. One rank.

    The counter is torch's own; it leaves out pooling, activations, the loss and the optimizer.
    """
    micro_batch, _ = parts.config.train.split_batch(1)
    images, epochs = (values[:micro_batch] for values in parts.sampler.batch(0))
    pixels, labels = parts.batches["train"].take(images, epochs)
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(parts.reduction.model(pixels), labels).backward()  # type: ignore[no-untyped-call]
    parts.optimizer.zero_grad()
    return {str(operator).removeprefix("aten."): flop for operator, flop in counter.get_flop_counts()["Global"].items()}


def peak_memory() -> int:
    """Return the most memory that this process has had resident, in bytes; 0 if the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
