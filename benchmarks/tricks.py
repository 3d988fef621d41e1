"""What each trick of the training step brings: images a second with all of them, and with one of them left out.

Only the step itself, on random pictures in memory; each measurement is a process of its own, in turns:

    python benchmarks/tricks.py --batch 64 --rounds 5
    python benchmarks/tricks.py --batch 64 --model large_cnn

`tests/unit` holds that none of them changes more than rounding: pooling first and the optimizer's step not a bit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import torch
from summary import spread_of
from torch import nn
from torch.nn import functional

from mnist_dist.config.schema import Sgd
from mnist_dist.fast.imports import leave_out_compiler
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.launch.group import KEEP_MEMORY
from mnist_dist.models import LargeCNN, SmallCNN, build_model
from mnist_dist.training.optimizers import build_optimizer

ALL = "as it is"
LEFT_OUT = {
    "channels": "pictures with channels first in memory",
    "pooling": "pooling after mask and ReLU",
    "optimizer": "the public Optimizer.step and zero_grad",
    "dropout": "nn.Dropout for the many values of large_cnn",
}
ADDED = {
    "malloc": "and glibc keeps freed memory (MALLOC_MMAP_THRESHOLD_ and others)",
    "compile": "and torch.compile",
}
PICTURES = 8192


class LatePoolingSmall(SmallCNN):
    """`SmallCNN` as it is usually written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Score `(B, C, H, W)` images as `(B, K)` logits."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2_drop(self.conv2(x))), 2)
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.fc2(self.fc1_drop(x))


class LatePoolingLarge(LargeCNN):
    """`LargeCNN` as pytorch/examples writes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Score `(B, C, H, W)` images as `(B, K)` logits."""
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        x = functional.relu(self.fc1(self.conv2_drop(functional.max_pool2d(x, 2)).flatten(1)))
        return self.fc2(self.fc1_drop(x))


LATE_POOLING = {"small_cnn": LatePoolingSmall, "large_cnn": LatePoolingLarge}


def images_per_second(variant: str, options: argparse.Namespace) -> float:
    """Train for some seconds after a warm-up."""
    if variant != "compile":
        leave_out_compiler()
    shape = {"classes": 10, "channels": 1, "image_size": 28}
    late = LATE_POOLING[options.model] if variant == "pooling" else None
    model: nn.Module = late(**shape) if late else build_model(options.model, **shape)
    if variant == "dropout":
        model.conv2_drop = nn.Dropout(model.conv2_drop.p)
    layout = torch.contiguous_format if variant == "channels" else torch.channels_last
    pictures, labels = torch.randn(PICTURES, 1, 28, 28), torch.randint(10, (PICTURES,))
    optimizer = build_optimizer(Sgd(), model.parameters())
    stepper = Stepper(optimizer)
    network = torch.compile(model) if variant == "compile" else model

    def step() -> None:
        rows = torch.randint(PICTURES, (options.batch,))
        logits = network(pictures.index_select(0, rows).to(memory_format=layout))
        functional.cross_entropy(logits, labels.index_select(0, rows)).backward()
        if variant == "optimizer":
            optimizer.step()
            optimizer.zero_grad()
        else:
            stepper.step()

    for _ in range(30):
        step()
    steps, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < options.seconds:
        step()
        steps += 1
    return steps * options.batch / seconds


def main() -> None:
    """Measure in turns and print medians with their ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(LATE_POOLING), default="small_cnn")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(images_per_second(options.only, options))
        return
    variants = {ALL: ALL} | {key: f"with {text}" for key, text in LEFT_OUT.items()} | ADDED
    if options.model != "large_cnn":
        del variants["dropout"]
    rates: dict[str, list[float]] = {text: [] for text in variants.values()}
    for _ in range(options.rounds):
        for key, text in variants.items():
            environment = os.environ | (KEEP_MEMORY if key == "malloc" else {})
            words = [sys.executable, __file__, *sys.argv[1:], "--only", key]
            ended = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            rates[text].append(float(ended.stdout.split()[-1]))
    if options.json:
        print(json.dumps(rates))
        return
    print(f"{options.model}, steps of {options.batch}: images/s, median of {options.rounds} in turns (range)")
    for text, found in rates.items():
        ratios = [other / own for other, own in zip(found, rates[ALL], strict=True)]
        print(f"{spread_of(found).to_text(',.0f'):28} {spread_of(ratios).median:5.2f} x  {text}")


if __name__ == "__main__":
    main()
