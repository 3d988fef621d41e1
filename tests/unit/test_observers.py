import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from mnist_dist.observe.console import TrainingConsole
from mnist_dist.observe.figures import RIGHT, WRONG, Sample, sample_grid
from mnist_dist.observe.terminal import print_samples
from mnist_dist.reports import EpochReport, Evaluation, Plan, Result, StepReport

PLAN = Plan(
    run="runs/a-name-that-is-rather-long-20260101-120000", device="cpu", device_reason="no GPU found",
    precision="fp32", precision_reason="the safe choice on cpu", ranks=2, threads=1, threads_reason="as asked",
    global_batch=64, micro_batch=16, accumulation=2, reduction="ddp", first_step=0, total_steps=100, epochs=2,
    model="small_cnn", parameters=21840,
    optimizer="sgd, learning rate 0.03", schedule="cosine", augmentation="none", data="Dataset",
    classes=tuple("0123456789"), train_images=3200, validation_images=320, test_images=700,
    store="decoded earlier, Dataset/.mnist-dist/x",
)  # fmt: skip
EPOCH = EpochReport(
    epoch=1, step=50, images=3200, train_loss=0.5, train_accuracy=0.9, test_images=700, test_loss=0.25,
    test_accuracy=0.9512, validation_loss=0.3, validation_accuracy=0.94, images_per_second=12345.6, seconds=1.5,
    learning_rate=0.03,
)  # fmt: skip
RESULT = Result(
    status="finished", run=PLAN.run, step=100, epochs=2, seconds=9.5, evaluated="700/700", metrics=EPOCH.metrics()
)
NOBODY = Evaluation(split="test", labels=np.zeros(1, int), predicted=np.zeros(1, int), losses=np.zeros(1, np.float32))


def watch(console):
    observer = TrainingConsole(console)
    observer.plan(PLAN)
    observer.progress(10)
    observer.step(StepReport(step=50, epoch=1, loss=0.5, accuracy=0.9, learning_rate=0.03, images_per_second=12345.6))
    observer.epoch(EPOCH, NOBODY)
    observer.result(RESULT)
    observer.close()
    return console.file.getvalue()


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, legacy_windows=False)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_no_line_is_wider_than_the_terminal(width):
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", watch(terminal(width)))
    assert max(map(len, re.split(r"[\r\n]", output))) <= width
    assert "95.12%" in output


def test_a_resumed_run_shows_the_epoch_that_it_is_in():
    console = terminal(120)
    observer = TrainingConsole(console)
    observer.plan(replace(PLAN, first_step=50))
    observer.close()
    assert "epoch 2/2" in console.file.getvalue()


def test_a_wide_terminal_has_every_column_and_a_narrow_one_the_chief_ones():
    titles = ["epoch", "train loss", "val. acc.", "test loss", "test acc."]
    wide, narrow = watch(terminal(160)), watch(terminal(80))
    assert all(title in wide and title in narrow for title in titles)
    assert "learn. rate" in wide
    assert "learn. rate" not in narrow


def test_without_a_terminal_there_are_plain_lines_alone():
    output = watch(Console(file=io.StringIO(), width=80))
    assert "\x1b" not in output
    assert "\r" not in output
    assert "global batch: 64 = 16 x 2 x 2" in output
    assert re.search(r"^epoch 1/2  step 50  train loss 0.5000 .*test loss 0.2500 accuracy 95.12%.*$", output, re.M)
    assert "evaluated 700/700" in output
    assert output.count("next:") == 3


def sample(predicted, true):
    return Sample(pixels=np.full((1, 28, 28), 200, np.uint8), predicted=predicted, true=true)


def colours(picture):
    return {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in picture.getcolors(1 << 24)}


def test_wrong_predictions_alone_are_marked():
    right, wrong = sample_grid([sample("1", "1")]), sample_grid([sample("7", "1")])
    assert RIGHT in colours(right)
    assert WRONG not in colours(right)
    assert WRONG in colours(wrong)


def test_a_grid_has_a_place_for_each_picture():
    one, nine = sample_grid([sample("1", "1")]), sample_grid([sample("1", "1")] * 9)
    assert nine.width > 7 * one.width
    assert nine.height > 1.8 * one.height


@pytest.mark.parametrize("colour", [True, False])
def test_pictures_are_drawn_in_any_terminal(colour):
    console = Console(file=io.StringIO(), force_terminal=colour, color_system="truecolor" if colour else None, width=80)
    print_samples(console, [sample("7", "1"), sample("2", "2")])
    output = console.file.getvalue()
    assert "7  (true 1)" in output
    assert ("▀" in output) is colour
