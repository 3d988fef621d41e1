"""`doctor`: problems of this machine that would stop a run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnist_dist.cli import flags
from mnist_dist.errors import ConfigError, MnistDistError, StoppedError, StorageError
from mnist_dist.observe.names import message_of, shown
from mnist_dist.observe.output import open_console, say

if TYPE_CHECKING:
    from mnist_dist.doctor.finding import Finding

START_SECONDS = 120
"""Processes that have not connected by then hang. Importing torch from a slow disk takes half a minute."""
COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def doctor(
    data: Annotated[
        Path | None,
        typer.Option(help=f"{flags.DATA}.", show_default="Dataset, if there is one"),
    ] = None,
    as_json: flags.Json = False,
    output: Annotated[Path | None, typer.Option(hidden=True)] = None,
    device: Annotated[str, typer.Option(hidden=True)] = "cpu",
) -> None:
    """Check versions, devices, limits, communication and data. Exit 2 if something would make a run fail."""
    if output is not None:
        if device == "all":
            from mnist_dist.doctor.survey import survey_torch

            survey_torch(output)
        else:
            from mnist_dist.doctor.all_reduce import measure

            measure("cuda" if device == "cuda" else "cpu", output)
        return
    if sys.stderr.isatty():
        say("Looking at this machine; starting processes for it takes some seconds ...", err=True)
    machine, around = _without_torch(data)
    findings = [*machine, *_with_torch(), *around]
    if as_json:
        say(json.dumps([asdict(finding) for finding in findings]))
    else:
        _print_table(findings)
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(ConfigError.exit_code)


def _without_torch(data: Path | None) -> tuple[list[Finding], list[Finding]]:
    """Return the findings about the machine, and those about what a run finds around it."""
    from mnist_dist.doctor import surroundings, system
    from mnist_dist.doctor.finding import examine
    from mnist_dist.machine import allowed_cpus

    machine = [
        *examine("Python", system.python),
        *examine("packages", system.packages),
        *examine("CPUs", system.cpus),
        *examine("/dev/shm", system.shared_memory),
        *examine("open files", system.open_files),
        *examine("host name", system.host_name),
        *examine("TCP port", system.loopback_port),
    ]
    around = [
        *examine("data", lambda: surroundings.pictures(data)),
        *examine("accelerate", lambda: surroundings.accelerate_config(os.environ)),
        *examine("environment", lambda: surroundings.environment(os.environ, allowed_cpus())),
    ]
    return machine, around


def _with_torch() -> list[Finding]:
    """Return the findings that need torch. Their processes have ended then; this one holds nothing of a GPU.

    Raises:
        StoppedError: A signal came meanwhile.
    """
    from mnist_dist.doctor.finding import Finding, examine, first_line

    try:
        record = json.loads(_run("all", ranks=1))
    except StoppedError:
        raise
    except MnistDistError as error:
        advice = "torch or a driver may have crashed or hang: look at the system's log, and at nvidia-smi."
        return [Finding(check="torch", state="problem", found=first_line(error), advice=advice)]
    findings = [Finding(**finding) for finding in record["findings"]]
    for library, device, ranks in record["groups"]:
        findings += examine("all-reduce", partial(_all_reduce, library, device, ranks))
    return findings


def _run(device: str, *, ranks: int) -> str:
    """Run this command's hidden work on a device, in processes of its own, and return what it wrote.

    Raises:
        MnistDistError: A process failed, died or hung.
        StoppedError: A signal came meanwhile.
    """
    from mnist_dist.group.signals import name_of
    from mnist_dist.launch.own import own_group
    from mnist_dist.launch.supervise import run_local
    from mnist_dist.machine import temporary_folder

    with temporary_folder() as folder:
        file = folder / "found"
        group = own_group(ranks=ranks, threads=1, extra=("--output", str(file), "--device", device))
        code = run_local(replace(group, start_seconds=START_SECONDS))
        if code:
            number = code - 128
            raise StoppedError(f"Stopped by {name_of(number)} before every check was done.", number)
        return file.read_text(encoding="utf-8")


def _all_reduce(library: str, device: str, ranks: int) -> Finding:
    """Return the finding about an all-reduce between processes of its own.

    Raises:
        StoppedError: A signal came meanwhile.
    """
    from mnist_dist.doctor.finding import Finding, first_line

    began = time.monotonic()
    try:
        median = float(_run(device, ranks=ranks))
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
    times = f"1 MiB in {1000 * median:.2f} ms; {seconds:.1f} s with their start"
    found = f"{library}: {ranks} processes, {times}"
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
