"""What the manifests of a Job say, done on this machine: its pods as processes that really train together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mnist_dist.launch.kubernetes import KubernetesJob, render

BIN = Path(sys.executable).parent
PAIR = KubernetesJob(name="pair", image="any", run_claim="runs", nodes=2, cpus=1, command=("train",))
ONE_EPOCH = ("train", "--config", "quick", "--epochs", "1")
ENDLESS = ("train", "--config", "quick", "--epochs", "100000")

pytestmark = pytest.mark.engines


@pytest.fixture
def start(tmp_path):
    """Start the pods of a job as processes of this machine, in its folders; they are killed when the test ends."""
    pods = []

    def start(job):
        (tree,) = [tree for tree in yaml.safe_load_all(render(job)) if tree["kind"] == "Job"]
        (container,) = tree["spec"]["template"]["spec"]["containers"]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])

        def here(text):
            text = re.sub(rf"\b{job.name}-0\.{job.name}\b", "127.0.0.1", text).replace("29500", port)
            return re.sub(r"^/(runs|tmp|data)\b", str(tmp_path / r"\1"), text)

        programs = {"python": sys.executable, "torchrun": str(BIN / "torchrun")}
        for index in range(tree["spec"]["completions"]):
            own = {entry["name"]: here(entry.get("value", str(index))) for entry in container["env"]}
            words = [programs[container["command"][0]], *map(here, container["command"][1:])]
            environment = os.environ | own | {"GLOO_SOCKET_IFNAME": "lo"}
            pods.append(subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=-1, stderr=-2, text=True))
        return pods[-job.nodes :]

    yield start
    for pod in pods:
        if pod.poll() is None:
            pod.send_signal(signal.SIGTERM)  # torchrun takes its processes along
            pod.communicate(timeout=60)


def codes(pods):
    outputs = [pod.communicate(timeout=120)[0] for pod in pods]
    return [pod.returncode for pod in pods], "\n".join(outputs)


def wait_for_checkpoint(run, pods):
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert pods[0].poll() is None, pods[0].communicate()
        time.sleep(0.02)


def actions(job, code):
    """Find what the Job does about a pod that ended with this code."""
    *_, tree = yaml.safe_load_all(render(job))
    for rule in tree["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", ()):
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("processes", [1, 2])
def test_two_pods_train_one_run_and_find_it_finished_when_started_again(start, tmp_path, processes):
    job = replace(PAIR, processes_per_node=processes, command=ONE_EPOCH)
    ended, output = codes(start(job))
    assert ended == [0, 0], output
    result = json.loads((tmp_path / "runs" / "pair" / "result.json").read_text())
    assert (result["status"], result["evaluated"]) == ("finished", "359/359")
    environment = json.loads((tmp_path / "runs" / "pair" / "environment.json").read_text())
    assert environment["ranks"] == 2 * processes
    ended, output = codes(start(job))
    assert ended == [0, 0], output


def test_a_drained_pod_stops_both_with_a_checkpoint_and_costs_no_restart(start, tmp_path):
    job = replace(PAIR, command=ENDLESS)
    pods = start(job)
    wait_for_checkpoint(tmp_path / "runs" / "pair", pods)
    pods[1].send_signal(signal.SIGTERM)
    ended, output = codes(pods)
    assert ended == [143, 143], output
    assert {actions(job, code) for code in ended} == {"Ignore"}
    assert json.loads((tmp_path / "runs" / "pair" / "result.json").read_text())["status"] == "stopped"
    assert list((tmp_path / "runs" / "pair" / "checkpoints").glob("step-*"))


def test_a_killed_pod_ends_the_other_and_both_go_on_when_they_are_started_again(start, tmp_path):
    job = replace(PAIR, command=("train", "--config", "quick", "--epochs", "20"))
    pods = start(job)
    wait_for_checkpoint(tmp_path / "runs" / "pair", pods)
    pods[1].kill()
    ended, output = codes(pods)
    assert ended == [7, -signal.SIGKILL], output
    assert {actions(job, code) for code in (7, 128 + signal.SIGKILL)} == {"Count"}
    ended, output = codes(start(job))
    assert ended == [0, 0], output
    assert "resumed after step" in output
    assert json.loads((tmp_path / "runs" / "pair" / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(("processes", "code", "action"), [(1, 3, "FailJob"), (2, 1, "Count")])
def test_missing_pictures_fail_the_job_at_once_unless_torchrun_hides_why(start, tmp_path, processes, code, action):
    job = replace(PAIR, processes_per_node=processes, data_claim="pictures")
    ended, output = codes(start(job))
    assert ended == [code, code], output
    assert str(tmp_path / "data") in output
    assert {actions(job, code) for code in ended} == {action}
