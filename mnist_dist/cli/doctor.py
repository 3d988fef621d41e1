"""`doctor`: what stands in the way of a run on this machine."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mnist_dist.cli import flags
from mnist_dist.errors import ConfigError, MnistDistError, StoppedError, StorageError
from mnist_dist.observe.names import message_of, shown
from mnist_dist.observe.output import open_console, say

if TYPE_CHECKING:
    from mnist_dist.doctor.finding import Finding

START_SECONDS = 120
"""Processes that have not met by then hang. Importing torch from a slow disk takes half a minute."""
COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with train/CLASS/* and test/CLASS/*.", show_default="Dataset, if there is one"),
    ] = None,
    as_json: flags.Json = False,
    output: Annotated[Path | None, typer.Option(hidden=True)] = None,
    device: Annotated[str, typer.Option(hidden=True)] = "cpu",
) -> None:
    """Check versions, devices, limits, communication and data. Exit 2 if something would make a run fail."""
    if output is not None:
        if device == "all":
            from mnist_dist.doctor.survey import survey

            survey(output)
        else:
            from mnist_dist.doctor.all_reduce import measure

            measure("cuda" if device == "cuda" else "cpu", output)
        return
    if sys.stderr.isatty():
        say("Looking at this machine; starting processes for it takes some seconds ...", err=True)
    findings = [*_without_torch(), *_with_torch(), *_around(data)]
    if as_json:
        say(json.dumps([asdict(finding) for finding in findings]))
    else:
        _print_table(findings)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(ConfigError.exit_code)


def _without_torch() -> list[Finding]:
    from mnist_dist.doctor import system
    from mnist_dist.doctor.finding import examine

    return [
        *examine("Python", system.python),
        *examine("packages", system.packages),
        *examine("CPUs", system.cpus),
        *examine("/dev/shm", system.shared_memory),
        *examine("open files", system.open_files),
        *examine("host name", system.host_name),
        *examine("TCP port", system.loopback_port),
    ]


def _with_torch() -> list[Finding]:
    """Run the checks that need torch, in child processes: this process never opens a GPU.

    Raises:
        StoppedError: A signal came meanwhile.
    """
    from mnist_dist.doctor.finding import Finding, examine, first_line
    from mnist_dist.doctor.survey import Survey
    from mnist_dist.machine import temporary_folder

    try:
        with temporary_folder() as folder:
            file = folder / "survey.json"
            _run("all", file, ranks=1)
            survey = Survey.read(file)
    except StoppedError:
        raise
    except MnistDistError as error:
        advice = "torch or a driver may have crashed or hang: look at the system's log, and at nvidia-smi."
        return [Finding(check="torch", state="problem", found=first_line(error), advice=advice)]
    findings = survey.findings
    if survey.gloo:
        findings += examine("all-reduce", lambda: _all_reduce("gloo", "cpu", ranks=2))
    if survey.nccl and survey.gpus > 1:
        findings += examine("all-reduce", lambda: _all_reduce("NCCL", "cuda", ranks=survey.gpus))
    return findings


def _run(device: Literal["all", "cpu", "cuda"], output: Path, *, ranks: int) -> None:
    """Run this command's hidden work on a device, in processes of its own.

    Raises:
        MnistDistError: A process has failed, died or hung.
        StoppedError: A signal came meanwhile.
    """
    from mnist_dist.group.signals import name_of
    from mnist_dist.launch.own import own_group
    from mnist_dist.launch.supervise import run_local

    group = own_group(ranks=ranks, threads=1, extra=("--output", str(output), "--device", device))
    code = run_local(replace(group, start_seconds=START_SECONDS))
    if code:
        number = code - 128
        raise StoppedError(f"Stopped by {name_of(number)} before all was looked at.", number)


def _around(data: Path | None) -> list[Finding]:
    from mnist_dist.doctor import surroundings
    from mnist_dist.doctor.finding import examine
    from mnist_dist.machine import allowed_cpus

    return [
        *examine("data", lambda: surroundings.pictures(data)),
        *examine("accelerate", lambda: surroundings.accelerate_config(os.environ)),
        *examine("environment", lambda: surroundings.environment(os.environ, allowed_cpus())),
    ]


def _all_reduce(library: str, device: Literal["cpu", "cuda"], *, ranks: int) -> Finding:
    """Start processes that add up a tensor.

    Raises:
        StoppedError: A signal came meanwhile.
    """
    from mnist_dist.doctor.finding import Finding, Measured, first_line
    from mnist_dist.machine import temporary_folder

    began = time.monotonic()
    try:
        with temporary_folder() as folder:
            file = folder / "measured.json"
            _run(device, file, ranks=ranks)
            measured = Measured.read(file)
    except StoppedError:
        raise
    except StorageError as error:
        return Finding(check="all-reduce", state="problem", found=str(error), advice="`train` needs such a folder too.")
    except MnistDistError as error:
        if "\n" in str(error):
            print(message_of(error), file=sys.stderr)  # a traceback has no place in a table
        advice = {
            "gloo": "Processes here cannot talk to each other: look at GLOO_SOCKET_IFNAME and for a firewall.",
            "NCCL": "The GPUs cannot talk to each other: `NCCL_DEBUG=INFO mnist-dist doctor` says more.",
        }[library]
        return Finding(check="all-reduce", state="problem", found=f"{library}: {first_line(error)}", advice=advice)
    seconds = time.monotonic() - began
    times = f"1 MiB in {1000 * measured.seconds:.2f} ms; {seconds:.1f} s with their start"
    found = f"{library}: {measured.ranks} processes, {times}"
    return Finding(check="all-reduce", state="ok", found=found)


def _print_table(findings: list[Finding]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = open_console(tables=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))  # room for words
    table.add_column("check", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold", min_width=30)  # the longest variable with its value
    table.add_column("advice", overflow="fold")
    for finding in findings:
        state = Text(finding.state, style=COLOURS[finding.state])
        table.add_row(shown(finding.check), state, shown(finding.found), shown(finding.advice))
    console.print(table)
    console.print()
    counts = Counter(finding.state for finding in findings)
    warnings, problems = counts["warning"], counts["problem"]
    console.print(
        f"{counts['ok']} ok, {warnings} warning{'s' * (warnings != 1)}, {problems} problem{'s' * (problems != 1)}",
    )
