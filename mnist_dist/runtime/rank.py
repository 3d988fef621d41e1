"""What a rank does on its device and together with the other ranks."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, TypeVar

import accelerate.accelerator
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from mnist_dist import errors
from mnist_dist.errors import ConfigError
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.group import heartbeat
from mnist_dist.runtime.device import Choice, default_generator

T = TypeVar("T")

NAMED_RANKS = 8
"""So many ranks are named in a message, which may be about a thousand."""


class Runtime:
    """One process of a run: its rank, its device and what it does together with the others.

    Built by `start`, by every rank. All methods that combine ranks say so and must be called by every rank.
    """

    def __init__(self, accelerator: Accelerator, device: Choice, precision: Choice, threads: int) -> None:
        self._accelerator = accelerator
        self._generator = default_generator(accelerator.device)
        self.device: torch.device = accelerator.device
        self.device_choice = device
        self.precision = precision
        self.threads = threads
        self.rank: int = accelerator.process_index
        self.ranks: int = accelerator.num_processes
        self._loss_scale = self._scale_now()
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64

    def set_threads(self, threads: int) -> None:
        """Set the number of CPU threads. Call it only between two steps."""
        torch.set_num_threads(threads)
        self.threads = threads

    def prepare(self, model: nn.Module, *, training: bool = True) -> nn.Module:
        """Move a network to the device, to compute in the run's precision. Every rank.

        Args:
            model: The same on every rank.
            training: With several ranks, wrap it in DDP.
        """
        # Looking for DTensors, of which our networks have none, would import half a second of sharding code.
        with replaced(accelerate.accelerator, "model_has_dtensor", lambda model: False):
            prepared: nn.Module = self._accelerator.prepare_model(model, evaluation_mode=not training)
        return prepared

    def seed(self, value: int) -> None:
        """Set the device's default generator, from which dropout masks are drawn; costs a microsecond or two."""
        self._generator.manual_seed(value)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Return a context in which backward adds to the gradients, and reduces them over ranks only if `last`."""
        if last or self.ranks == 1:
            return contextlib.nullcontext()
        context: AbstractContextManager[None] = self._accelerator.no_sync(model)
        return context

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, scaled under fp16. Every rank: DDP averages them over ranks."""
        self.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, stepper: Stepper, *, clip_norm: float | None) -> float | None:
        """Update the weights; under fp16 the scaler leaves out an update whose gradients overflowed.

        Returns:
            None, or the lowered loss scale if the update was left out: on every rank, as all have the same gradients.
        """
        scaler, optimizer = self._accelerator.scaler, stepper.optimizer
        if clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(_parameters(optimizer), clip_norm)
        if scaler is None:
            stepper.step()
            return None
        scaler.step(optimizer)  # waits for the device, so asking for the scale costs little more
        scaler.update()
        optimizer.zero_grad()
        former, self._loss_scale = self._loss_scale, self._scale_now()
        return self._loss_scale if self._loss_scale < former else None

    def scale(self, loss: Tensor) -> Tensor:
        """Scale a loss under fp16, for a gradient that is computed by hand."""
        scaler = self._accelerator.scaler
        return loss if scaler is None else scaler.scale(loss)

    def restore_scaler(self, state: dict[str, Any] | None) -> None:
        """Load the gradient scaler's state from a checkpoint."""
        if self._accelerator.scaler is not None and state is not None:
            self._accelerator.scaler.load_state_dict(state)
            self._loss_scale = self._scale_now()

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the gradient scaler's state under fp16, else None."""
        scaler = self._accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    def _scale_now(self) -> float:
        """Ask the gradient scaler for its scale, for which the host waits once it lies on the device; else 1."""
        scaler = self._accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over ranks, into a new one. Every rank."""
        total = values.clone()
        self.sum_in_place(total)
        return total

    def sum_in_place(self, values: Tensor) -> None:
        """Add a tensor up over ranks. Every rank."""
        if self.ranks > 1:
            torch.distributed.all_reduce(values)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Collect a tensor of the same shape from every rank, in the ranks' order. Every rank."""
        if self.ranks == 1:
            return [values]
        gathered = [torch.empty_like(values) for _ in range(self.ranks)]
        torch.distributed.all_gather(gathered, values)
        return gathered

    def broadcast(self, record: Any) -> Any:
        """Return rank 0's record on every rank, sent as JSON. Every rank; the others' argument is ignored."""
        return json.loads(self.broadcast_bytes(json.dumps(record).encode()))

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Return rank 0's bytes on every rank. Every rank; the others' argument is ignored."""
        if self.ranks == 1:
            return content
        length = torch.tensor([len(content)], device=self.device)
        torch.distributed.broadcast(length, 0)
        buffer = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == 0 and content:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        buffer = buffer.to(self.device)
        torch.distributed.broadcast(buffer, 0)
        return buffer.cpu().numpy().tobytes()

    def maximum(self, value: int) -> int:
        """Return the largest of the ranks' numbers. Every rank."""
        vote = Vote(self)
        vote.cast(value)
        return vote.result()

    def free_bytes(self) -> int:
        """Count the bytes of memory that are free on this rank's device; 0 on the CPU, whose memory the store maps."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        if self.device.type == "mps":
            return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
        return 0

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise if ranks disagree on a fact. Every rank, with the same names.

        Raises:
            ConfigError: A fact differs; the message names it and the ranks.
        """
        if self.ranks == 1:
            return
        digests = [int.from_bytes(hashlib.sha256(value.encode()).digest()[:7]) for value in facts.values()]
        mine = torch.tensor(digests, dtype=torch.int64, device=self.device)
        table = torch.stack(self.gather(mine)).cpu()  # (ranks, facts)
        for (name, fact), differs in zip(facts.items(), (table != table[0]).T, strict=True):
            others = differs.nonzero().flatten().tolist()
            if others:
                raise ConfigError(
                    f"Ranks disagree on the {name}: {_listed(others)} from rank 0. Rank {self.rank} has {fact}."
                )

    def count_same(self, text: str) -> int:
        """Count the ranks that have the same text as this one, which is among them. Every rank."""
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        table = torch.stack(self.gather(torch.tensor(digest, dtype=torch.int64, device=self.device)))
        return int((table == digest).sum())

    def on_first_rank(self, action: Callable[[], T]) -> T | None:
        """Run a function on rank 0. If it fails, every rank raises its error. Every rank.

        Returns:
            What the action returned on rank 0, None on the others.

        Raises:
            MnistDistError: What the action raised; an OSError becomes a StorageError.
        """
        value, error = None, None
        if self.rank > 0:
            heartbeat.wait()
        else:
            try:
                value = action()
            except errors.MnistDistError as raised:
                error = raised
            except OSError as raised:
                error = errors.storage_error(raised)
                error.__cause__ = raised
        failure = self.broadcast(error and errors.to_json(error))
        if failure is not None:
            raise error or errors.from_json(failure)
        return value

    def close(self) -> None:
        """Forget what Accelerate keeps per process, so that another run can start."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


class Vote:
    """An asynchronous maximum over ranks, exchanged by the CPUs while the devices compute."""

    def __init__(self, runtime: Runtime) -> None:
        self._ranks = runtime.ranks
        self._value = torch.zeros(1, dtype=torch.int64)
        self._pending: torch.distributed.Work | None = None

    def cast(self, value: int) -> None:
        """Start the vote with this rank's number. Every rank; it does not wait."""
        self._value.fill_(value)
        if self._ranks > 1:
            self._pending = torch.distributed.all_reduce(self._value, op=torch.distributed.ReduceOp.MAX, async_op=True)

    def result(self) -> int:
        """Return the largest number of the last vote, waiting for it; 0 before the first vote."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return int(self._value)


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute for a while, where there is one."""
    former = getattr(module, name, None)
    if former is not None:
        setattr(module, name, value)
    try:
        yield
    finally:
        if former is not None:
            setattr(module, name, former)


def _listed(ranks: list[int]) -> str:
    """Name ranks that differ, a few of many."""
    if len(ranks) == 1:
        return f"rank {ranks[0]} differs"
    more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
    return f"ranks {', '.join(map(str, ranks[:NAMED_RANKS]))}{more} differ"


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
