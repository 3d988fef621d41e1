"""What measures and examines a device: `doctor`, `bench`, and the table of images/s and host waits."""

import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

from mnist_dist.machine import visible_gpus

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MOST_WAITS = {"fp16": 2}
"""Of a step, between two reports: the gradient scaler looks for infinities, and its scale is looked at. Else none."""


@pytest.fixture(scope="session")
def examined(tmp_path_factory):
    """What `doctor` found."""
    words = [sys.executable, "-m", "mnist_dist", "doctor", "--json"]
    folder = tmp_path_factory.mktemp("doctor")
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    return json.loads(ended.stdout)


def test_doctor_finds_every_device_with_what_it_can_do(examined, device):
    found = {record["check"]: record["found"] for record in examined}
    if device == "cpu":
        assert re.search(r"bf16 (native|emulated|unknown)", found["cpu"])
        return
    for index in range(visible_gpus()):
        assert re.search(r"GiB free of .* GiB, bf16 (native|emulated)", found[f"cuda:{index}"])
    assert found["train takes"].startswith("cuda (")


def test_doctor_adds_up_a_tensor_over_all_processes(examined, several):
    library = {"cpu": "gloo", "cuda": "NCCL"}[several.device]
    words = rf"{library}: {several.ranks} processes, 1 MiB in \d+\.\d\d ms"
    sums = [record for record in examined if record["check"] == "all-reduce"]
    assert any(record["state"] == "ok" and re.match(words, record["found"]) for record in sums), sums


def test_bench_measures_a_device_and_another_process_on_one_more(command, report, place):
    place = type(place)(place.device, min(2, place.ranks))
    ended = command("bench", *place.words, "--seconds", "0.2", "--batch-size", place.batch, "--json", timeout=300)
    assert ended.code == 0, ended.err
    found = ended.json()
    assert found["device"] == place.device
    assert [row["processes"] for row in found["scaling"]] == [1, 2][: place.ranks]
    assert all(row["images_per_second"] > 0 for row in found["scaling"])
    report(place, f"bench, batch {place.batch} ({found['precision']})", found["scaling"][-1]["images_per_second"])


def test_between_two_reports_no_step_waits_for_the_device(command, report, heading, place, script):
    size = "small" if place.device == "cpu" else "full"
    path = os.pathsep.join(filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")]))
    launch = ["launch", "local", "--processes", place.ranks, "--max-restarts", 0, "--"]
    ended = command(*launch, *script("steady.py"), place.device, size, PYTHONPATH=path, timeout=300)
    assert ended.code == 0, ended.err
    found = ended.json()
    ways, device = found["ways"], found["ways"]["small_cnn"]["device"]
    heading(", ".join([device, *(f"{name} {version}" for name, version in found["versions"].items() if version)]))
    for name, row in ways.items():
        report(place, f"{name}, batch {row['batch']} ({row['precision']})", row["images_per_second"], row["waits"])
    assert len(ways) >= 5
    for name, row in ways.items():
        assert row["images_per_second"] > 0
        assert sum(row["waits"].values()) <= MOST_WAITS.get(row["precision"], 0), (name, row["waits"])


def test_a_wait_is_counted_by_the_line_that_waits():
    from steady import SYNCHRONISING, counted

    waits = Counter()
    with counted(waits, "cpu"):
        for _ in range(3):
            warnings.warn(f"{SYNCHRONISING} (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    ((place, count),) = waits.items()
    assert place.startswith("test_tools.py:")
    assert count == 3
