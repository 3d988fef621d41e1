"""The real command on this machine, well and with planted faults."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What the command says where a lot is amiss."""
    folder = tmp_path_factory.mktemp("planted")
    config = folder / "hf" / "accelerate" / "default_config.yaml"
    config.parent.mkdir(parents=True)
    config.write_text("distributed_type: MULTI_CPU\nmixed_precision: bf16\nnum_processes: 2\n")
    faults = {
        "HF_HOME": str(folder / "hf"),
        "WORLD_SIZE": "2",
        "ACCELERATE_MIXED_PRECISION": "fp8",
        "GLOO_SOCKET_IFNAME": "nowhere0",
    }
    return subprocess.run(
        [sys.executable, "-m", "mnist_dist", "doctor", "--json", "--data", "nothing"],
        cwd=folder,
        env=os.environ | faults,
        capture_output=True,
        text=True,
        timeout=120,
    )


def finding(ended, check):
    (found,) = (record for record in json.loads(ended.stdout) if record["check"] == check)
    return found


def test_a_machine_where_all_is_well_gets_a_table_that_fits_and_exit_code_0(command, tmp_path, folder_of):
    folder_of(tmp_path / "Dataset", classes=2, train=3, test=2)
    ended = command("doctor", COLUMNS="80", HF_HOME=str(tmp_path))
    assert ended.code == 0, ended.out
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["check", "state", "found", "advice"]
    checks = [line.split("  ")[0].rstrip() for line in lines[2:-2] if not line.startswith(" ")]
    for check in ("Python", "packages", "CPUs", "torch", "CUDA", "NCCL", "gloo", "cpu", "all-reduce", "data"):
        assert check in checks
    words = " ".join(ended.out.split())
    assert re.search(r"gloo: 2 processes, 1 MiB in \d+\.\d\d ms", words)
    assert "Dataset: 6 train, 4 test; 2 classes" in words
    assert re.fullmatch(r"\d+ ok, \d+ warnings?, 0 problems", lines[-1])


def test_problems_give_exit_code_2_and_each_fault_a_line_of_advice(planted):
    assert planted.returncode == 2
    assert "Traceback" not in planted.stderr
    records = json.loads(planted.stdout)
    assert {tuple(record) for record in records} == {("check", "state", "found", "advice")}
    for record in records:
        assert bool(record["advice"]) == (record["state"] != "ok"), record
        assert "\n" not in record["found"] + record["advice"]


@pytest.mark.parametrize(
    ("check", "state", "words"),
    [
        ("all-reduce", "problem", "nowhere0"),
        ("train takes", "problem", "ACCELERATE_MIXED_PRECISION is 'fp8'"),
        ("data", "problem", "There is no data folder nothing."),
        ("accelerate", "warning", "num_processes 2, distributed_type MULTI_CPU, mixed_precision bf16"),
        ("gloo", "ok", "in this build"),
    ],
)
def test_each_planted_fault_is_found_beside_the_others(planted, check, state, words):
    found = finding(planted, check)
    assert found["state"] == state
    assert words in found["found"]


def test_half_set_launcher_variables_are_found(planted):
    assert "WORLD_SIZE=2" in [record["found"] for record in json.loads(planted.stdout)]


def test_a_torch_that_cannot_be_imported_is_one_problem_among_findings(command, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise OSError('libcudart.so.13: cannot open shared object file')\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    ended = command("doctor", "--json", PYTHONPATH=path)
    assert ended.code == 2, ended.err
    records = {record["check"]: record for record in ended.json()}
    assert records["torch"]["state"] == "problem"
    assert "libcudart.so.13" in records["torch"]["found"]
    assert {"Python", "host name", "data", "environment"} <= records.keys()
    assert "all-reduce" not in records


CRASH = "import os, sys\nif '--device' in sys.argv and 'all' in sys.argv:\n    os.kill(os.getpid(), 11)\n"


def test_a_driver_that_crashes_torch_is_one_problem_among_findings(command, tmp_path):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(CRASH)
    ended = command("doctor", "--json", PYTHONPATH=str(tmp_path / "planted"))
    assert ended.code == 2, ended.err
    records = {record["check"]: record for record in ended.json()}
    assert "SIGSEGV" in records["torch"]["found"]
    assert "nvidia-smi" in records["torch"]["advice"]
    assert {"Python", "host name", "data", "environment"} <= records.keys()
