"""`bench`: how fast a config trains on this machine, what limits it, and one suggestion."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnist_dist.cli import flags
from mnist_dist.observe.output import open_console, say

if TYPE_CHECKING:
    from mnist_dist.bench.cases import Cases
    from mnist_dist.bench.report import Report
    from mnist_dist.config import Config, Resolved
    from mnist_dist.config.schema import Train

ON_CPUS = 2
"""Processes to measure by default on a machine without a GPU."""


def bench(
    config: flags.Config = None,
    data: flags.Data = None,
    processes: Annotated[
        int | None,
        flags.whole(
            "--processes",
            "-n",
            least=1,
            most=flags.MOST_PROCESSES,
            help="Measure 1, 2, 4, ... up to N processes.",
            show_default="all GPUs, or 2",
        ),
    ] = None,
    device: flags.DeviceKey = None,
    precision: flags.PrecisionKey = None,
    model: flags.ModelKey = None,
    batch_size: flags.BatchSizeKey = None,
    seconds: Annotated[
        float, flags.number(least=0.01, most=3600, help="For each measurement, after its warm-up.")
    ] = 3.0,
    set_: flags.Set = None,
    as_json: flags.Json = False,
    output: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure speed, scaling and where a step's time goes, and suggest one change."""
    from mnist_dist.cli.train import QUICK, resolve
    from mnist_dist.launch.own import own_output, this_worker

    given = {"data": data, "device": device, "precision": precision, "model": model, "batch_size": batch_size}
    resolved, source = resolve(config, set_, given)
    worker = this_worker(None)
    if worker is not None:
        _work(resolved.config, worker.ranks, seconds, own_output(output, "bench"))
        return
    cases = _plan(resolved.config.train, processes)
    if source == QUICK != config:
        say("No folder Dataset here: measuring on the 1,797 embedded digits (preset quick).", err=True)
    if sys.stderr.isatty():
        say("Measuring; other programs that run meanwhile distort the figures ...", err=True)
    report = _measure(resolved, cases, seconds)
    if as_json:
        say(json.dumps(asdict(report)))
        return
    from mnist_dist.bench.table import print_report

    print_report(report, open_console(tables=True))


def _plan(options: Train, processes: int | None) -> Cases:
    """Return the cases to measure.

    Raises:
        ConfigError: Fewer GPUs are there, or the processes cannot share the global batch.
    """
    from mnist_dist.bench.cases import plan_cases, shareable
    from mnist_dist.launch.own import choose_ranks
    from mnist_dist.machine import allowed_cpus, visible_gpus

    usual = choose_ranks(None, options.device)
    most = choose_ranks(processes, options.device)
    has_gpu = options.device in ("cuda", "mps") or (
        options.device == "auto" and (visible_gpus() > 0 or sys.platform == "darwin")
    )
    if processes is None and not has_gpu:
        most = ON_CPUS
    counts = shareable(options, most, asked=processes is not None)
    threads = {ranks: _threads(options, ranks) for ranks in counts}
    return plan_cases(options, usual=usual, threads=threads, cpus=None if has_gpu else allowed_cpus())


def _threads(options: Train, ranks: int) -> int:
    """Return the threads of each process, as `train` shares the CPUs."""
    from mnist_dist.machine import allowed_cpus, asked_threads

    if options.fixed_threads is not None:
        return options.fixed_threads
    return asked_threads(os.environ) or max(1, allowed_cpus() // ranks)


def _measure(resolved: Resolved, cases: Cases, seconds: float) -> Report:
    """Run one group of processes after the other, and exit with the code of a group that fails."""
    from mnist_dist.bench.records import GroupResult, write_cases
    from mnist_dist.bench.report import assemble
    from mnist_dist.cli.train import approve_data
    from mnist_dist.launch.own import own_group
    from mnist_dist.launch.supervise import run_local
    from mnist_dist.machine import allowed_cpus, temporary_folder
    from mnist_dist.machine.cpu_time import Moment, others_between

    results = {}
    before = Moment.now()
    with temporary_folder() as folder:
        for ranks in cases.counts:
            file = folder / f"{ranks}.json"
            write_cases(cases.of_group(ranks), file)
            group = own_group(ranks=ranks, threads=cases.base[ranks].threads, extra=("--output", str(file)))
            code = run_local(group, meanwhile=partial(approve_data, resolved, err=True))
            if code:
                raise typer.Exit(code)
            results[ranks] = GroupResult.read(file)
    after = Moment.now()
    return assemble(
        resolved.config,
        cases,
        results,
        cpus=allowed_cpus(),
        machine_cpus=os.cpu_count() or 1,
        others=others_between(before, after) if before and after else None,
        seconds_each=seconds,
    )


def _work(config: Config, ranks: int, seconds: float, file: Path) -> None:
    """Measure as one rank; the file holds the cases, and afterwards the result."""
    from mnist_dist.fast.imports import leave_out_compiler
    from mnist_dist.group.threads import prepare

    prepare(config, ranks)  # as in training
    if not config.train.compile:
        leave_out_compiler()
    from mnist_dist.bench.measure import measure_alone, measure_together
    from mnist_dist.bench.records import read_cases

    measure = measure_alone if ranks == 1 else measure_together
    measure(config, read_cases(file), seconds, file)
