"""Pictures for a person: a grid of samples, each titled with its predicted and its true class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mnist_dist.data import Dataset, Split
from mnist_dist.observe.lettering import LINE, drawable, letters, wrap
from mnist_dist.observe.records import Evaluation

TILE = 112
TITLE_MARGIN = 4
MARGIN = 8
RIGHT, WRONG, TEXT, PAPER = "#1a7f37", "#cf222e", "#24292f", "#ffffff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An image with what the network says of it."""

    pixels: NDArray[np.uint8]
    """`(C, H, W)`"""
    predicted: str
    true: str | None
    """`None` if unknown."""
    note: str = ""
    """A third piece of the title, e.g. a probability."""

    @property
    def wrong(self) -> bool:
        """Whether the prediction is known to be wrong."""
        return self.true is not None and self.true != self.predicted


def sample_grid(samples: list[Sample], *, columns: int = 8) -> Image.Image:
    """Draw samples in a grid; wrong ones have a red frame and title."""
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns)
    titles = [_title(sample) for sample in samples]
    title_height = LINE * max(map(len, titles)) + TITLE_MARGIN
    cell_width, cell_height = TILE + MARGIN, TILE + title_height + MARGIN
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, sample in enumerate(samples):
        row, column = divmod(index, columns)
        left, top = MARGIN + column * cell_width, MARGIN + row * cell_height
        colour = TEXT if sample.true is None else WRONG if sample.wrong else RIGHT
        top += title_height
        for line, text in enumerate(reversed(titles[index]), start=1):
            pen.text((left, top - TITLE_MARGIN - line * LINE), text, fill=colour, font=letters())
        sheet.paste(_tile(sample.pixels), (left, top))
        if sample.wrong:
            box = (left - 2, top - 2, left + TILE + 1, top + TILE + 1)
            pen.rectangle(box, outline=WRONG, width=3)
    return sheet


def samples_of(dataset: Dataset, split: Split, evaluation: Evaluation, images: NDArray[np.int64]) -> list[Sample]:
    """Pair some images of an evaluated split with their predicted and true class."""
    return [
        Sample(
            pixels=split.pixels(image),
            predicted=dataset.classes[evaluation.predicted[image]],
            true=dataset.classes[evaluation.labels[image]],
        )
        for image in images
    ]


def to_picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """Convert `(C, H, W)` uint8 pixels to a Pillow image."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def _tile(pixels: NDArray[np.uint8]) -> Image.Image:
    picture = to_picture(pixels)
    method = Image.Resampling.NEAREST if picture.width <= TILE else Image.Resampling.BILINEAR
    return picture.convert("RGB").resize((TILE, TILE), method)


def _title(sample: Sample) -> list[str]:
    """List the lines above an image."""
    second = f"true {sample.true}" if sample.true is not None else sample.note
    return [line for text in (f"predicted {sample.predicted}", second) for line in wrap(drawable(text), TILE)]
