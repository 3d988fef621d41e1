"""The benchmarks run from end to end on a tiny set, and say what they were run with."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(tmp_path, folder_of):
    data = folder_of(tmp_path / "pictures")

    def run(script, *words):
        ended = subprocess.run(
            [sys.executable, BENCHMARKS / script, "--data", data, "--output", tmp_path / "out", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


def test_compare_writes_a_table_a_chart_and_every_measurement(benchmark, tmp_path):
    names = ("mnist-dist train", "PyTorch, tensors in memory")
    only = [word for name in names for word in ("--only", name)]
    printed = benchmark("compare.py", "--rounds", 1, "--batches", 8, "--limit", 20, *only)
    record = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [row["name"] for row in record["measurements"]] == list(names)
    assert all(row["images_per_second"] > 0 for row in record["measurements"])
    assert record["summary"][1]["ours_over_this"] > 0
    assert record["machine"]["cores"] >= 1
    assert "--rounds 1" in record["command"]
    page = (tmp_path / "out" / "speed.md").read_text()
    assert f"| {names[1]} |" in page
    assert f"| {names[1]} |" in printed
    assert record["machine"]["versions"]["torch"] in page
    assert len(list(ElementTree.parse(tmp_path / "out" / "speed.svg").iter("{http://www.w3.org/2000/svg}path"))) == 2


def test_time_to_accuracy_decodes_in_every_run_and_leaves_the_pictures_alone(benchmark, tmp_path):
    smallest = ("--set", "train.epochs=1", "--set", "train.global_batch=8")
    benchmark("time_to_accuracy.py", "--config", "baseline", *smallest, "--seeds", 1, "--plain-runs", 1)
    record = json.loads((tmp_path / "out" / "time-to-accuracy.json").read_text())
    ours, plain = record["measurements"]
    assert (ours["name"], ours["seed"], ours["evaluation_seconds"]) == ("baseline", 0, None)
    assert 0 < plain["evaluation_seconds"] < plain["seconds"]
    assert "plain PyTorch, one epoch" in (tmp_path / "out" / "time-to-accuracy.md").read_text()
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["test", "train"]


def run(script, *words):
    command = [sys.executable, BENCHMARKS / script, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_step_profile_has_the_rate_of_every_operator_that_multiplies(tmp_path, folder_of):
    printed = run("step_profile.py", "--data", folder_of(tmp_path / "pictures"), "--batch", 8, "--steps", 2)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    rates = {name: rate for name, _, _, _, rate in rows[2:] if rate}
    assert set(rates) == {"mkldnn_convolution", "convolution_backward", "addmm", "mm"}
    assert sum(float(row[3].rstrip("%")) for row in rows[2:]) == pytest.approx(100, abs=2)


def test_one_rank_of_many_is_measured_alone():
    found = json.loads(run("many_ranks.py", "--ranks", 1, 8, "--json"))
    assert list(found) == ["1", "8"]
    assert all(figure > 0 for row in found.values() for figure in row.values())
    assert found["8"]["step"] > found["8"]["exchange"]


def test_convolutions_are_timed_as_they_are_wider_and_as_products():
    printed = run("convolutions.py", "--batch", 2, "--rounds", 1)
    assert len([line for line in printed.splitlines() if line.startswith(("| first", "| second"))]) == 6


def test_a_trick_can_be_left_out():
    assert float(run("tricks.py", "--model", "large_cnn", "--batch", 4, "--seconds", 0.1, "--only", "dropout")) > 0


def test_a_busy_program_begins_while_ours_a_plain_loop_and_a_fixed_setting_train(tmp_path, folder_of):
    chosen = ("--works", "small_cnn, batch 64", "--conditions", "begins", "--rounds", 1, "--seconds", 0.5)
    names = ("ours", "plain PyTorch", "1 thread")
    data = folder_of(tmp_path / "pictures", train=30)
    printed = run("busy.py", "--data", data, *chosen, "--settings", *names, "--output", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "busy.json").read_text())
    assert [row["setting"] for row in record["measurements"]] == list(names)
    assert all(row["images_per_second"] > 0 for row in record["measurements"])
    assert "| small_cnn, batch 64 | begins |" in printed
    assert "| small_cnn, batch 64 | begins |" in (tmp_path / "out" / "busy.md").read_text()
