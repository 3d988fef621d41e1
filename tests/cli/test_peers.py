"""The scripts that ours is measured beside, each as a process."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_dist.models import build_model, count_parameters

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.mark.parametrize(
    ("script", "workers"), [("plain", 2), ("accelerate_loop", 0), ("lightning_loop", 0), ("tensors", 0)]
)
def test_a_peer_trains_our_network_on_as_many_pictures_as_it_is_told(script, workers, folder_of, tmp_path):
    if script == "lightning_loop" and not importlib.util.find_spec("lightning"):
        pytest.skip("needs lightning: pip install -e '.[benchmark]'")
    data = folder_of(tmp_path / "pictures")  # 60 to train
    words = ["--data", data, "--batch", 8, "--epochs", 2, "--workers", workers, "--limit", 30, "--threads", 1]
    ended = subprocess.run(
        [sys.executable, PEERS / f"{script}.py", *map(str, words), "--evaluate"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report["parameters"] == count_parameters(build_model("small_cnn", classes=10, channels=1, image_size=28))
    assert len(report["images_per_second"]) == 2
    assert all(0 < 30 / rate < report["seconds"] for rate in report["images_per_second"])
    assert 0 <= report["test_accuracy"] <= 1
    assert 0 < report["evaluation_seconds"] < report["seconds"]
    assert report["peak_bytes"] > 2**27
    assert (report["largest_worker_peak_bytes"] > 2**26) == (workers > 0)
    assert report["threads"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"], "a peer leaves nothing behind"
