"""kill -9 at any moment, and the bits of the run that was never killed."""

import pytest

EXACT = ["train", "--set", "train.reduction=exact", "--set", "checkpoint.every_steps=7",
         "--set", "train.log_every=5", "--set", "data.validation_fraction=0.1"]  # fmt: skip
DDP = ["train", "--epochs", "4", "--set", "checkpoint.every_steps=7", "--set", "train.log_every=5",
       "--set", "train.global_batch=30", "--set", "train.threads=1"]  # fmt: skip


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
