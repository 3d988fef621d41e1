"""Signals that come before a rank can handle them, and interrupts beside other signals."""

import signal
import subprocess
import sys

import pytest

from mnist_dist.launch.processes import Rank

EARLY = """
import os, signal
from mnist_dist.group import signals
os.kill(os.getpid(), signal.SIGINT)
signals.install()
"""
INTERRUPTED = """
import os, signal
from mnist_dist.group import signals
signals.install()
with signals.deferred():
    for number in ({numbers}):
        os.kill(os.getpid(), number)
    print("goes on")
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs signal masks")
def test_an_interrupt_waits_until_a_rank_of_ours_handles_it(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        rank = Rank((sys.executable, "-c", EARLY), {"PYTHONPATH": ":".join(sys.path)}, log, whole=False)
        assert rank.wait(30) == 130
    assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.parametrize(("numbers", "code"), [("15, 2", 0), ("15, 2, 2", 130), ("2, 15, 2", 130), ("2, 15, 15", 0)])
def test_the_second_interrupt_ends_a_process_whatever_came_besides(numbers, code):
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED.format(numbers=numbers)], capture_output=True, timeout=30)
    assert (ended.returncode, b"goes on" in ended.stdout) == (code, code == 0)


@pytest.mark.parametrize("caught", [True, False])
def test_a_signal_that_breaks_an_import_ends_the_command_with_the_signals_code(caught):
    """A library may catch the exit inside of an import, which leaves a module that fails later in any way."""
    code = (
        "import os, sys\n"
        "from mnist_dist import cli\n"
        "import mnist_dist.cli.app as tree\n"
        "def app(**options):\n"
        f"    if {caught}:\n"
        "        try:\n"
        "            os.kill(os.getpid(), 15)\n"
        "        except SystemExit:\n"
        "            pass\n"
        "    raise RecursionError('of a module that was half imported')\n"
        "tree.app = app\n"
        "sys.argv = ['mnist-dist', 'config', 'list']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (143 if caught else 1)
    assert ("RecursionError" in done.stderr) is not caught
