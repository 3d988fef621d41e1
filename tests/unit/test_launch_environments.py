"""The environment that each launcher gives to 1, 2 and 8 GPUs on 1 and 2 machines, against a golden table.

After a change that is meant: `UPDATE_GOLDEN=1 pytest tests/unit/test_launch_environments.py`, and read the difference.
"""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from mnist_dist.group.place import worker_of
from mnist_dist.launch import engines, kubernetes
from mnist_dist.launch.group import Group, describe
from mnist_dist.launch.slurm import SlurmJob, render

GOLDEN = Path(__file__).parents[1] / "golden" / "environments.txt"
SIZES = [(machines, gpus) for machines in (1, 2) for gpus in (1, 2, 8)]
TRAIN = ("train", "--resume", "--run-dir", "/runs/a")
FAKES = {
    "scontrol": 'case "$*" in "show hostnames "*) echo n1; echo n2 ;; *) echo "Name=n1 NodeAddr=10.0.0.1 X=1" ;; esac',
    "srun": 'while [ "${1#--}" != "$1" ]; do echo "$1" >> "$OUT/options"; shift; done\n'
    "export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE)) SLURM_PROCID=0\n"
    "while [ $SLURM_PROCID -lt $SLURM_NTASKS ]; do\n"
    'SLURM_LOCALID=$((SLURM_PROCID % SLURM_NTASKS_PER_NODE)) "$@"; SLURM_PROCID=$((SLURM_PROCID + 1)); done',
}
"""What Slurm's programs do on a cluster of two nodes, as far as the batch script sees it; ranks run one by one."""
OPTIONS_THAT_MATTER = ("--ntasks", "--gpu", "--kill-on-bad-exit")


@pytest.fixture(autouse=True)
def _eight_threads(monkeypatch):
    """Threads are the machine's CPUs by the processes, and no part of the table."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)


def local(machines, gpus, folder):
    """Give the environment of each rank."""
    ranks = describe(Group(command=TRAIN, ranks=gpus)).replace(str(os.getpid()), "LAUNCHER").split(" &\n")
    words = [shlex.split(text.replace("\\\n", " ")) for text in ranks]
    return [dict(word.split("=", 1) for word in of_rank if "=" in word) for of_rank in words]


def slurm(machines, gpus, folder):
    """Run the batch script, and give the environment of each rank, with srun's options that matter."""
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    job = SlurmJob(
        command=TRAIN,
        run="/runs/a",
        nodes=machines,
        processes_per_node=gpus,
        gpus_per_node=gpus,
        cpus_per_process=8,
        python=("sh", "-c", 'env > "$OUT/$RANK"'),
    )
    (folder / "train.sbatch").write_text(render(job))
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": str(machines),
             "SLURM_NTASKS_PER_NODE": str(gpus), "SLURM_CPUS_PER_TASK": "8", "OUT": str(folder),
             "PATH": f"{folder}:{os.environ['PATH']}"}  # fmt: skip
    subprocess.run(["bash", folder / "train.sbatch"], env=given, check=True)
    ranks = []
    for rank in range(machines * gpus):
        found = dict(line.split("=", 1) for line in (folder / str(rank)).read_text().splitlines())
        ranks.append({name: found[name] for name in found if name not in given and not name.startswith("SLURM_")})
        for unimportant in ("PWD", "OLDPWD", "SHLVL", "_"):
            ranks[-1].pop(unimportant, None)
    options = [line for line in (folder / "options").read_text().split() if line.startswith(OPTIONS_THAT_MATTER)]
    return [{"srun": " ".join(sorted(options))} | environment for environment in ranks]


def pods(machines, gpus, folder):
    """Give the environment of each pod of an Indexed Job, which is that of its process or of its torchrun."""
    job = kubernetes.KubernetesJob(
        name="digits",
        image="i",
        run_claim="runs",
        nodes=machines,
        processes_per_node=gpus,
        gpus_per_node=gpus,
        cpus=8 * gpus,
        command=("train",),
    )
    manifest = next(tree for tree in yaml.safe_load_all(kubernetes.render(job)) if tree["kind"] == "Job")
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    start = " ".join(container["command"]).partition(" -m mnist_dist")[0]
    environments = []
    for index in range(machines):
        values = {entry["name"]: entry.get("value", str(index)) for entry in container["env"]}
        limits = container["resources"]["limits"]
        environments.append({"starts": start, "nvidia.com/gpu": limits["nvidia.com/gpu"]} | values)
    return environments


def of_engine(engine):
    """Make what gives the environment and the options of each machine's torchrun or `accelerate launch`."""

    def give(machines, gpus, folder):
        plans = []
        for node_rank in range(machines):
            cluster = engines.Cluster(
                nodes=machines,
                processes_per_node=gpus,
                node_rank=node_rank,
                head="127.0.0.1:29400" if machines > 1 else None,
                cpu=False,
                decided=True,
                python=("python",),
            )
            launch = engine(cluster, TRAIN)
            options = [" ".join(part) for part in launch.parts[1:-1]]
            options = [option.replace(f"{engines.recipes()}/", "") for option in options]
            plans.append({"options": " ".join(options)} | launch.environment)
        return plans

    return give


LAUNCHERS = {
    "local": local,
    "torchrun": of_engine(engines.torchrun),
    "accelerate": of_engine(engines.accelerate),
    "slurm": slurm,
    "kubernetes": pods,
}


def test_each_launcher_gives_the_environment_of_the_golden_table(tmp_path):
    lines = []
    for launcher, give in LAUNCHERS.items():
        for machines, gpus in SIZES if launcher != "local" else SIZES[:3]:
            folder = tmp_path / f"{launcher}-{machines}-{gpus}"
            folder.mkdir()
            environments = give(machines, gpus, folder)
            lines.append(f"{launcher}: {machines} machine{'s' * (machines > 1)}, {gpus} GPU{'s' * (gpus > 1)} each")
            shown = {0: environments[0], len(environments) - 1: environments[-1]}  # the others lie between
            for number, environment in shown.items():
                kind = "rank" if launcher in ("local", "slurm") else "machine"
                lines.append(f"  {kind} {number}")
                lines += [f"    {name}={value}" for name, value in sorted(environment.items())]
    text = "\n".join(lines) + "\n"
    if "UPDATE_GOLDEN" in os.environ:
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize(("machines", "gpus"), SIZES)
@pytest.mark.parametrize("launcher", ["local", "slurm", "kubernetes"])
def test_every_rank_is_told_a_place_of_its_own(launcher, machines, gpus, tmp_path):
    if (launcher == "local" and machines > 1) or (launcher == "kubernetes" and gpus > 1):
        pytest.skip("one machine alone" if launcher == "local" else "torchrun tells them")
    environments = LAUNCHERS[launcher](machines, gpus, tmp_path)
    for environment in environments:  # the folder is there when real ranks start
        environment.pop("MNIST_DIST_GROUP_FOLDER", None)
        environment |= {"MNIST_DIST_LAUNCHER": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
    workers = [worker_of(environment) for environment in environments]
    assert [worker.rank for worker in workers] == list(range(machines * gpus))
    assert [worker.local_rank for worker in workers] == list(range(gpus)) * machines
    assert {(worker.ranks, worker.local_ranks) for worker in workers} == {(machines * gpus, gpus)}
    assert not any("ACCELERATE_USE_CPU" in environment for environment in environments)
