"""The system calls with which a checkpoint and a run's side files are written: their order, and a kill at each."""

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


def write_under_strace(writer, mode, folder, trace, *options):
    """Let the writer write in one of its modes, with strace watching; gives what it says and the calls it made."""

    def say(line):
        writer.stdin.write(f"{line}\n")
        writer.stdin.flush()

    say(f"{mode} {folder}")
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
    outcome, calls = write_under_strace(writer, "third", tmp_path / "checkpoints", tmp_path / "trace")
    assert outcome["code"] == 0
    done = []
    for line in calls:
        if match := re.search(r"(fsync)\(\d+<(.*?)>\)|(rename)\(\"(.*?)\"|(unlink|rmdir)\(.*step-00000001", line):
            kind, path, renamed, source, removed = match.groups()
            done.append((kind or renamed or removed, Path(path or source or "").name))
    temporary = "writing-step-00000003"
    files = ["model.safetensors", "optimizer.safetensors", "meta.json", "MANIFEST.json"]
    expected = [*(("fsync", name) for name in files), ("fsync", temporary), ("rename", temporary)]
    assert done[:7] == [*expected, ("fsync", "checkpoints")]
    assert {kind for kind, _ in done[7:]} <= {"unlink", "rmdir"}
    assert len(done) > 7


def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint_and_the_next_write_goes_through(writer, tmp_path):
    outcome, calls = write_under_strace(writer, "third", tmp_path / "whole", tmp_path / "trace")
    assert outcome["code"] == 0
    names = [match[1] for line in calls if (match := re.match(r"(?!read)(\w+)\(", line))]  # it begins after a read
    renamed = False
    found = Counter()
    for index, name in enumerate(names):
        number = names[: index + 1].count(name)
        folder = tmp_path / f"{index}-{name}"
        kill = f"inject={name}:signal=KILL:when={number}"
        outcome, calls = write_under_strace(writer, "third", folder, tmp_path / "trace", "-e", kill)
        assert outcome["code"] == -signal.SIGKILL, (name, number)
        assert calls[-1] == "+++ killed by SIGKILL +++"
        # The kill comes as the call is entered: the rename itself is not yet done.
        expected = "step-00000003" if renamed else "step-00000002"
        assert outcome["found"] == expected, (name, number)
        assert outcome["warnings"] == []
        assert outcome["after"] == ["step-00000002", "step-00000003"]
        renamed = renamed or name == "rename"
        found[expected] += 1
        shutil.rmtree(folder)
    assert found["step-00000002"] > 20
    assert found["step-00000003"] > 5


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_while_a_step_is_saved_again_leaves_one_of_its_checkpoints(writer, tmp_path, exchange):
    """Where the file system cannot exchange two names, the former checkpoint is found under another one meanwhile."""
    cannot = [] if exchange else ["-e", "inject=renameat2:error=EINVAL"]
    outcome, calls = write_under_strace(writer, "again", tmp_path / "whole", tmp_path / "trace", *cannot)
    assert outcome["code"] == 0
    assert outcome["after"] == ["step-00000001", "step-00000002"]
    changing = r"(rename|renameat2|unlink|rmdir|fsync)\("
    names = [match[1] for line in calls if (match := re.match(changing, line))]
    assert names.count("renameat2") == 1
    assert names.count("rename") == (0 if exchange else 2)
    found = Counter()
    for index, name in enumerate(names):
        if name == "renameat2" and not exchange:
            continue  # it fails already
        number = names[: index + 1].count(name)
        folder = tmp_path / f"{index}-{name}"
        kill = ["-e", f"inject={name}:signal=KILL:when={number}"]
        outcome, calls = write_under_strace(writer, "again", folder, tmp_path / "trace", *cannot, *kill)
        assert outcome["code"] == -signal.SIGKILL, (name, number)
        assert outcome["found"].removeprefix("replaced-") == "step-00000002", (name, number)
        assert outcome["warnings"] == []
        assert outcome["after"] == ["step-00000001", "step-00000002"]
        found[outcome["found"]] += 1
        shutil.rmtree(folder)
    assert found["step-00000002"] > 10
    assert found["replaced-step-00000002"] == (0 if exchange else 1)


def test_side_files_are_synced_before_the_rename_and_whole_after_a_kill_at_any_call(writer, tmp_path):
    outcome, calls = write_under_strace(writer, "side", tmp_path / "whole", tmp_path / "trace")
    assert outcome["code"] == 0
    done = [
        (match[1] or match[3], Path(match[2] or match[4]).name)
        for line in calls
        if (match := re.search(r"(fsync)\(\d+<(.*?)>\)|(rename)\(\"(.*?)\"", line))
    ]
    files = [f".{name}.writing" for name in ("environment.json", "result.json", "config.yaml")]
    assert done == [step for name in files for step in (("fsync", name), ("rename", name), ("fsync", "whole"))]
    names = [match[1] for line in calls if (match := re.match(r"(openat|write|fsync|rename|unlink)\(", line))]
    found = Counter()
    for index, name in enumerate(names):
        number = names[: index + 1].count(name)
        folder = tmp_path / f"{index}-{name}"
        kill = f"inject={name}:signal=KILL:when={number}"
        outcome, _ = write_under_strace(writer, "side", folder, tmp_path / "trace", "-e", kill)
        assert outcome["code"] == -signal.SIGKILL, (name, number)
        assert outcome["warnings"] == []
        assert len(outcome["found"]) == 3
        assert outcome["after"] == ["config.yaml", "environment.json", "result.json"]
        found[sum(outcome["found"])] += 1
    assert min(found[total] for total in (3, 4, 5, 6)) > 0
