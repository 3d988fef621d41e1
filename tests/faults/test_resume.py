"""What a resume finds: damaged, foreign and missing things, each with its message, exit code and what survives."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

FORMAT_1 = Path(__file__).with_name("format-1")
"""A run that version 0.1.0 wrote in its first days, killed after step 20 of 21."""
WORDS = ["train", "--epochs", "3", "--set", "train.reduction=exact", "--set", "checkpoint.keep=3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs, all its checkpoints kept."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "-m", "mnist_dist", *WORDS, "--run", "run"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    return folder / "run"


@pytest.fixture
def interrupted(finished, watched):
    """A copy of it that looks as if it had been killed just before its end."""
    run = watched("run")
    shutil.copytree(finished, run.path)
    (run.path / "result.json").unlink()
    return run


def newest(run):
    return run.path / "checkpoints" / f"step-{run.steps[-1]:08}"


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", os.unlink),
        ("optimizer.safetensors", flip),
        ("meta.json", flip),
        ("MANIFEST.json", cut),
        ("MANIFEST.json", os.unlink),
    ],
)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_taken(command, interrupted, finished, damage, name):
    steps = interrupted.steps
    damage(newest(interrupted) / name)
    ended = command("resume", interrupted.path)
    assert ended.code == 0, ended.err
    assert f"step-{steps[-1]:08}" in " ".join(ended.out.split())
    assert f"resumed after step {steps[-2]}" in ended.out
    assert len(list(interrupted.path.glob("checkpoints/corrupt-*"))) == 1
    reference = type(interrupted)(finished)
    assert interrupted.bits() == reference.bits()


def test_without_any_whole_checkpoint_a_run_begins_again(command, interrupted, finished):
    for path in (interrupted.path / "checkpoints").iterdir():
        cut(path / "model.safetensors")
    ended = command("resume", interrupted.path)
    assert ended.code == 0, ended.err
    assert "resumed" not in ended.out
    assert len(list(interrupted.path.glob("checkpoints/corrupt-*"))) == 3
    assert interrupted.bits() == type(interrupted)(finished).bits()


def test_a_pickle_in_place_of_safetensors_is_never_opened(command, interrupted, tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/sprung",))

    (newest(interrupted) / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    assert command("resume", interrupted.path).code == 0
    assert command("evaluate", interrupted.path).code == 0
    assert not (tmp_path / "sprung").exists()


def test_half_written_checkpoints_are_not_taken(command, interrupted, finished):
    shutil.copytree(newest(interrupted), interrupted.path / "checkpoints" / "writing-step-00000999")
    assert command("resume", interrupted.path).code == 0
    assert interrupted.bits() == type(interrupted)(finished).bits()


def test_a_finished_run_says_so(command, finished):
    for words in (["resume", finished], [*WORDS, "--run", finished, "--resume"]):
        ended = command(*words)
        assert ended.code == 0, ended.err
        assert "is finished: 135 steps" in ended.out
    ended = command(*WORDS, "--run", finished, "--resume", "--json")
    assert ended.json()["step"] == 135
    assert "is finished" in ended.err


def test_another_config_is_refused_with_the_keys_named(command, interrupted):
    ended = command(*WORDS, "--run", interrupted.path, "--resume", "--seed", 5, "--set", "train.clip_norm=1")
    assert ended.code == 2
    assert "train.seed is 5, the run has 0" in ended.err
    assert "train.clip_norm is 1.0, the run has None" in ended.err


def test_one_command_starts_and_continues(command, started, watched, finished):
    run = watched("again")
    words = [*WORDS, "--run", run.path, "--resume", "--set", "train.log_every=5", "--set", "checkpoint.every_steps=5"]
    process = started(*words)
    run.wait_for(lambda: (run.path / "checkpoints").exists() and len(run.steps) > 1, process)
    process.terminate()
    process.wait(30)
    assert process.returncode == 143
    ended = command(*words)
    assert ended.code == 0, ended.err
    assert "resumed after step" in ended.out
    assert run.result["weights_sha256"] == type(run)(finished).result["weights_sha256"]


def test_other_pictures_and_other_classes_are_refused(command, watched, tmp_path, folder_of):
    folder_of(tmp_path / "Dataset")
    run = watched("run")
    words = ["--epochs", "2", "--run", run.path, "--set", "train.global_batch=4"]
    assert command("train", *words).code == 0
    result = run.path / "result.json"
    result.write_text(result.read_text().replace("finished", "stopped"))
    before = run.journal()
    Image.new("L", (28, 28), 9).save(tmp_path / "Dataset" / "train" / "class-0" / "0.png")
    ended = command("resume", run.path)
    assert ended.code == 3
    assert "not those that" in ended.err
    for split in ("train", "test"):
        (tmp_path / "Dataset" / split / "class-0").rename(tmp_path / "Dataset" / split / "another")
    ended = command("resume", run.path)
    assert ended.code == 4
    assert "was trained on other classes than Dataset has" in ended.err
    assert run.steps == [15, 30]
    assert run.result["status"] == "stopped"
    assert run.journal() == before


def test_another_network_is_refused(command, watched):
    run = watched("run")
    shutil.copytree(FORMAT_1, run.path)  # its config has no hash yet, so that it can be edited unnoticed
    config = run.path / "config.yaml"
    config.write_text(config.read_text().replace("small_cnn", "large_cnn"))
    ended = command("resume", run.path)
    assert ended.code == 4
    assert "of another network: " in ended.err
    assert run.steps == [20]


def test_a_run_of_the_first_format_goes_on_with_the_same_bits(command, watched):
    run = watched("run")
    shutil.copytree(FORMAT_1, run.path)
    ended = command("evaluate", run.path, "--json")
    assert ended.json()["step"] == 20
    ended = command("resume", run.path)
    assert ended.code == 0, ended.err
    assert "resumed after step 20" in ended.out
    assert command("train", "--config", FORMAT_1 / "config.yaml", "--run", "whole").code == 0
    assert run.bits() == watched("whole").bits()


@pytest.mark.skipif(not shutil.which("setpriv") or os.geteuid() != 0, reason="needs setpriv and root")
def test_an_unreadable_checkpoint_is_not_taken_for_a_damaged_one(interrupted):
    steps, journal = interrupted.steps, interrupted.journal()
    for path in interrupted.path.glob("checkpoints/*/model.safetensors"):
        path.chmod(0)
    powers = "-dac_override,-dac_read_search"
    command = ["setpriv", "--bounding-set", powers, "--inh-caps", powers, sys.executable, "-m", "mnist_dist"]
    ended = subprocess.run([*command, "resume", interrupted.path], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 5, ended.stderr
    assert "model.safetensors: Permission denied: its permissions must let you read" in ended.stderr
    assert interrupted.steps == steps
    assert interrupted.journal() == journal
    assert not list(interrupted.path.glob("checkpoints/corrupt-*"))


def test_a_run_that_began_with_another_runs_weights_goes_on_without_it(command, finished, watched, tmp_path):
    shutil.copytree(finished, tmp_path / "first")
    words = ["train", "--epochs", "1", "--seed", 5, "--set", "train.reduction=exact", "--init-from", "first"]
    assert command(*words, "--run", "whole").code == 0
    run = watched("run")
    assert command(*words, "--run", run.path, "--set", "checkpoint.keep=9").code == 0
    shutil.rmtree(run.path / "checkpoints")  # as if it had been killed before the first checkpoint
    (run.path / "result.json").unlink()
    shutil.rmtree(tmp_path / "first")
    ended = command("resume", run.path, "--processes", 2)
    assert ended.code == 0, ended.err
    assert run.bits() == watched("whole").bits()
    for name in ("checkpoints", "initial"):
        shutil.rmtree(run.path / name)
    (run.path / "result.json").unlink()
    ended = command("resume", run.path)
    assert ended.code == 4, ended.out
    assert "began with the weights of" in ended.err


def test_pictures_are_found_from_another_folder(command, folder_of, tmp_path):
    folder_of(tmp_path / "Dataset")
    words = ["train", "--epochs", "1", "--set", "train.global_batch=4", "--data", "Dataset"]
    assert command(*words, "--run", "run").code == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for words in (["evaluate", "../run"], ["show", "../run"]):
        ended = command(*words, cwd=elsewhere)
        assert ended.code == 0, ended.err
        assert f"The images are read from {tmp_path / 'Dataset'}, as when the run was started." in ended.err
    (tmp_path / "run" / "result.json").unlink()
    ended = command("resume", "../run", cwd=elsewhere)
    assert ended.code == 0, ended.err
    assert f"are read from {tmp_path / 'Dataset'}" in ended.out
    (tmp_path / "Dataset").rename(elsewhere / "Dataset")  # as on another machine: the path that was given
    assert command("evaluate", "../run", cwd=elsewhere).code == 0


def test_a_limit_of_a_files_size_is_a_storage_error(tmp_path):
    for kilobytes in (1, 6, 20):
        limited = f"ulimit -f {kilobytes}; exec {sys.executable} -m mnist_dist train --epochs 1 --run run-{kilobytes}"
        ended = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 5, ended.stderr
        assert "File too large: raise the limit of a file's size" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_run_without_a_checkpoint_begins_at_its_beginning(command, watched, finished):
    run = watched("run")
    run.path.mkdir()
    shutil.copy(finished / "config.yaml", run.path)
    assert command("resume", run.path).code == 0
    assert run.bits() == type(run)(finished).bits()


def test_weights_alone_come_from_another_run(command, finished, watched):
    words = ["train", "--epochs", "1", "--set", "train.max_steps=1", "--set", "optimizer.learning_rate=1e-9"]
    ended = command(*words, "--run", "next", "--init-from", finished, "--json", "--processes", 2)
    assert ended.code == 0, ended.err
    loss = type(watched("x"))(finished).result["metrics"]["test_loss"]
    assert ended.json()["metrics"]["test_loss"] == pytest.approx(loss, rel=1e-3)
    assert ended.json()["step"] == 1


def test_tensorboard_has_each_point_once_after_a_resume(command, interrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cut(newest(interrupted) / "model.safetensors")  # so that the last epoch is trained again
    assert command("resume", interrupted.path).code == 0
    points = {}
    for file in sorted((interrupted.path / "tensorboard").iterdir()):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            points.setdefault(tag, []).extend(point.step for point in events.Scalars(tag))
    assert sorted(points["by_epoch/test_loss"]) == [1, 2, 3]
    assert sorted(points["by_step/loss"]) == [15, 30, 45, 60, 75, 90, 105, 120, 135]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_read_only_folder_is_refused_and_everything_in_it_survives(command, interrupted, finished, tmp_path, watched):
    mount = tmp_path / "read-only"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        shutil.move(interrupted.path, mount / "run")
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        for words in (["resume", mount / "run"], [*WORDS, "--run", mount / "new", "--processes", 2]):
            ended = command(*words)
            assert ended.code == 5, ended.err
            assert "Read-only file system" in ended.err
            assert ended.err.count("error:") == 1
        subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
        assert command("resume", mount / "run").code == 0
        assert watched("read-only/run").bits() == type(interrupted)(finished).bits()
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize(
    ("setting", "key", "own"),
    [
        ("train.seed=3", "train.seed", "3"),
        ("train.threads=2", "train.threads", "2"),
        ("train.reduction=exact", "train.reduction", "exact"),
        ("optimizer.name=sgd", "optimizer.name", "sgd"),
    ],
)
def test_ranks_with_another_config_each_say_what_differs(started, tmp_path, setting, key, own):
    group = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        started("train", "--run", "run", *words, RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank, words in enumerate(([], ["--set", setting]))
    ]
    for process in ranks:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2, err
        assert f"Ranks disagree on the {key}: rank 1 differs from rank 0" in err
    assert f"Rank 1 has {own}." in err
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_fills_up_keeps_the_earlier_checkpoints(command, watched, tmp_path, processes):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        run = watched("small/run")
        words = ["train", "--epochs", "15", "--set", "checkpoint.keep=100", "--run", run.path, "--processes", processes]
        ended = command(*words)
        assert ended.code == 5, ended.err
        assert "No space left on device" in ended.err
        assert ended.err.count("error:") == 1
        saved = run.steps
        assert saved
        subprocess.run(["mount", "-o", "remount,size=20m", mount], check=True)
        resumed = command("resume", run.path)
        assert resumed.code == 0, resumed.err
        assert f"resumed after step {saved[-1]}" in resumed.out
        assert run.result["status"] == "finished"
    finally:
        subprocess.run(["umount", mount], check=True)
