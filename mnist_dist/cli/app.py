"""The tree of commands. Each imports what it needs when it is called, so that `--help` stays quick."""

from __future__ import annotations

from typing import Annotated

import typer

from mnist_dist.cli import bench, checks, configs, data, doctor, launch, results, training
from mnist_dist.observe.output import say

app = typer.Typer(
    name="mnist-dist",
    help="Train an image classifier from a folder of pictures, on one CPU or many GPUs, with the same result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, in two thirds of the time
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(training.train)
app.command("resume")(training.resume)
app.command("evaluate")(results.evaluate)
app.command("predict")(results.predict)
app.command("show")(results.show)
app.command("verify")(checks.verify)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("monitor")(results.monitor)
app.add_typer(data.app, name="data")
app.add_typer(configs.app, name="config")
app.add_typer(launch.app, name="launch")


def _print_version(wanted: bool) -> None:
    if wanted:
        from mnist_dist import __version__

        say(f"mnist-dist {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the options that stand before any command."""
