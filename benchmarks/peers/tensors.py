"""The barest loop there is: all images normalised in memory as one tensor, no DataLoader; decoding is not timed."""

from __future__ import annotations

import torch
from common import Options, Report, SeedCNN, build_optimizer, open_pictures, run
from torch import Tensor, nn
from torch.nn import functional


def train(options: Options, report: Report) -> nn.Module:
    """Train the network, and evaluate it if asked to."""
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    images, labels = decode(options, "train", report.device)
    images = images.to(memory_format=layout)
    model = SeedCNN().to(report.device, memory_format=layout)
    optimizer = build_optimizer(model)
    for _ in range(options.epochs):
        with report.epoch(images=len(images)):
            for rows in torch.randperm(len(images), device=report.device).split(options.batch):
                optimizer.zero_grad(set_to_none=True)
                scores = model(images.index_select(0, rows))
                loss = functional.cross_entropy(scores, labels.index_select(0, rows))
                loss.backward()
                optimizer.step()
    if options.evaluate:
        with report.evaluation(), torch.inference_mode():
            images, labels = decode(options, "test", report.device)
            scores = torch.cat([model.eval()(some) for some in images.split(1000)])
            report.test_accuracy = (scores.argmax(dim=1) == labels).float().mean().item()
    return model


def decode(options: Options, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Decode a split into `(N, 1, 28, 28)` normalised float32 images and their `(N,)` int64 labels."""
    pictures = open_pictures(options, split)
    images = torch.empty(len(pictures), 1, 28, 28)
    labels = torch.empty(len(pictures), dtype=torch.int64)
    for row, (image, label) in enumerate(pictures):
        images[row], labels[row] = image, label
    return images.to(device), labels.to(device)


if __name__ == "__main__":
    run(train, __doc__)
