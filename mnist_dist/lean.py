"""Keeps torch's compiler out of a run that compiles nothing: importing it takes longer than many steps of training.

Every optimizer and DDP import `torch._dynamo` only to tell the compiler what to leave alone. A stand-in answers that;
whoever asks it for anything else gets the real module, which then takes its place for good.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

COMPILER = "torch._dynamo"


def leave_out_compiler() -> None:
    """Let what torch's optimizers and DDP say to the compiler go nowhere, until someone needs the compiler itself."""
    if COMPILER not in sys.modules:
        stand_in = _Compiler(COMPILER)
        sys.modules[COMPILER] = stand_in
        torch._dynamo = stand_in


class _Compiler(ModuleType):
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

    def __getattr__(self, name: str) -> Any:
        if name == "__file__":  # `inspect` asks every module that there is, as pydantic makes it do
            raise AttributeError(name)
        return getattr(_real_compiler(), name)


class _Part(SimpleNamespace):
    """A submodule of which only a little is known."""

    def __init__(self, submodule: str, **known: Callable[[], Any]) -> None:
        super().__init__(_submodule=submodule, **known)

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_real_compiler(), self._submodule), name)


def _real_compiler() -> ModuleType:
    if isinstance(sys.modules.get(COMPILER), _Compiler):
        del sys.modules[COMPILER]
        del torch._dynamo
    return importlib.import_module(COMPILER)
