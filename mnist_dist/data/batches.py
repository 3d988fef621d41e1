"""Whole batches on their way to the network: gather, move, augment, normalise; never image by image."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist_dist.config.schema import Augmentation
from mnist_dist.data.augment import Augment
from mnist_dist.data.dataset import Split
from mnist_dist.data.store_files import StoredSplit, advise


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

    Copies from the host's memory do not wait: a GPU runs its work asynchronously, so the next
    batch is gathered here while it computes on the last.

    Args:
        stored: A split of the store.
        device: Where the rows are wanted.
        residency: Where all pixels and labels are kept.
    """

    def __init__(
        self, stored: StoredSplit, device: torch.device, residency: Literal["device", "host"] = "host"
    ) -> None:
        self.residency = residency
        advise(stored.images, whole=residency == "device")
        home = device if residency == "device" else torch.device("cpu")
        self._images = torch.from_numpy(stored.images).to(home)  # (N, C, H, W) uint8; mapped on the host
        self._labels = torch.from_numpy(stored.labels).to(home)
        self._device = device
        self._pinned = device.type == "cuda"

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(B, C, H, W)` pixels and `(B,)` labels of `(B,)` rows, which are on the host or beside the pixels."""
        if self._images.device.type == self._device.type:
            rows = self.send(rows)
            return self._images.index_select(0, rows), self._labels.index_select(0, rows)
        return self.send(self._select(self._images, rows)), self.send(self._select(self._labels, rows))

    def send(self, values: Tensor) -> Tensor:
        """Send a tensor to the device, where it arrives before what is computed next.

        A GPU copies asynchronously only from pinned memory: for other memory the host would wait.
        PyTorch does not reuse pinned memory before the copy from it is done.
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
        self._normalise = Normalise(mean=mean, std=std, device=device)
        size = split.stored.images.shape[-1]
        augment = Augment(augmentation, size=size, seed=seed) if augmentation else None
        self._augment = augment if augment and augment.active else None

    @property
    def residency(self) -> Literal["device", "host"]:
        """Where all pixels are kept: in the memory of the device or of its host."""
        return self._gather.residency

    def take(self, images: NDArray[np.int64], epochs: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """Build a batch.

        Args:
            images: `(B,)` indices into the split.
            epochs: `(B,)` epoch of each image, from which its augmentation is drawn; `None` never augments.

        Returns:
            `(B, C, H, W)` float32 normalised pixels and `(B,)` int64 labels, both on the device.
        """
        drawn = self.draw(images, epochs)
        return self.make(drawn | {name: self.send(drawn[name]) for name in drawn.keys() - {"rows"}})

    def draw(self, images: NDArray[np.int64], epochs: NDArray[np.int64] | None = None) -> dict[str, Tensor]:
        """Draw what a batch is made from, on the host; arguments as for `take`.

        Returns:
            `rows`, `(B,)` int64 of the store, and what `Augment.draw` returns if the images are augmented.
        """
        rows = torch.from_numpy(images)
        if self._rows is not None:
            rows = self._rows[rows]
        if self._augment is None or epochs is None:
            return {"rows": rows}
        return {"rows": rows, **self._augment.draw(images, epochs)}

    def make(self, drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Build a batch from what `draw` returns: `rows` on the host or beside the pixels, the rest on the device."""
        pixels, labels = self._gather(drawn["rows"])  # (B, C, H, W) uint8, (B,)
        if len(drawn) > 1 and self._augment is not None:
            pixels = self._augment.apply(pixels.float(), drawn)
        return self._normalise(pixels), labels

    def send(self, values: Tensor) -> Tensor:
        """Send a tensor to the device, where it arrives before what is computed next; see `Gather`."""
        return self._gather.send(values)
