"""Images in a terminal, two pixels a character."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.style import Style
from rich.table import Column, Table
from rich.text import Text

from mnist_dist.observe.figures import Sample, to_picture
from mnist_dist.observe.output import glyph, written

SIDE = 16
GAP = 2
BLOCK = "▀"
RAMP = " .:-=+*#%@"


def print_samples(console: Console, samples: list[Sample]) -> None:
    """Print images side by side, each below its prediction; in colour where the console has it."""
    paint = _blocks if console.color_system and glyph(console, BLOCK, "") else _characters
    right = glyph(console, "✓", "(right)")
    titles, pictures = [], []
    for sample in samples:
        title = sample.predicted
        if sample.true is not None:
            title += f"  (true {sample.true})" if sample.wrong else f"  {right}"
        style = "bold red" if sample.wrong else "green"
        pixels = np.asarray(to_picture(sample.pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB"))
        titles.append(Text(written(console, title), style=style, overflow="fold"))
        pictures.append(paint(pixels))
    in_row = max(1, (console.width + GAP) // (SIDE + GAP))
    columns = [Column(width=SIDE, vertical="bottom") for _ in samples[:in_row]]  # long names grow upwards
    grid = Table.grid(*columns, padding=(0, GAP), pad_edge=False)
    for start in range(0, len(samples), in_row):
        grid.add_row(*titles[start : start + in_row])
        grid.add_row(*pictures[start : start + in_row])
    console.print(grid)


def _blocks(pixels: NDArray[np.uint8]) -> Text:
    """Draw `(H, W, 3)` with upper half blocks: foreground above, background below."""
    text = Text()
    for above, below in zip(pixels[::2], pixels[1::2], strict=True):
        for top, bottom in zip(above, below, strict=True):
            text.append(BLOCK, Style(color=_hex(top), bgcolor=_hex(bottom)))
        text.append("\n")
    return text


def _characters(pixels: NDArray[np.uint8]) -> Text:
    """Draw `(H, W, 3)` with denser characters for brighter pixels, every other row."""
    levels = pixels.mean(axis=2)[::2] / 256 * len(RAMP)
    return Text("\n".join("".join(RAMP[int(level)] for level in row) for row in levels) + "\n")


def _hex(pixel: NDArray[np.uint8]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*pixel)
