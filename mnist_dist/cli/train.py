"""`train` and `resume`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mnist_dist.cli import flags
from mnist_dist.errors import (
    ConfigError,
    DataError,
    DeviceMemoryError,
    MnistDistError,
    StoppedError,
    StorageError,
    WorkerError,
    typed,
)
from mnist_dist.group.place import group_folder_of
from mnist_dist.group.signals import name_of
from mnist_dist.observe.output import open_console, say

if TYPE_CHECKING:
    from mnist_dist.config import Resolved, Setting
    from mnist_dist.group.place import GroupFolder, Worker
    from mnist_dist.launch.group import Group
    from mnist_dist.launch.supervise import Restarts
    from mnist_dist.run.folder import RunFolder

QUICK = "quick"
RESUMABLE = (1, StorageError.exit_code, WorkerError.exit_code, DeviceMemoryError.exit_code)
"""Exit codes after which a run can be resumed, once the cause is gone."""
MAX_RESTARTS = 3
START_SECONDS = 1800.0
HANG_SECONDS = 600.0


def train(
    config: flags.Config = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"{flags.DATA}.",
            show_default="Dataset; embedded digits if there is none",
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            "--run-dir",  # torchrun takes --run for its own --run-path
            help="New folder for all that the run writes.",
            show_default="runs/CONFIG-TIME",
        ),
    ] = None,
    processes: flags.Processes = None,
    device: flags.DeviceKey = None,
    precision: flags.PrecisionKey = None,
    epochs: flags.EpochsKey = None,
    seed: flags.SeedKey = None,
    model: flags.ModelKey = None,
    batch_size: flags.BatchSizeKey = None,
    lr: flags.LearningRateKey = None,
    set_: flags.Set = None,
    resume_: Annotated[
        bool, typer.Option("--resume", help="Continue the run in that folder if there is one with this config.")
    ] = False,
    init_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Start from that run's weights (not its optimizer or step).")
    ] = None,
    max_restarts: flags.MaxRestarts = MAX_RESTARTS,
    start_timeout: Annotated[
        float,
        flags.number(
            least=1,
            most=flags.MOST_SECONDS,
            help="Seconds a process may take to its first step before it counts as hanging.",
        ),
    ] = START_SECONDS,
    hang_timeout: Annotated[
        float,
        flags.number(
            least=1, most=flags.MOST_SECONDS, help="Seconds without a sign of life, after that, that count as hanging."
        ),
    ] = HANG_SECONDS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON; all else goes to standard error.")
    ] = False,
) -> None:
    """Train, evaluating and saving at the end of each epoch."""
    from mnist_dist.launch.own import choose_ranks, own_group, this_worker
    from mnist_dist.run.folder import RunFolder, claim_run_folder

    worker = this_worker(processes)
    given = {"data": data, "device": device, "precision": precision, "epochs": epochs, "seed": seed}
    given |= {"model": model, "batch_size": batch_size, "lr": lr}
    resolved, source = resolve(config, set_, given)
    if source == QUICK != config and (worker is None or (worker.rank == 0 and group_folder_of(os.environ) is None)):
        say("No folder Dataset here: training on the 1,797 embedded digits (preset quick).", err=as_json)
    ranks = worker.ranks if worker else choose_ranks(processes, resolved.config.train.device)
    resolved.config.train.split_batch(ranks)
    if dry_run:
        if worker is None or worker.rank == 0:
            _print_dry_run(resolved, ranks)
        return
    if resume_ and run is None:
        raise ConfigError("--resume needs --run: the folder of the run to continue, or to start.")
    if run is not None:
        RunFolder(run).check_text()
    existing = RunFolder(run) if run and resume_ and RunFolder(run).holds_run() else None
    if existing:
        resolved = _continue(existing, resolved, given=data is not None, err=as_json)
        if worker is None and _is_finished(existing, as_json=as_json):
            return
    elif run and worker is None:
        RunFolder(run).check_new()
    if init_from is not None and not existing and (worker is None or worker.rank == 0):  # only rank 0 reads it
        RunFolder(init_from).check_run()
    if worker is not None:
        _work(resolved, run, worker, resume=resume_, init_from=init_from, as_json=as_json)
    else:
        folder = RunFolder(run or claim_run_folder(_name_of(source)))
        own = own_group(ranks=ranks, log=folder.log, extra=() if run else ("--run", str(folder.path)))
        group = replace(own, start_seconds=start_timeout, hang_seconds=hang_timeout)
        again = () if resume_ else ("--resume",)
        _supervise(resolved, folder, group, _restarts(max_restarts, folder, again), as_json=as_json)


def resolve(config: str | None, set_: list[str] | None, given: Mapping[str, str | None]) -> tuple[Resolved, str | None]:
    """Resolve the config of a command line.

    Args:
        config: What `--config` says.
        set_: What `--set` says.
        given: The values of the options in `flags.KEYS`; None where one was not given.

    Returns:
        The config, and the preset, file or run that it started from: `quick` where the user named neither a config
        nor images and there are none.
    """
    from mnist_dist.config import load, parse_setting

    settings = [*map(parse_setting, set_ or ()), *_given(given)]
    has_data = any(setting.key == "data.root" for setting in settings) or Path("Dataset").is_dir()
    source = QUICK if config is None and not has_data else config
    return load(source, tuple(settings)), source


def _name_of(source: str | None) -> str:
    """Name a run after what its config started from."""
    if source is None:
        return "train"
    return Path(source).resolve().name if Path(source).is_dir() else Path(source).stem


def resume(
    run: flags.Run,
    processes: flags.Processes = None,
    device: flags.DeviceKey = None,
    data: Annotated[str | None, typer.Option(help="Where the run's images are now.")] = None,
    max_restarts: flags.MaxRestarts = MAX_RESTARTS,
) -> None:
    """Continue a run to its end, from its newest whole checkpoint."""
    from mnist_dist.config import load
    from mnist_dist.launch.own import choose_ranks, own_group, this_worker
    from mnist_dist.run.folder import RunFolder

    worker = this_worker(processes)
    folder = RunFolder(run)
    folder.check_text()
    folder.check_run()
    if worker is None and _is_finished(folder):
        return
    settings = _given({"data": data, "device": device})
    resolved = load(folder.config, tuple(settings))
    if data is None:
        resolved = _with_data(resolved, folder, err=False)
    if worker is not None:
        _work(resolved, run, worker, resume=True, init_from=None, as_json=False)
        return
    ranks = choose_ranks(processes, resolved.config.train.device)
    resolved.config.train.split_batch(ranks)
    group = replace(own_group(ranks=ranks, log=folder.log), start_seconds=START_SECONDS)
    _supervise(resolved, folder, group, _restarts(max_restarts, folder, ()), as_json=False)


def _continue(folder: RunFolder, asked: Resolved, *, given: bool, err: bool) -> Resolved:
    """Return the saved config of a run if it is the one that is asked for.

    Args:
        folder: The run's.
        asked: The command line's config.
        given: Whether the user named the images. If not, they may still be where they were when the run was started.
        err: Whether lines go to standard error.

    Raises:
        ConfigError: It differs; the message names the keys.
        CheckpointError: The saved one is damaged or edited.
    """
    from mnist_dist.config import load
    from mnist_dist.config.resolve import differences

    folder.check_run()
    saved = load(folder.config)
    root = asked.config.data.root
    if (
        given
        and root != saved.config.data.root
        and folder.find_data(saved.config.data.root) == str(Path(root).absolute())
    ):
        asked = _with_root(asked, saved.config.data.root)  # the same folder, seen from here
    found = differences(saved.config, asked.config)
    if found:
        raise ConfigError(
            f"--resume: {folder.path} has another config ({'; '.join(found)}). Give the same, or another --run; "
            f"{typed('resume', folder.path)} continues it as it is."
        )
    return _with_root(saved, root) if given and Path(root).is_dir() else _with_data(saved, folder, err=err)


def _with_data(resolved: Resolved, folder: RunFolder, *, err: bool) -> Resolved:
    """Find a run's images where they were when it was started; the launcher prints where they are."""
    root = folder.find_data(resolved.config.data.root)
    if root != resolved.config.data.root and "RANK" not in os.environ:
        say(f"The images are read from {root}, as when the run was started.", err=err)
    return _with_root(resolved, root)


