"""Watches what a training step asks of torch: its operators, what the host waits for, and what travels to a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnist_dist.config import Config, Setting, load
from mnist_dist.config.schema import EMBEDDED_DIGITS
from mnist_dist.data import Dataset
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.observe import Observer, Observers
from mnist_dist.run.build import build_parts, join
from mnist_dist.runtime import Runtime
from mnist_dist.training import loop
from mnist_dist.training.optimizers import build_optimizer
from mnist_dist.training.parts import Parts
from mnist_dist.training.state import Progress

aten = torch.ops.aten


@dataclass(frozen=True)
class Transfer:
    """A tensor that goes from one device to another."""

    source: str
    target: str
    pinned: bool
    non_blocking: bool


class Watch(TorchDispatchMode):
    """Counts operators, and stands in for pinned memory, which only a machine with a GPU has."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.transfers: list[Transfer] = []
        self._pinned: list[Tensor] = []

    @property
    def waits(self) -> int:
        """How often the host read a number from a tensor."""
        return self.operators["aten::_local_scalar_dense"]

    def forget(self) -> None:
        """Begin to count anew."""
        self.operators.clear()
        self.transfers.clear()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is aten.is_pinned.default:
            return self._is_pinned(args[0])
        self.operators[function._schema.name] += 1
        if function is aten._pin_memory.default:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        pinned = kwargs.pop("pin_memory", False)
        result = function(*args, **kwargs)
        if pinned:
            self._pinned.append(result)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if isinstance(result, Tensor) and tensors and (source := tensors[-1]).device != result.device:
            non_blocking = kwargs.get("non_blocking") or (function is aten.copy_.default and args[2:] == (True,))
            self.transfers.append(
                Transfer(source.device.type, result.device.type, self._is_pinned(source), bool(non_blocking))
            )
        return result

    def _is_pinned(self, tensor: Tensor) -> bool:
        memory = tensor.untyped_storage()._cdata
        return any(memory == pinned.untyped_storage()._cdata for pinned in self._pinned)


class Elsewhere(Runtime):
    """A rank whose device is not the host's: a number that the host asks it for is an error, as it has none."""

    def __init__(self, runtime: Runtime) -> None:
        vars(self).update(vars(runtime))
        self.device = torch.device("meta")

    def prepare(self, model: nn.Module, *, training: bool = True) -> nn.Module:
        return super().prepare(model, training=training).to(self.device)

    def free_bytes(self) -> int:
        return 1 << 40


class StepsOver(Exception):  # noqa: N818
    pass


class Steps(Observer):
    """Keeps what a step has asked for, and ends the loop after the last."""

    def __init__(self, watch: Watch, last: int) -> None:
        self._watch = watch
        self._last = last
        self.operators: Counter[str] = Counter()
        self.transfers: list[Transfer] = []

    def progress(self, step: int) -> None:
        self.operators, self.transfers = Counter(self._watch.operators), list(self._watch.transfers)
        self._watch.forget()
        if step == self._last:
            raise StepsOver


def config_of(**given: object) -> Config:
    """Make a config for the embedded digits; `__` stands for a dot."""
    settings = {"data.root": EMBEDDED_DIGITS, "train.log_every": 10**6, "train.device": "cpu", "train.threads": 1}
    settings |= {key.replace("__", "."): value for key, value in given.items()}
    return load(
        "baseline", tuple(Setting(key=key, value=value, origin="here") for key, value in settings.items())
    ).config


def watch_step(config: Config, dataset: Dataset, *, elsewhere: bool = False, step: int = 4) -> Steps:
    """Train by the real loop, and return what one step asked for that reports and saves nothing."""
    with join(config) as runtime:
        build = parts_elsewhere if elsewhere else build_parts
        return watch_steps(build(config, dataset, runtime), last=step)


def parts_elsewhere(config: Config, dataset: Dataset, runtime: Runtime) -> Parts:
    """Build the parts of a run whose device is not the host's; torch has no fused optimizer for the meta device."""
    parts = build_parts(config, dataset, Elsewhere(runtime))
    optimizer = build_optimizer(config.optimizer, parts.model.parameters(), fused=False)
    return replace(parts, optimizer=optimizer, stepper=Stepper(optimizer))


def watch_steps(parts: Parts, *, last: int) -> Steps:
    """Train by the real loop until a step is done, and return what that step asked for."""
    with Watch() as watch:
        steps = Steps(watch, last)
        try:
            loop.train(replace(parts, observers=Observers((steps,))), Progress())
        except StepsOver:
            return steps
    raise AssertionError("the loop has come to an end of its own")
