"""`launch`: hand a command over to processes of this machine, or to the engine that starts them elsewhere."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mnist_dist.cli import flags, tree
from mnist_dist.errors import ConfigError
from mnist_dist.errors.shell import join

if TYPE_CHECKING:
    from mnist_dist.launch.engines import Cluster, Launch

app = typer.Typer(no_args_is_help=True, help="Start a command here, on several machines or on a cluster.")

MOST_MACHINES = 65536
MOST_CPUS = 4096
OWN = ("train", "resume")
"""The commands of ours that engines start."""

Command = Annotated[list[str], typer.Argument(metavar="COMMAND", help="What to run, after two dashes: `-- train ...`.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print exactly what would run, and stop.")]
Nodes = Annotated[int, flags.whole(least=1, most=MOST_MACHINES, help="Machines.")]
PerNode = Annotated[
    int | None,
    flags.whole(
        least=1, most=flags.MOST_PROCESSES, help="Processes on each machine.", show_default="one a visible GPU, or 1"
    ),
]
NodeRank = Annotated[int, flags.whole(least=0, most=MOST_MACHINES - 1, help="This machine's number: 0 is the head.")]
Head = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Machine 0, as the others reach it.")]
MaxRestarts = Annotated[
    int, flags.whole(least=0, most=1_000_000, help="How often processes that failed are started again.")
]


@app.command()
def local(
    command: Command,
    processes: Annotated[
        int | None,
        flags.whole(
            "--processes",
            "-n",
            least=1,
            most=flags.MOST_PROCESSES,
            help="Processes.",
            show_default="one a GPU, or 1",
        ),
    ] = None,
    max_restarts: Annotated[
        int | None, flags.whole(least=0, most=1_000_000, help="Restarts without progress in between.", show_default="3")
    ] = None,
    start_timeout: Annotated[
        float | None,
        flags.number(least=1, most=flags.MOST_SECONDS, help="Seconds to the first step.", show_default="1800"),
    ] = None,
    hang_timeout: Annotated[
        float | None,
        flags.number(
            least=1, most=flags.MOST_SECONDS, help="Seconds without a sign of life after that.", show_default="600"
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Run a command as a group of processes on this machine, and supervise them.

    The command is `train` or `resume` with its options, or any program that reads RANK, WORLD_SIZE and MASTER_ADDR.
    Hangs are detected only for `train` and `resume`.
    """
    from mnist_dist.cli.train import HANG_SECONDS, MAX_RESTARTS, START_SECONDS
    from mnist_dist.launch.group import Group, describe
    from mnist_dist.launch.own import choose_ranks, own_command
    from mnist_dist.launch.supervise import Restarts, run_local
    from mnist_dist.machine import check_loopback

    if command[0] in OWN:
        ours = {"--processes": processes, "--max-restarts": max_restarts, "--start-timeout": start_timeout,
                "--hang-timeout": hang_timeout}  # fmt: skip
        options = [word for name, value in ours.items() if value is not None for word in (name, str(value))]
        parsed = tree.parse((command[0], *options, *command[1:]))
        if command[0] == "train":
            _check_share(parsed.params, ranks=None)
        words = [*own_command(), command[0], *options, *command[1:]]
        if not dry_run:
            os.execv(sys.executable, words)  # it supervises the processes itself
        print(join(words))
        return
    check_loopback()
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    group = Group(
        command=tuple(command),
        ranks=processes or choose_ranks(None, "auto"),
        environment=environment,
        foreign=True,
        start_seconds=START_SECONDS if start_timeout is None else start_timeout,
        hang_seconds=HANG_SECONDS if hang_timeout is None else hang_timeout,
    )
    if dry_run:
        print(describe(group))
        return
    raise typer.Exit(run_local(group, Restarts(limit=MAX_RESTARTS if max_restarts is None else max_restarts)))


@app.command()
def torchrun(
    command: Command,
    nodes: Nodes = 1,
    processes_per_node: PerNode = None,
    node_rank: NodeRank = 0,
    head: Head = None,
    max_restarts: MaxRestarts = 3,
    dry_run: DryRun = False,
) -> None:
    """Run `train` through torchrun; with several machines, start this on each, with its --node-rank."""
    from mnist_dist.launch import engines

    words, cluster = _cluster(
        command, processes_per_node, nodes=nodes, node_rank=node_rank, head=head, max_restarts=max_restarts,
        dry_run=dry_run,
    )  # fmt: skip
    _start(engines.torchrun(cluster, words), dry_run=dry_run)


