"""Augmentation: keyed, for whole batches, on the device.

What happens to an image depends on (seed, epoch, image) alone: not on the batch, the ranks or the micro-batch. All
geometry is composed into one map, so an image is resampled once. Then its values change, operation by operation.

Another augmentation is a field of `config.schema.Augmentation` and one row of `GEOMETRY` or `VALUES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mnist_dist.config.schema import Augmentation
from mnist_dist.keyed import Purpose, keyed_uniform

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in gray, as torchvision has them (ITU-R 601)."""
ERASED = (0.02, 1 / 3)
"""Shares of an image's area that a box may erase, as in Zhong et al., "Random Erasing Data Augmentation", AAAI 2020."""
ASPECTS = (0.3, 1 / 0.3)
"""Aspect ratios of that box."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Moves pixels: one factor of the map by which each image is resampled."""

    fields: tuple[str, ...]
    """Of `Augmentation`; it is active if one of them is not 0."""
    draws: slice
    """Which of an image's random numbers it takes; no other operation has them."""
    maps: Callable[[Augmentation, NDArray[np.float64], int], NDArray[np.float64]]
    """Returns `(B, 2, 3)` maps from places in the new image to places in the old one, in [-1, 1] coordinates, from the
    config, `(B, n)` numbers uniform in [0, 1), and the size in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Changes pixel values."""

    field: str
    """Of `Augmentation`; it is active if it is not 0."""
    draws: slice
    """Which of an image's random numbers it takes; no other operation has them."""
    apply: Callable[[Tensor, Tensor, float], Tensor]
    """Returns new `(B, C, H, W)` float32 pixels in [0, 255], from the former, `(B, n)` float32 numbers uniform in
    [0, 1), and the field's value."""


def rotate_shift_scale(augmentation: Augmentation, draws: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Rotate, move and enlarge each image, each by up to the configured amount."""
    turn, scale, right, down = (2 * draws - 1).T
    angle = turn * math.radians(augmentation.rotation_degrees)
    zoom = 1 / (1 + scale * augmentation.scale)
    cosine, sine = np.cos(angle) * zoom, np.sin(angle) * zoom
    shift_x, shift_y = np.stack([right, down]) * (2 * augmentation.shift_pixels / size)
    rows = [
        [cosine, -sine, -(cosine * shift_x - sine * shift_y)],
        [sine, cosine, -(sine * shift_x + cosine * shift_y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def flip(augmentation: Augmentation, draws: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Mirror some images left to right, and some top to bottom."""
    maps = np.zeros((len(draws), 2, 3))
    maps[:, 0, 0] = np.where(draws[:, 0] < augmentation.horizontal_flip, -1, 1)
    maps[:, 1, 1] = np.where(draws[:, 1] < augmentation.vertical_flip, -1, 1)
    return maps


def brighten(pixels: Tensor, draws: Tensor, most: float) -> Tensor:
    """Multiply the values of each image by a factor from `1 - most` to `1 + most`."""
    return (pixels * _factors(draws, most)).clamp(0, 255)


def contrast(pixels: Tensor, draws: Tensor, most: float) -> Tensor:
    """Move the values of each image away from its mean gray, or towards it, by a factor from `1 - most` on."""
    mean = _gray(pixels).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, pixels, _factors(draws, most)).clamp(0, 255)


def saturate(pixels: Tensor, draws: Tensor, most: float) -> Tensor:
    """Move the colours of each image away from gray, or towards it; gray images stay as they are."""
    if pixels.shape[1] == 1:
        return pixels
    return torch.lerp(_gray(pixels).expand_as(pixels), pixels, _factors(draws, most)).clamp(0, 255)


def erase(pixels: Tensor, draws: Tensor, probability: float) -> Tensor:
    """Fill a box of some images with the image's mean colour."""
    height, width = pixels.shape[-2:]
    hit, area, aspect, x, y = draws.T  # each (B,)
    area = (ERASED[0] + area * (ERASED[1] - ERASED[0])) * height * width
    ratio = torch.exp(math.log(ASPECTS[0]) + aspect * (math.log(ASPECTS[1]) - math.log(ASPECTS[0])))
    tall, wide = (area * ratio).sqrt().clamp(max=height), (area / ratio).sqrt().clamp(max=width)
    rows = torch.arange(height, device=pixels.device) + 0.5  # centres of pixels
    columns = torch.arange(width, device=pixels.device) + 0.5
    top, left = y * (height - tall), x * (width - wide)
    inside_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])  # (B, H)
    inside_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])  # (B, W)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :] & (hit < probability)[:, None, None]
    return torch.where(inside[:, None], pixels.mean(dim=(2, 3), keepdim=True), pixels)


