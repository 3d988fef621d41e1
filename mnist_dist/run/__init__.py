"""A run, from its config to its folder: built, saved, resumed, and taken up again when it has ended."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_dist.run.build import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """Import `train`, and torch with it, when it is asked for: a run's folder is read without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mnist_dist.run import build

    return getattr(build, name)
