"""What a person sees in a terminal, and the plain lines that take its place in a file or a pipe."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mnist_dist.config import EMBEDDED_DIGITS
from mnist_dist.errors.shell import quote
from mnist_dist.observe import Observer
from mnist_dist.observe.columns import COLUMNS, Column, figures_of
from mnist_dist.observe.names import shown
from mnist_dist.observe.output import glyph, print_line
from mnist_dist.observe.records import EpochReport, Evaluation, Event, Plan, Result, StepReport

REFRESH_SECONDS = 0.25
PLAIN_SECONDS = 10.0


class TrainingConsole(Observer):
    """Plan, progress bar, a row an epoch and the result; without a terminal, plain lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._plan: Plan | None = None
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._shown = self._started = time.monotonic()

    def plan(self, plan: Plan) -> None:  # noqa: D102
        self._plan = plan
        facts = [(name, shown(value)) for name, value in _facts(plan, more=glyph(self._console, "…", "..."))]
        if not self._console.is_terminal:
            for name, value in facts:
                self._print(f"{name}: {value}")
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold")
        grid.add_column(overflow="fold")
        for name, value in facts:
            grid.add_row(name, Text(value))
        self._console.print(Panel(grid, title="Plan", title_align="left", border_style="cyan", expand=False))
        self._console.print(_header(self._columns()))
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("step {task.completed}/{task.total}"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            expand=True,
            refresh_per_second=1 / REFRESH_SECONDS,
        )
        self._task = self._progress.add_task(
            _epoch(plan, plan.first_epoch), total=plan.total_steps, completed=plan.first_step, figures=""
        )
        self._progress.start()

    def progress(self, step: int) -> None:  # noqa: D102
        if self._progress is not None and time.monotonic() - self._shown > REFRESH_SECONDS:
            self._shown = time.monotonic()
            self._progress.update(self._task, completed=step)

    def step(self, report: StepReport) -> None:  # noqa: D102
        assert self._plan is not None
        if self._progress is not None:
            figures = f"loss {report.loss:.4f}"
            if self._console.width >= 100:
                figures += f"  {report.images_per_second:,.0f} images/s"
            epoch = _epoch(self._plan, report.epoch)
            self._progress.update(self._task, completed=report.step, description=epoch, figures=figures)
        elif time.monotonic() - self._shown > PLAIN_SECONDS:
            self._shown = time.monotonic()
            done = (report.step - self._plan.first_step) / (self._plan.total_steps - self._plan.first_step)
            left = (self._shown - self._started) * (1 - done) / done
            self._print(
                f"{_epoch(self._plan, report.epoch)}  step {report.step}/{self._plan.total_steps}  "
                f"loss {report.loss:.4f}  {report.images_per_second:,.0f} images/s  ETA {left:.0f} s"
            )

    def event(self, event: Event) -> None:  # noqa: D102
        if event.event == "fewer_threads":
            threads = f"{event.figures['threads']:.0f}"
            self._print(
                f"step {event.step}: other programs need CPUs, so each process computes with {threads} "
                f"thread{'s' * (threads != '1')} from now on (set train.threads=N to fix it)"
            )

    def epoch(self, report: EpochReport, test: Evaluation) -> None:  # noqa: D102
        assert self._plan is not None
        if self._progress is not None:
            self._console.print(_row(figures_of(report, test), self._columns()))
            return
        pairs = {
            "train": (report.train_loss, report.train_accuracy),
            "validation": (report.validation_loss, report.validation_accuracy),
            "test": (report.test_loss, report.test_accuracy),
        }
        splits = [
            f"{name} loss {loss:.4f} accuracy {accuracy:.2%}"
            for name, (loss, accuracy) in pairs.items()
            if loss is not None and accuracy is not None
        ]
        self._print(
            f"{_epoch(self._plan, report.epoch)}  step {report.step}  {'  '.join(splits)}  "
            f"{report.images_per_second:,.0f} images/s  {report.seconds:.1f} s"
        )

    def result(self, result: Result) -> None:  # noqa: D102
        self.close()
        assert self._plan is not None
        split = "test" if self._plan.test_images else "validation"
        lines = [
            f"{split} accuracy {result.metrics[f'{split}_accuracy']:.2%}, loss {result.metrics[f'{split}_loss']:.4f} "
            f"(evaluated {result.evaluated})",
        ]
        if result.best:
            lines.append(
                f"best validation accuracy {result.best['validation_accuracy']:.2%} at step {result.best['step']:.0f}"
            )
        lines.append(f"{result.step} steps in {result.seconds:.1f} s; everything is in {result.run}")
        commands = next_commands(result.run, data=self._plan.data)
        if not self._console.is_terminal:
            for line in lines:
                self._print(line)
            for command, purpose in commands:
                self._print(f"next: {command}  # {purpose}")
            return
        grid = Table.grid(padding=(0, 2))
        for command, purpose in commands:
            grid.add_row(Text(purpose, overflow="fold"), Text(shown(command), style="bold cyan", overflow="fold"))
        text = Text("\n".join(map(shown, lines)))
        text.highlight_regex(rf"^{split} accuracy [\d.]+%", "bold green")
        self._console.print(
            Panel(
                Group(text, "", Text("Next"), grid),
                title="Done",
                title_align="left",
                border_style="green",
                expand=False,
            )
        )

    def close(self) -> None:  # noqa: D102
        if self._progress is not None:
            self._progress.stop()

    def _columns(self) -> list[Column]:
        assert self._plan is not None
        absent = {"validation": self._plan.validation_images, "test": self._plan.test_images}
        return _fitting(self._console.width, without=tuple(name for name, images in absent.items() if not images))

    def _print(self, line: str) -> None:
        print_line(self._console, line)


