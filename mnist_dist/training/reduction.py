"""How the gradients of a step's micro-batches become one gradient, the same on every rank.

`Ddp` is PyTorch's DistributedDataParallel. `Exact` adds the micro-batches' gradients in a fixed binary tree: each
rank adds its own subtree, only one partial sum of each rank travels, and every rank adds those up the same way. So
the bits are the same on 1, 2, 4, ... ranks, up to one for each micro-batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from mnist_dist.errors import ConfigError
from mnist_dist.group import heartbeat
from mnist_dist.runtime import Runtime


class Ddp:
    """Gradients averaged by DDP while the last micro-batch's backward pass is still going on."""

    def __init__(self, runtime: Runtime, model: nn.Module, *, global_batch: int) -> None:
        if runtime.ranks > 1:
            _keep_strides(model)
        self.model = runtime.prepare(model)
        self._runtime = runtime
        self._scale = runtime.ranks / global_batch  # DDP divides by ranks
        self._losses: list[Tensor] = []
        self._correct: list[Tensor] = []

    def warm_up(self, pixels: Tensor) -> None:
        """Run one backward pass, after which DDP fixes the order of its buckets. Every rank.

        Otherwise the first step would add in a different order than later steps, and a resumed run's first step in a
        different order than the same step of a run that never stopped.
        """
        if self._runtime.ranks > 1:
            self.model.eval()  # leaves running statistics alone
            self.model(pixels).sum().mul(0).backward()
            self.model.train()
            self.model.zero_grad()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context for a micro-batch's forward and backward pass."""
        return self._runtime.accumulate(self.model, last=last)

    def backward(self, loss: Tensor, correct: Tensor) -> None:
        """Add a micro-batch's gradients.

        Args:
            loss: Summed over the micro-batch.
            correct: Number classified correctly.
        """
        self._runtime.backward(loss * self._scale)
        self._losses.append(loss.detach())
        self._correct.append(correct)

    def finish(self) -> tuple[Tensor, Tensor]:
        """End a step: `grad` of each parameter is the mean over the global batch.

        Returns:
            This rank's loss and number correct; `collect` adds them up over ranks.
        """
        sums = self._total(self._losses), self._total(self._correct)
        self._losses.clear()
        self._correct.clear()
        return sums

    def collect(self, sums: list[tuple[Tensor, Tensor]]) -> list[list[float]]:
        """Turn the sums of several steps into numbers over all ranks. Every rank; waits for the device."""
        columns = [torch.stack(column).to(self._runtime.sum_dtype) for column in zip(*sums, strict=True)]
        rows: list[list[float]] = self._runtime.sum(torch.stack(columns, dim=1)).tolist()
        return rows

    def _total(self, values: list[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.stack(values).sum(dtype=self._runtime.sum_dtype)

    def settle(self) -> None:
        """Average the running statistics of batch normalisation over ranks. Every rank."""
        for buffer in self.model.buffers():
            if buffer.is_floating_point() and self._runtime.ranks > 1:
                buffer.copy_(self._runtime.sum(buffer) / self._runtime.ranks)


def _keep_strides(model: nn.Module) -> None:
    """Restride the gradients of convolutions over one channel to their weights' strides, which DDP insists on.

    With channels last the stride over the one channel is another; in memory that makes no difference.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4 and parameter.shape[1] == 1:
            restride = partial(torch.as_strided, size=parameter.size(), stride=parameter.stride())
            parameter.register_hook(restride)  # type: ignore[no-untyped-call]


class Exact:
    """Gradients added in a fixed binary tree over the global batch's micro-batches."""

    def __init__(self, runtime: Runtime, model: nn.Module, *, global_batch: int) -> None:
        refuse_batch_norm(model)
        self.model = runtime.prepare(model, training=False)
        self._runtime = runtime
        self._global_batch = global_batch
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._subtrees: list[tuple[int, Tensor]] = []  # each with its number of micro-batches, the largest first

    def warm_up(self, pixels: Tensor) -> None:
        """Do nothing: there are no buckets."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Return the context for a micro-batch's forward and backward pass."""
        return nullcontext()

    def backward(self, loss: Tensor, correct: Tensor) -> None:
        """Add a micro-batch's gradients, with its loss and number correct behind them, to the tree.

        Args:
            loss: Summed over the micro-batch.
            correct: Number classified correctly.
        """
        gradients = torch.autograd.grad(self._runtime.scale(loss), self._parameters)
        values = [*(gradient.reshape(-1) for gradient in gradients), loss.detach().view(1), correct.view(1)]
        size, total = 1, torch.cat([value.float() for value in values])
        while self._subtrees and self._subtrees[-1][0] == size:
            _, left = self._subtrees.pop()
            size, total = 2 * size, left.add_(total)
        self._subtrees.append((size, total))

    def finish(self) -> tuple[Tensor, Tensor]:
        """End a step: `grad` of each parameter is the mean over the global batch. Every rank.

        Returns:
            Loss and number correct over all ranks.
        """
        ((_, mine),) = self._subtrees  # a rank has a power of two of micro-batches
        self._subtrees.clear()
        level = self._runtime.gather(mine)
        while len(level) > 1:
            level = [left + right for left, right in zip(level[::2], level[1::2], strict=True)]
        gradient, sums = level[0][:-2], level[0][-2:]
        gradient.div_(self._global_batch)
        ends = torch.tensor([0, *(parameter.numel() for parameter in self._parameters)]).cumsum(0).tolist()
        for parameter, (start, end) in zip(self._parameters, pairwise(ends), strict=True):
            parameter.grad = gradient[start:end].view_as(parameter)
        loss, correct = sums.clone()  # views would keep the whole gradient in memory until they are looked at
        return loss, correct

    def collect(self, sums: list[tuple[Tensor, Tensor]]) -> list[list[float]]:
        """Turn the sums of several steps into numbers; waits for the device."""
        rows: list[list[float]] = torch.stack([torch.stack(pair) for pair in sums]).tolist()
        return rows

    def settle(self) -> None:
        """Do nothing: ranks do not differ."""


def learn(reduction: Ddp | Exact, pixels: Tensor, labels: Tensor, *, label_smoothing: float, last: bool) -> Tensor:
    """Add a micro-batch's gradients: its forward pass, its loss and its backward pass. Every rank.

    Args:
        reduction: Of the run.
        pixels: `(micro_batch, C, H, W)`, normalised.
        labels: `(micro_batch,)` int64.
        label_smoothing: Share of each target that is spread over all classes.
        last: Whether it is this rank's last of a step.

    Returns:
        `()` cross-entropy in nats, summed over the micro-batch.
    """
    with reduction.micro_batch(last=last):
        logits = reduction.model(pixels)  # (micro_batch, K)
        loss, correct = score(logits, labels, label_smoothing=label_smoothing)
        heartbeat.beat()  # from here on it may wait for others
        reduction.backward(loss, correct)
    return loss.detach()


def score(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sum up the loss of a batch and count its correct predictions, on its device.

    Args:
        logits: `(B, K)` scores of any float type.
        targets: `(B,)` int64 classes, or `(B, K)` probabilities whose rows add up to 1, as mixed images have them.
        label_smoothing: Share of each target that is spread over all classes.

    Returns:
        `()` cross-entropy in nats, summed; `()` int64 number of images whose highest score is that of their target,
        or of its most probable class.
    """
    loss = functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    labels = targets if targets.dim() == 1 else targets.argmax(dim=1)
    return loss, (logits.argmax(dim=1) == labels).sum()


def refuse_batch_norm(model: nn.Module) -> None:
    """Raise if a network's result for an image depends on the other images.

    Raises:
        ConfigError: It has batch normalisation, whose result depends on how a batch is divided.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"train.reduction exact does not work with {type(module).__name__} ({name}), whose result depends on "
                f"how a batch is divided: use GroupNorm, or train.reduction ddp."
            )
