"""Writes the batch script with which Slurm trains: ranks straight under srun, signals, requeue, resume."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from mnist_dist.errors import ConfigError
from mnist_dist.errors.shell import join, quote

TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}", re.ASCII)
NAME = re.compile(r"[A-Za-z0-9_.,:@+%-]{1,128}")
"""What stands in a line that begins with #SBATCH as it is."""

SCRIPT = r"""#!/usr/bin/env bash
# Trains under Slurm: one task a process, ranks straight under srun.
#
#   {how}
#
# Before the time limit, and on preemption with SIGUSR2, the run saves and stops; the job goes back into the queue and
# resumes. A job that loses a machine is requeued by Slurm and resumes too. Logs are appended to one file.
{directives}
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

TRAIN=({train})
RESULT={result}
PYTHON=({python})

# The ranks meet on the first machine of the allocation, at the address under which Slurm knows it.
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # reads all: no SIGPIPE
MASTER_ADDR=$(scontrol -o show node "$HEAD" | sed 's/.* NodeAddr=\([^ ]*\).*/\1/')
export MASTER_ADDR MASTER_PORT=$((20000 + (SLURM_JOB_ID + ${{SLURM_RESTART_COUNT:-0}}) % 20000))
# A group of another size than this is refused: no silent run of one process.
export MNIST_DIST_WORLD_SIZE=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}
{cpu}

# Each rank gets its place in the variables that torchrun would set. A rank that dies ends the others.
srun --ntasks="$MNIST_DIST_WORLD_SIZE" --ntasks-per-node="$SLURM_NTASKS_PER_NODE" --cpus-per-task="$OMP_NUM_THREADS" \
  {bind}--kill-on-bad-exit=1 --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec "$@"' rank "${{PYTHON[@]}}" "${{TRAIN[@]}}" &
STEP=$!

# The signal reaches this script alone: pass it on to the ranks, and remember it.
WARNED=''
trap 'WARNED=yes TRAPPED=yes; kill -USR2 $STEP' USR2
trap 'TRAPPED=yes; kill -TERM $STEP' TERM
TRAPPED=yes
while [ -n "$TRAPPED" ]; do  # a trap interrupts the wait
  TRAPPED='' CODE=0
  wait $STEP || CODE=$?
done

# Again only where the run says that it was stopped, or was stopped before it had begun (140), and not after scancel.
if [ -n "$WARNED" ] && {{ [ $CODE = 140 ] || grep -qs '"status": "stopped"' "$RESULT"; }}; then
  echo "stopped before the time was over: back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60  # Slurm ends this script
fi
exit "$CODE"
"""


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


def render(job: SlurmJob, *, how: str = "sbatch SCRIPT") -> str:
    """Write the batch script of a job.

    Args:
        job: What to run.
        how: How the script is submitted, for its head.
    """
    directives = {
        "job-name": job.name,
        "partition": job.partition,
        "nodes": job.nodes,
        "ntasks-per-node": job.processes_per_node,
        "cpus-per-task": job.cpus_per_process,
        "gpus-per-node": job.gpus_per_node or None,
        "time": job.time,
        "signal": f"B:USR2@{job.warning_seconds}",
        "output": "slurm-%j.out",
    }
    # Without binding, whatever the site's default is: NCCL's direct links need the other ranks' GPUs in sight.
    has_gpus = job.gpus_per_node > 0
    return SCRIPT.format(
        how=how,
        directives="\n".join(f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None),
        train=join(job.command),
        python=join(job.python),
        cpu="# A GPU each: local rank i takes GPU i." if has_gpus else "export ACCELERATE_USE_CPU=true",
        bind="--gpu-bind=none " if has_gpus else "",
        result=quote(f"{job.run}/result.json"),
    )


def submit(script: str) -> str:
    """Hand a script to Slurm.

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
