"""The order of the system calls with which a checkpoint is written."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHANGES = ("mkdir", "openat", "write", "fsync", "rename", "unlinkat", "rmdir")

pytestmark = pytest.mark.skipif(not shutil.which("strace") or os.geteuid() != 0, reason="needs strace and root")


@pytest.fixture(scope="module")
def writer():
    script = Path(__file__).with_name("writer.py")
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.communicate()


def write_under_strace(writer, folder, *options):
    """Write step 3 behind steps 1 and 2, with strace watching; gives the writer's exit code."""
    writer.stdin.write(f"{folder}\n")
    writer.stdin.flush()
    pid = int(writer.stdout.readline())
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-p", str(pid), *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert "attached" in tracer.stderr.readline()
    os.kill(pid, signal.SIGCONT)
    code = int(writer.stdout.readline())
    tracer.communicate(timeout=30)
    return code


def test_files_are_synced_before_the_rename_and_old_ones_removed_after_it(writer, tmp_path):
    trace, folder = tmp_path / "trace", tmp_path / "checkpoints"
    names = ",".join(CHANGES)
    assert write_under_strace(writer, folder, "-e", f"trace={names}", "-o", str(trace)) == 0
    done = []
    for line in trace.read_text().splitlines():
        if match := re.search(r"(fsync)\(\d+<(.*?)>\)|(rename)\(\"(.*?)\"|(unlinkat|rmdir)\(.*step-00000001", line):
            kind, path, renamed, source, removed = match.groups()
            done.append((kind or renamed or removed, Path(path or source or "").name))
    temporary = "writing-step-00000003"
    files = ["model.safetensors", "optimizer.safetensors", "meta.json", "MANIFEST.json"]
    expected = [*(("fsync", name) for name in files), ("fsync", temporary), ("rename", temporary)]
    assert done[:7] == [*expected, ("fsync", "checkpoints")]
    assert {kind for kind, _ in done[7:]} <= {"unlinkat", "rmdir"}
    assert len(done) > 7