@app.command()
def accelerate(
    command: Command,
    nodes: Nodes = 1,
    processes_per_node: PerNode = None,
    node_rank: NodeRank = 0,
    head: Head = None,
    max_restarts: MaxRestarts = 3,
    dry_run: DryRun = False,
) -> None:
    """Run `train` through `accelerate launch`; with several machines, start this on each, with its --node-rank."""
    from mnist_dist.launch import engines

    words, cluster = _cluster(
        command, processes_per_node, nodes=nodes, node_rank=node_rank, head=head, max_restarts=max_restarts,
        dry_run=dry_run,
    )  # fmt: skip
    _start(engines.accelerate(cluster, words), dry_run=dry_run)


@app.command()
def slurm(
    command: Command,
    nodes: Nodes = 1,
    processes_per_node: Annotated[
        int | None,
        flags.whole(
            least=1, most=flags.MOST_PROCESSES, help="Processes on each machine.", show_default="the GPUs, or 1"
        ),
    ] = None,
    gpus_per_node: Annotated[
        int, flags.whole(least=0, most=flags.MOST_PROCESSES, help="GPUs of each machine; 0 trains on CPUs.")
    ] = 0,
    cpus_per_process: Annotated[int, flags.whole(least=1, most=MOST_CPUS, help="CPUs of each process.")] = 1,
    time: Annotated[str, typer.Option(help="Time limit: minutes, HH:MM:SS or D-HH:MM:SS.")] = "01:00:00",
    warning_seconds: Annotated[
        int, flags.whole(least=1, most=65535, help="Seconds before the time limit at which the run saves.")
    ] = 120,
    name: Annotated[str, typer.Option(help="The job's name.")] = "mnist-dist",
    partition: Annotated[str | None, typer.Option(help="The partition.", show_default="the cluster's")] = None,
    dry_run: DryRun = False,
) -> None:
    """Submit a job that trains, saves before its time is over, goes back into the queue and resumes."""
    from mnist_dist.launch.own import own_command
    from mnist_dist.launch.slurm import SlurmJob, render, submit

    per_node = processes_per_node or gpus_per_node or 1
    words, run = _prepared(command, ranks=nodes * per_node)
    job = SlurmJob(
        command=words,
        run=run,
        nodes=nodes,
        processes_per_node=per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_process=cpus_per_process,
        time=time,
        warning_seconds=warning_seconds,
        name=name,
        partition=partition,
        python=own_command(),
    )
    script = render(job)
    print(script if dry_run else submit(script), end="" if dry_run else "\n")