GEOMETRY = (
    Geometry(fields=("rotation_degrees", "shift_pixels", "scale"), draws=slice(0, 4), maps=rotate_shift_scale),
    Geometry(fields=("horizontal_flip", "vertical_flip"), draws=slice(4, 6), maps=flip),
)
VALUES = (
    Values(field="brightness", draws=slice(6, 7), apply=brighten),
    Values(field="contrast", draws=slice(7, 8), apply=contrast),
    Values(field="saturation", draws=slice(8, 9), apply=saturate),
    Values(field="erase", draws=slice(9, 14), apply=erase),
)


class Augment:
    """Augments the training images as a config says.

    Args:
        augmentation: The config's section.
        size: Height and width of the images, in pixels.
        seed: The run's.
    """

    def __init__(self, augmentation: Augmentation, *, size: int, seed: int) -> None:
        self._augmentation = augmentation
        self._size = size
        self._seed = seed
        self._geometry = [row for row in GEOMETRY if any(getattr(augmentation, name) for name in row.fields)]
        self._values = [row for row in VALUES if getattr(augmentation, row.field)]

    @property
    def active(self) -> bool:
        """Whether any image would be changed."""
        return bool(self._geometry or self._values)

    def draw(self, images: NDArray[np.int64], epochs: NDArray[np.int64]) -> dict[str, Tensor]:
        """Draw on the host all that is random about some images.

        Args:
            images: `(B,)` indices into the training split.
            epochs: `(B,)` epoch of each.

        Returns:
            `maps`, `(B, 2, 3)` float32, if pixels move; `draws`, `(B, n)` float32 in [0, 1), if values change.
        """
        drawn: dict[str, Tensor] = {}
        if self._geometry:
            drawn["maps"] = torch.from_numpy(self._maps(images, epochs).astype(np.float32))
        if self._values:
            columns = [self._uniform(images, epochs, row.draws) for row in self._values]
            drawn["draws"] = torch.from_numpy(np.concatenate(columns, axis=1).astype(np.float32))
        return drawn

    def apply(self, pixels: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """Augment `(B, C, H, W)` float32 pixels in [0, 255] by what was drawn for them, on their device."""
        if "maps" in drawn:
            pixels = warp(pixels, drawn["maps"])
        start = 0
        for row in self._values:
            end = start + row.draws.stop - row.draws.start
            pixels = row.apply(pixels, drawn["draws"][:, start:end], getattr(self._augmentation, row.field))
            start = end
        return pixels

    def _maps(self, images: NDArray[np.int64], epochs: NDArray[np.int64]) -> NDArray[np.float64]:
        """Compose the maps of all geometry: `(B, 2, 3)`."""
        total: NDArray[np.float64] | None = None
        for row in self._geometry:
            maps = row.maps(self._augmentation, self._uniform(images, epochs, row.draws), self._size)
            total = maps if total is None else _then(total, maps)
        assert total is not None
        return total

    def _uniform(self, images: NDArray[np.int64], epochs: NDArray[np.int64], which: slice) -> NDArray[np.float64]:
        places = np.arange(which.start, which.stop)
        return keyed_uniform(Purpose.AUGMENT, self._seed, epochs[:, None], images[:, None], places)


def warp(pixels: Tensor, maps: Tensor) -> Tensor:
    """Apply `(B, 2, 3)` maps to `(B, C, H, W)` images, bilinearly; what lies outside repeats the edge."""
    grid = functional.affine_grid(maps, list(pixels.shape), align_corners=False)
    edge = 1 - 1 / pixels.shape[-1]  # the outermost pixels' centres; padding_mode="border" is not on every device
    return functional.grid_sample(pixels, grid.clamp(-edge, edge), align_corners=False)


def _then(outer: NDArray[np.float64], inner: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compose `(B, 2, 3)` maps: a place goes through `outer` first, then through `inner`."""
    total = inner[:, :, :2] @ outer
    total[:, :, 2] += inner[:, :, 2]
    return total


def _factors(draws: Tensor, most: float) -> Tensor:
    return (1 + (2 * draws - 1) * most).view(-1, 1, 1, 1)


def _gray(pixels: Tensor) -> Tensor:
    """Return `(B, 1, H, W)` luma of colour images; gray ones as they are."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.unbind(dim=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)
