"""Make whole batches: gather, move, augment, normalise."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mnist_dist.config.schema import Augmentation
from mnist_dist.data.dataset import Split
from mnist_dist.data.store_files import Stored, advise
from mnist_dist.keyed import Purpose, keyed_uniform


class Normalise:
    """Turns uint8 pixels into float32 with the training set's mean 0 and standard deviation 1."""

    def __init__(self, *, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self._scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(-1, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise `(B, C, H, W)` pixels in [0, 255], in place where they are float32 already.

        Returns:
            Channels last in memory, as convolutions and pooling like it; every layer that follows keeps to it.
        """
        return pixels.to(torch.float32, memory_format=torch.channels_last).mul_(self._scale).add_(self._shift)


class Gather:
    """Any rows of what is stored, on a device.

    From the host's memory they travel without anyone waiting: a GPU works off later what it is told to do, so the next
    batch is gathered here while it computes on the last.

    Args:
        stored: A split of the store.
        device: Where the rows are wanted.
        residency: Where all pixels and labels are kept.
    """

    def __init__(self, stored: Stored, device: torch.device, residency: Literal["device", "host"] = "host") -> None:
        self.residency = residency
        advise(stored.images, whole=residency == "device")
        home = device if residency == "device" else torch.device("cpu")
        self._images = torch.from_numpy(stored.images).to(home)  # (N, C, H, W) uint8; mapped on the host
        self._labels = torch.from_numpy(stored.labels).to(home)
        self._device = device
        self._pinned = device.type == "cuda"

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Get `(B, C, H, W)` pixels and `(B,)` labels of `(B,)` rows, which are on the host or beside the pixels."""
        if self._images.device.type == self._device.type:
            rows = self.send(rows)
            return self._images.index_select(0, rows), self._labels.index_select(0, rows)
        return self.send(self._select(self._images, rows)), self.send(self._select(self._labels, rows))

    def send(self, values: Tensor) -> Tensor:
        """Send a tensor to the device, where it arrives before what is computed next.

        A GPU fetches it later by itself, and from pinned memory alone: from other memory the host would wait for it.
        PyTorch gives pinned memory to nobody else before the copy from it is done.
        """
        if self._pinned and values.device.type == "cpu":
            return values.pin_memory().to(self._device, non_blocking=True)
        return values.to(self._device)

    def _select(self, values: Tensor, rows: Tensor) -> Tensor:
        chosen = torch.empty((len(rows), *values.shape[1:]), dtype=values.dtype, pin_memory=self._pinned)
        return torch.index_select(values, 0, rows, out=chosen)


class Batches:
    """Any images of one split, as normalised batches on a device."""

    def __init__(
        self,
        split: Split,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        gather: Gather | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self._gather = gather or Gather(split.stored, device)
        self._rows = None if split.rows is None else torch.from_numpy(split.rows)
        self._size = split.stored.images.shape[-1]
        self._normalise = Normalise(mean=mean, std=std, device=device)
        self._augmentation = augmentation if augmentation and augmentation.active else None
        self._seed = seed

    @property
    def residency(self) -> Literal["device", "host"]:
        """Where all pixels are kept: in the memory of the device or of its host."""
        return self._gather.residency

    def take(self, images: NDArray[np.int64], epochs: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """Make a batch.

        Args:
            images: `(B,)` indices into the split.
            epochs: `(B,)` epoch of each image, from which its augmentation is drawn; None never augments.

        Returns:
            `(B, C, H, W)` float32 normalised pixels and `(B,)` int64 labels, both on the device.
        """
        return self.make(*self.draw(images, epochs))

    def draw(self, images: NDArray[np.int64], epochs: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor | None]:
        """Return what a batch is made from, on the host; arguments as for `take`.

        Returns:
            `(B,)` int64 rows of the store, and `(B, 2, 3)` float32 maps if the images are augmented.
        """
        rows = torch.from_numpy(images)
        if self._rows is not None:
            rows = self._rows[rows]
        if self._augmentation is None or epochs is None:
            return rows, None
        matrices = affine_matrices(self._augmentation, size=self._size, seed=self._seed, epochs=epochs, images=images)
        return rows, torch.from_numpy(matrices)

    def make(self, rows: Tensor, matrices: Tensor | None) -> tuple[Tensor, Tensor]:
        """Make a batch from what `draw` has drawn, which is on the host, or on the device with the pixels."""
        pixels, labels = self._gather(rows)  # (B, C, H, W) uint8, (B,)
        if matrices is not None:
            pixels = warp(pixels.float(), self.send(matrices))
        return self._normalise(pixels), labels

    def send(self, values: Tensor) -> Tensor:
        """Send a tensor to the device, where it arrives before what is computed next; see `Gather`."""
        return self._gather.send(values)


def affine_matrices(
    augmentation: Augmentation, *, size: int, seed: int, epochs: NDArray[np.int64], images: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Draw each image's rotation, shift and scale from (seed, epoch, image) alone.

    Args:
        augmentation: Ranges.
        size: Height and width of the images, in pixels.
        seed: The run's.
        epochs: `(B,)`.
        images: `(B,)` indices into the training split.

    Returns:
        `(B, 2, 3)` maps from places in the new image to places in the old one, in [-1, 1] coordinates.
    """
    draws = keyed_uniform(Purpose.AUGMENT, seed, epochs[:, None], images[:, None], np.arange(4))  # (B, 4)
    turn, scale, right, down = (2 * draws - 1).T
    angle = turn * math.radians(augmentation.rotation_degrees)
    zoom = 1 / (1 + scale * augmentation.scale)
    cosine, sine = np.cos(angle) * zoom, np.sin(angle) * zoom
    shift_x, shift_y = np.stack([right, down]) * (2 * augmentation.shift_pixels / size)
    matrices = [
        [cosine, -sine, -(cosine * shift_x - sine * shift_y)],
        [sine, cosine, -(sine * shift_x + cosine * shift_y)],
    ]
    return np.moveaxis(np.array(matrices, np.float32), -1, 0)


def warp(pixels: Tensor, matrices: Tensor) -> Tensor:
    """Apply `(B, 2, 3)` maps to `(B, C, H, W)` images, bilinearly; what lies outside repeats the edge."""
    grid = functional.affine_grid(matrices, list(pixels.shape), align_corners=False)
    edge = 1 - 1 / pixels.shape[-1]  # the outermost pixels' centres; padding_mode="border" is not on every device
    return functional.grid_sample(pixels, grid.clamp(-edge, edge), align_corners=False)
