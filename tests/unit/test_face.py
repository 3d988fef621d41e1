"""The package's small face for Python programs."""

import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import mnist_dist
from mnist_dist.errors import ConfigError


def test_importing_the_package_and_reading_a_run_folder_imports_no_torch():
    code = "import sys, mnist_dist, mnist_dist.run.folder, mnist_dist.models; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_program_trains_a_run_and_labels_images_with_it(tmp_path):
    config = mnist_dist.load("quick", {"train.max_steps": 30, "train.device": "cpu"})
    result = mnist_dist.train(config, run=str(tmp_path / "run"), console=Console(quiet=True))
    assert result.step == 30
    with mnist_dist.open_run(tmp_path / "run", device="cpu") as network:
        assert network.classes == tuple("0123456789")
        probabilities = network.predict(np.zeros((3, *network.decoding.shape), np.uint8))
    assert probabilities.shape == (3, 10)
    assert probabilities.sum(axis=1) == pytest.approx(1)


def test_settings_win_and_a_wrong_one_says_where_it_came_from():
    assert mnist_dist.load("quick", {"train.seed": 7}).config.train.seed == 7
    with pytest.raises(ConfigError, match=r"train\.seeed"):
        mnist_dist.load("quick", {"train.seeed": 7})


def test_names_that_scripts_import_are_there():
    from mnist_dist import checkpoint
    from mnist_dist.models import SmallCNN
    from mnist_dist.optim import lr_at

    assert checkpoint.write.__module__ == "mnist_dist.run.checkpoint"
    assert (SmallCNN.__name__, lr_at.__module__) == ("SmallCNN", "mnist_dist.training.optimizers")


def test_what_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = mnist_dist.nothing