def _with_root(resolved: Resolved, root: str) -> Resolved:
    data = resolved.config.data.model_copy(update={"root": root})
    return replace(resolved, config=resolved.config.model_copy(update={"data": data}))


def _is_finished(folder: RunFolder, *, as_json: bool = False) -> bool:
    """Return whether a run is at its end already, and say so."""
    result = folder.read_result(lambda line: say(f"warning: {line}", err=True))
    if result is None or result.get("status") != "finished":
        return False
    say(f"{folder.path} is finished: {result.get('step')} steps. Nothing to do.", err=as_json)
    if as_json:
        say(json.dumps(result))
    return True


def _restarts(limit: int, folder: RunFolder, again: tuple[str, ...]) -> Restarts:
    from mnist_dist.launch.supervise import Restarts

    return Restarts(limit=limit, again=again, saved_step=folder.saved_step)


def _supervise(resolved: Resolved, folder: RunFolder, group: Group, restarts: Restarts, *, as_json: bool) -> None:
    """Start the ranks, again where they fail, and exit with their code."""
    from mnist_dist.launch.supervise import run_local

    threads = resolved.config.train.fixed_threads
    began_with = folder.saved_step()
    try:
        # The ranks import torch while the images are decoded.
        meanwhile = partial(approve_data, resolved, err=as_json)
        code = run_local(replace(group, threads=threads), restarts, meanwhile)
    except MnistDistError as error:
        if error.exit_code in (ConfigError.exit_code, DataError.exit_code):
            folder.remove_unstarted()
        elif error.exit_code in RESUMABLE and folder.saved_step() is not None:
            hint = f"{typed('resume', folder.path)} goes on from the checkpoint of step {folder.saved_step()}."
            error.args = (*error.args[:-1], f"{error.args[-1]} {hint}")
        raise
    if code:
        folder.remove_unstarted()
        raise StoppedError(_stop(folder, code - 128, began_with), code - 128)


