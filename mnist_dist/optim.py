"""Optimizers and learning rates, for programs that use them by themselves."""

from mnist_dist.training.optimizers import build_optimizer, lr_at

__all__ = ["build_optimizer", "lr_at"]
