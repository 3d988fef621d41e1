"""Ranks that meet: more than once, in temporary folders of any name, and never deaf while they wait."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "mnist_dist"]
TWICE = """
import atexit
import os
import sys
from pathlib import Path
def write_threads():
    Path(f"threads-{os.environ['RANK']}").write_text(str(len(os.listdir("/proc/self/task"))))
atexit.register(write_threads)  # runs after all that is registered later
from rich.console import Console
from mnist_dist.config import load, parse_setting
from mnist_dist.run import train
for number in range(2):
    settings = ["train.epochs=1", f"train.seed={number}", "train.threads=1", "train.device=cpu"]
    resolved = load("quick", tuple(map(parse_setting, settings)))
    train(resolved, run=Path(f"{sys.argv[1]}-{number}"), console=Console(quiet=True))
"""

AGAIN = """
from pathlib import Path
from rich.console import Console
from mnist_dist.config import load, parse_setting
from mnist_dist.errors import ConfigError
from mnist_dist.run import train
for run in ("absent", "run"):
    settings = ["train.epochs=1", "train.threads=1", "train.device=cpu"]
    resolved = load("quick", tuple(map(parse_setting, settings)))
    try:
        train(resolved, run=Path(run), init_from=Path("none") if run == "absent" else None, console=Console(quiet=True))
    except Exception as error:
        assert run == "absent", error
    else:
        assert run == "run"
"""


def run(words, cwd, **environment):
    return subprocess.run(list(map(str, words)), cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip


@pytest.mark.parametrize(
    "launcher",
    [
        [*PROGRAM, "launch", "local", "-n", "2", "--", sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ],
    ids=["local", "torchrun"],
)
def test_the_same_ranks_can_train_twice(tmp_path, watched, launcher):
    (tmp_path / "twice.py").write_text(TWICE)
    ended = run([*launcher, "twice.py", "run"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, second = (watched(f"run-{number}").result for number in range(2))
    assert first["status"] == second["status"] == "finished"
    assert first["weights_sha256"] != second["weights_sha256"]
    # A thread of gloo's that is left while Python ends can abort the process.
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)] == ["1", "1"]


@pytest.mark.parametrize("name", ["two words", "50%25 off", "#1?x=2", "Fotos-für-später", b"not-\xff-utf8", "-x"])
def test_ranks_meet_in_a_temporary_folder_of_any_name(tmp_path, name):
    folder = os.fsencode(tmp_path) + b"/" + os.fsencode(name)
    os.mkdir(folder)  # noqa: PTH102 - bytes
    words = [*PROGRAM, "train", "--epochs", "1", "--run", "run", "--processes", "2", "--max-restarts", "0"]
    ended = run(words, tmp_path, TMPDIR=os.fsdecode(folder))
    assert ended.returncode == 0, ended.stderr
    assert not [entry for entry in os.listdir(folder) if entry.startswith(b"mnist-dist")]  # noqa: PTH208


def test_a_relative_temporary_folder_is_one_too(tmp_path):
    (tmp_path / "temporary").mkdir()
    ended = run([*PROGRAM, "train", "--epochs", "1", "--run", "run", "-n", "2"], tmp_path, TMPDIR="temporary")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("rank", "number", "code"), [(0, signal.SIGTERM, 143), (1, signal.SIGINT, 130), (0, signal.SIGHUP, 129)]
)
def test_a_rank_that_waits_for_the_others_ends_at_a_signal(started, tmp_path, free_port, rank, number, code):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    process = started("train", "--epochs", "1", "--run", "run", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port))  # fmt: skip
    wait_until_it_waits(process.pid)
    process.send_signal(number)
    _, err = process.communicate(timeout=15)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_rank_that_waits_in_a_first_collective_ends_at_a_signal(started, tmp_path, free_port):
    """The other rank joins and then does nothing."""
    idle = (
        "import datetime, os, time, torch.distributed as dist\n"
        "store, _, _ = next(dist.rendezvous('env://'))\n"
        "dist.init_process_group('gloo', store=dist.PrefixStore('group-0', store), rank=1, world_size=2)\n"
        "open('joined', 'w').close(); time.sleep(600)\n"
    )
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "GLOO_SOCKET_IFNAME": "lo"}
    other = subprocess.Popen([sys.executable, "-c", idle], cwd=tmp_path,
                             env=os.environ | place | {"RANK": "1", "LOCAL_RANK": "1"})  # fmt: skip
    try:
        process = started("train", "--epochs", "1", "--run", "run", **place, RANK="0", LOCAL_RANK="0")
        deadline = time.monotonic() + 60
        while not (tmp_path / "joined").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        wait_until_it_waits(process.pid)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=15)
        assert process.returncode == 143, err
    finally:
        other.kill()
        other.wait()


def wait_until_it_waits(pid):
    """Wait until a process has used no CPU time for a while, long after its start."""
    used, since, deadline = None, time.monotonic(), time.monotonic() + 90
    while time.monotonic() - since < 1.5 or used[0] < 100:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        now = (int(fields[11]), int(fields[12]))
        if used is None or sum(now) > sum(used) + 1:
            used, since = now, time.monotonic()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_RANK": "0", "PMI_SIZE": "4"},
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "MPI_LOCALRANKID": "x"},
        {"ACCELERATE_DEBUG_MODE": "abc", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "perhaps", "FORK_LAUNCHED": "7"},
        {"ACCELERATE_CPU_AFFINITY": "true", "FSDP_VERSION": "9", "ACCELERATE_USE_FSDP": "false"},
    ],
    ids=lambda variables: " ".join(variables),
)
@pytest.mark.parametrize("processes", [1, 2])
def test_variables_of_others_change_nothing(tmp_path, variables, processes):
    words = [*PROGRAM, "train", "--epochs", "1", "--run", "run", "--processes", processes, "--max-restarts", "0"]
    ended = run(words, tmp_path, **variables)
    assert ended.returncode == 0, ended.stderr


ALONE = """
import os, sys, time
import torch.distributed
from mnist_dist import cli
from mnist_dist.data.batches import Batches
torch.distributed.destroy_process_group = lambda *_: time.sleep(90)
take, taken = Batches.take, 0
def failing(self, *images):
    global taken
    taken += 1
    if taken == 5 and os.environ["RANK"] == "1":
        raise ArithmeticError("of this rank alone")
    return take(self, *images)
