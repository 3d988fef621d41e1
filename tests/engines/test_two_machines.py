"""Training over two machines (network namespaces) that share no disk, by the recipes alone."""

import sys
from pathlib import Path

import pytest
from cluster import Machines, wait_for
from conftest import TRAIN
from watched import Watched

RECIPES = Path(__file__).parents[2] / "launch"
HEAD = f"{Machines.ADDRESSES[0]}:29400"

pytestmark = pytest.mark.engines


def torchrun(machines, node):
    variables = {"NODES": "2", "PROCESSES": "1", "NODE_RANK": str(node), "HEAD": HEAD}
    words = ["bash", RECIPES / "torchrun" / "train.sh", *TRAIN, "--resume", "--run-dir", "run"]
    return machines.start(node, words, **variables)


def launched(machines, node):
    options = ["--nodes", "2", "--processes-per-node", "1", "--node-rank", node, "--head", f"{Machines.HEAD}:29400"]
    words = [sys.executable, "-m", "mnist_dist", "launch", "torchrun", *options, "--", *TRAIN, "--run", "run"]
    return machines.start(node, words)


def accelerate(machines, node):
    options = ["--num_processes", "2", "--machine_rank", node, "--main_process_ip", Machines.HEAD]
    words = ["accelerate", "launch", "--config_file", RECIPES / "accelerate" / "machines.yaml", *options]
    words += ["-m", "mnist_dist", *TRAIN, "--resume", "--run", "run"]
    return machines.start(node, words, MNIST_DIST_WORLD_SIZE="2")


@pytest.fixture
def head(machines):
    """The run as the head has it."""
    return Watched(machines.folders[0] / "run")


def finish(machines, processes):
    for node, process in enumerate(processes):
        assert process.wait(120) == 0, machines.out(node)


def has_checkpoint(run):
    return (run.path / "checkpoints").exists() and run.steps


def test_torchrun_trains_across_and_a_link_cut_for_six_seconds_is_survived(machines, head, whole):
    processes = [torchrun(machines, node) for node in (0, 1)]
    wait_for(lambda: has_checkpoint(head), "a checkpoint")
    before = head.steps[-1]
    machines.cut(6)
    assert head.steps[-1] <= before + 20  # nobody went on alone
    finish(machines, processes)
    assert "2 processes" in machines.out(0)
    assert "warning" not in machines.out(0)
    assert head.bits() == whole
    assert not (machines.folders[1] / "run").exists()


def test_accelerate_trains_across(machines, head, whole):
    finish(machines, [accelerate(machines, node) for node in (0, 1)])
    assert "2 processes" in machines.out(0)
    assert head.bits() == whole


def test_a_killed_machine_that_is_started_again_rejoins_and_the_bits_are_right(machines, head, whole):
    first, _ = [launched(machines, node) for node in (0, 1)]
    wait_for(lambda: has_checkpoint(head), "a checkpoint")
    assert len(machines.kill(1)) >= 2  # torchrun and its rank
    again = launched(machines, 1)
    finish(machines, [first, again])
    assert "resumed after step" in machines.out(0)
    assert head.bits() == whole
