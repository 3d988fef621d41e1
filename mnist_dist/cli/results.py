"""`evaluate`, `predict`, `show` and `monitor`: what a trained run is good for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mnist_dist.cli import flags
from mnist_dist.cli.outputs import check_picture, check_place, save_picture, write_csv
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.observe.names import shown
from mnist_dist.observe.output import open_console, print_line, say, written

if TYPE_CHECKING:
    from rich.table import Table

    from mnist_dist.observe.records import Evaluation

Which = Annotated[str | None, flags.checkpoint()]
Data = Annotated[
    str | None, typer.Option(help="Another data folder with the same classes.", show_default="the run's own")
]


def evaluate(
    run: flags.Run,
    data: Data = None,
    checkpoint: Which = None,
    split: Annotated[
        Literal["test", "validation", "train"] | None,
        flags.choice(
            of=("test", "validation", "train"),
            also=dict.fromkeys(("val", "valid", "dev"), "validation"),
            help="Which images.",
            show_default="test; validation if there are no test images",
        ),
    ] = None,
    processes: Annotated[
        int, flags.whole("--processes", "-n", least=1, most=flags.MOST_PROCESSES, help="Processes to start.")
    ] = 1,
    device: flags.Device = "auto",
    as_json: flags.Json = False,
) -> None:
    """Evaluate a run exactly: loss, accuracy and a table of classes."""
    from mnist_dist.launch.own import own_group, this_worker
    from mnist_dist.run.folder import RunFolder

    RunFolder(run).check_run()
    worker = this_worker(None if processes == 1 else processes)
    if worker is None and processes > 1:
        from mnist_dist.launch.supervise import run_local

        raise typer.Exit(run_local(own_group(ranks=processes)))

    from mnist_dist.group.threads import spin

    spin()  # before torch is imported
    from mnist_dist.run.predictor import open_data, open_run

    with open_run(run, checkpoint=checkpoint, device=device, say=partial(say, err=True)) as trained:
        dataset = open_data(trained, data, partial(say, err=True))
        name = split or dataset.reported.name
        if name not in dataset.splits:
            raise ConfigError(f"{dataset.root} has no {name} images: use --split {' or '.join(dataset.splits)}.")
        evaluation = trained.evaluate(dataset, dataset.splits[name])
        if trained.runtime.rank > 0:
            return
    step = trained.step
    if as_json:
        say(json.dumps(_record(evaluation, trained.classes, step)))
        return
    console = open_console(tables=True)
    console.print(_class_table(evaluation, trained.classes, partial(written, console)))
    print_line(
        console,
        f"{name} accuracy {evaluation.accuracy:.2%}, loss {evaluation.loss:.4f}, step {step} "
        f"(evaluated {evaluation.images}/{len(dataset.splits[name])})",
    )


def predict(
    run: flags.Run,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    checkpoint: Which = None,
    device: flags.Device = "auto",
    max_megapixels: Annotated[
        int | None, flags.whole(least=1, most=4096, help="Largest image to decode.", show_default="the run's own")
    ] = None,
    as_json: flags.Json = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write a CSV file.")] = None,
    grid: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the images with their labels.")] = None,
) -> None:
    """Label images, each with its probability."""
    from mnist_dist.run.folder import RunFolder

    RunFolder(run).check_run()
    check_picture(grid)
    check_place(csv_file)
    if not any(path.exists() for path in images):
        raise DataError(f"There is no {' and no '.join(map(str, images))}.")

    from mnist_dist.group.threads import spin
    from mnist_dist.observe.figures import Sample, sample_grid

    spin()  # before torch is imported
    from mnist_dist.run.predictor import open_run, read_pictures

    with open_run(run, checkpoint=checkpoint, device=device, say=partial(say, err=True)) as trained:
        most = max_megapixels or trained.decoding.max_megapixels
        read = read_pictures(images, replace(trained.decoding, max_megapixels=most))
        for path, text in read.warnings.items():
            say(f"warning: {path}: {text}", err=True)
        for path, reason in read.unreadable:
            say(f"unreadable  {path}  ({reason})", err=True)
        if not read.files:
            raise DataError("None of these images can be read: nothing was labelled.")
        probabilities = trained.predict(read.pixels)
    labels = [trained.classes[index] for index in probabilities.argmax(axis=1)]
    best = probabilities.max(axis=1)
    rows = [(str(file), label, round(float(p), 4)) for file, label, p in zip(read.files, labels, best, strict=True)]
    if as_json:
        say(json.dumps([dict(zip(("file", "label", "probability"), row, strict=True)) for row in rows]))
    else:
        width = max(len(shown(label)) for label in labels)
        for name, label, probability in rows:
            say(f"{shown(label):<{width}}  {probability:7.2%}  {name}")
    if csv_file is not None:
        write_csv(csv_file, [("file", "label", "probability"), *rows])
    if grid is not None:  # last: what it may fail at costs no label
        samples = [
            Sample(pixels=picture, predicted=label, true=None, note=f"{p:.1%}")
            for picture, (_, label, p) in zip(read.pixels, rows, strict=True)
        ]
        save_picture(sample_grid(samples), grid)
    if bad := len(read.unreadable):
        raise DataError(f"{bad} of {bad + len(read.files)} images cannot be read; the others are labelled.")


def show(
    run: flags.Run,
    data: Data = None,
    checkpoint: Which = None,
    count: Annotated[int, flags.whole("--count", "-c", least=1, most=1000, help="How many images.")] = 16,
    mistakes: Annotated[bool, typer.Option("--mistakes", help="The worst mistakes, by loss.")] = False,
    seed: Annotated[
        int | None, flags.whole(least=0, most=2**63 - 1, help="Draw the same images again.", show_default="random")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Where to draw them.", show_default="RUN/predictions.png"),
    ] = None,
    device: flags.Device = "auto",
) -> None:
    """Show random test images with predicted and true labels, in the terminal and as a PNG."""
    from mnist_dist.run.folder import RunFolder

    RunFolder(run).check_run()
    check_picture(output)

    import secrets

    import numpy as np

    from mnist_dist.group.threads import spin
    from mnist_dist.keyed import Purpose, keyed_permutation
    from mnist_dist.observe.figures import sample_grid, samples_of
    from mnist_dist.observe.terminal import print_samples

    spin()  # before torch is imported
    from mnist_dist.run.predictor import open_data, open_run

    with open_run(run, checkpoint=checkpoint, device=device, say=partial(say, err=True)) as trained:
        dataset = open_data(trained, data, partial(say, err=True))
        split = dataset.reported
        evaluation = trained.evaluate(dataset, split)
    if mistakes:
        wrong = np.flatnonzero(evaluation.predicted != evaluation.labels)
        chosen = wrong[np.argsort(-evaluation.losses[wrong], kind="stable")][:count]
    else:
        key = secrets.randbits(32) if seed is None else seed
        chosen = keyed_permutation(Purpose.SAMPLE, len(split), key)[:count]
    console = open_console()
    summary = (
        f"{evaluation.correct:,} of {evaluation.images:,} {split.name} images are right ({evaluation.accuracy:.2%})"
    )
    if not len(chosen):
        print_line(console, f"No mistakes: {summary}")
        return
    samples = samples_of(dataset, split, evaluation, chosen)
    print_samples(console, samples)
    if mistakes:
        for image, sample in zip(chosen, samples, strict=True):
            file = split.file(image)
            print_line(console, f"{sample.true} taken for {sample.predicted}: {file}")
    path = output or run / "predictions.png"
    save_picture(sample_grid(samples), path, follow=output is not None)  # the run may be a stranger's
    print_line(console, f"{summary}; drawn in {path}")


def monitor(
    runs: Annotated[Path, typer.Argument(metavar="[RUNS]", help="A run, or a folder of runs.")] = Path("runs"),
    port: Annotated[int, flags.whole(least=0, most=65535, help="The next free one is taken if it is in use.")] = 6006,
) -> None:
    """Show runs in TensorBoard, on this machine alone."""
    import socket
    import subprocess

    from mnist_dist.launch.own import safe_environment, safe_python
    from mnist_dist.machine import check_loopback, die_with_parent

    if not runs.is_dir():
        what = f"{runs} is a file" if runs.exists() else f"There is no folder {runs}"
        raise ConfigError(f"{what}: name a run or a folder of runs, or train one first.")
    check_loopback()
    for candidate in range(port, min(port + 100, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            port = probe.getsockname()[1]
            break
    else:
        raise ConfigError(f"No port from {port} on is free on 127.0.0.1: choose another --port.")
    say(f"TensorBoard over {runs}: http://127.0.0.1:{port}/  (Ctrl-C ends it)")
    options = ["--logdir", str(runs), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [*safe_python(), "-m", "tensorboard.main", *options, "--reload_interval", "5"],
        env=os.environ | safe_environment(),
        preexec_fn=die_with_parent(),
    )
    try:
        raise typer.Exit(server.wait())
    finally:
        server.terminate()
        server.wait()


def _record(evaluation: Evaluation, classes: tuple[str, ...], step: int) -> dict[str, object]:
    rows = _per_class(evaluation, classes)
    return {
        "split": evaluation.split,
        "step": step,
        "images": evaluation.images,
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "correct": evaluation.correct,
        "classes": {name: {"images": n, "correct": c, "precision": p, "recall": r} for name, n, c, p, r, _ in rows},
    }


def _per_class(
    evaluation: Evaluation, classes: tuple[str, ...]
) -> list[tuple[str, int, int, float | None, float | None, str]]:
    """List name, images, correct, precision, recall and what it is most often taken for, class by class."""
    confusion = evaluation.confusion(len(classes))
    rows = []
    for label, name in enumerate(classes):
        images, predicted, correct = (
            int(n) for n in (confusion[label].sum(), confusion[:, label].sum(), confusion[label, label])
        )
        others = confusion[label].copy()
        others[label] = 0
        worst = f"{classes[int(others.argmax())]} ({int(others.max())})" if others.any() else "-"
        precision, recall = correct / predicted if predicted else None, correct / images if images else None
        rows.append((name, images, correct, precision, recall, worst))
    return rows


def _class_table(evaluation: Evaluation, classes: tuple[str, ...], written: Callable[[str], str]) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("class", overflow="fold")
    for title in ("images", "correct", "precision", "recall"):
        table.add_column(title, justify="right", overflow="fold")
    table.add_column("most taken for", overflow="fold")
    for name, images, correct, precision, recall, worst in _per_class(evaluation, classes):
        shares = (f"{share:.2%}" if share is not None else "-" for share in (precision, recall))
        table.add_row(written(name), f"{images:,}", f"{correct:,}", *shares, written(worst))
    return table
