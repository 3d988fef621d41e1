"""The tree of commands. Each imports what it needs when it is called, so that `--help` stays quick."""

from __future__ import annotations

from typing import Annotated

import typer

from mnist_dist.cli import bench, configs, data, doctor, launch, results, train, verify
from mnist_dist.cli.tree import app
from mnist_dist.observe.output import say

__all__ = ["app"]

app.command("train")(train.train)
app.command("resume")(train.resume)
app.command("evaluate")(results.evaluate)
app.command("predict")(results.predict)
app.command("show")(results.show)
app.command("verify")(verify.verify)
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
    """Read the options that stand before any command."""
