"""The same bits on a device: on one process and on several, after kills, signals and evaluations."""

import signal

import pytest

EXACT = ["train", "--config", "quick", "--set", "train.reduction=exact", "--set", "train.epochs=6",
         "--set", "checkpoint.every_steps=7", "--set", "train.log_every=5"]  # fmt: skip
IMAGES = 359
KILLS = 2


@pytest.fixture
def whole(finished):
    """Give the run that one process took to its end on a device."""
    return lambda device: finished(*EXACT, "--device", device, "--processes", 1)


@pytest.mark.parametrize("settings", [(), ("data.residency=host",)], ids=["pixels anywhere", "pixels on the host"])
def test_exact_has_the_same_bits_again_on_one_process_and_on_several(command, watched, whole, place, settings):
    words = [*EXACT, *place.in_exact.words, *(word for setting in settings for word in ("--set", setting))]
    ended = command(*words, "--run", "again", timeout=300)
    assert ended.code == 0, ended.err
    assert watched("again").bits() == whole(place.device).bits()


def test_exact_has_the_same_bits_after_kill_9_on_changing_processes(kill_and_resume, watched, whole, place):
    counts = {1, place.in_exact.ranks}
    run = watched("killed")
    words = [*EXACT, "--device", place.device]
    hits, _ = kill_and_resume(run, words, counts=tuple(sorted(counts)), kills=KILLS, seed=1)
    assert hits == KILLS
    assert run.bits() == whole(place.device).bits()


def test_a_signal_saves_and_a_resume_ends_with_the_same_bits(command, started, watched, whole, place):
    run = watched("stopped")
    process = started(*EXACT, "--run", run.path, *place.in_exact.words)
    run.wait_for(lambda: run.newest is not None, process, seconds=120)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Stopped by SIGTERM after step" in err
    assert run.result["status"] == "stopped"
    assert run.newest == run.result["step"]
    resumed = command("resume", run.path, *place.in_exact.words, timeout=300)
    assert resumed.code == 0, resumed.err
    assert run.bits() == whole(place.device).bits()


def test_a_run_that_was_stopped_on_a_device_goes_on_on_the_cpu(command, started, watched, device):
    run = watched("stopped")
    words = ["train", "--config", "quick", "--precision", "fp32", "--set", "train.epochs=8"]
    process = started(*words, "--set", "checkpoint.every_steps=7", "--run", run.path, "--device", device, "-n", 1)
    run.wait_for(lambda: run.newest is not None, process, seconds=120)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    resumed = command("resume", run.path, "--device", "cpu", "--processes", 1, timeout=300)
    assert resumed.code == 0, resumed.err
    assert run.result["status"] == "finished"
    assert run.result["metrics"]["test_accuracy"] > 0.97


def test_an_evaluation_counts_every_image_once_and_has_the_same_bits_on_all(command, whole, place):
    run = whole(place.device)
    words = ["evaluate", run.path, "--json"]
    found = [command(*words, *of.words).json() for of in (place, type(place)(place.device, 1))]
    assert found[0] == found[1]
    assert found[0]["images"] == IMAGES
    last = [record for record in run.journal() if record["kind"] == "epoch"][-1]
    assert found[0]["loss"] == pytest.approx(last["test_loss"], rel=1e-3)


def test_a_run_of_a_device_is_evaluated_on_the_cpu(command, whole, device):
    found = command("evaluate", whole(device).path, "--json", "--device", "cpu").json()
    last = [record for record in whole(device).journal() if record["kind"] == "epoch"][-1]
    assert found["images"] == IMAGES
    assert found["loss"] == pytest.approx(last["test_loss"], rel=1e-2)