Batches.take = failing
cli.main()
"""


@pytest.mark.parametrize(
    "launcher",
    [
        [*PROGRAM, "launch", "local", "-n", "2", "--max-restarts", "0", "--", sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ],
    ids=["local", "torchrun"],
)
def test_a_rank_that_fails_alone_says_why_though_leaving_its_group_would_wait_for_ever(tmp_path, launcher):
    """NCCL's destroy_process_group waits for kernels that wait for this very rank; here it sleeps."""
    (tmp_path / "alone.py").write_text(ALONE)
    began = time.monotonic()
    ended = run([*launcher, "alone.py", "train", "--epochs", "1", "--run-dir", "run", "--device", "cpu"], tmp_path)
    assert time.monotonic() - began < 60
    assert ended.returncode == 1
    assert "ArithmeticError: of this rank alone" in ended.stderr


def test_a_program_can_train_again_after_a_run_that_failed(tmp_path, watched):
    """The failed run's group is left as the next one is joined."""
    (tmp_path / "again.py").write_text(AGAIN)
    ended = run([*PROGRAM, "launch", "local", "-n", "2", "--", sys.executable, "again.py"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert watched("run").result["status"] == "finished"


INTERFACES = """
import json, os, sys
from mnist_dist.runtime import start
with start(device="cpu", precision="fp32", threads=1) as runtime:
    if runtime.rank == 0:
        print(json.dumps([os.environ.get(f"{name}_SOCKET_IFNAME") for name in ("GLOO", "NCCL")]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux names the interface of a route")
@pytest.mark.parametrize(
    ("local_ranks", "given", "seen"),
    [(1, {}, ["lo", "=lo"]), (2, {}, ["lo", None]), (1, {"NCCL_SOCKET_IFNAME": "ib0"}, ["lo", "ib0"])],
    ids=["two machines", "one machine", "set by the user"],
)
def test_gloo_and_nccl_take_the_interface_that_leads_to_rank_0(tmp_path, free_port, local_ranks, given, seen):
    """The ranks of both machines run here."""
    (tmp_path / "meet.py").write_text(INTERFACES)
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": str(local_ranks), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port), **given}  # fmt: skip
    ranks = [
        subprocess.Popen([sys.executable, "meet.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                         env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank % local_ranks)})
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert json.loads(outputs[0]) == seen


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs unshare and root")
@pytest.mark.parametrize(
    "words",
    [["train", "--run", "run", "-n", "2"], ["launch", "local", "--", "true"], ["monitor", "."],
     ["launch", "torchrun", "--", "train", "--run", "run"]],
    ids=" ".join,
)  # fmt: skip
def test_a_machine_without_a_loopback_interface_is_told_so(tmp_path, words):
    ended = run(["unshare", "-n", *PROGRAM, *words], tmp_path)
    if "unshare failed" in ended.stderr:
        pytest.skip("new network namespaces are not permitted here")
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: The loopback interface (127.0.0.1) of this machine cannot be used")
    assert len(ended.stderr.splitlines()) == 1
