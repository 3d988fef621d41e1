"""What goes wrong on a device: memory that runs out, a rank that fails alone, GPUs that are not there."""

import os
import shlex
import subprocess
import sys
import time

import pytest

from mnist_dist.machine import visible_gpus

PROGRAM = [sys.executable, "-m", "mnist_dist"]
QUICK = ["train", "--config", "quick"]
LARGE = ["--precision", "fp32", "--set", "data.image_size=224", "--batch-size", "1024", "--set", "train.max_steps=2",
         "--processes", "1"]  # fmt: skip
"""A step on 1,024 such images takes over 5 GiB, the evaluation less than half a GiB."""
LIMIT = {"cpu": 6 << 30, "cuda": 1 << 30}
"""Bytes: of addresses on the CPU, where libraries take some too, and of memory on a GPU."""


def limited(device: str, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Make a command and an environment in which a device has little memory."""
    if device == "cpu":
        return ["sh", "-c", f"ulimit -v {LIMIT[device] >> 10}; exec {shlex.join(words)}"], {}
    query = [sys.executable, "-c", "import torch; print(torch.cuda.mem_get_info()[1])"]
    total = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
    return words, {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{LIMIT[device] / total:.6f}"}


def test_memory_that_runs_out_ends_the_run_and_the_advice_holds(tmp_path, device):
    def train(run, *more):
        words, environment = limited(device, [*PROGRAM, *QUICK, *LARGE, "--device", device, "--run", run, *more])
        return subprocess.run(words, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True,
                              timeout=300)  # fmt: skip

    ended = train("too-much")
    assert ended.returncode == 8, ended.stderr
    assert "has not enough memory for micro-batches of 1024 images: set train.micro_batch lower" in ended.stderr
    assert "Traceback" not in ended.stderr
    ended = train("little", "--set", "train.micro_batch=16")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("planted on rank 1", 1, "Rank 1 failed, which is a bug: RuntimeError: planted on rank 1."),
        ("CUDA out of memory. Planted on rank 1.", 8, "has not enough memory for micro-batches of"),
    ],
    ids=["a bug", "memory"],
)
def test_a_rank_that_fails_alone_ends_all_with_its_own_words_in_seconds(
    command, tmp_path, several, script, error, code, words
):
    launch = ["launch", "local", "--processes", several.ranks, "--max-restarts", "0", "--"]
    train = [*QUICK, "--device", several.device, "--batch-size", several.batch, "--run", "run"]
    ended = command(*launch, *script("alone.py"), error, "failed", *train, timeout=300)
    assert time.time() - float((tmp_path / "failed").read_text()) < 30
    assert ended.code == code, ended.err
    assert words in ended.err
    assert "lost the connection" not in ended.err


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused_before_any_starts(command):
    ended = command("train", "--device", "cuda", "--processes", 1024, "--batch-size", 1024)
    assert ended.code == 2
    assert f"--processes is 1024, and {visible_gpus()} GPU" in ended.err


@pytest.mark.gpu
def test_two_ranks_are_never_let_onto_one_gpu(command):
    words = ["launch", "local", "--processes", 2, "--max-restarts", 0, "--", *PROGRAM, *QUICK, "--device", "cuda"]
    ended = command(*words, "--run", "run", CUDA_VISIBLE_DEVICES="0", timeout=300)
    assert ended.code == 2, ended.err
    assert "GPU" in ended.err
    assert "no CUDA GPU is visible" not in ended.err  # which would be another reason
    assert "Traceback" not in ended.err


def test_ranks_that_see_one_gpu_each_train_together(command, several):
    """As under Slurm's `--gpus-per-task=1`; on the CPU they see none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").replace(",", " ")
    train = shlex.join([*PROGRAM, *QUICK, "--device", several.device, "--run", "run", "--json"])
    one = f"set -- {visible}; shift $LOCAL_RANK; CUDA_VISIBLE_DEVICES=$1 exec {train}"
    ended = command("launch", "local", "--processes", 2, "--max-restarts", 0, "--", "sh", "-c", one, timeout=300)
    assert ended.code == 0, ended.err
    assert ended.json()["metrics"]["test_accuracy"] > 0.97
