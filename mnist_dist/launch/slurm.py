"""Fills in the batch script with which Slurm trains, and submits it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from mnist_dist.errors import ConfigError
from mnist_dist.errors.shell import join, quote
from mnist_dist.launch.engines import recipes

TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}", re.ASCII)
NAME = re.compile(r"[A-Za-z0-9_.,:@+%-]{1,128}")
"""What stands in a line that begins with #SBATCH as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """What a job asks for."""

    command: tuple[str, ...]
    """`train --resume --run-dir RUN ...`"""
    run: str
    """The run folder, on a disk that all machines share."""
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_process: int = 1
    time: str = "01:00:00"
    """Time limit, as Slurm writes it."""
    warning_seconds: int = 120
    """Time before the limit at which the run gets the signal to save and stop."""
    name: str = "mnist-dist"
    partition: str | None = None
    python: tuple[str, ...] = ("python", "-P", "-m", "mnist_dist")
    """The words that start this program on the machines of the cluster."""

    def __post_init__(self) -> None:
        if self.gpus_per_node and self.gpus_per_node != self.processes_per_node:
            raise ConfigError(
                f"--gpus-per-node is {self.gpus_per_node} and --processes-per-node {self.processes_per_node}: each "
                f"process has one GPU, so make them the same."
            )
        if not TIME.fullmatch(self.time):
            raise ConfigError(f"--time is {self.time!r}: write minutes, HH:MM:SS or D-HH:MM:SS.")
        for option, value in (("--name", self.name), ("--partition", self.partition)):
            if value is not None and not NAME.fullmatch(value):
                raise ConfigError(f"{option} is {value!r}: give up to 128 letters, digits and any of _ . , : @ + % -")


def render(job: SlurmJob) -> str:
    """Return the batch script of a job: the recipe launch/slurm/train.sbatch with its fields filled in."""
    directives = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes_per_node,
        "cpus-per-task": job.cpus_per_process,
        "gpus-per-node": job.gpus_per_node,
        "time": job.time,
        "signal": f"B:USR2@{job.warning_seconds}",
    }
    fields = {f"#SBATCH --{name}=": [f"#SBATCH --{name}={value}"] for name, value in directives.items()}
    if job.partition is not None:
        fields["#SBATCH --job-name="].append(f"#SBATCH --partition={job.partition}")
    fields |= {
        "#   edit ": ["#   sbatch SCRIPT"],
        "TRAIN=": [f"TRAIN=({join(job.command)})"],
        "RESULT=": [f"RESULT={quote(f'{job.run}/result.json')}"],
        "PYTHON=": [f"PYTHON=({join(job.python)})"],
    }
    recipe = (recipes() / "slurm" / "train.sbatch").read_text(encoding="utf-8")
    if job.gpus_per_node == 0:
        assert recipe.count("--gpu-bind=none ") == 1, "train.sbatch needs --gpu-bind=none once"
        recipe = recipe.replace("--gpu-bind=none ", "")
        fields |= {"#SBATCH --gpus-per-node=": [], "# A GPU each": ["export ACCELERATE_USE_CPU=true"]}
    return "".join(f"{line}\n" for line in _fill(recipe.splitlines(), fields))


def _fill(recipe: list[str], fields: dict[str, list[str]]) -> Iterator[str]:
    """Yield the lines of a recipe; those of a field replace the line that begins with its key.

    One pass over the recipe: a line that was filled in is never taken for one of the recipe's.
    """
    for beginning in fields:
        count = sum(line.startswith(beginning) for line in recipe)
        assert count == 1, f"train.sbatch has {count} lines that begin with {beginning!r}: it needs one"
    for line in recipe:
        yield from next((lines for beginning, lines in fields.items() if line.startswith(beginning)), [line])


def submit(script: str) -> str:
    """Submit a script to Slurm.

    Returns:
        What sbatch says: the number of the job.

    Raises:
        ConfigError: There is no Slurm here, or it refuses the job.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError("There is no sbatch here: log in to the cluster, or write the script with --dry-run.")
    done = subprocess.run([sbatch], input=os.fsencode(script), capture_output=True, check=False)
    if done.returncode:
        raise ConfigError(f"Slurm refuses the job: {os.fsdecode(done.stderr).strip()}")
    return os.fsdecode(done.stdout).strip()
