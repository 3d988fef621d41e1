"""A plain PyTorch loop over torchvision's ImageFolder."""

from __future__ import annotations

import torch
from common import Options, Report, SeedCNN, build_loader, build_optimizer, run
from torch import nn
from torch.nn import functional


def train(options: Options, report: Report) -> nn.Module:
    """Train the network, and evaluate it if asked to."""
    device = report.device
    loader = build_loader(options, "train", device)
    model = SeedCNN().to(device)
    optimizer = build_optimizer(model)
    for _ in range(options.epochs):
        with report.epoch(images=len(loader.dataset)):
            for images, labels in loader:
                images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                optimizer.zero_grad(set_to_none=True)
                loss = functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
    if options.evaluate:
        with report.evaluation():
            report.test_accuracy = evaluate(model.eval(), options, device)
    return model


@torch.inference_mode()
def evaluate(model: nn.Module, options: Options, device: torch.device) -> float:
    """Measure the accuracy on the test images."""
    loader = build_loader(options, "test", device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in loader:
        correct += (model(images.to(device)).argmax(dim=1) == labels.to(device)).sum()
    return correct.item() / len(loader.dataset)


if __name__ == "__main__":
    run(train, __doc__)
