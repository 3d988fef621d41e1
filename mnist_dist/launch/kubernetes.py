"""Fills in the manifests with which Kubernetes trains, and hands them to kubectl."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import yaml

from mnist_dist.errors import ConfigError
from mnist_dist.group.place import EXPECTED_RANKS
from mnist_dist.launch.engines import recipes

DATA = PurePosixPath("/data")
"""Where the recipes mount the claim with the images, read-only."""
RUNS = PurePosixPath("/runs")
"""Where the recipes mount the claim for run folders."""
MAX_RESTARTS = 3
NAME_LENGTH = 40
"""The names of pods and hosts, which are longer by up to 20 characters, must stay within 63."""
INSTANCE = "app.kubernetes.io/instance"
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MEMORY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?(M|G|T|Mi|Gi|Ti)")


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
    kind: Literal["job", "trainjob"] = "job"
    max_restarts: int | None = None
    """How often the whole group is started again; None: 3 for a Job, as the runtime has it for a TrainJob."""


def render(job: KubernetesJob) -> str:
    """Return a run as YAML for `kubectl apply`: a recipe of launch/kubernetes filled in, below a comment on its use.

    What a user would have to know about pods is added to the command where it is missing: `--resume`, since a pod
    that is started again has the same command as before; `--run-dir` below `/runs`, named after the job; `--data
    /data` where there is a claim with images. `--run` becomes `--run-dir`, since torchrun takes the former for
    its own `--run-path`. All else stays as it is; a `--config` must be a preset or a file of the image.

    With one process in a pod, the pod is that process. Kubernetes then sees its exit code: an error of the user's
    fails the Job at once, and a run that was stopped with a checkpoint goes on without using up a restart. With
    several, torchrun starts them; it ends with 1 whatever its processes ended with, so that every failure but the
    disruption of a pod counts, and is tried again.

    Raises:
        ConfigError: A value is none that Kubernetes would take, or the run would lose its folder.
    """
    _check(job)
    arguments = complete(job)
    if job.kind == "trainjob":
        documents = _recipe("trainjob.yaml")
        spec = documents[-1]["spec"]
        container, resources = spec["trainer"], "resourcesPerNode"
        container |= {"numNodes": job.nodes, "numProcPerNode": job.processes_per_node}
        (patch,) = spec["runtimePatches"]
        (replicated_job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        pod = replicated_job["template"]["spec"]["template"]["spec"]
    else:
        documents = _recipe("job.yaml" if job.processes_per_node == 1 else "job-gpus.yaml")
        service, spec = (document["spec"] for document in documents)
        restarts = MAX_RESTARTS if job.max_restarts is None else job.max_restarts
        # When one pod fails, all do.
        spec |= {"completions": job.nodes, "parallelism": job.nodes, "backoffLimit": restarts * job.nodes}
        service["selector"][INSTANCE] = spec["template"]["metadata"]["labels"][INSTANCE] = job.name
        pod = spec["template"]["spec"]
        pod["subdomain"] = job.name
        (container,), resources = pod["containers"], "resources"
    for document in documents:
        document["metadata"]["name"] = document["metadata"]["labels"][INSTANCE] = job.name
    container["image"] = job.image
    container["command"] = _command(job, container["command"], arguments)
    container["env"] = _environment(job, container["env"])
    container[resources] = {"requests": _amounts(job), "limits": _amounts(job)}  # YAML would alias one dict
    _mount(job, pod)
    return _usage(job) + yaml.safe_dump_all(documents, sort_keys=False, explicit_start=True, width=120)


def apply(manifest: str) -> str:
    """Submit a manifest to the cluster that kubectl is set up for.

    Returns:
        What kubectl says.

    Raises:
        ConfigError: There is no kubectl here, or the cluster refuses the manifest.
    """
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ConfigError("There is no kubectl here: write the manifest with --dry-run, and apply it where there is.")
    words = [kubectl, "apply", "-f", "-"]
    done = subprocess.run(words, input=manifest.encode(), capture_output=True, check=False)
    if done.returncode:
        raise ConfigError(f"The cluster refuses the manifest: {os.fsdecode(done.stderr).strip()}")
    return os.fsdecode(done.stdout).strip()


def _recipe(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((recipes() / "kubernetes" / name).read_text(encoding="utf-8")))


def _command(job: KubernetesJob, recipe: list[str], arguments: list[str]) -> list[str]:
    """Return the recipe's words that start this program, for this job, and the arguments.

    They reach the program as they are: Kubernetes replaces `$(NAME)` by a variable's value and `$$` by `$` in a
    container's command, and leaves any other `$` alone.
    """
    values = {"--nnodes": job.nodes, "--nproc-per-node": job.processes_per_node, "--master-addr": _first_host(job)}
    start = recipe[: recipe.index("train")]
    options = [word.partition("=")[0] for word in start]
    start = [f"{name}={values[name]}" if name in values else word for name, word in zip(options, start, strict=True)]
    return [*start, *(word.replace("$", "$$") for word in arguments)]


def _environment(job: KubernetesJob, recipe: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the recipe's variables, with the values of this job: numbers and a host, so no `$` needs doubling."""
    values = {
        "WORLD_SIZE": job.nodes,
        "MASTER_ADDR": _first_host(job),
        EXPECTED_RANKS: job.nodes * job.processes_per_node,
        "OMP_NUM_THREADS": max(1, job.cpus // job.processes_per_node),  # else as many as the machine has, not the pod
    }
    kept = [entry for entry in recipe if entry["name"] != "ACCELERATE_USE_CPU"]
    filled = [entry | {"value": str(values[entry["name"]])} if entry["name"] in values else entry for entry in kept]
    return [*filled, *([] if job.gpus_per_node else [{"name": "ACCELERATE_USE_CPU", "value": "true"}])]


def _first_host(job: KubernetesJob) -> str:
    return f"{job.name}-0.{job.name}"


def _amounts(job: KubernetesJob) -> dict[str, str]:
    gpus = {"nvidia.com/gpu": str(job.gpus_per_node)} if job.gpus_per_node else {}
    return {"cpu": str(job.cpus), "memory": job.memory} | gpus


def _mount(job: KubernetesJob, pod: dict[str, Any]) -> None:
    """Put the claims into the volumes of a recipe's pod; without a claim for images, take out what mounts it."""
    (container,) = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    volumes["runs"]["persistentVolumeClaim"]["claimName"] = job.run_claim
    volumes["data"]["persistentVolumeClaim"]["claimName"] = job.data_claim
    if job.data_claim is None:
        for holder, field in ((pod, "volumes"), (container, "volumeMounts")):
            holder[field] = [entry for entry in holder[field] if entry["name"] != "data"]


def _check(job: KubernetesJob) -> None:
    """Refuse what the cluster would refuse later, or run in another way than meant."""
    _require(
        LABEL.fullmatch(job.name) and len(job.name) <= NAME_LENGTH,
        f"--name is {job.name!r}: Kubernetes needs up to {NAME_LENGTH} lower-case letters, digits and dashes, "
        f"beginning with a letter and not ending with a dash, e.g. mnist-baseline.",
    )
    _require(
        job.image and job.image.isprintable() and not re.search(r"\s", job.image),
        f"--image is {job.image!r}: name an image of a registry, e.g. one built from launch/kubernetes/Dockerfile.",
    )
    for option, claim in (("--run-claim", job.run_claim), ("--data-claim", job.data_claim)):
        _require(
            claim is None or (SUBDOMAIN.fullmatch(claim) and len(claim) <= 253),
            f"{option} is {claim!r}: name a PersistentVolumeClaim, see `kubectl get persistentvolumeclaims`.",
        )
    counts = {"--nodes": job.nodes, "--processes-per-node": job.processes_per_node, "--cpus": job.cpus}
    for option, count in counts.items():
        _require(count >= 1, f"{option} is {count}: give at least 1.")
    _require(job.gpus_per_node >= 0, f"--gpus-per-node is {job.gpus_per_node}: give 0 to train on CPUs, or more.")
    _require(
        job.gpus_per_node == 0 or job.processes_per_node <= job.gpus_per_node,
        f"--processes-per-node is {job.processes_per_node}, but --gpus-per-node is {job.gpus_per_node}: each process "
        f"needs a GPU of its own; give both the same number.",
    )
    _require(
        MEMORY.fullmatch(job.memory), f"--memory is {job.memory!r}: write a number with its unit, e.g. 8Gi or 500Mi."
    )
    if job.max_restarts is not None:
        _require(job.max_restarts >= 0, f"--max-restarts is {job.max_restarts}: give 0 for none, or more.")
        _require(
            job.kind == "job",
            f"--max-restarts is {job.max_restarts}, but a TrainJob is started again as its runtime says: leave it out.",
        )


def _require(valid: object, message: str) -> None:
    if not valid:
        raise ConfigError(message)


def complete(job: KubernetesJob) -> list[str]:
    """Return the words of the user's command and those that a pod needs, see `render`.

    Raises:
        ConfigError: The command would not work in a pod.
    """
    words = [re.sub(r"^--run(?=$|=)", "--run-dir", word) for word in job.command]
    for word in words:
        _require(
            not any(0xD800 <= ord(character) < 0xE000 or character == "\0" for character in word),
            f"The command has {word!r}, which is no text that a manifest can hold: rename it.",
        )
    _require(
        words[:1] == ["train"],
        f"The command is {' '.join(words)!r}: begin it with train, e.g. -- train --config baseline. A pod that is "
        f"started again can continue nothing else.",
    )
    _require(
        not any(re.match(r"--processes(=|$)|-n\d*$", word) for word in words),
        "The command has --processes: give --nodes and --processes-per-node before the two dashes instead.",
    )
    run = _value(words, "--run-dir")
    if run is None:
        words += ["--run-dir", str(RUNS / job.name)]
    else:
        _require(
            _is_below(run, RUNS),
            f"The command has --run-dir {run}, which is lost with its pod: take a folder in {RUNS}, where --run-claim "
            f"is mounted, e.g. {RUNS / job.name}.",
        )
    data = _value(words, "--data")
    if job.data_claim is None:
        _require(
            data is None or not _is_below(data, DATA),
            f"The command has --data {data}, but nothing is mounted there: give --data-claim, the claim with the "
            f"images.",
        )
    elif data is not None:
        _require(
            _is_below(data, DATA),
            f"The command has --data {data}, but --data-claim is mounted at {DATA}: give {DATA} or a folder in it.",
        )
    elif not any(word.removeprefix("--set=").startswith("data.root=") for word in words):
        words += ["--data", str(DATA)]
    if "--resume" not in words:
        words.append("--resume")
    return words


def _value(words: list[str], option: str) -> str | None:
    """Return the value of an option; the last one counts, as on the command line."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            _require(following is not None, f"The command ends with {option}: write its value after it.")
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def _is_below(path: str, mount: PurePosixPath) -> bool:
    """Return whether a path lies on a mounted volume; the mount itself holds images, but is no run's folder."""
    folder = PurePosixPath(path)
    return ".." not in folder.parts and (mount in folder.parents or folder == mount == DATA)


def _usage(job: KubernetesJob) -> str:
    """Return the comment above the YAML: what it needs and how to use it."""
    claims = [job.run_claim, *([job.data_claim] if job.data_claim else [])]
    needs = "Kubernetes 1.31 or newer" if job.kind == "job" else "Kubeflow Trainer 2.3 or newer"
    label = INSTANCE if job.kind == "job" else "jobset.sigs.k8s.io/jobset-name"
    several = "; pods on different nodes mount them: ReadWriteMany" if job.nodes > 1 else ""
    lines = [
        f"Pods: {job.nodes}; processes: {job.nodes * job.processes_per_node}. Needs {needs}.",
        f"Persistent volume claims: {', '.join(claims)}{several}.",
        "",
        "  start it       kubectl apply -f FILE",
        f"  watch it       kubectl logs -f --prefix --tail=-1 --max-log-requests={job.nodes} -l {label}={job.name}",
        "  go on with it  kubectl replace --force -f FILE   (from its newest checkpoint, if it has failed)",
        "  delete it      kubectl delete -f FILE            (the run's folder stays)",
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
