"""The report of `bench` as text."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mnist_dist.bench.records import Speed
from mnist_dist.bench.report import Report
from mnist_dist.observe.names import shown

PARTS = {
    "input": "gather, move, augment, normalise",
    "compute": "forward, backward, optimizer",
    "communication": "what the exchange of gradients adds",
    "other": "sampler, loop, bookkeeping",
}


def print_report(report: Report, console: Console) -> None:
    """Print a report; no table is wider than 80 columns."""
    device = report.device if report.device == "cpu" else f"{report.device} ({report.device_reason})"
    _line(
        console,
        f"{report.model} ({report.parameters:,} weights), {report.reduction}, steps of {report.global_batch} images; "
        f"{device}, {report.precision}",
    )
    _line(console, _surroundings(report))
    console.print()
    console.print(_speeds(report))
    _line(console, "efficiency: against one process with as many threads, times the number")
    console.print()
    console.print(_steps(report.scaling))
    console.print()
    for line in _facts(report):
        _line(console, line)
    console.print()
    _line(console, f"{report.advice.limit}: {report.advice.reason}.", title="Nearest limit: ")
    _line(console, report.advice.suggestion, title="Suggestion: ")


def _line(console: Console, text: str, *, title: str = "") -> None:
    console.print(Text.assemble((title, "bold"), shown(text)))


def _surroundings(report: Report) -> str:
    cpus = f"{report.cpus} CPU{'s' * (report.cpus != 1)}"
    if report.others is None:
        return cpus
    busy, stolen = report.others.busy, report.others.stolen
    if max(busy, stolen) < 0.05:
        return f"{cpus}; the machine was otherwise idle"
    return f"{cpus}; meanwhile other programs kept {busy:.1f} CPUs busy, and {stolen:.1f} were not granted"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(columns[0])
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _speeds(report: Report) -> Table:
    table = _table("training", "images/s", "range", "speed-up", "efficiency")
    for row in report.scaling:
        each = " each" if row.processes > 1 else ""
        table.add_row(
            f"{_count(row.processes, 'process')} x {_count(row.threads, 'thread')}{each}",
            f"{row.images_per_second:,.0f}",
            f"{row.least:,.0f} to {row.most:,.0f}",
            f"{row.speedup:.2f}",
            f"{row.efficiency:.0%}" if row.processes > 1 else "",
        )
    for other in report.alternatives:
        what = other.precision if other.global_batch == report.global_batch else f"steps of {other.global_batch}"
        table.add_row(
            f"{_count(other.processes, 'process')}, {what}",
            f"{other.images_per_second:,.0f}",
            "",
            f"{other.speedup:.2f}",
            "",
        )
    return table


def _steps(rows: tuple[Speed, ...]) -> Table:
    rows = rows if len(rows) < 3 else (rows[0], rows[-1])
    table = _table("ms of a step", *(_count(row.processes, "process") for row in rows))
    for part, meaning in PARTS.items():
        values = [(getattr(row.step, part), row.step.seconds) for row in rows]
        table.add_row(f"{part}: {meaning}", *(f"{1000 * value:.2f} {value / step:>5.0%}" for value, step in values))
    table.add_row("the whole step", *(f"{1000 * row.step.seconds:.2f}  100%" for row in rows))
    return table


def _facts(report: Report) -> list[str]:
    arithmetic, memory = report.arithmetic, report.memory
    lines = [
        f"Arithmetic: {arithmetic.flop_per_image / 1e6:,.3g} MFLOP an image; one process reaches "
        f"{arithmetic.share:.0%} of the {arithmetic.matrix_flop_per_second / 1e9:,.0f} GFLOP/s of a matrix "
        f"product in {report.precision}.",
        f"Memory: a process takes {_size(memory.peak)} at most, of which imports {_size(memory.imports)}"
        + ("." if memory.cuda_peak is None else f"; {_size(memory.cuda_peak)} of the GPU's."),
    ]
    if report.collective is not None:
        exchange = report.collective
        seconds = dict(exchange.seconds_by_bytes)[exchange.gradient_bytes]
        lines.append(
            f"{exchange.collective.capitalize()} between {exchange.processes} processes, by itself: "
            f"{1000 * seconds:.2f} ms for {_size(exchange.gradient_bytes)} of gradients."
        )
    return lines


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{plural * (number != 1)}"


def _size(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}" if count < 10 * unit else f"{count / unit:,.0f} {name}"
    return f"{count} bytes"
