"""What README.md shows works as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_a_checkpoint_loads_in_three_lines_of_plain_torch(trained_run):
    (code,) = (block for block in PYTHON if "load_file" in block)
    probe = code + "import torch\nassert model.eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)\n"
    ended = subprocess.run(
        [sys.executable, "-c", probe], cwd=trained_run.parents[1], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr


def test_the_python_call_trains_twice_in_one_process(tmp_path):
    (code,) = (block for block in PYTHON if "from-python" in block)
    again = 'mnist_dist.train(mnist_dist.load("quick"), run="runs/again")\n'
    ended = subprocess.run(
        [sys.executable, "-c", code + again], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # the bits are compared
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    accuracy = re.search(r"^([01]\.\d+)$", ended.stdout, re.M)
    assert accuracy
    assert float(accuracy[1]) > 0.97
    hashes = [re.search(r'weights_sha256": "(\w+)', (tmp_path / "runs" / name / "result.json").read_text())[1]
              for name in ("from-python", "again")]  # fmt: skip
    assert hashes[0] == hashes[1]


@pytest.mark.quick
@pytest.mark.parametrize("line", re.findall(r"^\| .* \| `(.*(?:torchrun|accelerate launch).*)` \|$", README, re.M))
def test_each_line_for_cpu_ranks_starts_two(line, tmp_path):
    if "ACCELERATE_USE_CPU" not in line and "nproc-per-node 2" not in line:
        pytest.skip("a line for GPUs")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        f"{line} --epochs 1 --set train.max_steps=3", shell=True, cwd=tmp_path, env=environment, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("cpu (no GPU found); 2 processes") + ended.stdout.count("ACCELERATE_USE_CPU); 2") == 1


def test_every_file_that_the_readme_links_to_is_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_test_that_a_page_names_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in tests, f"{page.name} names {name}"


def test_every_file_that_a_page_links_to_is_there():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
