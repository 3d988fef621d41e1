"""Pictures in a terminal, two pixels a character."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.text import Text

from mnist_dist.observe.figures import Sample, to_picture

SIDE = 16
RAMP = " .:-=+*#%@"


def print_samples(console: Console, samples: list[Sample]) -> None:
    """Print pictures side by side, each below its prediction; in colour where the console has it."""
    paint = _blocks if console.color_system else _characters
    tiles: list[RenderableType] = []
    for sample in samples:
        title = f"{sample.predicted}"
        if sample.true is not None:
            title += f"  (true {sample.true})" if sample.wrong else "  ✓"
        style = "bold red" if sample.wrong else "green"
        pixels = np.asarray(to_picture(sample.pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB"))
        tiles.append(Group(Text(title, style=style, overflow="ellipsis", no_wrap=True), paint(pixels), ""))
    console.print(Columns(tiles, width=SIDE, padding=(0, 2)))


def _blocks(pixels: NDArray[np.uint8]) -> Text:
    """Draw `(H, W, 3)` with upper half blocks: foreground above, background below."""
    text = Text()
    for above, below in zip(pixels[::2], pixels[1::2], strict=True):
        for top, bottom in zip(above, below, strict=True):
            text.append("▀", Style(color=_hex(top), bgcolor=_hex(bottom)))
        text.append("\n")
    return text


def _characters(pixels: NDArray[np.uint8]) -> Text:
    """Draw `(H, W, 3)` with denser characters for brighter pixels, every other row."""
    levels = pixels.mean(axis=2)[::2] / 256 * len(RAMP)
    return Text("\n".join("".join(RAMP[int(level)] for level in row) for row in levels) + "\n")


def _hex(pixel: NDArray[np.uint8]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*pixel)
