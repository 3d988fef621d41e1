"""What `launch ... --dry-run` prints, against golden files; and the recipes say the same.

After a change that is meant: `UPDATE_GOLDEN=1 pytest tests/cli/test_dry_runs.py`, and read the difference.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_dist.launch.engines import Cluster, torchrun
from mnist_dist.launch.slurm import SlurmJob, render

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TRAIN = ["--", "train", "--config", "baseline", "--run", "/runs/a"]
TARGETS = {
    "local": ["local", "-n", "4"],
    "torchrun": ["torchrun", "--processes-per-node", "2"],
    "torchrun-machines": ["torchrun", "--nodes", "2", "--processes-per-node", "4", "--node-rank", "1",
                          "--head", "127.0.0.1:29400"],
    "accelerate": ["accelerate", "--processes-per-node", "2"],
    "accelerate-machines": ["accelerate", "--nodes", "2", "--processes-per-node", "4", "--head", "127.0.0.1"],
    "kubernetes": ["kubernetes", "--image", "mnist-dist:0.1.0", "--run-claim", "runs", "--data-claim", "digits",
                   "--nodes", "2", "--gpus-per-node", "4", "--cpus", "16", "--memory", "64Gi"],
    "kubernetes-trainjob": ["kubernetes", "--kind", "trainjob", "--image", "mnist-dist:0.1.0", "--run-claim", "runs"],
    "slurm": ["slurm", "--nodes", "2", "--gpus-per-node", "4", "--cpus-per-process", "8", "--time", "04:00:00",
              "--partition", "gpu"],
}  # fmt: skip


def check(name, text):
    path = GOLDEN / f"{name}.txt"
    if "UPDATE_GOLDEN" in os.environ:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_prints_what_a_person_would_sign(command, target, tmp_path):
    ended = command("launch", *TARGETS[target], "--dry-run", *TRAIN, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert ended.code == 0, ended.err
    words = {f"{sys.executable} -P": "python", f"{sys.executable}": "python", f"{ROOT}/": ""}
    text = ended.out
    for word, shown in words.items():
        text = text.replace(word, shown)
    check(target, text)
    assert not list(tmp_path.iterdir())


def test_a_program_of_ones_own_is_shown_with_the_environment_of_each_rank(command):
    ended = command("launch", "local", "-n", "2", "--dry-run", "--", "python", "mine.py", OMP_NUM_THREADS="1")
    first, second = ended.out.split(" &\n")
    for rank, text in enumerate((first, second)):
        assert f"RANK={rank} " in text
        assert "WORLD_SIZE=2 " in text
        assert "MASTER_ADDR=127.0.0.1 " in text
        assert text.rstrip().endswith("python mine.py")


def test_a_commands_own_options_hold_and_are_spelled_for_torchrun(command):
    ended = command("launch", "local", "--max-restarts", "5", "--dry-run", "--", "train", "--max-restarts", "0")
    assert ended.out.split()[-5:] == ["train", "--max-restarts", "5", "--max-restarts", "0"]  # the last one holds
    ended = command("launch", "torchrun", "--dry-run", "--", "train", "--run=a", "--epochs", "1")
    assert "train --run-dir=a --epochs 1 --resume" in ended.out


def test_a_config_that_is_only_in_the_image_is_left_to_it(command):
    words = ["--image", "i", "--run-claim", "runs", "--dry-run", "--", "train", "--config", "/configs/mine.yaml"]
    ended = command("launch", "kubernetes", *words)
    assert ended.code == 0, ended.err
    assert "/configs/mine.yaml" in ended.out


def test_the_slurm_recipe_is_what_the_launcher_would_submit():
    job = SlurmJob(
        command=("train", "--resume", "--run-dir", "runs/a"),
        run="runs/a",
        nodes=2,
        processes_per_node=4,
        gpus_per_node=4,
        cpus_per_process=8,
        time="04:00:00",
    )
    recipe = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
    how = "#   edit the #SBATCH lines, TRAIN and RESULT, then: sbatch launch/slurm/train.sbatch\n"
    assert render(job) == recipe.replace(how, "#   sbatch SCRIPT\n")


def test_the_torchrun_recipe_starts_what_the_launcher_would_start(tmp_path):
    """A torchrun that only prints what it is given stands on the PATH."""
    fake = tmp_path / "torchrun"
    fake.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\necho --environment--\nenv\n")
    fake.chmod(0o755)
    variables = {"NODES": "2", "PROCESSES": "4", "NODE_RANK": "1", "HEAD": "127.0.0.1:29400", "OMP_NUM_THREADS": "1"}
    words = ["train", "--resume", "--run-dir", "runs/a b"]
    ended = subprocess.run(
        [ROOT / "launch" / "torchrun" / "train.sh", *words],
        env=os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=True,
    )
    options, environment = ended.stdout.split("--environment--\n")
    cluster = Cluster(nodes=2, processes_per_node=4, node_rank=1, head="127.0.0.1:29400")
    launch = torchrun(cluster, tuple(words))
    ours = [word for part in launch.parts[1:] for word in part]
    pairs = [tuple(ours[index : index + 2]) for index in range(0, len(ours) - len(words) - 2, 2)]
    theirs = options.splitlines()
    assert theirs[-len(words) - 2 :] == ["-m", "mnist_dist", *words]
    assert {tuple(theirs[index : index + 2]) for index in range(0, len(theirs) - len(words) - 2, 2)} == set(pairs)
    variables = dict(line.partition("=")[::2] for line in environment.splitlines())
    assert all(variables[name] == value for name, value in launch.environment.items() if name != "OMP_NUM_THREADS")
