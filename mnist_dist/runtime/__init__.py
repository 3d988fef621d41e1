"""Processes, device and precision: the only package that imports accelerate or torch.distributed."""

from mnist_dist.runtime.join import has_backend, start
from mnist_dist.runtime.rank import Runtime, Vote

__all__ = ["Runtime", "Vote", "has_backend", "start"]
