"""`train` from a user's side: what it prints and what it leaves behind."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

KEYS = {"epoch", "step", "images", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "images_per_second",
        "seconds", "learning_rate", "validation_loss", "validation_accuracy"}  # fmt: skip


def journal(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_the_first_line_says_that_the_embedded_digits_are_used(trained_run):
    output = (trained_run.parents[1] / "output.txt").read_text()
    assert "embedded digits" in output.splitlines()[0]
    assert "device: cpu (as asked)" in output
    assert "precision: fp32" in output
    assert "\x1b" not in output
    assert "evaluated 359/359" in output
    assert "monitor runs" in output


def test_the_journal_has_a_row_an_epoch_with_the_contracts_keys(trained_run):
    rows = journal(trained_run, "epoch")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all(set(row) >= KEYS for row in rows)
    assert sum(row["images"] for row in rows) == rows[-1]["step"] * 32
    steps = journal(trained_run, "step")
    assert steps[-1]["step"] == rows[-1]["step"]
    for row in rows:
        mine = [step for step in steps if step["epoch"] == row["epoch"]]
        assert mine
        assert min(step["accuracy"] for step in mine) <= row["train_accuracy"] <= max(s["accuracy"] for s in mine)


def test_result_evaluate_and_last_row_agree(command, trained_run):
    result = json.loads((trained_run / "result.json").read_text())
    row = journal(trained_run, "epoch")[-1]
    evaluated = command("evaluate", trained_run, "--json").json()
    assert result["status"] == "finished"
    assert result["evaluated"] == "359/359"
    assert result["metrics"]["test_accuracy"] == row["test_accuracy"] == evaluated["accuracy"] > 0.9
    assert result["metrics"]["test_loss"] == row["test_loss"] == pytest.approx(evaluated["loss"], rel=1e-6)
    assert sum(entry["correct"] for entry in evaluated["classes"].values()) == evaluated["correct"]


def test_evaluation_by_three_processes_is_the_same(command, trained_run):
    alone = command("evaluate", trained_run, "--json", OMP_NUM_THREADS="1").json()
    assert command("evaluate", trained_run, "--json", "--processes", 3, OMP_NUM_THREADS="1").json() == alone


def test_the_newest_two_and_the_best_checkpoint_are_kept(command, trained_run):
    best = json.loads((trained_run / "result.json").read_text())["best"]
    accuracies = {row["step"]: row["validation_accuracy"] for row in journal(trained_run, "epoch")}
    assert best["validation_accuracy"] == max(accuracies.values())
    kept = {int(path.name.removeprefix("step-")) for path in (trained_run / "checkpoints").iterdir()}
    assert kept == {*sorted(accuracies)[-2:], best["step"]}
    by_name = command("evaluate", trained_run, "--checkpoint", "best", "--split", "validation", "--json").json()
    assert (by_name["step"], by_name["accuracy"]) == (best["step"], best["validation_accuracy"])


def test_tensorboard_has_scalars_pictures_hyper_parameters_and_config_in_one_file(trained_run):
    assert len(list((trained_run / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(trained_run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {f"by_step/{name}" for name in ("loss", "accuracy", "learning_rate", "images_per_second")} <= set(
        tags["scalars"]
    )
    for name in ("test_accuracy", "test_loss", "train_loss", "validation_accuracy"):
        points = [(point.step, round(point.value, 4)) for point in events.Scalars(f"by_epoch/{name}")]
        assert points == [(row["epoch"], round(row[name], 4)) for row in journal(trained_run, "epoch")]
    assert len(events.Images("test_predictions")) == 4
    assert "config/text_summary" in tags["tensors"]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hyper_parameters = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hyper_parameters["optimizer.learning_rate"].number_value == 0.005


def test_the_resolved_config_is_saved_with_origins_and_shown(command, trained_run):
    saved = (trained_run / "config.yaml").read_text()
    assert command("config", "show", trained_run).out == saved
    lines = {line.split(":")[0].strip(): line for line in saved.splitlines()}
    assert lines["epochs"].endswith("# --epochs")
    assert lines["validation_fraction"].endswith("# --set")
    assert lines["global_batch"].endswith("# quick")
    assert lines["clip_norm"].endswith("# default")


def test_json_is_all_that_standard_output_has(command):
    ended = command("train", "--epochs", "1", "--json", "--run", "run")
    record = ended.json()
    assert record["status"] == "finished"
    assert record["run"] == "run"
    assert "epoch 1/1" in ended.err


@pytest.mark.parametrize("processes", [1, 2])
def test_micro_batches_change_nothing_but_rounding(command, tmp_path, processes):
    words = ["train", "--config", "quick", "--json", "--set", "train.max_steps=8", "--set", "model.dropout=0"]
    words += ["--set", "optimizer.name=sgd", "--set", "train.clip_norm=1"]
    whole = command(*words, "--run", "whole").json()["metrics"]
    pieces = command(*words, "--run", "pieces", "--processes", processes, "--set", "train.micro_batch=4")
    assert "32 = 4 x" in pieces.err
    for name in ("train_loss", "test_loss"):
        assert pieces.json()["metrics"][name] == pytest.approx(whole[name], rel=1e-4)


def test_the_same_command_gives_the_same_weights_and_another_seed_others(command):
    words = [
        "train",
        "--epochs",
        "1",
        "--json",
        "--set",
        "data.augment.rotation_degrees=10",
        "--set",
        "train.threads=1",
    ]
    runs = [command(*words, "--seed", seed, "--run", f"run{n}").json() for n, seed in enumerate((0, 0, 1))]
    hashes = [run["weights_sha256"] for run in runs]
    assert hashes[0] == hashes[1] != hashes[2]


def test_bf16_on_request_and_for_every_later_evaluation(command, tmp_path):
    ended = command("train", "--epochs", "1", "--precision", "bf16", "--device", "cpu")
    assert ended.code == 0, ended.err
    assert "precision: bf16 (as asked)" in ended.out
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert command("evaluate", run, "--json").json()["loss"] == pytest.approx(result["metrics"]["test_loss"], rel=1e-6)


def test_a_changed_picture_folder_trains_with_any_class_names(command, tmp_path, folder_of):
    folder_of(tmp_path / "Dataset", classes=4, val=5, size=20)
    words = ["--set", "train.global_batch=8", "--set", "data.image_size=20", "--set", "data.channels=3"]
    ended = command("train", "--epochs", "6", "--run", "run", "--json", *words)
    assert ended.code == 0, ended.err
    assert ended.json()["metrics"]["test_accuracy"] == 1
    assert "validation_accuracy" in ended.json()["metrics"]
    predicted = command("predict", "run", "Dataset/test/class-2", "--json").json()
    assert {row["label"] for row in predicted} == {"class-2"}
    assert len(predicted) == 7


def test_a_dry_run_writes_nothing(command, tmp_path):
    ended = command("train", "--dry-run", "--processes", "2")
    assert ended.code == 0
    assert "processes      2" in ended.out
    assert "32 = 16 x 1 x 2" in ended.out
    assert not list(tmp_path.iterdir())


def test_a_compiled_network_learns_the_same(command, tmp_path):
    losses = {}
    for compiled in ("false", "true"):
        settings = ["model.dropout=0", "train.max_steps=6", "train.log_every=1", f"train.compile={compiled}"]
        words = [word for setting in settings for word in ("--set", setting)]
        outcome = command("train", "--config", "quick", "--run", compiled, *words)
        assert outcome.code == 0, outcome.err
        losses[compiled] = [row["loss"] for row in journal(tmp_path / compiled, "step")]
    assert len(losses["true"]) == 6
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-3)


def test_prepared_steps_are_announced_and_change_no_bit(command, tmp_path):
    words = ["--config", "quick", "--device", "cpu", "--set", "train.threads=1", "--epochs", "2"]
    prepared = command("train", *words, "--run", "prepared", "--set", "train.graph=auto")
    assert "256 steps prepared at a time, run one by one on the CPU" in prepared.out
    several = command("train", *words, "--run", "two", "--processes", 2, "--set", "train.graph=auto")
    assert "steps one by one: 2 processes exchange gradients" in several.out
    plain = command("train", *words, "--run", "plain", "--set", "train.graph=off")
    assert "graph" not in plain.out
    hashes = [
        json.loads((tmp_path / run / "result.json").read_text())["weights_sha256"] for run in ("prepared", "plain")
    ]
    assert hashes[0] == hashes[1]
    assert journal(tmp_path / "prepared", "step")[-1]["loss"] == journal(tmp_path / "plain", "step")[-1]["loss"]


def test_compiling_for_the_cpu_without_a_compiler_is_refused(command, tmp_path):
    outcome = command("train", "--config", "quick", "--set", "train.compile=true", PATH=str(tmp_path), CXX="")
    assert outcome.code == 2
    assert "needs a C++ compiler" in outcome.err


def test_smoothed_labels_are_trained_towards_and_not_evaluated_against(command, tmp_path):
    words = ["--config", "quick", "--set", "train.label_smoothing=0.5", "--epochs", "3", "--run", "smooth"]
    assert command("train", *words).code == 0
    row = journal(tmp_path / "smooth", "epoch")[-1]
    entropy = -(0.55 * math.log(0.55) + 9 * 0.05 * math.log(0.05))  # of a target: no network comes below
    assert entropy < row["train_loss"] < entropy + 0.5
    assert row["test_loss"] < entropy
    assert row["test_accuracy"] > 0.9


@pytest.mark.mnist
def test_the_fast_recipe_makes_a_good_classifier_of_undecoded_pictures(command, mnist_idx):
    assert command("data", "import", "--from", mnist_idx, "--to", "Dataset").code == 0
    outcome = command("train", "--config", "fast", "--run", "fast", "--json")
    assert outcome.code == 0, outcome.err
    assert "Decoding 70,000 images" in outcome.err
    result = outcome.json()
    assert result["evaluated"] == "10000/10000"
    assert result["metrics"]["test_accuracy"] > 0.985


def test_the_names_that_people_try_first_are_options_with_their_origin(command):
    words = ["--model", "large_cnn", "--batch-size", "16", "--lr", "0.5", "--processes", "2"]
    ended = command("train", "--dry-run", *words)
    assert ended.code == 0, ended.err
    assert "global batch   16 = 8 x 1 x 2" in ended.out
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    for line in ("name: large_cnn # --model", "global_batch: 16 # --batch-size", "learning_rate: 0.5 # --lr"):
        assert line in lines


def test_a_run_folder_is_a_config_for_every_command(command, trained_run):
    shown = command("config", "show", trained_run)
    assert command("config", "validate", trained_run).code == 0
    ended = command("train", "--config", trained_run, "--dry-run")
    assert ended.code == 0, ended.err

    def values(text):
        return [value for line in text.splitlines() if (value := line.partition("#")[0].rstrip())]

    assert values(ended.out.partition("\n\n")[2]) == values(shown.out)
    assert command("verify", "--config", trained_run, "--set", "train.reductoin=exact").code == 2


def test_val_is_taken_for_the_validation_split(command, trained_run):
    ended = command("evaluate", trained_run, "--split", "val", "--json")
    assert ended.json()["split"] == "validation"
