"""Nothing is imported from the folder in which a command is started, by it or by what it starts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODULES = (
    "tensorboard",
    "torch",
    "random",
    "numpy",
    "accelerate",
    "yaml",
    "sitecustomize",
    "multiprocessing",
    "typing",
)


@pytest.fixture
def planted(tmp_path):
    """A folder with modules of common names; each says in a file that it was imported."""
    folder = tmp_path / "received"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r} + ' ')\n")
    return folder


def start(words, folder):
    """Start the program as its installed script does: without the working folder on Python's path."""
    return subprocess.Popen([sys.executable, "-P", "-m", "mnist_dist", *words], cwd=folder,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--epochs", "1", "--run", "../run", "-n", "2"],
        ["launch", "local", "-n", "2", "--", "train", "--epochs", "1", "--run", "../run"],
        ["launch", "torchrun", "--processes-per-node", "2", "--", "train", "--epochs", "1", "--run", "../run"],
        ["launch", "accelerate", "--processes-per-node", "2", "--", "train", "--epochs", "1", "--run", "../run"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_training_imports_no_module_of_the_working_folder(planted, tmp_path, words):
    process = start(words, planted)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()


def test_a_program_of_ones_own_finds_its_modules_beside_it(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    (tmp_path / "mine.py").write_text("import beside; print(beside.VALUE)\n")
    process = start(["launch", "local", "--", sys.executable, "mine.py"], tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "7\n"), err


def test_tensorboard_imports_no_module_of_the_working_folder_and_ends_with_a_killed_monitor(
    planted, tmp_path, free_port
):
    process = start(["monitor", ".", "--port", str(free_port)], planted)
    assert str(free_port) in process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not is_listening(free_port):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (server,) = map(int, children.read_text().split())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    while is_alive(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "imported").exists(), (tmp_path / "imported").read_text()


def is_listening(port):
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines[1:])


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
