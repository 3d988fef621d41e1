"""The state that a checkpoint saves is read by versions that know more figures, or fewer."""

import pytest

from mnist_dist.observe.records import EpochReport
from mnist_dist.training.state import Progress

ROW = {
    "epoch": 1, "step": 20, "images": 1280, "train_loss": 0.5, "train_accuracy": 0.8, "test_images": 360,
    "test_loss": 0.4, "test_accuracy": 0.9, "images_per_second": 1e4, "seconds": 2.0, "learning_rate": 0.1,
}  # fmt: skip


def record(row):
    return {**Progress(step=20).to_json(), "last": row}


def test_a_figure_that_an_older_version_did_not_write_reads_as_absent():
    last = Progress.from_json(record(ROW)).last
    assert isinstance(last, EpochReport)
    assert last.validation_loss is None
    assert "validation_loss" not in last.metrics()
    assert last.test_accuracy == 0.9


def test_a_figure_that_a_newer_version_wrote_is_passed_over():
    assert Progress.from_json(record(ROW | {"top_5_accuracy": 0.99})) is not None


@pytest.mark.parametrize("row", [{**ROW, "train_loss": "low"}, [1], "none"])
def test_a_row_with_wrong_figures_is_refused(row):
    with pytest.raises(ValueError, match="last"):
        Progress.from_json(record(row))