def next_commands(run: str, *, data: str) -> list[tuple[str, str]]:
    """Suggest what to type after a run: commands, and what each is for."""
    program = program_name()
    parent = Path(run).parent
    watched, run = quote(str(parent) if parent.name == "runs" else run), quote(run)
    return [
        (f"{program} monitor {watched}", "watch it in TensorBoard"),
        (f"{program} predict {run} IMAGE.png", "label images"),
        (f"{program} train --data FOLDER", "train on your own images")
        if data.startswith(EMBEDDED_DIGITS)
        else (f"{program} show {run}", "see predictions"),
    ]


def program_name() -> str:
    """Return what to type for this program: its name if it is on the PATH, otherwise its path."""
    if shutil.which("mnist-dist"):
        return "mnist-dist"
    script = Path(sys.executable).with_name("mnist-dist")
    if not script.exists():
        return "python -m mnist_dist"
    return os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)


def _facts(plan: Plan, *, more: str) -> list[tuple[str, str]]:
    counts = {"train": plan.train_images, "test": plan.test_images, "validation": plan.validation_images}
    splits = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    names = ", ".join([*plan.classes[:10], *([more] if len(plan.classes) > 10 else [])])
    ranks = "1 process" if plan.ranks == 1 else f"{plan.ranks} processes"
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    why = f" ({plan.threads_reason})" if plan.threads_reason else ""
    resumed = f"; resumed after step {plan.first_step:,}" if plan.first_step else ""
    if plan.reduction == "exact":
        resumed += "; exact: the same bits on any number of processes"
    return [
        ("device", f"{plan.device} ({plan.device_reason}); {ranks}, {threads} each" + why),
        ("precision", f"{plan.precision} ({plan.precision_reason})" + ("; TF32 off" if plan.device == "cuda" else "")),
        ("global batch", f"{plan.batch_arithmetic}  (micro-batch x accumulation x processes)"),
        (
            "length",
            f"{plan.total_steps:,} steps, {plan.planned_epochs:g} epoch{'s' * (plan.planned_epochs != 1)}" + resumed,
        ),
        ("model", f"{plan.model}, {plan.parameters:,} weights"),
        ("optimizer", f"{plan.optimizer}; schedule {plan.schedule}"),
        ("data", f"{plan.data}: {splits}"),
        ("classes", f"{len(plan.classes)} ({names})"),
        ("augmentation", plan.augmentation),
        ("store", plan.store),
        *([("graph", plan.graph)] if plan.graph else []),
        ("run", plan.run),
    ]


def _epoch(plan: Plan, epoch: int) -> str:
    return f"epoch {epoch}/{plan.last_epoch}"


def _fitting(width: int, *, without: tuple[str, ...]) -> list[Column]:
    """Return the columns that fit into a terminal; those of the highest ranks are left out first.

    Args:
        width: In characters.
        without: Splits that the run does not have.
    """
    columns = [column for column in COLUMNS if column.title and not column.name.startswith(without)]
    for column in sorted(columns, key=lambda column: -column.rank):
        if column.rank == 0 or sum(map(_width, columns)) <= width:
            break
        columns.remove(column)
    return columns


def _width(column: Column) -> int:
    return max(len(column.title), 7) + 2


def _header(columns: list[Column]) -> Text:
    return Text("".join(column.title.rjust(_width(column)) for column in columns), style="bold")


def _row(figures: dict[str, float], columns: list[Column]) -> Text:
    row = Text()
    for column in columns:
        text = format(figures[column.name], column.format)
        row.append(text.rjust(_width(column)), style="green" if column.name == "test_accuracy" else "")
    return row
