"""A machine that does something else as well: a run computes with the threads that other programs leave CPUs for."""

import json
import os
import signal
import subprocess
import sys

import pytest

from mnist_dist.machine import allowed_cpus

ENDLESS = ["train", "--config", "quick", "--set", "train.epochs=100000", "--set", "checkpoint.every_steps=45",
           "--set", "train.global_batch=64", "--device", "cpu"]  # fmt: skip

pytestmark = pytest.mark.skipif(
    allowed_cpus() < 2 or not os.path.exists("/proc/stat"),  # noqa: PTH110
    reason="needs two CPUs, and a system that tells what they do",
)


@pytest.fixture
def busy():
    """Start programs that keep all CPUs busy."""
    hogs = []

    def start():
        hogs.extend(subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count()))

    yield start
    for hog in hogs:
        hog.kill()
        hog.wait()


def threads_of(run):
    meta = run.path / "checkpoints" / f"step-{run.steps[-1]:08}" / "meta.json"
    return json.loads(meta.read_text())["progress"]["threads"]


def stop(process):
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    return out


def test_a_run_that_other_programs_crowd_takes_fewer_threads_and_keeps_to_it(started, watched, busy):
    run = watched("run")
    process = started(*ENDLESS, "--run", run.path)
    run.wait_for(lambda: (run.path / "metrics.jsonl").exists() and run.journal(), process)
    if json.loads((run.path / "environment.json").read_text())["threads"] == 1:
        stop(process)
        pytest.skip("other programs were busy before the run began")
    busy()
    run.wait_for(lambda: any(row["kind"] == "event" for row in run.journal()), process)
    out = stop(process)
    event = next(row for row in run.journal() if row["kind"] == "event")
    assert event["event"] == "fewer_threads"
    assert event["threads"] == threads_of(run) == 1
    assert f"step {event['step']}: other programs need CPUs, so each process computes with 1 thread from now on" in out

    resumed = started("resume", run.path)
    before = run.steps[-1]
    run.wait_for(lambda: run.steps[-1] > before, resumed)
    assert "1 process, 1 thread each" in stop(resumed)
    assert threads_of(run) == 1


def test_a_run_that_begins_on_a_busy_machine_takes_one_thread_and_says_why(command, busy, tmp_path):
    busy()
    ended = command("train", "--config", "quick", "--epochs", "1", "--run", "run", "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "1 thread each (other programs use" in ended.out


def test_a_number_of_threads_stays_on_a_busy_machine(command, busy):
    busy()
    words = ["train", "--config", "quick", "--epochs", "1", "--run", "run", "--device", "cpu"]
    ended = command(*words, "--set", "train.threads=2")
    assert ended.code == 0, ended.err
    assert "2 threads each (as asked)" in ended.out


def test_more_threads_than_cpus_are_warned_about(command):
    words = ["train", "--config", "quick", "--epochs", "1", "--run", "run", "--device", "cpu"]
    ended = command(*words, "--processes", 2, OMP_NUM_THREADS=str(8 * allowed_cpus()))
    assert ended.code == 0, ended.err
    assert f"OMP_NUM_THREADS is {8 * allowed_cpus()}, for {allowed_cpus()} CPUs" in ended.out
    assert f"2 processes, {allowed_cpus() // 2} thread" in ended.out


def test_more_processes_than_cpus_are_not_blamed_on_a_variable_that_nobody_set(command):
    words = ["train", "--config", "quick", "--epochs", "1", "--run", "run", "--device", "cpu"]
    ended = command(*words, "--processes", 2 * allowed_cpus())
    assert ended.code == 0, ended.err
    assert "OMP_NUM_THREADS" not in ended.out + ended.err
    assert "1 thread each" in ended.out


def test_ranks_that_a_launcher_binds_to_cpus_of_their_own_do_not_divide_them(tmp_path, free_port):
    """As Slurm and mpirun do; a third CPU would be needed to see two threads each."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "GLOO_SOCKET_IFNAME": "lo"}
    code = (
        "import os\n"
        "os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ['RANK'])]})\n"
        "from mnist_dist.group import threads\n"
        "from mnist_dist.runtime import start\n"
        "with start(device='cpu', precision='fp32', threads=None) as runtime:\n"
        "    print(threads.Cpus.of_this_rank(runtime.count_same(threads.Cpus.name())))\n"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            text=True,
            stdout=subprocess.PIPE,
            cwd=tmp_path,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == 2 * ["Cpus(bound=1, allowed=1, ranks=1)\n"]


def test_a_run_resumed_with_other_processes_chooses_its_threads_anew(command, started, watched):
    run = watched("run")
    process = started(*ENDLESS, "--run", run.path)
    run.wait_for(lambda: len(run.steps) > 0, process)
    stop(process)
    resumed = started("resume", run.path, "--processes", str(allowed_cpus()))
    before = run.steps[-1]
    run.wait_for(lambda: run.steps[-1] > before, resumed)
    assert f"{allowed_cpus()} processes, 1 thread each" in stop(resumed)
    assert threads_of(run) == 1
