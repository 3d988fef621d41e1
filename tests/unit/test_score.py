"""Loss and number correct of a batch, for classes and for probabilities."""

import pytest
import torch
from torch.nn import functional

from mnist_dist.training.reduction import score

LOGITS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLASSES = LOGITS.argmax(dim=1).roll(1)
ONE_HOT = functional.one_hot(CLASSES, 10).double()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_of_one_class_score_as_that_class(smoothing):
    loss, correct = score(LOGITS, CLASSES, label_smoothing=smoothing)
    soft_loss, soft_correct = score(LOGITS, ONE_HOT, label_smoothing=smoothing)
    assert soft_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert soft_correct == correct


def test_a_mixed_target_counts_as_its_most_probable_class_and_its_loss_is_mixed():
    other = CLASSES.roll(1)
    mixed = 0.7 * ONE_HOT + 0.3 * functional.one_hot(other, 10).double()
    loss, correct = score(LOGITS, mixed)
    parts = score(LOGITS, CLASSES)[0], score(LOGITS, other)[0]
    assert loss.item() == pytest.approx(0.7 * parts[0].item() + 0.3 * parts[1].item(), rel=1e-12)
    assert correct == score(LOGITS, CLASSES)[1]
