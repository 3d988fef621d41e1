"""Training on a device: it learns, and takes the same steps as one process on the CPU."""

import json

import pytest

STEPS = ["train", "--config", "quick", "--precision", "fp32", "--set", "optimizer.name=sgd", "--set",
         "optimizer.learning_rate=0.05", "--set", "schedule.name=constant", "--set", "model.dropout=0",
         "--set", "train.max_steps=6", "--set", "train.log_every=1"]  # fmt: skip
"""Six steps on augmented images; rounding changes little in them."""
WAYS = {
    "plain": lambda place: [],
    "accumulation": lambda place: [f"train.micro_batch={place.batch // (4 * place.ranks)}"],
    "exact": lambda place: ["train.reduction=exact"],
    "compiled": lambda place: ["train.compile=true"],
}


@pytest.mark.parametrize(
    ("place", "precision"),
    [
        (("cpu", "one"), "bf16"),
        (("cpu", "all"), "fp32"),
        *(pytest.param(("cuda", "one"), name, marks=pytest.mark.gpu) for name in ("fp32", "bf16", "fp16")),
        pytest.param(("cuda", "all"), "bf16", marks=pytest.mark.gpu(2)),
    ],
    indirect=["place"],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_the_digits_are_learned_in_any_precision(command, tmp_path, place, precision):
    words = ["train", "--config", "quick", "--precision", precision, *place.words, "--batch-size", place.batch]
    ended = command(*words, "--run", "run", "--json", timeout=300)
    assert ended.code == 0, ended.err
    assert ended.json()["metrics"]["test_accuracy"] > 0.97
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    found = (environment["device"], environment["ranks"], environment["precision"])
    assert found == (place.device, place.ranks, precision)


def test_without_a_number_of_processes_every_gpu_has_one(command, place):
    ranks = 1 if place.device == "cpu" else place.ranks
    ended = command("train", "--device", place.device, "--dry-run", "--batch-size", place.batch)
    assert ended.code == 0, ended.err
    assert f"processes      {ranks}\n" in ended.out


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_takes_the_steps_of_one_process_on_the_cpu(finished, place, way):
    steps = [*STEPS, "--batch-size", place.batch]
    settings = [word for setting in WAYS[way](place) for word in ("--set", setting)]
    here = place.in_exact if way == "exact" else place
    expected = finished(*steps, "--device", "cpu").losses()
    found = finished(*steps, *here.words, *settings).losses()
    assert len(found) == 6
    assert found == pytest.approx(expected, rel=1e-4)  # bf16 differs by 4e-5, images without their scaling by 3e-4
