"""The real command on tiny images: what it finds fits together, and nothing is left behind."""

import math

import pytest

PARTS = ("input", "compute", "communication", "other")


@pytest.fixture
def found(command, tmp_path, folder_of, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    folder_of(tmp_path / "Dataset")
    before = sorted(tmp_path.iterdir())
    diverging = ["--set", "train.global_batch=8", "--set", "optimizer.learning_rate=1e6"]  # but no measurement does
    ended = command("bench", "--seconds", "0.05", "-n", 2, "--device", "cpu", *diverging, "--json")
    assert ended.code == 0, ended.err
    assert sorted(tmp_path.iterdir()) == before
    assert list(temporary.iterdir()) == []
    return ended.json()


def test_two_processes_are_measured_and_the_figures_fit_together(found):
    one, two = found["scaling"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["speedup"] == one["efficiency"] == 1
    assert two["speedup"] == pytest.approx(two["images_per_second"] / one["images_per_second"])
    for row in found["scaling"]:
        assert row["windows"] % 2 == 1
        assert 0 < row["least"] <= row["images_per_second"] <= row["most"]
        step = row["step"]
        assert sum(step[part] for part in PARTS) == pytest.approx(step["seconds"])
        assert step["seconds"] == pytest.approx(found["global_batch"] / row["images_per_second"])  # on a CPU
        assert all(step[part] > 0 for part in ("input", "compute", "other"))
        assert step["communication"] >= 0
    assert one["step"]["communication"] == 0

    alternatives = {(row["precision"], row["global_batch"]) for row in found["alternatives"]}
    assert alternatives == {("bf16", 8), ("fp32", 32)}
    assert found["arithmetic"]["flop_per_image"] == pytest.approx(2.58e6, rel=0.01)  # 3 classes
    assert 0 < found["arithmetic"]["share"] < 1
    assert 0 < found["memory"]["imports"] <= found["memory"]["peak"] < 2**34

    collective, model = found["collective"], found["prediction"]
    exchange = collective["exchange"]
    assert exchange["collective"] == "all-reduce"
    assert exchange["gradient_bytes"] == 4 * found["parameters"]
    assert exchange["gradient_bytes"] in [size for size, _ in collective["seconds_by_bytes"]]
    assert [images for images, _ in model["seconds_by_images"]] == [2, 4, 8]
    assert [row["processes"] for row in model["predictions"]] == [2, 4, 8]
    # The formula of docs/scaling.md, with the figures as a reader finds them.
    ring = 2 * exchange["latency_seconds"] + exchange["gradient_bytes"] / exchange["bytes_per_second"]
    seconds = model["fixed_seconds"] + 4 * model["seconds_per_image"] + model["overhead_seconds"] + ring
    assert model["predictions"][0]["images_per_second"] == pytest.approx(8 / seconds)
    assert 1 <= model["pays_up_to"] <= 8
    assert all(math.isfinite(value) for value in found["others"].values())
    assert found["advice"]["suggestion"]


def test_what_cannot_be_measured_is_refused_before_any_process_starts(command):
    ended = command("bench", "-n", 3, "--set", "train.global_batch=64")
    assert ended.code == 2
    assert ended.err.strip() == (
        "error: train.global_batch is 64, which 3 processes cannot share equally: use 63 or 66."
    )
