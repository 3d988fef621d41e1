"""Signals: all ranks agree on a step, a checkpoint is saved, the exit code is 128 + n, and a resume goes on."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from watched import Watched

WORDS = ["train", "--epochs", "2", "--set", "train.reduction=exact", "--set", "train.log_every=5"]
SLOW = ["--set", "model.name=large_cnn"]

pytestmark = pytest.mark.usefixtures("temporary")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bits of the run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(
        [sys.executable, "-m", "mnist_dist", *WORDS, *SLOW, "--run", "run"],
        cwd=folder,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return Watched(folder / "run").bits()


@pytest.mark.parametrize(("name", "processes"), [("SIGTERM", 2), ("SIGINT", 2), ("SIGUSR2", 1), ("SIGHUP", 1)])
def test_a_signal_saves_and_a_resume_ends_with_the_same_bits(command, started, watched, whole, name, processes):
    run, number = watched("run"), getattr(signal, name)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    process = started(*WORDS, *SLOW, "--run", run.path, "--processes", processes)
    run.wait_for(lambda: (run.path / "metrics.jsonl").exists() and len(run.journal()) > 2, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert f"Stopped by {name} after step" in err
    assert "Traceback" not in err
    assert run.result["status"] == "stopped"
    assert run.steps[-1] == run.result["step"] > 0
    resumed = command("resume", run.path)
    assert resumed.code == 0, resumed.err
    assert f"resumed after step {run.steps[0] if len(run.steps) == 1 else ''}" in resumed.out
    assert run.bits() == whole


@pytest.mark.skipif(not shutil.which("strace") or os.geteuid() != 0, reason="needs strace and root")
def test_a_signal_inside_a_checkpoint_write_leaves_that_one_whole_and_saves_once_more(
    command, tmp_path, watched, whole
):
    """strace sends the signal as a file of the first checkpoint is synced."""
    run, trace = watched("run"), tmp_path / "trace"
    words = [sys.executable, "-m", "mnist_dist", *WORDS, *SLOW, "--set", "checkpoint.every_steps=20", "--run", run.path]
    file = run.path / "checkpoints" / "writing-step-00000020" / "optimizer.safetensors"
    tracer = ["strace", "-f", "-y", "-o", trace, "-P", file, "-e", "trace=fsync"]
    ended = subprocess.run(
        [*tracer, "-e", "inject=fsync:signal=TERM:when=1", *words],
        cwd=tmp_path,
        env=os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 143, ended.stderr
    lines = trace.read_text().splitlines()
    hit = next(index for index, line in enumerate(lines) if "--- SIGTERM" in line)
    assert str(file) in lines[hit - 1]
    assert run.steps == [20, 21]
    assert run.result["step"] == 21
    assert command("resume", run.path, "--processes", 2).code == 0
    assert run.bits() == whole


def test_one_rank_told_to_stop_stops_all(started, watched):
    run = watched("run")
    process = started(*WORDS, *SLOW, "--run", run.path, "--processes", 2)
    run.wait_for(lambda: (run.path / "metrics.jsonl").exists() and len(run.journal()) > 1, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert run.result["status"] == "stopped"
    assert run.steps[-1] == run.result["step"]


def test_a_second_interrupt_ends_at_once(started, watched):
    run = watched("run")
    process = started(*WORDS, *SLOW, "--run", run.path, "--processes", 2)
    run.wait_for(lambda: (run.path / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT


def test_a_signal_under_nohup_is_ignored(started, watched):
    run = watched("run")
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = started("train", "--epochs", "3", "--run", run.path, "--processes", 2)
    finally:
        signal.signal(signal.SIGHUP, former)
    run.wait_for(lambda: (run.path / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert run.result["status"] == "finished"


def test_an_evaluation_that_was_stopped_is_done_first_by_a_resume(command, started, watched, tmp_path):
    """The test set is made large, so that the signal falls into its evaluation."""
    from PIL import Image

    from mnist_dist.data.scan import embedded_digits

    for split, (images, labels) in embedded_digits(28).items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = tmp_path / "Dataset" / split / str(label) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(file)
            for copy in range(20 if split == "test" else 0):
                file.with_name(f"{number}-{copy}.png").hardlink_to(file)
    words = ["train", "--config", "quick", "--data", "Dataset", "--epochs", "1", *SLOW, "--set", "train.log_every=9999",
             "--set", "train.threads=1"]  # fmt: skip
    run = watched("run")
    process = started(*words, "--run", run.path)
    run.wait_for(lambda: (run.path / "metrics.jsonl").exists() and len(run.journal()) == 1, process)  # the last step
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "evaluation of the test images was stopped" in err
    assert [line["kind"] for line in run.journal()] == ["step"]
    resumed = command("resume", run.path)
    assert resumed.code == 0, resumed.err
    assert [line["kind"] for line in run.journal()] == ["step", "epoch"]
    assert command(*words, "--run", "whole").code == 0
    assert run.bits() == watched("whole").bits()
