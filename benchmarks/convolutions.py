"""How fast the two convolutions of `small_cnn` can be: as they are, with more channels, and as bare matrix products.

Forward and backward pass of each layer by itself, on random values in memory, in turns:

    python benchmarks/convolutions.py --batch 64
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from commands import become_rank
from summary import spread_of
from torch.nn import functional

SIDE = 5
TIMES = 50
LAYERS = {"first": (1, 10, 28), "second": (10, 20, 12)}
"""Channels in and out, and the image's side."""
WIDER = {"first": (1, 16, 28), "second": (16, 32, 12)}


def convolution(batch: int, inputs: int, outputs: int, size: int) -> Callable[[], object]:
    """Build a layer's passes; its input needs a gradient unless it is an image."""
    picture = inputs == 1
    x = torch.randn(batch, size, size, inputs).permute(0, 3, 1, 2).requires_grad_(not picture)
    weight, bias = torch.randn(outputs, inputs, SIDE, SIDE).requires_grad_(), torch.randn(outputs).requires_grad_()
    gradient = torch.randn_like(functional.conv2d(x, weight, bias))
    leaves = [weight, bias] if picture else [x, weight, bias]
    return lambda: torch.autograd.grad(functional.conv2d(x, weight, bias), leaves, gradient)


def products(batch: int, inputs: int, outputs: int, size: int) -> Callable[[], object]:
    """Build products of the same numbers, as if every window was copied to where it is needed already."""
    rows = size - SIDE + 1
    terms, places = inputs * SIDE**2, rows * batch
    kernel, windows = torch.randn(rows, outputs, terms), torch.randn(rows, terms, places)
    gradient = torch.randn(rows, outputs, places)

    def multiply() -> None:
        torch.bmm(kernel, windows)
        torch.bmm(gradient, windows.transpose(1, 2))
        if inputs > 1:
            torch.bmm(kernel.transpose(1, 2), gradient)

    return multiply


def flop(batch: int, inputs: int, outputs: int, size: int) -> float:
    """Count additions and multiplications of all passes."""
    passes = 2 if inputs == 1 else 3
    return passes * 2.0 * batch * (size - SIDE + 1) ** 2 * outputs * inputs * SIDE**2


def seconds_of(work: Callable[[], object]) -> float:
    """Take the mean of some calls after a warm-up."""
    for _ in range(5):
        work()
    began = time.perf_counter()
    for _ in range(TIMES):
        work()
    return (time.perf_counter() - began) / TIMES


def measure(batch: int, rounds: int) -> None:
    """Time in turns and print a table."""
    cases = {}
    for name, (inputs, outputs, size) in LAYERS.items():
        wider = WIDER[name]
        cases[f"{name}, {inputs} to {outputs} channels"] = (convolution, (batch, inputs, outputs, size))
        cases[f"{name}, {wider[0]} to {wider[1]} channels"] = (convolution, (batch, *wider))
        cases[f"{name}, {inputs} to {outputs}, bare products"] = (products, (batch, inputs, outputs, size))
    works = {name: make(*shape) for name, (make, shape) in cases.items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(seconds_of(work))
    print(f"| layer, {batch} images | ms, median of {rounds} (range) | GFLOP/s |\n| --- | --- | --- |")
    for name, (_, shape) in cases.items():
        spread = spread_of([1e3 * value for value in seconds[name]])
        print(f"| {name} | {spread.to_text('.2f')} | {flop(*shape) / spread.median / 1e6:,.0f} |")


def main() -> None:
    """Measure in a process as our launcher starts it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    become_rank()
    measure(options.batch, options.rounds)


if __name__ == "__main__":
    main()