@app.command()
def kubernetes(
    command: Command,
    image: Annotated[str, typer.Option(help="An image with this program: launch/kubernetes/Dockerfile makes one.")],
    run_claim: Annotated[str, typer.Option(help="PersistentVolumeClaim for run folders, mounted at /runs.")],
    data_claim: Annotated[
        str | None, typer.Option(help="PersistentVolumeClaim with the images, mounted read-only at /data.")
    ] = None,
    nodes: Annotated[int, flags.whole(least=1, most=MOST_MACHINES, help="Pods.")] = 1,
    processes_per_node: Annotated[
        int | None,
        flags.whole(least=1, most=flags.MOST_PROCESSES, help="Processes in each pod.", show_default="the GPUs, or 1"),
    ] = None,
    gpus_per_node: Annotated[
        int, flags.whole(least=0, most=flags.MOST_PROCESSES, help="GPUs of each pod; 0 trains on CPUs.")
    ] = 0,
    cpus: Annotated[int, flags.whole(least=1, most=MOST_CPUS, help="CPUs of each pod.")] = 2,
    memory: Annotated[str, typer.Option(help="Memory of each pod.")] = "8Gi",
    kind: Annotated[
        Literal["job", "trainjob"],
        flags.choice(of=("job", "trainjob"), help="An Indexed Job, or a TrainJob of Kubeflow Trainer."),
    ] = "job",
    name: Annotated[str, typer.Option(help="Of the job, and of the run in /runs.")] = "mnist",
    max_restarts: Annotated[
        int | None,
        flags.whole(least=0, most=1_000_000, help="Restarts of a job.", show_default="3; a TrainJob's runtime decides"),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Start training on a cluster with kubectl; --dry-run prints the manifest alone."""
    from mnist_dist.launch.kubernetes import KubernetesJob, apply, complete, render

    job = KubernetesJob(
        name=name,
        image=image,
        run_claim=run_claim,
        data_claim=data_claim,
        nodes=nodes,
        processes_per_node=processes_per_node or gpus_per_node or 1,
        gpus_per_node=gpus_per_node,
        cpus=cpus,
        memory=memory,
        kind=kind,
        max_restarts=max_restarts,
        command=tuple(command),
    )
    manifest = render(job)
    _check_share(tree.parse(tuple(complete(job))).params, ranks=nodes * job.processes_per_node)
    print(manifest if dry_run else apply(manifest), end="" if dry_run else "\n")


def _cluster(command: list[str], per_node: int | None, **options: Any) -> tuple[tuple[str, ...], Cluster]:
    """Complete a command for an engine, and describe where it runs; `options` are fields of `Cluster`."""
    from mnist_dist.launch.engines import Cluster
    from mnist_dist.launch.own import choose_ranks, safe_environment, safe_python
    from mnist_dist.machine import check_loopback, visible_gpus

    device = (tree.parse(tuple(command)).params.get("device") if command[0] in OWN else None) or "auto"
    cluster = Cluster(
        processes_per_node=per_node or choose_ranks(None, device),
        cpu=device == "cpu" or (device == "auto" and not visible_gpus()),
        decided=device != "auto",
        python=safe_python(),
        environment=safe_environment(),
        **options,
    )
    words, _ = _prepared(command, ranks=cluster.ranks)
    if cluster.nodes == 1 and not cluster.dry_run:
        check_loopback()
    return words, cluster


def _prepared(command: list[str], *, ranks: int) -> tuple[tuple[str, ...], str]:
    """Check a command for an engine that starts it again after failures.

    Returns:
        Its words, with `--resume` (so that a restart continues) and `--run-dir` (torchrun takes `--run` for its own),
        and the run folder.

    Raises:
        ConfigError: It isn't `train` or `resume`, names no folder, or so many processes can't share its batch.
    """
    from mnist_dist.config import load
    from mnist_dist.run.folder import RunFolder

    if command[0] not in OWN:
        raise ConfigError(f"{command[0]!r} cannot be launched there: the command is `train ...` or `resume RUN`.")
    parsed = tree.parse(tuple(command))
    options = parsed.params
    for name in ("processes", "max_restarts", "start_timeout", "hang_timeout"):
        source = parsed.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} belongs before the two dashes: the engine starts processes.")
    if command[0] == "resume":
        run = RunFolder(options["run"])
        run.check_run()
        load(run.config).config.train.split_batch(ranks)
        return tuple(command), str(run.path)
    if options["run"] is None:
        raise ConfigError("train needs --run-dir here: all processes and every restart need the same folder.")
    _check_share(options, ranks=ranks)
    words = [re.sub(r"^--run(?=$|=)", "--run-dir", word) for word in command]
    return (*words, *(() if options["resume_"] else ("--resume",))), str(options["run"])


def _check_share(options: dict[str, Any], *, ranks: int | None) -> None:
    """Check that the config of a `train` with these options is valid and so many processes can share its batch.

    Raises:
        ConfigError: They can't, or the config is wrong; one that is only where the processes run is left to them.
    """
    from mnist_dist.cli.train import resolve

    config = options["config"]
    if config is not None and "/" in config and not Path(config).exists():
        return
    resolved, _ = resolve(config, list(options["set_"] or ()), {name: options[name] for name in flags.KEYS})
    if ranks is not None:
        resolved.config.train.split_batch(ranks)


def _start(launch: Launch, *, dry_run: bool) -> None:
    if dry_run:
        print(launch)
        return
    sys.stdout.flush()
    launch.replace_this_process()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
