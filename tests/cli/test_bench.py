"""The real command on tiny images: what it finds fits together, and nothing is left behind."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from cost_model import CostModel

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

    exchange = found["collective"]
    assert (exchange["collective"], exchange["processes"]) == ("all-reduce", 2)
    assert exchange["gradient_bytes"] == 4 * found["parameters"]
    assert exchange["gradient_bytes"] in [size for size, _ in exchange["seconds_by_bytes"]]
    assert [row["global_batch"] for row in found["parts_of_batch"]] == [2, 4, 8]
    assert all(math.isfinite(value) for value in found["others"].values())
    assert found["advice"]["suggestion"]

    script = Path(__file__).parents[2] / "benchmarks" / "cost_model.py"
    words = [sys.executable, script, "--processes", "2", "4"]
    printed = subprocess.run(words, input=json.dumps(found), capture_output=True, text=True, check=True).stdout
    # The formula of docs/scaling.md.
    model = CostModel.of(found)
    ring = 2 * model.latency + model.gradient_bytes / model.bandwidth
    rate = 8 / (model.alone.fixed + 4 * model.alone.each + model.overhead + ring)
    row = next(line.split() for line in printed.splitlines() if line.strip().startswith("2 "))
    assert row[1] == f"{rate:,.0f}"
    assert row[3] == f"{two['images_per_second']:,.0f}"


def test_what_cannot_be_measured_is_refused_before_any_process_starts(command):
    ended = command("bench", "-n", 3, "--set", "train.global_batch=64")
    assert ended.code == 2
    assert ended.err.strip() == (
        "error: train.global_batch is 64, which 3 processes cannot share equally: use 63 or 66."
    )
