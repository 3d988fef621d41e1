"""Keeps torch's compiler out of a run that compiles nothing: importing it takes longer than many steps of training.

Every optimizer and DDP import `torch._dynamo` only to tell the compiler what to leave alone, and a quarter of torch's
own import is `torch._meta_registrations`, from which the compiler and tensors on the meta device know the shapes of
results. Stand-ins take their places; whoever asks one of them for anything else gets the real module, which then takes
its place for good. Until then, some operators are unknown on the meta device. Not for a process that compiles.
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
    """Import torch, and let what it says to the compiler go nowhere until someone needs the compiler itself.

    Where torch is imported already, only the optimizers' and DDP's share is saved.
    """
    if "torch" not in sys.modules:
        sys.modules[SHAPES] = _StandIn(SHAPES)
    import torch

    if COMPILER not in sys.modules:
        stand_in = _Compiler(COMPILER)
        sys.modules[COMPILER] = stand_in
        torch._dynamo = stand_in


class _StandIn(ModuleType):
    """Has nothing until it is asked for something."""

    def __getattr__(self, name: str) -> Any:
        if name == "__file__":  # `inspect` asks every module that there is, as pydantic makes it do
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _Compiler(_StandIn):
    """Does nothing, which is what `torch._dynamo` does with functions that are not compiled."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.utils = _Part("utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")  # its default
        self.trace_rules = _Part("trace_rules", clear_lru_cache=lambda: None)

    def disable(self, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """Keep the compiler out of a function."""
        return function

    def graph_break(self) -> None:
        """End what is compiled together."""


class _Part(SimpleNamespace):
    """A submodule of which only a little is known."""

    def __init__(self, submodule: str, **known: Callable[[], Any]) -> None:
        super().__init__(_submodule=submodule, **known)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_real(COMPILER), self._submodule), name)


def _real(name: str) -> ModuleType:
    """Import what a stand-in stands for: shapes first, as torch itself does."""
    for module in (SHAPES, COMPILER) if name == COMPILER else (SHAPES,):
        if isinstance(sys.modules.get(module), _StandIn):
            del sys.modules[module]
            vars(sys.modules["torch"]).pop(module.removeprefix("torch."), None)
        importlib.import_module(module)
    return sys.modules[name]
