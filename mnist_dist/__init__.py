"""Train an image classifier from a folder of images on any number of processes, with the same result.

Example::

    import mnist_dist

    result = mnist_dist.train(mnist_dist.load("quick", {"train.epochs": 2}), run="runs/a")
    with mnist_dist.open_run("runs/a") as network:
        probabilities = network.predict(pixels)  # (B, C, H, W) uint8 to (B, K)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_dist.run import checkpoint
    from mnist_dist.run.face import load, open_run, train

__version__ = "0.1.0"
__all__ = ["checkpoint", "load", "open_run", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for (PEP 562): launchers never import torch."""
    if name == "checkpoint":
        return import_module("mnist_dist.run.checkpoint")
    if name in __all__:
        return getattr(import_module("mnist_dist.run.face"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
