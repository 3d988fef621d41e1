"""Exact evaluation: every image of a split counted once, at any number of processes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from mnist_dist.data import Split
from mnist_dist.data.batches import Batches
from mnist_dist.errors import StoppedError
from mnist_dist.group import heartbeat
from mnist_dist.keyed import Purpose, keyed_hash
from mnist_dist.observe.records import Evaluation
from mnist_dist.runtime import Runtime

BATCH = 500
BATCH_VALUES = 1 << 22
"""The most images and pixel values in an evaluation batch, with any number of ranks."""


def evaluate(
    model: nn.Module, batches: Batches, split: Split, runtime: Runtime, stopping: Callable[[], int] = lambda: 0
) -> Evaluation:
    """Evaluate a network on every image of a split. Every rank.

    Rank (i mod ranks) evaluates batch i. Each image has its own entry for loss and prediction, and entries are summed
    in the images' order, so the figures have the same bits with any number of ranks.

    Args:
        model: Unwrapped, returns logits; left in training mode if it was.
        batches: Of the split.
        split: The split.
        runtime: This rank's.
        stopping: Returns the number of a signal that arrived, else 0. A signal stops the evaluation.

    Raises:
        StoppedError: A signal stopped it; on every rank.
        RuntimeError: Not every image was counted exactly once: a bug.
    """
    images = len(split)
    batch = batch_size(split.stored.images[0].size)
    losses = torch.zeros(images, device=runtime.device)
    predicted = torch.zeros(images, dtype=torch.int64, device=runtime.device)
    seen = torch.zeros(2, dtype=torch.int64)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(runtime.rank * batch, images, runtime.ranks * batch):
            rows = np.arange(start, min(start + batch, images))
            if stopping():
                break
            pixels, labels = batches.take(rows)
            logits = model(pixels).float()  # (B, K)
            losses[start : start + batch] = functional.cross_entropy(logits, labels, reduction="none")
            predicted[start : start + batch] = logits.argmax(dim=1)
            heartbeat.beat()
            seen += torch.tensor([len(rows), _hash_sum(rows)])
    model.train(was_training)
    if (number := runtime.maximum(stopping())) != 0:
        raise StoppedError(f"The evaluation of the {split.name} images was stopped.", number)
    counted, hashed = runtime.sum(seen.to(runtime.device)).tolist()
    if (counted, hashed) != (images, _hash_sum(np.arange(images))):
        raise RuntimeError(f"evaluated {counted} of {images} {split.name} images, or some twice: this is a bug")
    return Evaluation(
        split=split.name,
        labels=split.labels,
        predicted=runtime.sum(predicted).cpu().numpy(),
        losses=runtime.sum(losses).cpu().numpy(),
    )


def batch_size(values: int) -> int:
    """Return the batch size for evaluation, given the values per image."""
    return max(1, min(BATCH, BATCH_VALUES // values))


def _hash_sum(rows: NDArray[np.int64]) -> int:
    """Add up 32-bit hashes of image indices: exact in int64 for two billion images."""
    return int((keyed_hash(Purpose.EVALUATE, rows) >> np.uint64(32)).sum())
