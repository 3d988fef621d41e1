"""Training under a real Slurm of two nodes: over both, preempted, after the loss of a node, cancelled."""

import pytest
from cluster import wait_for
from conftest import TRAIN

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")

pytestmark = pytest.mark.engines


@pytest.fixture
def submit(slurm, tmp_path):
    """Submit a training over both nodes; gives the job's number. It is cancelled when the test ends."""
    jobs = []

    def start():
        words = ["launch", "slurm", "--nodes", "2", "--", *TRAIN, "--run", "run"]
        jobs.append(slurm.run("mnist-dist", *words, cwd=tmp_path).split()[-1])
        return jobs[-1]

    yield start
    for job in jobs:
        slurm.run("scancel", job, check=False)


@pytest.fixture
def end_of(slurm, tmp_path):
    """Wait for a job's end; gives its state and what it printed."""

    def wait(job, seconds=120):
        wait_for(lambda: slurm.state(job)["JobState"] in ENDED, f"the end of job {job}", seconds)
        return slurm.state(job)["JobState"], (tmp_path / f"slurm-{job}.out").read_text()

    return wait


def training(run):
    return run.path.joinpath("metrics.jsonl").exists() and len(run.journal()) > 2


def test_a_job_trains_over_both_nodes_with_the_bits_of_the_local_run(submit, end_of, run, whole):
    state, out = end_of(submit())
    assert state == "COMPLETED", out
    assert "2 processes" in out
    assert run.bits() == whole


def test_a_preempted_job_saves_requeues_and_resumes_to_the_same_bits(slurm, submit, end_of, run, whole):
    job = submit()
    wait_for(lambda: training(run), "training")
    slurm.run("scancel", "--batch", "--signal=USR2", job)
    wait_for(lambda: slurm.state(job)["Restarts"] == "1", "the requeue")
    state, out = end_of(job)
    assert state == "COMPLETED", out
    assert "Stopped by SIGUSR2 after step" in out
    assert "back into the queue" in out
    assert "resumed after step" in out
    assert run.bits() == whole


def test_a_job_that_loses_a_node_is_requeued_and_finishes_with_the_same_bits(slurm, submit, end_of, run, whole):
    job = submit()
    wait_for(lambda: (run.path / "checkpoints").exists() and run.steps, "a checkpoint")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    wait_for(lambda: slurm.state(job)["Restarts"] == "1", "the requeue")
    slurm.run("scontrol", "update", "nodename=n2", "state=resume", check=False)  # it may be back by itself
    state, out = end_of(job)
    assert state == "COMPLETED", out
    assert "resumed after step" in out
    assert run.bits() == whole


def test_a_cancelled_job_leaves_a_whole_checkpoint_and_does_not_come_back(slurm, submit, end_of, run, whole, command):
    job = submit()
    wait_for(lambda: training(run), "training")
    slurm.run("scancel", job)
    state, _ = end_of(job)
    assert state == "CANCELLED"
    wait_for(lambda: run.path.joinpath("result.json").exists(), "the result")
    assert run.result["status"] == "stopped"
    assert run.steps[-1] == run.result["step"]
    assert slurm.state(job)["Restarts"] == "0"
    assert command("resume", run.path).code == 0
    assert run.bits() == whole


def test_srun_takes_the_option_by_which_each_rank_sees_all_gpus_of_its_machine(slurm):
    """The batch script of a job with GPUs has it; these nodes have none."""
    assert slurm.run("srun", "--ntasks=2", "--nodes=2", "--gpu-bind=none", "echo", "ran").split() == ["ran"] * 2
