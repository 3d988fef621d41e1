"""Options that several commands share, written once, and how the values of options are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

MOST_PROCESSES = 1024
"""Of one machine."""
LONGEST_STEP = 18
"""In digits."""
MOST_SECONDS = 366 * 86400
"""Of a time-out: a year; a clock's arithmetic ends somewhere beyond."""


def whole(*names: str, least: int, most: int, **more: Any) -> Any:
    """Declare an option whose value is a whole number within limits."""
    return typer.Option(*names, parser=_number(int, "a whole number", least, most), metavar="N", **more)


def number(*names: str, least: float, most: float, **more: Any) -> Any:
    """Declare an option whose value is a number within limits."""
    return typer.Option(*names, parser=_number(float, "a number", least, most), metavar="X", **more)


def choice(*names: str, of: tuple[str, ...], also: dict[str, str] | None = None, **more: Any) -> Any:
    """Declare an option whose value is one of a few words.

    Args:
        names: Of the option.
        of: The words.
        also: Other words that are taken for some of them.
        more: For Typer.
    """

    def read(text: str) -> str:
        word = (also or {}).get(text, text)
        if word not in of:
            from mnist_dist.config.suggestions import any_of, suggest_value

            raise typer.BadParameter(f"{_shorten(text)}: it must be {any_of(list(of))}.{suggest_value(text, of)}")
        return word

    return typer.Option(*names, parser=read, metavar="|".join(of), **more)


def checkpoint() -> Any:
    """Declare the option that names a checkpoint: best, last, a step, or the name of its folder."""

    def read(text: str) -> str:
        which = text.removeprefix("step-")
        if which.isdecimal() and len(which) > LONGEST_STEP:
            raise typer.BadParameter(f"{_shorten(text)}: it must be best, last or a step.")
        return which

    return typer.Option("--checkpoint", parser=read, metavar="WHICH", help="best, last or a step.", show_default="last")


def _number(kind: Callable[[Any], float], what: str, least: float, most: float) -> Callable[[Any], Any]:
    def read(text: Any) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not least <= value <= most:  # nan is in no range
            shown = _shorten(text if value is None else value)
            raise typer.BadParameter(f"{shown}: it must be {what} from {least:,} to {most:,}.")
        return value

    return read


def _shorten(value: object) -> str:
    from mnist_dist.config.reading import shorten

    return shorten(value)


Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `train` made.")]
Config = Annotated[
    str | None,
    typer.Option(help="A preset (`config list`), a YAML file or a run folder.", show_default="its defaults"),
]
DATA = "Folder of images by class: train/CLASS/* beside test or val, or CLASS/* alone"
Data = Annotated[str | None, typer.Option(help=f"{DATA}.")]
DeviceKey = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda|mps", help="train.device.")]
PrecisionKey = Annotated[str | None, typer.Option(metavar="auto|fp32|bf16|fp16", help="train.precision.")]
EpochsKey = Annotated[str | None, typer.Option(metavar="X", help="train.epochs.")]
SeedKey = Annotated[str | None, typer.Option(metavar="N", help="train.seed.")]
ModelKey = Annotated[str | None, typer.Option(metavar="NAME", help="model.name.")]
BatchSizeKey = Annotated[
    str | None, typer.Option(metavar="N", help="train.global_batch: images in a step, over all processes.")
]
LearningRateKey = Annotated[str | None, typer.Option("--lr", metavar="X", help="optimizer.learning_rate.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any config key; repeatable.")]
Processes = Annotated[
    int | None,
    whole(
        "--processes", "-n", least=1, most=MOST_PROCESSES, help="Processes to start.", show_default="one a GPU, or 1"
    ),
]
MaxRestarts = Annotated[
    int,
    whole(
        least=0,
        most=1_000_000,
        help="Most restarts in a row without a new checkpoint.",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"], choice(of=("auto", "cpu", "cuda", "mps"), help="Where to compute.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

KEYS = {
    "data": ("data.root", "--data"),
    "device": ("train.device", "--device"),
    "precision": ("train.precision", "--precision"),
    "epochs": ("train.epochs", "--epochs"),
    "seed": ("train.seed", "--seed"),
    "model": ("model.name", "--model"),
    "batch_size": ("train.global_batch", "--batch-size"),
    "lr": ("optimizer.learning_rate", "--lr"),
}
"""The config key and the name of each option that stands for a key, by its parameter."""
