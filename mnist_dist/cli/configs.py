"""`config`: the presets, and what a config resolves to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnist_dist.cli import flags
from mnist_dist.observe.output import say

app = typer.Typer(help="List, show and validate configs.", no_args_is_help=True)

Source = Annotated[
    str | None,
    typer.Argument(metavar="[CONFIG]", help="A preset, a YAML file or a run folder.", show_default="the defaults"),
]


@app.command("list")
def list_() -> None:
    """List the presets with what each is for."""
    from mnist_dist.config import presets

    for name, path in presets().items():
        purpose = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        say(f"{name:<12} {purpose}")


@app.command("show")
def show(source: Source = None, set_: flags.Set = None) -> None:
    """Show every value of a config, and where it comes from."""
    from mnist_dist.config import find_config, load, parse_setting

    resolved = load(source, tuple(map(parse_setting, set_ or ())))
    if source and not set_ and find_config(source).parent == Path(source):  # a run knows where its values come from
        print(find_config(source).read_text(encoding="utf-8"), end="")
    else:
        print(resolved.to_yaml(), end="")


@app.command("validate")
def validate(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset, a YAML file or a run folder.")],
    set_: flags.Set = None,
) -> None:
    """Check a config; exit 2 and name each mistake if there are any."""
    from mnist_dist.config import load, parse_setting

    load(source, tuple(map(parse_setting, set_ or ())))
    say(f"{source} is valid")
