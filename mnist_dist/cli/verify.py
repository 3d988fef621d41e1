"""`verify`: whether a run is the same on any number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnist_dist.cli import flags
from mnist_dist.observe.output import open_console, say

if TYPE_CHECKING:
    import numpy as np

    from mnist_dist.config import Resolved

Record = dict[str, "np.ndarray"]

FIGURES = ("loss", "gradients", "weights", "metrics")
"""What is compared, in the order of the table."""


def verify(
    config: flags.Config = None,
    data: flags.Data = None,
    processes: Annotated[
        int,
        flags.whole(
            "--processes", "-n", least=1, most=flags.MOST_PROCESSES, help="Compare 1, 2, 4, ... up to N processes."
        ),
    ] = 2,
    steps: Annotated[int, flags.whole(least=1, most=100_000, help="How many steps each takes.")] = 5,
    device: flags.DeviceKey = None,
    model: flags.ModelKey = None,
    batch_size: flags.BatchSizeKey = None,
    lr: flags.LearningRateKey = None,
    set_: flags.Set = None,
    as_json: flags.Json = False,
    output: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the same steps on 1 to N processes and show what differs. N is --processes; between them 2, 4, 8, ..."""
    from mnist_dist.cli.train import resolve
    from mnist_dist.launch.own import own_output, this_worker
    from mnist_dist.machine import temporary_folder

    given = {"data": data, "device": device, "model": model, "batch_size": batch_size, "lr": lr}
    resolved, _ = resolve(config, set_, given)
    counts = sorted({*(1 << power for power in range(processes.bit_length()) if 1 << power <= processes), processes})
    resolved = _with_steps(resolved, steps, counts[-1])
    if this_worker(None) is not None:
        from mnist_dist.run.verify import probe

        probe(resolved, own_output(output, "verify"))
        return
    for count in counts:
        resolved.config.train.split_batch(count)
    with temporary_folder() as folder:
        records = {count: _probe(resolved, count, folder) for count in counts}
    rows = {count: _differences(records[1], record) for count, record in records.items()}
    if as_json:
        say(json.dumps({"reduction": resolved.config.train.reduction, "steps": steps, "differences": rows}))
    else:
        _print_table(rows, resolved, steps)


def _with_steps(resolved: Resolved, steps: int, most: int) -> Resolved:
    """Shorten the experiment, with one micro-batch size for all process counts."""
    from mnist_dist.config import Resolved

    options = resolved.config.train
    micro_batch = options.split_batch(most if options.reduction == "ddp" else 1)[0]
    changed = options.model_copy(update={"max_steps": steps, "log_every": 1, "micro_batch": micro_batch})
    return Resolved(config=resolved.config.model_copy(update={"train": changed}), origins=resolved.origins)


def _probe(resolved: Resolved, ranks: int, folder: Path) -> Record:
    """Run the steps on so many processes; exit with their code if they fail."""
    from safetensors.numpy import load_file

    from mnist_dist.launch.own import own_group
    from mnist_dist.launch.supervise import run_local

    file = folder / f"{ranks}.safetensors"
    options = resolved.config.train
    code = run_local(own_group(ranks=ranks, threads=options.fixed_threads or 1, extra=("--output", str(file))))
    if code:
        raise typer.Exit(code)
    record: Record = load_file(file)
    return record


def _differences(one: Record, other: Record) -> dict[str, float]:
    """Find the largest absolute difference of each kind of figure."""
    return {name: float(abs(one[name].astype("f8") - other[name].astype("f8")).max()) for name in one}


def _print_table(rows: dict[int, dict[str, float]], resolved: Resolved, steps: int) -> None:
    from rich.table import Table

    options = resolved.config.train
    console = open_console(tables=True)
    table = Table("processes", *FIGURES)
    for count, row in rows.items():  # a row's own order is that of a file
        table.add_row(str(count), *("identical" if not row[name] else f"{row[name]:.1e}" for name in FIGURES))
    pieces = options.global_batch // (options.micro_batch or options.global_batch)
    console.print(f"{options.reduction}, {steps} steps, {pieces} micro-batches of {options.micro_batch} in each")
    console.print("Largest differences from one process:")
    console.print(table)
    if any(value for row in rows.values() for value in row.values()):
        reason = (
            "Only the order of additions differs: each process adds its own micro-batches first. "
            "train.reduction=exact adds in one order on any number of processes."
            if options.reduction == "ddp"
            else "In exact mode nothing may differ: please report this."
        )
        console.print(reason)
