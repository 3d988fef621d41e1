"""`data`: import, check and measure pictures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mnist_dist.errors import ConfigError, DataError, typed
from mnist_dist.observe.names import shown
from mnist_dist.observe.output import open_console, say

app = typer.Typer(help="Import, check and measure pictures.", no_args_is_help=True)

Root = Annotated[Path, typer.Argument(metavar="[DATA]", help="Folder with train/CLASS/* and test/CLASS/*.")]
MaxMegapixels = Annotated[
    int, typer.Option(min=1, max=4096, help="Largest picture to decode; `data.max_megapixels` of a run.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    with temporary_folder() as temporary:
        idx = read_idx_folder(source or _download(temporary))
    if not idx.is_mnist:
        say("Note: these are not MNIST's original files (their md5 differs); imported as they are.")
    write_image_folder(idx, to, say)
    say(f"Done. Next: {typed('train', '--data', to)}")


@app.command("check")
def check(root: Root = Path("Dataset"), max_megapixels: MaxMegapixels = 256, as_json: Json = False) -> None:
    """Decode every picture and list each file that cannot be read or would be ignored; exit 3 if one is bad."""
    from mnist_dist.data.pictures import Decoding, decode_all, discard
    from mnist_dist.data.sources import is_picture, scan, walk

    listing = scan(root)
    decoding = Decoding(image_size=8, channels=1, max_megapixels=max_megapixels)
    unreadable: dict[str, str] = {}
    warnings: dict[str, str] = {}
    for pictures in listing.splits.values():
        for chunk in decode_all(root, pictures.files, decoding, discard):
            unreadable |= dict(chunk.unreadable)
            warnings |= chunk.warnings
    ignored = sorted(
        entry.path for split in listing.splits for entry in walk(root / split) if not is_picture(entry.name)
    )
    total = sum(len(pictures.files) for pictures in listing.splits.values())
    if as_json:
        say(json.dumps({"pictures": total, "unreadable": unreadable, "warnings": warnings, "ignored": ignored}))
    else:
        for file, reason in unreadable.items():
            say(f"unreadable  {root / file}  ({reason})")
        for file, text in warnings.items():
            say(f"warning     {root / file}  ({text})")
        for path in ignored:
            say(f"ignored     {path}  (not a picture by its ending)")
        say(f"{total:,} pictures, {len(unreadable)} unreadable; {len(ignored)} other files ignored")
    if unreadable:
        raise typer.Exit(DataError.exit_code)


@app.command("stats")
def stats(
    root: Root = Path("Dataset"),
    image_size: Annotated[int, typer.Option(min=8, help="Measured after resizing to this.")] = 28,
    channels: Annotated[int, typer.Option(min=1, max=3, help="1 or 3.")] = 1,
    max_megapixels: MaxMegapixels = 256,
    as_json: Json = False,
) -> None:
    """Count pictures by class and split, and measure the training set's mean and standard deviation."""
    import numpy as np
    from rich.table import Column, Table

    from mnist_dist.config.schema import Data
    from mnist_dist.data import open_dataset

    if channels == 2:
        raise ConfigError("--channels is 2: use 1 (grayscale) or 3 (colour).")
    data = Data(
        root=str(root), image_size=image_size, channels=3 if channels == 3 else 1, max_megapixels=max_megapixels
    )
    dataset = open_dataset(data, seed=0, announce=partial(say, err=True))
    counts = {
        name: np.bincount(split.labels, minlength=len(dataset.classes)).tolist()
        for name, split in dataset.splits.items()
    }
    if as_json:
        by_class = {name: dict(zip(dataset.classes, column, strict=True)) for name, column in counts.items()}
        say(json.dumps({"counts": by_class, "mean": dataset.mean, "std": dataset.std, "sha256": dataset.sha256}))
        return
    table = Table(Column("class", overflow="fold"), *(Column(name, justify="right", no_wrap=True) for name in counts))
    for label, name in enumerate(dataset.classes):
        table.add_row(shown(name), *(f"{column[label]:,}" for column in counts.values()))
    table.add_section()
    table.add_row("all", *(f"{sum(column):,}" for column in counts.values()))
    console = open_console(tables=True)
    console.print(table)
    console.print(f"mean {_figures(dataset.mean)}  std {_figures(dataset.std)}  (pixels in [0, 1])")


def _figures(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _download(folder: Path) -> Path:
    """Get MNIST's four files with torchvision, from the mirrors that it knows."""
    from torchvision.datasets import MNIST

    try:
        MNIST(str(folder), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"MNIST could not be downloaded: {error}. Get the four files in another way and use --from."
        ) from None
    return folder / "MNIST" / "raw"
