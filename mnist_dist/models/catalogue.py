"""The networks by name. This module needs no torch: configs and launchers read it too.

Another network is a class that takes `classes`, `channels`, `image_size` and `dropout`, and one row of `CATALOGUE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A row of the catalogue."""

    cls: str
    """Module and name of the class, as `package.module:Name`."""
    summary: str
    """In a few words, for `config show` and error messages."""
    smallest: int
    """The smallest `data.image_size` that it takes, in pixels; configs start at 8."""
    multiply_adds: Callable[[int, int], int] | None = None
    """Multiplications with additions of a forward pass over one image, of (channels, image size). The last layer,
    which depends on the number of classes, is left out. `None`: unknown. Used to choose CPU threads."""

    @property
    def module(self) -> str:
        """The module of the class."""
        return self.cls.partition(":")[0]

    @property
    def class_name(self) -> str:
        """The name of the class in its module."""
        return self.cls.partition(":")[2]


def _small_cnn(channels: int, size: int) -> int:
    first, second = size - 4, (size - 4) // 2 - 4
    side = second // 2
    return first**2 * 10 * 25 * channels + second**2 * 20 * 250 + 20 * side**2 * 50


def _large_cnn(channels: int, size: int) -> int:
    side = (size - 4) // 2
    return (size - 2) ** 2 * 32 * 9 * channels + (size - 4) ** 2 * 64 * 288 + 64 * side**2 * 128


def _fast_cnn(channels: int, size: int) -> int:
    first, second = size - 8, (size - 8) // 2 - 2
    side = second // 2
    return first**2 * 16 * 25 * channels + second**2 * 32 * 144 + 32 * side**2 * 256


CATALOGUE = {
    "small_cnn": Network(
        cls="mnist_dist.models.cnn:SmallCNN",
        summary="two 5x5 convolutions, 22,000 weights",
        smallest=16,
        multiply_adds=_small_cnn,
    ),
    "large_cnn": Network(
        cls="mnist_dist.models.cnn:LargeCNN",
        summary="two 3x3 convolutions, 1.2 million weights",
        smallest=8,
        multiply_adds=_large_cnn,
    ),
    "fast_cnn": Network(
        cls="mnist_dist.models.cnn:FastCNN",
        summary="a 5x5 and a 3x3 convolution, 139,000 weights, the quickest to a given accuracy",
        smallest=16,
        multiply_adds=_fast_cnn,
    ),
}


def build_model(name: str, *, classes: int, channels: int, image_size: int, dropout: float = 0.25) -> nn.Module:
    """Build a network, its weights drawn from torch's default generator.

    Args:
        name: A key of `CATALOGUE`.
        classes: Number of classes, K.
        channels: Channels of an image, C.
        image_size: Height and width of an image, in pixels.
        dropout: Share of activations set to zero in training, in [0, 1).

    Returns:
        A module that maps `(B, C, H, W)` floats to `(B, K)` logits.
    """
    row = CATALOGUE[name]
    model: nn.Module = getattr(import_module(row.module), row.class_name)(
        classes=classes, channels=channels, image_size=image_size, dropout=dropout
    )
    return model


def count_parameters(model: nn.Module) -> int:
    """Count a network's weights."""
    return sum(parameter.numel() for parameter in model.parameters())
