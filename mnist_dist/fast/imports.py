"""Saves the import of torch's compiler, which takes longer than many steps of training, in runs that compile nothing.

Optimizers and DDP import `torch._dynamo` only to tell the compiler what to skip. A quarter of torch's own import is
`torch._meta_registrations`, which gives the compiler and the meta device the shapes of results. Stand-ins replace both
modules. When code asks a stand-in for anything else, the real module is imported and replaces it. Until then the meta
device lacks some operators. Do not use this in a process that compiles.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

COMPILER = "torch._dynamo"
SHAPES = "torch._meta_registrations"


def leave_out_compiler() -> None:
    """Import torch with stand-ins for its compiler, until something needs the real one.

    If torch is imported already, this saves only the imports by optimizers and DDP.
    """
    if "torch" not in sys.modules:
        sys.modules[SHAPES] = _StandIn(SHAPES)
    import torch

    if COMPILER not in sys.modules:
        stand_in = _Compiler(COMPILER)
        sys.modules[COMPILER] = stand_in
        torch._dynamo = stand_in


class _StandIn(ModuleType):
    """An empty module that imports the real one on first use."""

    def __getattr__(self, name: str) -> Any:
        if name == "__file__":  # `inspect` asks every module that there is, as pydantic makes it do
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Compiler(_StandIn):
    """Does nothing, as `torch._dynamo` does for functions that are not compiled."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.utils = _Part("utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")  # its default
        self.trace_rules = _Part("trace_rules", clear_lru_cache=lambda: None)

    def disable(self, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """Return the function as it is."""
        return function

    def graph_break(self) -> None:
        """Do nothing."""


class _Part(SimpleNamespace):
    """A submodule with a few known attributes. Any other comes from the real module."""

    def __init__(self, submodule: str, **known: Callable[[], Any]) -> None:
        super().__init__(_submodule=submodule, **known)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_real(COMPILER), self._submodule), name)


def _real(name: str) -> ModuleType:
    """Import the real module in place of its stand-in: shapes first, as torch does."""
    for module in (SHAPES, COMPILER) if name == COMPILER else (SHAPES,):
        if isinstance(sys.modules.get(module), _StandIn):
            del sys.modules[module]
            vars(sys.modules["torch"]).pop(module.removeprefix("torch."), None)
        importlib.import_module(module)
    return sys.modules[name]
