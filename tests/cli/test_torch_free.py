"""Commands that can answer without torch do: it takes seconds to import."""

import subprocess
import sys

import pytest

from mnist_dist.launch.group import Group
from mnist_dist.launch.supervise import run_local

PROBE = """
import sys
sys.argv = ["mnist-dist", *sys.argv[1:]]
from mnist_dist.cli import _run
code = _run()
print("MODULES", code, *(name for name in ("torch", "torchvision", "accelerate", "tensorboard") if name in sys.modules))
"""

COMMANDS = ["train", "evaluate", "predict", "show", "monitor", "bench", "doctor", "data", "data import", "data check",
            "data stats", "launch local", "launch torchrun", "launch accelerate", "launch slurm", "launch kubernetes",
            "config", "config list", "config show", "config validate"]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        *((f"{command} --help", 0) for command in COMMANDS),
        ("config list", 0),
        ("config show quick --set train.epochs=3", 0),
        ("config validate baseline", 0),
        ("data check nowhere", 3),
        ("data import --from nowhere", 3),
        ("train --dry-run", 0),
        ("train --data nowhere --dry-run", 3),
        ("train --set train.epoch=3", 2),
        ("train --processes 3", 2),
        ("train --config nothing", 2),
        ("monitor nowhere", 2),
        ("bench --processes 3", 2),
        ("bench --data nowhere", 3),
        ("launch local -n 2 --dry-run -- train", 0),
        ("launch local -n 2 -- true", 0),
        ("doctor", 0),  # what torch holds of a GPU ends with the processes that have looked at it
        ("launch torchrun --dry-run -- train --run r", 0),
        ("launch accelerate --dry-run -- train --run r", 0),
        ("launch slurm --dry-run -- train --run r", 0),
    ],
)
def test_a_command_that_needs_no_torch_does_not_import_it(words, code, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", PROBE, *words.split()], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.splitlines()[-1] == f"MODULES {code}", ended.stderr


HEAVY = ("torch._dynamo.eval_frame", "torch._inductor", "torch._refs", "torch.distributed.tensor", "torch.onnx",
         "torchvision", "sympy", "pandas", "scipy", "matplotlib", "sklearn", "tensorflow")  # fmt: skip
"""What takes long to import and no plain training needs."""

RANK = f"""
import os, sys
sys.argv = ["mnist-dist", *sys.argv[1:]]
from mnist_dist.cli import _run
code = _run()
if os.environ["RANK"] == "0":
    print("HEAVY", code, *(name for name in {HEAVY} if name in sys.modules))
sys.stdout.flush()
os._exit(code)
"""


@pytest.mark.quick
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plain_training_imports_nothing_heavy_that_it_does_not_need(ranks, tmp_path, capfd):
    words = ["train", "--epochs", "1", "--run", str(tmp_path / "run"), "--device", "cpu"]
    run_local(Group(command=(sys.executable, "-c", RANK, *words), ranks=ranks, threads=1))
    assert capfd.readouterr().out.splitlines()[-1] == "HEAVY 0"
