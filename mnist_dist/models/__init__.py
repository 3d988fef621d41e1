"""The networks. The catalogue needs no torch; a class is imported when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mnist_dist.models.catalogue import CATALOGUE, Network, build_model, count_parameters

if TYPE_CHECKING:
    from mnist_dist.models.cnn import FastCNN, LargeCNN, SmallCNN

__all__ = ["CATALOGUE", "FastCNN", "LargeCNN", "Network", "SmallCNN", "build_model", "count_parameters"]


def __getattr__(name: str) -> Any:
    """Import a network's class (PEP 562)."""
    module = next((row.module for row in CATALOGUE.values() if row.class_name == name), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)
