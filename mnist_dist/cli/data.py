"""`data`: import, check and measure images."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mnist_dist.cli import flags
from mnist_dist.errors import ConfigError, DataError, typed
from mnist_dist.observe.output import open_console, say, written

app = typer.Typer(help="Import, check and measure images.", no_args_is_help=True)

Root = Annotated[Path | None, typer.Argument(metavar="[DATA]", help=f"{flags.DATA}; default Dataset.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="The same folder, as `train` takes it.")]
FollowLinks = Annotated[
    bool, typer.Option("--follow-links", help="Read links that lead out of the folder; `data.follow_links` of a run.")
]
MaxMegapixels = Annotated[
    int, flags.whole(least=1, most=4096, help="Largest image to decode; `data.max_megapixels` of a run.")
]


@app.command("import")
def import_(
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="IDX_DIR", help="Folder with four IDX files, gzipped or not."),
    ] = None,
    to: Annotated[Path, typer.Option(help="New folder to write.")] = Path("Dataset"),
    download: Annotated[bool, typer.Option("--download", help="Get MNIST with torchvision first.")] = False,
) -> None:
    """Turn IDX files, as MNIST comes in, into an image folder."""
    from mnist_dist.data.idx import check_target, read_idx_folder, write_image_folder
    from mnist_dist.machine import temporary_folder

    if (source is None) == (not download):
        raise ConfigError("data import needs either --from IDX_DIR or --download.")
    check_target(to)
    if source is not None:
        idx = read_idx_folder(source)
    else:
        with temporary_folder() as temporary:
            idx = read_idx_folder(_download(temporary))
    if not idx.is_mnist:
        say("Note: these are not MNIST's original files (their md5 differs); imported as they are.")
    write_image_folder(idx, to, say)
    say(f"Done. Next: {typed('train', '--data', to)}")


@app.command("check")
def check(
    root: Root = None,
    data: DataOption = None,
    follow_links: FollowLinks = False,
    max_megapixels: MaxMegapixels = 256,
    as_json: flags.Json = False,
) -> None:
    """Decode every image and list each file that cannot be read or would be ignored; exit 3 if one is bad."""
    from mnist_dist.data.decode import Decoding, decode_all, discard
    from mnist_dist.data.scan import survey

    folder = _folder(root, data)
    found = survey(folder, follow_links=follow_links)
    decoding = Decoding(image_size=8, channels=1, max_megapixels=max_megapixels)
    unreadable = {os.path.relpath(path, folder): reason for path, reason in found.bad.items()}
    warnings: dict[str, str] = {}
    for pictures in found.listing.splits.values():
        for chunk in decode_all(folder, pictures.files, decoding, discard):
            unreadable |= dict(chunk.unreadable)
            warnings |= chunk.warnings
    total = len(found.bad) + sum(len(pictures.files) for pictures in found.listing.splits.values())
    if as_json:
        record = {"pictures": total, "unreadable": unreadable, "warnings": warnings, "ignored": sorted(found.ignored)}
        say(json.dumps(record | {"reasons": found.ignored, "faults": found.faults}))
    else:
        for file, reason in sorted(unreadable.items()):
            say(f"unreadable  {folder / file}  ({reason})")
        for file, text in warnings.items():
            say(f"warning     {folder / file}  ({text})")
        for path, reason in sorted(found.ignored.items()):
            say(f"ignored     {path}  ({reason})")
        for fault in found.faults:
            say(f"fault       {fault}")
        say(f"{total:,} images, {len(unreadable)} unreadable; {len(found.ignored)} other files ignored")
    if unreadable or found.faults:
        raise typer.Exit(DataError.exit_code)


@app.command("stats")
def stats(
    root: Root = None,
    data: DataOption = None,
    image_size: Annotated[int, typer.Option(help="Measured after resizing to this.")] = 28,
    channels: Annotated[int, typer.Option(help="1 or 3.")] = 1,
    follow_links: FollowLinks = False,
    max_megapixels: MaxMegapixels = 256,
    as_json: flags.Json = False,
) -> None:
    """Count images by class and split, and measure the training set's mean and standard deviation."""
    import numpy as np
    from rich.table import Column, Table

    from mnist_dist.config import Setting, load
    from mnist_dist.data import open_dataset

    given = {
        "root": ("--data", str(_folder(root, data))),
        "image_size": ("--image-size", image_size),
        "channels": ("--channels", channels),
        "follow_links": ("--follow-links", follow_links),
        "max_megapixels": ("--max-megapixels", max_megapixels),
    }
    settings = [Setting(key=f"data.{key}", value=value, origin=flag) for key, (flag, value) in given.items()]
    settings.append(Setting(key="model.name", value="large_cnn", origin=""))  # of ours, it takes the smallest images
    dataset = open_dataset(load(None, tuple(settings)).config.data, seed=0, announce=partial(say, err=True))
    counts = {
        name: np.bincount(split.labels, minlength=len(dataset.classes)).tolist()
        for name, split in dataset.splits.items()
    }
    if as_json:
        by_class = {name: dict(zip(dataset.classes, column, strict=True)) for name, column in counts.items()}
        say(json.dumps({"counts": by_class, "mean": dataset.mean, "std": dataset.std, "sha256": dataset.sha256}))
        return
    console = open_console(tables=True)
    table = Table(Column("class", overflow="fold"), *(Column(name, justify="right", no_wrap=True) for name in counts))
    for label, name in enumerate(dataset.classes):
        table.add_row(written(console, name), *(f"{column[label]:,}" for column in counts.values()))
    table.add_section()
    table.add_row("all", *(f"{sum(column):,}" for column in counts.values()))
    console.print(table)
    console.print(f"mean {_figures(dataset.mean)}  std {_figures(dataset.std)}  (pixels in [0, 1])")


def _folder(argument: Path | None, option: Path | None) -> Path:
    """Return the data folder that was named, in whichever way.

    Raises:
        ConfigError: Two different ones were named.
    """
    if argument is not None and option is not None and argument != option:
        raise ConfigError(f"The data folder is {argument} and, with --data, {option}: name one.")
    return argument or option or Path("Dataset")


def _figures(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _download(folder: Path) -> Path:
    """Download MNIST's four files with torchvision, from the mirrors that it knows."""
    from torchvision.datasets import MNIST

    try:
        MNIST(str(folder), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"MNIST could not be downloaded: {error}. Get the four files in another way and use --from."
        ) from None
    return folder / "MNIST" / "raw"
