"""What every peer shares: the network, the images, the command line and the report."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

Pictures = ImageFolder | Subset[tuple[Tensor, int]]
MEAN, STD = 0.1307, 0.3081
"""Of MNIST's training pixels, as its examples everywhere have them."""
LEARNING_RATE, MOMENTUM = 0.03, 0.9


class SeedCNN(nn.Module):
    """Two 5x5 convolutions and two linear layers for 28x28 images of ten classes: `small_cnn` in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d(0.25)
        self.fc1 = nn.Linear(320, 50)
        self.fc1_drop = nn.Dropout(0.25)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Score `(B, 1, 28, 28)` images as `(B, 10)` logits."""
        x = functional.relu(functional.max_pool2d(self.conv1(x), 2))  # (B, 10, 12, 12)
        x = functional.relu(functional.max_pool2d(self.conv2_drop(self.conv2(x)), 2))  # (B, 20, 4, 4)
        x = functional.relu(self.fc1(x.flatten(1)))  # (B, 50)
        logits: Tensor = self.fc2(self.fc1_drop(x))
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line of a peer."""

    data: Path
    batch: int
    epochs: int
    workers: int
    threads: int | None
    limit: int | None
    evaluate: bool
    seed: int
    channels_last: bool


@dataclass(slots=True, kw_only=True)
class Report:
    """What a peer measures while it trains."""

    device: torch.device
    rates: list[float] = field(default_factory=list)
    """Training images a second of each epoch."""
    test_accuracy: float | None = None
    evaluation_seconds: float | None = None

    @contextmanager
    def epoch(self, images: int) -> Iterator[None]:
        """Time the training part of an epoch, to the end of what the device was given to do."""
        began = time.perf_counter()
        yield
        self._wait()
        self.rates.append(images / (time.perf_counter() - began))

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Time the evaluation on the test images."""
        began = time.perf_counter()
        yield
        self._wait()
        self.evaluation_seconds = time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def best_device() -> torch.device:
    """Choose the accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Build the SGD of every peer, fused as PyTorch advises."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)


def open_pictures(options: Options, split: str) -> Pictures:
    """Open an image folder; its training images are the same random `--limit` in every run of every peer."""
    # The first generation of transforms: on images this small, it takes a third less time than transforms.v2.
    preprocess = transforms.Compose(
        [transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))]
    )
    pictures = ImageFolder(options.data / split, transform=preprocess)
    if split != "train" or options.limit is None or options.limit >= len(pictures):
        return pictures
    chosen = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[: options.limit]
    return Subset(pictures, chosen.tolist())


def build_loader(options: Options, split: str, device: torch.device) -> DataLoader[tuple[Tensor, int]]:
    """Build the DataLoader of a split, with the settings that PyTorch's documentation recommends."""
    training = split == "train"
    return DataLoader(
        open_pictures(options, split),
        batch_size=options.batch if training else 1000,
        shuffle=training,
        num_workers=options.workers,
        persistent_workers=training and options.workers > 0,
        pin_memory=device.type == "cuda",
    )


def run(train: Callable[[Options, Report], nn.Module], description: str | None) -> None:
    """Parse the command line, train, and print the report as one line of JSON.

    Args:
        train: Trains the network, timing epochs with the report, and gives it back.
        description: Of the peer, for `--help`.
    """
    options = _parse(description)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    report = Report(device=best_device())
    model = train(options, report)
    gc.collect()  # ends the loader's workers; only then is their peak known
    print(
        json.dumps(
            {
                "images_per_second": report.rates,
                "test_accuracy": None if report.test_accuracy is None else round(report.test_accuracy, 6),
                "evaluation_seconds": report.evaluation_seconds,
                "seconds": time.time() - psutil.Process().create_time(),
                "peak_bytes": _peak_bytes(resource.RUSAGE_SELF),
                "largest_worker_peak_bytes": _peak_bytes(resource.RUSAGE_CHILDREN) if options.workers else 0,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "threads": torch.get_num_threads(),
                "device": _name(report.device),
            }
        )
    )


def _parse(description: str | None) -> Options:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--threads", type=int, help="of the arithmetic (default: all cores)")
    parser.add_argument("--limit", type=int, help="training images of an epoch, the same in each (default: all)")
    parser.add_argument("--evaluate", action="store_true", help="measure the accuracy on the test images at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--channels-last", action="store_true", help="keep images as NHWC (tensors.py only)")
    return Options(**vars(parser.parse_args()))


def _peak_bytes(who: int) -> int:
    """Look up the largest resident set of this process, or of the largest child that has ended."""
    return resource.getrusage(who).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
