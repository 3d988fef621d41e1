"""A folder with `train` and `val` alone trains, resumes, and is evaluated and shown on its validation images."""

import json

import pytest

pytestmark = pytest.mark.quick
SETTINGS = ["--epochs", 2, "--device", "cpu", "--batch-size", 8, "--set", "data.image_size=16"]


@pytest.fixture
def folder(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=20, test=5)
    (root / "test").rename(root / "valid")
    return root


def test_a_run_without_test_images_reports_its_validation_images(folder, command):
    trained = command("train", "--data", folder, "--processes", 2, "--run", "run", *SETTINGS)
    assert trained.code == 0, trained.err
    assert "validation accuracy" in trained.out
    assert "(evaluated 10/10)" in trained.out
    assert "test loss" not in trained.out
    assert " test" not in trained.out.replace("validation", "")
    run = folder.parent / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert not [name for line in epochs for name in line if name.startswith("test")]
    result = json.loads((run / "result.json").read_text())
    assert result["evaluated"] == "10/10"
    assert result["best"]["validation_accuracy"] == max(line["validation_accuracy"] for line in epochs)

    evaluated = command("evaluate", run, "--json").json()
    assert evaluated["accuracy"] == pytest.approx(result["metrics"]["validation_accuracy"])
    assert "of 10 validation images are right" in command("show", run, "--count", 2).out
    again = command("evaluate", run, "--data", folder, "--json").json()
    assert again["accuracy"] == evaluated["accuracy"]
    refused = command("evaluate", run, "--split", "test")
    assert refused.code == 2
    assert "use --split train or validation" in refused.err


def test_a_runs_own_folder_without_splits_is_never_evaluated_on_its_training_images(folder, command, tmp_path):
    flat = (folder / "train").rename(tmp_path / "flat")
    assert command("train", "--data", flat, "--run", "run", *SETTINGS).code == 0
    usual, named = (command("evaluate", "run", *words) for words in ((), ("--data", flat)))
    assert usual.out == named.out
    assert "validation accuracy" in named.out
    (flat / "class-0" / "0.png").unlink()  # other images: all of them are new to the run, as far as anyone knows
    other = command("evaluate", "run", "--data", flat)
    assert "test accuracy" in other.out
    assert "(evaluated 39/39)" in other.out
