"""The distributed sampler: which image is at which position of the endless stream of epochs.

Epoch e is a permutation that depends on the seed and e alone. Step k takes positions [kB, (k+1)B), so no batch
is ever short, and which images are in it does not depend on the number of processes. There is nothing to save
and nothing to skip: to resume is to ask for another step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mnist_dist.errors import ConfigError
from mnist_dist.keyed import Purpose, keyed_permutation, permuted

MOST_SORTED = 1 << 17
"""An epoch of more images is never laid out as a whole: 131,072 take 12 ms to sort, six million more than a second.

Fewer are sorted, since that makes every order of a small set equally likely: over 12,000 seeds, the 120 orders of five
images had a chi-square of 106 when sorted and of 350 from the Feistel network (119 degrees of freedom). The number of
images does not change during a run, so it never goes from one way to the other.
"""
BLOCK = 1 << 14
"""Places that are computed together: what a rank needs in its next steps, so that a step costs as much on any number of
ranks. 60 places by themselves take 0.8 ms, as part of a block 0.02."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """A training set's order."""

    images: int
    global_batch: int
    seed: int
    epoch_steps: Fraction = field(init=False)
    """Steps of an epoch, exactly; not necessarily whole."""

    def __post_init__(self) -> None:
        if self.global_batch > self.images:
            raise ConfigError(
                f"train.global_batch is {self.global_batch}, but there are only {self.images} training images: "
                f"use {self.images} or less."
            )
        object.__setattr__(self, "epoch_steps", Fraction(self.images, self.global_batch))

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return a step's images and the epoch that each belongs to, both `(global_batch,)`."""
        return self._piece(step, rank=0, ranks=1)

    def share(
        self, step: int, *, rank: int, ranks: int, micro_batch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return a rank's contiguous piece of a step: part of `batch`, without the work for other ranks' pieces.

        Args:
            step: The first is 0.
            rank: Whose piece.
            ranks: Number of processes; `ranks` x `micro_batch` divides the global batch.
            micro_batch: Images in a micro-batch.

        Returns:
            Images and their epochs, both `(accumulation, micro_batch)`.
        """
        images, epochs = self._piece(step, rank=rank, ranks=ranks)
        return images.reshape(-1, micro_batch), epochs.reshape(-1, micro_batch)

    def _piece(self, step: int, *, rank: int, ranks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        count = self.global_batch // ranks
        if self.images > MOST_SORTED:
            block, row = divmod(step, max(1, BLOCK // count))
            images, epochs = _block(self, block, rank, ranks)
            return images[row], epochs[row]
        first = step * self.global_batch + rank * count
        end = first + count
        parts = []
        for epoch in range(first // self.images, (end - 1) // self.images + 1):
            start = epoch * self.images
            parts.append(_sorted_epoch(self.images, self.seed, epoch)[max(0, first - start) : end - start])
        return np.concatenate(parts), np.arange(first, end) // self.images

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 0, whose totals a step counts in."""
        return step * self.global_batch // self.images

    def epoch_end(self, epoch: int) -> int:
        """Return the number of steps after which an epoch is complete."""
        return -(-(epoch + 1) * self.images // self.global_batch)


@lru_cache(maxsize=2)
def _block(sampler: Sampler, block: int, rank: int, ranks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Compute a rank's pieces of several steps in a row.

    Returns:
        Images and their epochs, both `(steps, global_batch // ranks)`.
    """
    count = sampler.global_batch // ranks
    steps = max(1, BLOCK // count)
    firsts = np.arange(block * steps, (block + 1) * steps) * sampler.global_batch + rank * count
    epochs, places = np.divmod(firsts[:, None] + np.arange(count), sampler.images)
    images = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        there = epochs == epoch
        images[there] = permuted(places[there], Purpose.SHUFFLE, sampler.images, sampler.seed, epoch)
    return images, epochs


@lru_cache(maxsize=1)
def _sorted_epoch(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return keyed_permutation(Purpose.SHUFFLE, images, seed, epoch)
