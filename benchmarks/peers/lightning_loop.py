"""Lightning's Trainer over torchvision's ImageFolder, without what costs it time: no logger, bar, checkpoint."""

from __future__ import annotations

from contextlib import AbstractContextManager

import lightning
import torch
from common import Options, Report, SeedCNN, build_loader, build_optimizer, run
from torch import Tensor, nn
from torch.nn import functional


class Classifier(lightning.LightningModule):
    """The network, and what Lightning is to do with it."""

    def __init__(self, report: Report, images: int) -> None:
        super().__init__()
        self.model = SeedCNN()
        self.report, self.images = report, images
        self.timed: AbstractContextManager[None]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Choose the optimizer."""
        return build_optimizer(self.model)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss of a batch."""
        images, labels = batch
        return functional.cross_entropy(self.model(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Count what is right in a batch."""
        images, labels = batch
        accuracy = (self.model(images).argmax(dim=1) == labels).float().mean()
        self.log("test_accuracy", accuracy, batch_size=len(labels))

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        self.timed = self.report.epoch(self.images)
        self.timed.__enter__()

    def on_train_epoch_end(self) -> None:
        """Stop the clock."""
        self.timed.__exit__(None, None, None)


def train(options: Options, report: Report) -> nn.Module:
    """Train the network, and evaluate it if asked to."""
    loader = build_loader(options, "train", report.device)
    classifier = Classifier(report, images=len(loader.dataset))
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        devices=1,
        logger=False,
        log_every_n_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(classifier, loader)
    if options.evaluate:
        with report.evaluation():
            (result,) = trainer.test(classifier, build_loader(options, "test", report.device), verbose=False)
        report.test_accuracy = result["test_accuracy"]
    return classifier.model


if __name__ == "__main__":
    run(train, __doc__)
