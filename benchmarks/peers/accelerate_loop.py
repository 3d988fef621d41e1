"""Hugging Face Accelerate's prepared loop over torchvision's ImageFolder."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from common import Options, Report, SeedCNN, build_loader, build_optimizer, run
from torch import nn
from torch.nn import functional


def train(options: Options, report: Report) -> nn.Module:
    """Train the network, and evaluate it if asked to."""
    accelerator = Accelerator()
    model = SeedCNN()
    model, optimizer, loader = accelerator.prepare(
        model, build_optimizer(model), build_loader(options, "train", accelerator.device)
    )
    for _ in range(options.epochs):
        with report.epoch(images=len(loader.dataset)):
            for images, labels in loader:
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
    if options.evaluate:
        with report.evaluation():
            report.test_accuracy = evaluate(model.eval(), options, accelerator)
    accelerator.free_memory()  # or it keeps the loader, and the loader its workers
    return model


@torch.inference_mode()
def evaluate(model: nn.Module, options: Options, accelerator: Accelerator) -> float:
    """Measure the accuracy on the test images."""
    loader = accelerator.prepare(build_loader(options, "test", accelerator.device))
    correct = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for images, labels in loader:
        predictions, labels = accelerator.gather_for_metrics((model(images).argmax(dim=1), labels))
        correct += (predictions == labels).sum()
    return correct.item() / len(loader.dataset)


if __name__ == "__main__":
    run(train, __doc__)
