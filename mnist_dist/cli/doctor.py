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
    """Look at versions, devices, limits, communication and data. Exit 2 if something would make a run fail."""
    if output is not None:
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
    """Look at what needs torch, as far as it can be imported."""
    from mnist_dist.doctor.finding import Finding, examine, first_line

    try:
        import torch

        from mnist_dist.doctor import hardware
        from mnist_dist.runtime import has_backend
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        found = f"torch and accelerate cannot be imported: {type(error).__name__}: {first_line(error)}"
        advice = "Install what it names anew: see https://pytorch.org/get-started/locally."
        return [Finding(check="torch", state="problem", found=found, advice=advice)]
    findings = [
        Finding(check="torch", state="ok", found=torch.__version__),
        *examine("CUDA", hardware.cuda),
        *examine("NCCL and gloo", hardware.backends),
        *examine("cpu", hardware.processor),
        *examine("GPUs", hardware.graphics),
        *examine("train takes", hardware.choice),
    ]
    if has_backend("gloo"):
        findings += examine("all-reduce", lambda: _all_reduce("gloo", "cpu", ranks=2))
    if has_backend("nccl") and torch.cuda.device_count() > 1:
        ranks = torch.cuda.device_count()
        findings += examine("all-reduce", lambda: _all_reduce("NCCL", "cuda", ranks=ranks))
    return findings


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
    from mnist_dist.cli.processes import own_group
    from mnist_dist.doctor.all_reduce import Measured
    from mnist_dist.doctor.finding import Finding, first_line
    from mnist_dist.launch.local import run_local
    from mnist_dist.machine import temporary_folder
    from mnist_dist.signals import name_of

    began = time.monotonic()
    try:
        with temporary_folder() as folder:
            file = folder / "measured.json"
            group = own_group(ranks=ranks, threads=1, extra=("--output", str(file), "--device", device))
            code = run_local(replace(group, start_seconds=START_SECONDS))
            measured = None if code else Measured.read(file)
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
    if measured is None:
        number = code - 128
        raise StoppedError(f"Stopped by {name_of(number)} before all was looked at.", number)
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
