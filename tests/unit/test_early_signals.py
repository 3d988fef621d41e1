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
