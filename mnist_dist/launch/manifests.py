"""A run on Kubernetes as plain trees: an Indexed Job with its Service, or a TrainJob of Kubeflow Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from mnist_dist.errors import CheckpointError, ConfigError, DataError, DeviceMemoryError, NonFiniteError, StorageError
from mnist_dist.group.place import EXPECTED_RANKS
from mnist_dist.launch.engines import FORWARDED_SIGNALS

Kind = Literal["job", "trainjob"]

DATA = PurePosixPath("/data")
"""Where the claim with the images is mounted, read-only."""
RUNS = PurePosixPath("/runs")
"""Where the claim for run folders is mounted."""
FINAL_CODES = tuple(
    error.exit_code
    for error in (ConfigError, DataError, CheckpointError, StorageError, NonFiniteError, DeviceMemoryError)
)
"""Exit codes after which another try would end in the same way."""
STOPPED_CODES = (129, 130, 140, 143)
"""128 + SIGHUP, SIGINT, SIGUSR2 and SIGTERM, as Linux numbers them: stopped with a checkpoint, to go on from there."""
MAX_RESTARTS = 3
GRACE_SECONDS = 120
"""From SIGTERM until a pod is killed: enough to end a step and write a checkpoint."""
PORT = 29500
USER = 1000
COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesJob:
    """A run on a cluster: a fixed number of equal pods, one for each node that it uses."""

    name: str
    """Of the Job, its Service and its label."""
    image: str
    """Has this package installed: launch/kubernetes/Dockerfile makes such a one."""
    run_claim: str
    """PersistentVolumeClaim for the run's folder; every pod mounts it, only rank 0 writes."""
    command: tuple[str, ...]
    """`train` and its options; see `render` for those that may be left out."""
    data_claim: str | None = None
    """PersistentVolumeClaim with the images, mounted read-only; None: they are in the image, or embedded."""
    nodes: int = 1
    processes_per_node: int = 1
    gpus_per_node: int = 0
    """0 trains on CPUs."""
    cpus: int = 2
    """CPUs of each pod, which its processes share."""
    memory: str = "8Gi"
    """Of each pod, its /dev/shm included."""
    kind: Kind = "job"
    max_restarts: int | None = None
    """How often the whole group is started again; None: 3 for a Job, as the runtime has it for a TrainJob."""


def service(job: KubernetesJob) -> dict[str, Any]:
    """Give the pods the host names by which they find rank 0."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name, "labels": _labels(job)},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # they look for each other while they start
            "selector": _labels(job),
        },
    }


def indexed_job(job: KubernetesJob, arguments: list[str]) -> dict[str, Any]:
    """Fill in a Job of one pod for each node; it starts all pods again when one has failed."""
    restarts = MAX_RESTARTS if job.max_restarts is None else job.max_restarts
    alone = job.processes_per_node == 1
    container = {
        "name": "train",
        "image": job.image,
        "command": _literal([*(["python"] if alone else _torchrun(job)), "-m", "mnist_dist", *arguments]),
        "env": [*(_place_of_rank(job) if alone else _place_of_node()), *_environment(job)],
        "resources": _resources(job),
        "securityContext": _container_security(),
        "volumeMounts": _mounts(job),
    }
    pod = {
        "subdomain": job.name,
        "restartPolicy": "Never",  # a failure policy needs it, and a new pod can go to another node
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": _volumes(job),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "labels": _labels(job)},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": restarts * job.nodes,  # when one pod fails, all do
            "podFailurePolicy": {"rules": _failure_rules(seen=alone)},
            "template": {"metadata": {"labels": _labels(job)}, "spec": pod},
        },
    }


def _failure_rules(*, seen: bool) -> list[dict[str, Any]]:
    """Say which failures of a pod count as a try; the first rule that matches decides.

    Args:
        seen: Whether the pod ends with the exit code of its process; torchrun makes a 1 of each.
    """
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    if not seen:
        return [disrupted]
    return [
        {"action": action, "onExitCodes": {"containerName": "train", "operator": "In", "values": list(codes)}}
        # When a drained node stops one pod, the others stop with it at the same step, undisturbed themselves.
        for action, codes in (("FailJob", FINAL_CODES), ("Ignore", STOPPED_CODES))
    ] + [disrupted]


def _torchrun(job: KubernetesJob) -> list[str]:
    """Start a node's processes; its agents meet at a fixed address and never restart: the Job does."""
    words = {
        "--nnodes": job.nodes,
        "--nproc-per-node": job.processes_per_node,
        "--master-addr": _first_host(job),
        "--master-port": PORT,
    }
    return ["torchrun", *(f"{option}={value}" for option, value in words.items())]


