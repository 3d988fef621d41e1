"""kill -9 at any moment, and the bits of the run that was never killed."""

import functools
import os
import random
import signal
import time

import pytest

EXACT = ["train", "--set", "train.reduction=exact", "--set", "checkpoint.every_steps=7",
         "--set", "train.log_every=5", "--set", "data.validation_fraction=0.1"]  # fmt: skip
DDP = ["train", "--epochs", "4", "--set", "checkpoint.every_steps=7", "--set", "train.log_every=5",
       "--set", "train.global_batch=30", "--set", "train.threads=1"]  # fmt: skip


@pytest.fixture
def kill_and_resume(started, ranks_of):
    return functools.partial(_kill_and_resume, started, ranks_of)


def _kill_and_resume(started, ranks_of, run, first_words, *, counts, kills, seed):
    """Run to the end through many kills; gives how many hit, and how many of them hit a checkpoint being written."""
    draw = random.Random(seed)
    hits = in_write = attempt = 0
    while True:
        words = ["resume", run.path] if run.path.joinpath("config.yaml").exists() else [*first_words, "--run", run.path]
        words += ["--processes", draw.choice(counts), "--max-restarts", 0]
        process = started(*words, OMP_NUM_THREADS="1")
        attempt += 1
        assert attempt < 3 * kills + 10
        if hits < kills:
            before = run.steps[-1] if run.path.joinpath("checkpoints").exists() and run.steps else 0
            deadline = time.monotonic() + 60
            # Wait for real progress, then strike after a moment drawn at random: in a step, a write, an evaluation.
            while process.poll() is None and not (run.path.joinpath("checkpoints").exists() and run.steps
                                                  and run.steps[-1] > before):  # fmt: skip
                assert time.monotonic() < deadline
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.1))
            victims = [process.pid, *ranks_of(process)] if process.poll() is None else []
            if victims:
                os.kill(draw.choice(victims), signal.SIGKILL)
                process.communicate(timeout=60)
                if process.returncode == 0:  # it was at its end already
                    return hits, in_write
                assert process.returncode in (7, -signal.SIGKILL)
                in_write += bool(list(run.path.glob("checkpoints/writing-*")))
                hits += 1
                continue
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return hits, in_write


def test_an_exact_run_killed_20_times_on_1_2_or_4_processes_ends_with_the_same_bits(command, kill_and_resume, watched):
    words = [*EXACT, "--set", "train.epochs=12"]
    assert command(*words, "--run", "whole", OMP_NUM_THREADS="1").code == 0
    run = watched("killed")
    hits, _ = kill_and_resume(run, words, counts=(1, 2, 4), kills=20, seed=1)
    assert hits >= 20
    assert run.bits() == watched("whole").bits()


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_ddp_run_killed_often_ends_with_the_same_bits_at_the_same_process_count(
    command, kill_and_resume, watched, ranks
):
    words = [*DDP, *(["--precision", "bf16", "--device", "cpu", "--set", "train.micro_batch=5",
                      "--set", "train.clip_norm=1"] if ranks == 2 else [])]  # fmt: skip
    assert command(*words, "--run", "whole", "--processes", ranks, OMP_NUM_THREADS="1").code == 0
    run = watched("killed")
    hits, _ = kill_and_resume(run, words, counts=(ranks,), kills=6, seed=ranks)
    assert hits >= 6
    assert run.bits() == watched("whole").bits()


def test_a_run_of_prepared_steps_killed_often_ends_with_the_bits_of_one_whose_steps_were_not(
    command, kill_and_resume, watched
):
    words = [*DDP, "--device", "cpu", "--set", "data.augment.rotation_degrees=10"]
    assert command(*words, "--run", "whole", "--processes", 1).code == 0
    run = watched("killed")
    hits, _ = kill_and_resume(run, [*words, "--set", "train.graph=auto"], counts=(1,), kills=6, seed=3)
    assert hits >= 6
    assert run.bits() == watched("whole").bits()


@pytest.mark.slow
def test_an_exact_run_killed_200_times_ends_with_the_same_bits(command, kill_and_resume, watched):
    words = [*EXACT, "--set", "train.epochs=120"]
    assert command(*words, "--run", "whole", OMP_NUM_THREADS="1", timeout=600).code == 0
    run = watched("killed")
    hits, in_write = kill_and_resume(run, words, counts=(1, 2, 4), kills=200, seed=2)
    print(f"{hits} kills, {in_write} of them in a checkpoint write")
    assert hits >= 200
    assert run.bits() == watched("whole").bits()


@pytest.mark.parametrize(
    ("setting", "processes"),
    [
        pytest.param("train.clip_norm=0.5", 2, marks=pytest.mark.quick),
        ("train.precision=bf16", 4),
        ("train.micro_batch=4", 4),
        ("optimizer.name=sgd", 2),
        ("model.name=large_cnn", 4),
    ],
)
def test_exact_gives_the_same_bits_on_any_number_of_processes(command, watched, setting, processes):
    words = [*EXACT, "--set", "train.max_steps=8", "--set", setting, "--device", "cpu"]
    assert command(*words, "--run", "one").code == 0
    assert command(*words, "--run", "many", "--processes", processes).code == 0
    assert watched("many").bits() == watched("one").bits()


def test_verify_finds_exact_identical_and_ddp_rounding_only(command):
    words = ["verify", "--processes", "4", "--set", "model.dropout=0", "--json", "--device", "cpu"]
    exact = command(*words, "--set", "train.reduction=exact").json()["differences"]
    assert list(exact) == ["1", "2", "4"]
    assert all(value == 0 for row in exact.values() for value in row.values())
    ddp = command(*words).json()["differences"]
    assert all(value == 0 for value in ddp["1"].values())
    assert 0 < ddp["4"]["gradients"] < 1e-5
    assert ddp["4"]["weights"] < 1e-2


def test_verify_says_in_a_table_what_differs(command):
    ended = command("verify", "--set", "train.reduction=exact", "--device", "cpu")
    assert ended.code == 0, ended.err
    assert ended.out.count("identical") == 8
    assert "exact, 5 steps, 4 micro-batches of 8" in ended.out
