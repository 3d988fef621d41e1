"""Manifests for Kubernetes: valid offline, down to each key, and made from the recipes."""

import copy
import signal
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

from mnist_dist.errors import CheckpointError, ConfigError, DataError, DeviceMemoryError, NonFiniteError, StorageError
from mnist_dist.launch.engines import FORWARDED_SIGNALS
from mnist_dist.launch.kubernetes import KubernetesJob, render

RECIPES = Path(__file__).parents[2] / "launch" / "kubernetes"
CPUS = KubernetesJob(
    name="mnist",
    image="mnist-dist:0.1.0",
    run_claim="mnist-runs",
    data_claim="mnist-data",
    nodes=2,
    command=("train", "--config", "baseline"),
)
GPUS = replace(CPUS, processes_per_node=4, gpus_per_node=4, cpus=16, memory="64Gi")
EXAMPLES = {"job.yaml": CPUS, "job-gpus.yaml": GPUS, "trainjob.yaml": replace(GPUS, kind="trainjob")}
VARIANTS = [
    *EXAMPLES.values(),
    replace(CPUS, kind="trainjob"),
    replace(CPUS, nodes=1, data_claim=None, max_restarts=0),
    replace(CPUS, processes_per_node=2),
]


def documents(job):
    return list(yaml.safe_load_all(render(job)))


def the_job(job):
    return documents(job)[-1]


def container(job):
    tree = the_job(job)
    return tree["spec"]["trainer"] if job.kind == "trainjob" else tree["spec"]["template"]["spec"]["containers"][0]


def variables(job):
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(job)["env"]}


def validate(document):
    """Refuse a document that a cluster would refuse, by Kubernetes' own schemas; Kubeflow's drop unknown keys."""
    if document["kind"] == "TrainJob":
        assert TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(document)).to_dict() == document
    else:
        for version in ("1.31", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("job", VARIANTS, ids=lambda job: f"{job.kind}-{job.nodes}x{job.processes_per_node}")
def test_every_manifest_is_valid(job):
    kinds = [document["kind"] for document in documents(job)]
    assert kinds == (["Service", "Job"] if job.kind == "job" else ["TrainJob"])
    for document in documents(job):
        validate(document)


@pytest.mark.parametrize(
    ("job", "path", "wrong"),
    [
        (CPUS, ["spec", "completionMode"], "completionsMode"),
        (CPUS, ["spec", "template", "spec", "volumes", 0, "persistentVolumeClaim", "claimName"], "claim"),
        (EXAMPLES["trainjob.yaml"], ["spec", "trainer", "numNodes"], "numNode"),
        (EXAMPLES["trainjob.yaml"], ["spec", "runtimePatches", 0, "trainingRuntimeSpec"], "runtimeSpec"),
    ],
)
def test_a_mistyped_key_is_found_by_the_validation(job, path, wrong):
    document = the_job(job)
    branch = document
    for key in path[:-1]:
        branch = branch[key]
    branch[wrong] = branch.pop(path[-1])
    with pytest.raises((kubernetes_validate.ValidationError, AssertionError)):
        validate(document)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_recipe_filled_in_with_its_own_values_is_the_recipe(name):
    text, rendered = (RECIPES / name).read_text(encoding="utf-8"), render(EXAMPLES[name])
    assert list(yaml.safe_load_all(text)) == list(yaml.safe_load_all(rendered))
    usage, line, _ = rendered.partition("---\n")
    assert text.partition(line)[0].endswith(usage), "_usage() and the recipe's comment have come apart"


def test_all_manifests_have_an_example():
    assert {path.name for path in RECIPES.glob("*.yaml")} == EXAMPLES.keys()


@pytest.mark.parametrize("job", VARIANTS, ids=lambda job: f"{job.kind}-{job.nodes}x{job.processes_per_node}")
def test_every_pod_runs_a_train_that_can_be_started_again(job):
    words = container(job)["command"]
    train = words[words.index("train") :]
    assert words[words.index("-m") + 1] == "mnist_dist"
    assert "--resume" in train
    assert train[train.index("--run-dir") + 1] == "/runs/mnist"
    assert ("--data" in train) == (job.data_claim is not None)
    assert variables(job)["MNIST_DIST_WORLD_SIZE"] == str(job.nodes * job.processes_per_node)
    assert ("ACCELERATE_USE_CPU" in variables(job)) == (job.gpus_per_node == 0)


def test_a_single_process_of_a_pod_is_started_without_torchrun():
    assert container(CPUS)["command"][:3] == ["python", "-m", "mnist_dist"]
    assert variables(CPUS)["WORLD_SIZE"] == "2"
    assert variables(CPUS)["MASTER_ADDR"] == "mnist-0.mnist"
    assert "job-completion-index" in variables(CPUS)["RANK"]["fieldRef"]["fieldPath"]


def test_the_pods_meet_where_the_service_puts_the_first_of_them():
    service, job = documents(GPUS)
    pod = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    name = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--master-addr={name}" in container(GPUS)["command"]


def test_a_job_is_tried_again_as_often_as_its_whole_group_may_fail():
    assert the_job(replace(CPUS, nodes=4))["spec"]["backoffLimit"] == 12
    assert the_job(replace(CPUS, nodes=4, max_restarts=0))["spec"]["backoffLimit"] == 0


def test_exit_codes_decide_only_where_they_come_through():
    def rules(job):
        return [
            (rule["action"], *rule.get("onExitCodes", {}).get("values", ()))
            for rule in the_job(job)["spec"]["podFailurePolicy"]["rules"]
        ]

    final = (ConfigError, DataError, CheckpointError, StorageError, NonFiniteError, DeviceMemoryError)
    stopped = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR2, signal.SIGTERM)
    assert rules(CPUS) == [
        ("FailJob", *(error.exit_code for error in final)),
        ("Ignore", *(128 + number for number in stopped)),
        ("Ignore",),
    ]
    assert rules(GPUS) == [("Ignore",)]


