"""How fast a device multiplies, how much of that an image needs, and how much memory a process has taken."""

from __future__ import annotations

import sys
import time

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from mnist_dist.bench.windows import synchronise
from mnist_dist.training.parts import Parts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIDES = (512, 1024, 2048, 4096, 8192)
"""Of the square matrices: a device reaches its rate only with large ones."""
LONGEST = 0.1
"""Seconds: where a product takes longer, larger ones are not tried."""
REPEATS = 5


def matrix_flop_per_second(device: torch.device, precision: str) -> float:
    """Measure the best rate of products of square matrices, an addition and a multiplication being two operations.

    Args:
        device: Where.
        precision: Of the matrices' values.
    """
    best = 0.0
    for side in SIDES:
        square = torch.rand(side, side, device=device).to(DTYPES[precision])
        fastest = min(_seconds_of_product(square) for _ in range(REPEATS))
        best = max(best, 2 * side**3 / fastest)
        if fastest > LONGEST:
            break
    return best


def _seconds_of_product(square: torch.Tensor) -> float:
    synchronise(square.device)
    began = time.perf_counter()
    torch.mm(square, square)
    synchronise(square.device)
    return time.perf_counter() - began


def flop_per_image(parts: Parts) -> float:
    """Count what forward and backward pass need for one image: convolutions and matrix products alone. One rank."""
    micro_batch, _ = parts.config.train.split_batch(1)
    return sum(flop_by_operator(parts).values()) / micro_batch


def flop_by_operator(parts: Parts) -> dict[str, int]:
    """Count what forward and backward pass of a micro-batch need, by the names of torch's operators. One rank.

    The counter is torch's own; pooling, activations, the loss and the optimizer are not in it.
    """
    micro_batch, _ = parts.config.train.split_batch(1)
    images, epochs = (values[:micro_batch] for values in parts.sampler.batch(0))
    pixels, labels = parts.batches["train"].take(images, epochs)
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(parts.reduction.model(pixels), labels).backward()  # type: ignore[no-untyped-call]
    parts.optimizer.zero_grad()
    return {str(operator).removeprefix("aten."): flop for operator, flop in counter.get_flop_counts()["Global"].items()}


def peak_memory() -> int:
    """Get the most memory that this process has had resident so far, in bytes; 0 where the system doesn't say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
