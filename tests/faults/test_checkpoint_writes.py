"""The system calls with which a checkpoint is written: their order, and a kill at each of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

CALLS = "trace=%file,%desc"
"""Every system call that has to do with a file."""

pytestmark = pytest.mark.skipif(not shutil.which("strace") or os.geteuid() != 0, reason="needs strace and root")


@pytest.fixture(scope="module")
def writer():
    script = Path(__file__).with_name("writer.py")
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.communicate()


def write_under_strace(writer, folder, trace, *options):
    """Write step 3 behind steps 1 and 2, with strace watching; gives what the writer says and the calls it made."""

    def say(line):
        writer.stdin.write(f"{line}\n")
        writer.stdin.flush()

    say(folder)
    pid = int(writer.stdout.readline())
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)  # until it waits to begin
    command = ["strace", "-y", "-p", str(pid), "-o", str(trace), "-e", CALLS, *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert "attached" in tracer.stderr.readline()
    say("go")
    outcome = json.loads(writer.stdout.readline())
    tracer.communicate(timeout=30)
    return outcome, trace.read_text().splitlines()


def test_files_are_synced_before_the_rename_and_old_ones_removed_after_it(writer, tmp_path):
    outcome, calls = write_under_strace(writer, tmp_path / "checkpoints", tmp_path / "trace")
    assert outcome["code"] == 0
    done = []
    for line in calls:
        if match := re.search(r"(fsync)\(\d+<(.*?)>\)|(rename)\(\"(.*?)\"|(unlinkat|rmdir)\(.*step-00000001", line):
            kind, path, renamed, source, removed = match.groups()
            done.append((kind or renamed or removed, Path(path or source or "").name))
    temporary = "writing-step-00000003"
    files = ["model.safetensors", "optimizer.safetensors", "meta.json", "MANIFEST.json"]
    expected = [*(("fsync", name) for name in files), ("fsync", temporary), ("rename", temporary)]
    assert done[:7] == [*expected, ("fsync", "checkpoints")]
    assert {kind for kind, _ in done[7:]} <= {"unlinkat", "rmdir"}
    assert len(done) > 7


def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint_and_the_next_write_goes_through(writer, tmp_path):
    outcome, calls = write_under_strace(writer, tmp_path / "whole", tmp_path / "trace")
    assert outcome["code"] == 0
    names = [match[1] for line in calls if (match := re.match(r"(?!read)(\w+)\(", line))]  # it begins after a read
    renamed = False
    found = Counter()
    for index, name in enumerate(names):
        number = names[: index + 1].count(name)
        folder = tmp_path / f"{index}-{name}"
        kill = f"inject={name}:signal=KILL:when={number}"
        outcome, calls = write_under_strace(writer, folder, tmp_path / "trace", "-e", kill)
        assert outcome["code"] == -signal.SIGKILL, (name, number)
        assert calls[-1] == "+++ killed by SIGKILL +++"
        # The kill comes as the call is entered: the rename itself is not yet done.
        expected = "step-00000003" if renamed else "step-00000002"
        assert outcome["newest_whole"] == expected, (name, number)
        assert outcome["warnings"] == []
        assert outcome["after"] == ["step-00000002", "step-00000003"]
        renamed = renamed or name == "rename"
        found[expected] += 1
        shutil.rmtree(folder)
    assert found["step-00000002"] > 20
    assert found["step-00000003"] > 5
