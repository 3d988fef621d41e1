"""Ranks that die, hang or fail on one machine: restarts, messages, exit codes, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watched import Watched

WORDS = ["train", "--epochs", "4", "--set", "train.reduction=exact", "--set", "checkpoint.every_steps=10",
         "--set", "train.log_every=5"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("temporary")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bits of the run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    command = [sys.executable, "-m", "mnist_dist", *WORDS, "--run", "run"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    return Watched(folder / "run").bits()


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Have every rank run some code as its Python starts."""

    def make(code):
        folder = tmp_path / "planted"
        folder.mkdir()
        lines = [f"    {line}" for line in code.splitlines()]
        (folder / "sitecustomize.py").write_text("\n".join(["import os", "if 'RANK' in os.environ:", *lines]))
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return make


AT_STEP = """
import mnist_dist.training.loop as loop
whole = loop._set_rate
def planted(parts, step, total_steps):
    if step == {step} and parts.runtime.rank == 1: {fault}
    return whole(parts, step, total_steps)
loop._set_rate = planted
"""


def flat(text):
    return " ".join(text.split())


@pytest.mark.quick
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGSEGV)])
def test_a_rank_that_is_killed_costs_a_restart_and_no_bits(started, watched, whole, ranks_of, rank, number):
    run = watched("run")
    process = started(*WORDS, "--run", run.path, "--processes", 2)
    run.wait_for(lambda: (run.path / "checkpoints").exists() and run.steps, process)
    os.kill(ranks_of(process)[rank], number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"warning: Rank {rank} of 2 was killed by {signal.Signals(number).name}" in err
    assert re.search(r"Starting again from the checkpoint of step \d+ \(try 1 of 3", err)
    assert run.bits() == whole


def test_a_rank_that_hangs_is_found_out_and_the_group_started_again(started, watched, whole, ranks_of):
    run = watched("run")
    process = started(*WORDS, "--run", run.path, "--processes", 2, "--hang-timeout", 2)
    run.wait_for(lambda: (run.path / "checkpoints").exists() and run.steps, process)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "warning: Rank 1 of 2 hangs: no sign of life for 2 s after step" in err
    log = (run.path / "logs" / "rank-0.log").read_text()
    assert "most recent call first" in log
    assert "train.py" in log
    assert run.bits() == whole


def test_ranks_that_hang_at_one_place_are_told_as_that_and_nobody_is_blamed(command, plant, tmp_path):
    plant(AT_STEP.replace(" and parts.runtime.rank == 1", "").format(step=14, fault="__import__('time').sleep(600)"))
    ended = command(*WORDS, "--run", "run", "--processes", 2, "--hang-timeout", 2, "--max-restarts", 0)
    assert ended.code == 7
    words = flat(ended.err)
    assert "All 2 ranks hang: no sign of life for 2 s after step 14." in words
    assert "which one began it is not known; the stacks of the ranks that still answered are in run/logs." in words
    assert "Xid" in words
    for rank in range(2):
        assert "most recent call first" in (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text()


def test_a_rank_that_always_dies_spends_the_restarts(command, plant, watched):
    plant(AT_STEP.format(step=14, fault="os.kill(os.getpid(), 9)"))
    ended = command(*WORDS, "--run", "run", "--processes", 2, "--max-restarts", 2)
    assert ended.code == 7
    assert ended.err.count("warning:") == 2
    assert "Rank 1 of 2 was killed by SIGKILL" in ended.err
    assert "started again 2 times without coming as far as another checkpoint" in ended.err
    assert "`mnist-dist resume run` goes on from the checkpoint of step 10." in ended.err
    assert watched("run").steps == [10]


def test_an_error_at_the_same_step_again_is_no_accident(command, plant, tmp_path):
    plant(AT_STEP.format(step=14, fault="raise ValueError('planted')"))
    ended = command(*WORDS, "--run", "run", "--processes", 2)
    assert ended.code == 1
    assert ended.err.count("warning:") == 1
    assert "error: Rank 1 failed, which is a bug: ValueError: planted." in ended.err
    assert "The same error recurred at the same step" in ended.err
    assert "Traceback" not in ended.err
    log = (tmp_path / "run" / "logs" / "rank-1.log").read_text()
    assert log.count("ValueError: planted") == 2
    assert "Traceback" in log


def test_an_import_that_fails_on_one_rank_is_shown_as_its_own(command, plant, tmp_path):
    plant("if os.environ['RANK'] == '1':\n    import sys\n    sys.modules['safetensors'] = None")
    ended = command(*WORDS, "--run", "run", "--processes", 3, "--set", "train.global_batch=48",
                    "--set", "train.reduction=ddp")  # fmt: skip
    assert ended.code == 1
    assert "Rank 1 failed, which is a bug: ModuleNotFoundError" in flat(ended.err)
    assert ended.err.count("error:") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


NCCL_WORDS = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.26.2\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
"""From pytorch/pytorch #152302."""
IN_PREPARATION = """
from mnist_dist.runtime import Runtime
whole = Runtime.prepare
def planted(self, *given, **named):
    if self.rank == 1: {fault}
    return whole(self, *given, **named)
Runtime.prepare = planted
"""


@pytest.mark.parametrize(
    "place", [AT_STEP.replace("{step}", "4"), IN_PREPARATION], ids=["in a step", "as DDP is built"]
)
def test_a_rank_without_memory_for_nccl_says_so_and_is_not_started_again(command, plant, place):
    fault = f"import torch.distributed as d; raise d.DistBackendError({NCCL_WORDS!r})"
    plant(place.replace("{fault}", fault))
    ended = command(*WORDS, "--run", "run", "--processes", 2, "--set", "train.reduction=ddp")
    assert ended.code == 8, ended.err
    assert "NCCL found no memory on the GPU for its own buffers" in flat(ended.err)
    assert "micro_batch" not in ended.err
    assert "warning" not in ended.err


def test_a_long_way_to_the_first_step_is_no_hanging(command, plant):
    plant("import time\ntime.sleep(4)")
    words = ["train", "--epochs", "1", "--run", "run", "--processes", 2]
    ended = command(*words, "--hang-timeout", "1")
    assert ended.code == 0, ended.err
    assert "warning" not in ended.err


def test_a_rank_that_never_comes_to_its_first_step_hangs_too(command, plant):
    plant(AT_STEP.format(step=0, fault="__import__('time').sleep(600)"))
    ended = command(*WORDS, "--run", "run", "--processes", 2, "--start-timeout", 8, "--max-restarts", 0)
    assert ended.code == 7
    assert "hangs: no sign of life for 8 s before its first step" in ended.err


def test_a_killed_launcher_leaves_no_process_and_the_next_one_cleans_up_after_it(
    started, command, watched, ranks_of, temporary
):
    run = watched("run")
    process = started(*WORDS, "--run", run.path, "--processes", 2)
    run.wait_for(lambda: (run.path / "checkpoints").exists() and run.steps, process)
    ranks = ranks_of(process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/exe").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (stale,) = temporary.glob("mnist-dist*")
    os.utime(stale, (0, 0))
    assert command("resume", run.path, "--processes", 2).code == 0
    assert run.result["status"] == "finished"


def test_nobody_who_reads_is_no_reason_to_start_again(started):
    process = started("train", "--config", "quick", "--epochs", "1000", "--run", "run", "--processes", "2")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert "warning" not in err
    assert "error" not in err
    process.stdout = None
