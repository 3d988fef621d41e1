"""`config`: the presets, and what a config resolves to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mnist_dist.observe.output import say

app = typer.Typer(help="List, show and validate configs.", no_args_is_help=True)

Source = Annotated[
    str | None,
    typer.Argument(metavar="[CONFIG]", help="A preset, a YAML file or a run folder.", show_default="the defaults"),
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any config key; repeatable.")]


@app.command("list")
def list_() -> None:
    """List the presets with what each is for."""
    from mnist_dist.config import presets

    for name, path in presets().items():
        purpose = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        say(f"{name:<12} {purpose}")


@app.command("show")
def show(source: Source = None, set_: Settings = None) -> None:
    """Show every value of a config, and where it comes from."""
    from mnist_dist.config import load, parse_setting

    if source and not set_ and (Path(source) / "config.yaml").is_file():
        print((Path(source) / "config.yaml").read_text(encoding="utf-8"), end="")
        return
    print(load(_file_of(source), tuple(map(parse_setting, set_ or ()))).to_yaml(), end="")


@app.command("validate")
def validate(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="A preset, a YAML file or a run folder.")],
    set_: Settings = None,
) -> None:
    """Check a config; exit 2 and name each mistake if there are any."""
    from mnist_dist.config import load, parse_setting

    load(_file_of(source), tuple(map(parse_setting, set_ or ())))
    say(f"{source} is valid")


def _file_of(source: str | None) -> str | None:
    if source and (Path(source) / "config.yaml").is_file():
        return str(Path(source) / "config.yaml")
    return source
