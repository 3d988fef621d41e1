"""What only a CUDA GPU can show; `pytest -m gpu` runs these there."""

import json

import pytest

from mnist_dist.machine import visible_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not visible_gpus(), reason="no CUDA GPU is visible")]


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp16"])
def test_the_embedded_digits_are_learned_in_any_precision(command, tmp_path, precision):
    ended = command("train", "--device", "cuda", "--precision", precision, "--processes", "1", "--run", "run", "--json")
    assert ended.code == 0, ended.err
    record = ended.json()
    assert record["metrics"]["test_accuracy"] > 0.97
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["device"] == "cuda"
    loss = command("evaluate", "run", "--json").json()["loss"]
    assert loss == pytest.approx(record["metrics"]["test_loss"], rel=1e-3)


def test_gpu_and_cpu_agree(command):
    words = ["train", "--precision", "fp32", "--processes", "1", "--json", "--set", "train.max_steps=5"]
    words += ["--set", "model.dropout=0"]
    losses = [command(*words, "--device", device, "--run", device).json() for device in ("cpu", "cuda")]
    cpu, cuda = (record["metrics"]["train_loss"] for record in losses)
    assert cuda == pytest.approx(cpu, rel=1e-3)


def test_more_ranks_than_gpus_are_refused(command):
    ended = command("train", "--device", "cuda", "--processes", 32, "--set", "train.global_batch=32")
    assert ended.code == 2
    assert "cannot have a GPU each" in ended.err