def _first_host(job: KubernetesJob) -> str:
    return f"{job.name}-0.{job.name}"


def _place_of_rank(job: KubernetesJob) -> list[dict[str, Any]]:
    """Tell the only process of a pod what a launcher would tell it."""
    return [
        {"name": "RANK", "valueFrom": {"fieldRef": {"fieldPath": COMPLETION_INDEX}}},
        {"name": "LOCAL_RANK", "value": "0"},
        {"name": "WORLD_SIZE", "value": str(job.nodes)},
        {"name": "LOCAL_WORLD_SIZE", "value": "1"},
        {"name": "MASTER_ADDR", "value": _first_host(job)},
        {"name": "MASTER_PORT", "value": str(PORT)},
    ]


def _place_of_node() -> list[dict[str, Any]]:
    """Tell a node's torchrun which node it is; it reads PET_* as its own options."""
    return [{"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": COMPLETION_INDEX}}}, *_torchrun_stop()]


def _torchrun_stop() -> list[dict[str, Any]]:
    """Let torchrun pass on what asks a run to stop, and wait for it to do so.

    By default SIGUSR2 would end torchrun without its processes, and they would be killed after 30 s.
    """
    return [
        {"name": "PET_SIGNALS_TO_HANDLE", "value": FORWARDED_SIGNALS},
        {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(GRACE_SECONDS - 10)},
    ]


def train_job(job: KubernetesJob, arguments: list[str]) -> dict[str, Any]:
    """Fill in a TrainJob; its runtime gives torchrun the node's place through PET_* variables."""
    pod = {
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": _pod_security(),
        "containers": [{"name": "node", "securityContext": _container_security(), "volumeMounts": _mounts(job)}],
        "volumes": _volumes(job),
    }
    replicated_job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": job.name, "labels": _labels(job)},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {
                "image": job.image,
                "command": _literal(["torchrun", "-m", "mnist_dist", *arguments]),
                "env": [*_torchrun_stop(), *_environment(job)],
                "numNodes": job.nodes,
                "numProcPerNode": job.processes_per_node,
                "resourcesPerNode": _resources(job),
            },
            "runtimePatches": [
                {
                    "manager": "mnist-dist/launch",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated_job]}}},
                }
            ],
        },
    }


def _literal(words: list[str]) -> list[str]:
    """Write words so that they reach the program as they are.

    Kubernetes replaces `$(NAME)` by a variable's value and `$$` by `$` in a container's command, arguments and values
    of variables, and leaves any other `$` alone.
    """
    return [word.replace("$", "$$") for word in words]


def _labels(job: KubernetesJob) -> dict[str, str]:
    return {"app.kubernetes.io/name": "mnist-dist", "app.kubernetes.io/instance": job.name}


def _environment(job: KubernetesJob) -> list[dict[str, Any]]:
    """Return the variables that every process needs."""
    values = {
        EXPECTED_RANKS: job.nodes * job.processes_per_node,
        "OMP_NUM_THREADS": max(1, job.cpus // job.processes_per_node),  # else as many as the machine has, not the pod
        "PYTHONSAFEPATH": "1",  # a module in the pods' working folder hides none
        "HOME": "/tmp",  # caches, the decoded images among them: /data is read-only
        **({} if job.gpus_per_node else {"ACCELERATE_USE_CPU": "true"}),
    }
    return [{"name": name, "value": _literal([str(value)])[0]} for name, value in values.items()]


def _resources(job: KubernetesJob) -> dict[str, Any]:
    amounts = {"cpu": str(job.cpus), "memory": job.memory}
    if job.gpus_per_node:
        amounts["nvidia.com/gpu"] = str(job.gpus_per_node)
    return {"requests": dict(amounts), "limits": dict(amounts)}  # copies: YAML would write an alias


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,  # so that this user may write to the run's claim
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> dict[str, Any]:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _mounts(job: KubernetesJob) -> list[dict[str, Any]]:
    data = [{"name": "data", "mountPath": str(DATA), "readOnly": True}] if job.data_claim else []
    return [
        *data,
        {"name": "runs", "mountPath": str(RUNS)},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "scratch", "mountPath": "/tmp"},
    ]


def _volumes(job: KubernetesJob) -> list[dict[str, Any]]:
    claim = {"claimName": job.data_claim, "readOnly": True}
    return [
        *([{"name": "data", "persistentVolumeClaim": claim}] if job.data_claim else []),
        {"name": "runs", "persistentVolumeClaim": {"claimName": job.run_claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL needs more than the 64 MB that a pod has
        {"name": "scratch", "emptyDir": {}},
    ]
