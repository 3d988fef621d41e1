"""Writes down a run for Kubernetes, as YAML for `kubectl apply`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import PurePosixPath

import yaml

from mnist_dist.errors import ConfigError
from mnist_dist.launch.manifests import DATA, RUNS, KubernetesJob, indexed_job, service, train_job

__all__ = ["KubernetesJob", "apply", "complete", "render"]

NAME_LENGTH = 40
"""The names of pods and hosts, which are longer by up to 20 characters, must stay within 63."""
LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MEMORY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?(M|G|T|Mi|Gi|Ti)")


def render(job: KubernetesJob) -> str:
    """Write a run as YAML for `kubectl apply`, with a comment that says how to use it.

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
    documents = [service(job), indexed_job(job, arguments)] if job.kind == "job" else [train_job(job, arguments)]
    return _usage(job) + yaml.safe_dump_all(documents, sort_keys=False, explicit_start=True, width=120)


def apply(manifest: str) -> str:
    """Hand a manifest to the cluster that kubectl is set up for.

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


def _check(job: KubernetesJob) -> None:
    """Refuse what the cluster would refuse later, or run in another way than meant."""
    _require(
        LABEL.fullmatch(job.name) and len(job.name) <= NAME_LENGTH,
        f"name is {job.name!r}: Kubernetes needs up to {NAME_LENGTH} lower-case letters, digits and dashes, beginning "
        f"with a letter and not ending with a dash, e.g. mnist-baseline.",
    )
    _require(
        job.image and job.image.isprintable() and not re.search(r"\s", job.image),
        f"image is {job.image!r}: name an image of a registry, e.g. one built from launch/kubernetes/Dockerfile.",
    )
    for field, claim in (("run_claim", job.run_claim), ("data_claim", job.data_claim)):
        _require(
            claim is None or (SUBDOMAIN.fullmatch(claim) and len(claim) <= 253),
            f"{field} is {claim!r}: name a PersistentVolumeClaim, see `kubectl get persistentvolumeclaims`.",
        )
    counts = {"nodes": job.nodes, "processes_per_node": job.processes_per_node, "cpus": job.cpus}
    for field, count in counts.items():
        _require(count >= 1, f"{field} is {count}: give at least 1.")
    _require(job.gpus_per_node >= 0, f"gpus_per_node is {job.gpus_per_node}: give 0 to train on CPUs, or more.")
    _require(
        job.gpus_per_node == 0 or job.processes_per_node <= job.gpus_per_node,
        f"processes_per_node is {job.processes_per_node}, but gpus_per_node is {job.gpus_per_node}: each process "
        f"needs a GPU of its own; give both the same number.",
    )
    _require(
        MEMORY.fullmatch(job.memory), f"memory is {job.memory!r}: write a number with its unit, e.g. 8Gi or 500Mi."
    )
    if job.max_restarts is not None:
        _require(job.max_restarts >= 0, f"max_restarts is {job.max_restarts}: give 0 for none, or more.")
        _require(
            job.kind == "job",
            f"max_restarts is {job.max_restarts}, but a TrainJob is started again as its runtime says: leave it out.",
        )


def _require(valid: object, message: str) -> None:
    if not valid:
        raise ConfigError(message)


def complete(job: KubernetesJob) -> list[str]:
    """Complete the command of the user's, see `render`.

    Raises:
        ConfigError: The command would not work in a pod.
    """
    words = [re.sub(r"^--run(?=$|=)", "--run-dir", word) for word in job.command]
    for word in words:
        _require(
            not any(0xD800 <= ord(character) < 0xE000 or character == "\0" for character in word),
            f"command has {word!r}, which is no text that a manifest can hold.",
        )
    _require(
        words[:1] == ["train"],
        f"command is {' '.join(words)!r}: begin it with train, e.g. -- train --config baseline; nothing else "
        f"goes on by itself after a restart.",
    )
    _require(
        not any(re.match(r"--processes(=|$)|-n\d*$", word) for word in words),
        "command has --processes: the pods' number is nodes x processes_per_node; give those instead.",
    )
    run = _value(words, "--run-dir")
    if run is None:
        words += ["--run-dir", str(RUNS / job.name)]
    else:
        _require(
            _is_below(run, RUNS),
            f"command has --run-dir {run}, which is lost with its pod: take a folder in {RUNS}, where run_claim is "
            f"mounted, e.g. {RUNS / job.name}.",
        )
    data = _value(words, "--data")
    if job.data_claim is None:
        _require(
            data is None or not _is_below(data, DATA),
            f"command has --data {data}, but nothing is mounted there: give data_claim, the claim with the images.",
        )
    elif data is not None:
        _require(
            _is_below(data, DATA),
            f"command has --data {data}, but data_claim is mounted at {DATA}: give {DATA} or a folder in it.",
        )
    elif not any(word.removeprefix("--set=").startswith("data.root=") for word in words):
        words += ["--data", str(DATA)]
    if "--resume" not in words:
        words.append("--resume")
    return words


def _value(words: list[str], option: str) -> str | None:
    """Find the value of an option; the last one counts, as on the command line."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            _require(following is not None, f"command ends with {option}: write its value after it.")
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def _is_below(path: str, mount: PurePosixPath) -> bool:
    """Tell whether a path lies on a mounted volume; the mount itself holds images, but is no run's folder."""
    folder = PurePosixPath(path)
    return ".." not in folder.parts and (mount in folder.parents or folder == mount == DATA)


def _usage(job: KubernetesJob) -> str:
    """Say above the YAML what it needs and how to use it."""
    claims = [job.run_claim, *([job.data_claim] if job.data_claim else [])]
    needs = "Kubernetes 1.31 or newer" if job.kind == "job" else "Kubeflow Trainer 2.3 or newer"
    label = "app.kubernetes.io/instance" if job.kind == "job" else "jobset.sigs.k8s.io/jobset-name"
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