def _stop(folder: RunFolder, number: int, began_with: int | None) -> str:
    """Print what a signal left that came before a rank could stop at a step; see `run.train` for the other case."""
    stopped, saved = f"Stopped by {name_of(number)}", folder.saved_step()
    if saved is None:
        return f"{stopped} before anything was saved."
    what = "nothing new was saved" if saved == began_with else f"saved at step {saved}"
    return f"{stopped}: {what}; go on with {typed('resume', folder.path)}."


def _given(values: Mapping[str, str | None]) -> list[Setting]:
    from mnist_dist.config import Setting, parse_flag

    settings = []
    for name, value in values.items():
        key, flag = flags.KEYS[name]
        if value is not None:
            is_text = name in ("data", "model")
            settings.append(Setting(key=key, value=value, origin=flag) if is_text else parse_flag(key, flag, value))
    return settings


def _work(
    resolved: Resolved, run: Path | None, worker: Worker, *, resume: bool, init_from: Path | None, as_json: bool
) -> None:
    """Train as one rank of a group; rank 0 prints."""
    from mnist_dist.fast.imports import leave_out_compiler
    from mnist_dist.group.threads import prepare

    prepare(resolved.config, worker.ranks)
    if not resolved.config.train.compile:
        leave_out_compiler()
    from mnist_dist.run.build import train

    console = open_console(stderr=as_json)
    result = train(resolved, run=run, resume=resume, init_from=init_from, console=console)
    if as_json and worker.rank == 0:
        say(json.dumps(result.to_json()))


def approve_data(resolved: Resolved, group: GroupFolder, *, err: bool) -> None:
    """Check whether the images have changed, decode them if so, and approve a store for the ranks."""
    from mnist_dist.config import EMBEDDED_DIGITS
    from mnist_dist.group.messages import Approval
    from mnist_dist.machine.cpu_time import own_seconds

    began = own_seconds()
    if resolved.config.data.root == EMBEDDED_DIGITS:
        Approval(folder=None).write(group)  # they are in the package
        return
    from mnist_dist.data import Sampler, open_dataset

    options = resolved.config.train
    dataset = open_dataset(resolved.config.data, seed=options.seed, announce=partial(say, err=err))
    Sampler(images=len(dataset.train), global_batch=options.global_batch, seed=options.seed)
    Approval(
        folder=str(dataset.folder.absolute()) if dataset.folder else None,
        state=dataset.state,
        sha256=dataset.sha256,
        cpu_seconds=own_seconds() - began,
    ).write(group)


def _print_dry_run(resolved: Resolved, ranks: int) -> None:
    """Print the pieces of a batch, the steps and the resolved config; nothing is written."""
    from mnist_dist.config import EMBEDDED_DIGITS
    from mnist_dist.data import Sampler
    from mnist_dist.data.dataset import divide
    from mnist_dist.data.scan import embedded_digits, scan

    options, data = resolved.config.train, resolved.config.data
    files: tuple[str, ...]
    if data.root == EMBEDDED_DIGITS:
        labels = {name: labels for name, (_, labels) in embedded_digits(image_size=8).items()}  # of any size
        files, classes = (), tuple("0123456789")
    else:
        listing = scan(Path(data.root), follow_links=data.follow_links)
        labels = {name: pictures.labels for name, pictures in listing.splits.items()}
        files, classes = listing.splits["train"].files, listing.classes
    counts = {name: len(column) for name, column in labels.items()}
    others = labels.keys() - {"train"}
    rows, held_out = divide(labels["train"], files, data, seed=options.seed, classes=classes, others=others)
    if rows is not None and held_out is not None:
        counts |= {"train": len(rows), "val": len(held_out)}
    Sampler(images=counts["train"], global_batch=options.global_batch, seed=options.seed)
    micro_batch, accumulation = options.split_batch(ranks)
    said = {"train": "train", "val": "validation", "test": "test"}
    say(f"processes      {ranks}")
    say(f"images       {', '.join(f'{counts[name]:,} {what}' for name, what in said.items() if name in counts)}")
    say(f"global batch   {options.global_batch} = {micro_batch} x {accumulation} x {ranks}")
    say(f"steps          {options.total_steps(counts['train']):,}")
    print(f"\n{resolved.to_yaml()}", end="")