@pytest.mark.parametrize("job", [GPUS, EXAMPLES["trainjob.yaml"]])
def test_torchrun_passes_on_the_same_signals_as_elsewhere(job):
    assert variables(job)["PET_SIGNALS_TO_HANDLE"] == FORWARDED_SIGNALS


def test_resources_are_requested_as_they_are_limited():
    for job in (GPUS, EXAMPLES["trainjob.yaml"]):
        resources = container(job).get("resources") or container(job)["resourcesPerNode"]
        assert resources["limits"] == resources["requests"]
        assert resources["limits"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "4"}
        assert variables(job)["OMP_NUM_THREADS"] == "4"
    assert "nvidia.com/gpu" not in container(CPUS)["resources"]["limits"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", "train --run-dir /runs/mnist --data /data --resume"),
        ("train --run /runs/a/b", "train --run-dir /runs/a/b --data /data --resume"),
        ("train --run=/runs/a --resume", "train --run-dir=/runs/a --resume --data /data"),
        ("train --data /data/small", "train --data /data/small --run-dir /runs/mnist --resume"),
        (
            "train --set data.root=/data/x",
            "train --set data.root=/data/x --run-dir /runs/mnist --resume",
        ),
        ("train --config $(NAME)", "train --config $$(NAME) --run-dir /runs/mnist --data /data --resume"),
    ],
)
def test_a_command_is_completed_with_what_a_pod_needs(command, expected):
    words = container(replace(CPUS, command=tuple(command.split())))["command"]
    assert " ".join(words[3:]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "MNIST_1"}, "--name is 'MNIST_1': Kubernetes needs"),
        ({"name": "1st"}, "--name is '1st'"),
        ({"name": "m" * 41}, "up to 40 lower-case letters"),
        ({"image": ""}, "--image is ''"),
        ({"image": "my image"}, "--image is 'my image'"),
        ({"run_claim": "my_runs"}, "--run-claim is 'my_runs': name a PersistentVolumeClaim"),
        ({"data_claim": "-data"}, "--data-claim is '-data'"),
        ({"nodes": 0}, "--nodes is 0: give at least 1"),
        ({"processes_per_node": 0}, "--processes-per-node is 0"),
        ({"cpus": 0}, "--cpus is 0"),
        ({"gpus_per_node": -1}, "--gpus-per-node is -1"),
        ({"gpus_per_node": 1, "processes_per_node": 2}, "--processes-per-node is 2, but --gpus-per-node is 1"),
        ({"memory": "8"}, "--memory is '8': write a number with its unit"),
        ({"memory": "8GB"}, "--memory is '8GB'"),
        ({"max_restarts": -1}, "--max-restarts is -1"),
        ({"max_restarts": 3, "kind": "trainjob"}, "--max-restarts is 3, but a TrainJob"),
        ({"command": ()}, "The command is '': begin it with train"),
        ({"command": ("evaluate", "/runs/a")}, "The command is 'evaluate /runs/a': begin it with train"),
        ({"command": ("train", "--processes", "4")}, "The command has --processes"),
        ({"command": ("train", "-n4")}, "The command has --processes"),
        ({"command": ("train", "--run")}, "The command ends with --run-dir: write its value"),
        ({"command": ("train", "--run", "runs/a")}, "--run-dir runs/a, which is lost with its pod"),
        ({"command": ("train", "--run", "/runs")}, "--run-dir /runs, which is lost with its pod"),
        ({"command": ("train", "--run", "/runs/../a")}, "--run-dir /runs/../a, which is lost"),
        ({"command": ("train", "--data", "Dataset")}, "--data Dataset, but --data-claim is mounted at /data"),
        ({"command": ("train", "--data", "/data"), "data_claim": None}, "--data /data, but nothing is mounted there"),
    ],
)
def test_a_mistake_is_refused_with_its_option_its_value_and_a_remedy(changes, message):
    with pytest.raises(ConfigError) as raised:
        render(replace(CPUS, **changes))
    assert message in str(raised.value)
