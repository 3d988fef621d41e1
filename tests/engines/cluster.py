"""A real two-node Slurm on this host, and two network namespaces that stand for two machines."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


class Slurm:
    """slurmctld and two slurmd's, all in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool-n1", "spool-n2"):
            (root / name).mkdir(parents=True)
        key = root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        root.chmod(0o755)
        ports = {name: _free_port() for name in ("ctl", "n1", "n2")}
        (root / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports["ctl"]}
SlurmctldPidFile={root}/slurmctld.pid
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdTimeout=10
SlurmdParameters=config_overrides
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmdPidFile={root}/slurmd-%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports["n1"]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports["n2"]} CPUs=2 RealMemory=4000
PartitionName=debug Nodes=n[1-2] Default=YES
""")
        self.environment = {
            "SLURM_CONF": str(root / "slurm.conf"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def start(self) -> None:
        files = {name: self.root / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        options = [f"--key-file={self.root / 'munge.key'}", f"--socket={files['socket']}", f"--pid-file={files['pid']}",
                   f"--log-file={files['log']}", f"--seed-file={files['seed']}"]  # fmt: skip
        self.run("munged", "--force", *options)
        conf = self.environment["SLURM_CONF"]
        self.run("slurmctld", "-f", conf, "-c", "-L", str(self.root / "slurmctld.log"))
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%t %D").split() == ["idle", "2"], "two idle nodes", 30)

    def start_node(self, node: str) -> None:
        log = str(self.root / f"{node}.log")
        self.run("slurmd", "-N", node, "-f", self.environment["SLURM_CONF"], "-c", "-L", log)

    def stop(self) -> None:
        self.run("scancel", "--user=root", check=False)
        wait_for(lambda: not self.run("squeue", "-h", check=False).strip(), "an empty queue", 30)
        files = [self.root / f"{name}.pid" for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munge")]
        pids = [int(file.read_text()) for file in files if file.exists()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "the daemons' end", 30)

    def run(self, *words: str, cwd: Path | None = None, check: bool = True) -> str:
        done = subprocess.run(
            words, cwd=cwd, env=os.environ | self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.partition("=")[::2] for word in words)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Machines:
    """Two network namespaces, joined by a cable, each with a folder of its own."""

    ADDRESSES = ("10.77.0.1", "10.77.0.2")
    HEAD = "head-of-the-test"

    def __init__(self, root: Path) -> None:
        self.names = [f"md{os.getpid()}{side}" for side in "ab"]
        self.folders = [root / side for side in "ab"]
        self.started: list[subprocess.Popen[bytes]] = []
        for folder in self.folders:
            folder.mkdir(parents=True)

    def connect(self) -> None:
        ends = ("va", "vb")
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", "va", "netns", self.names[0], "type", "veth", "peer", "name", "vb", "netns", self.names[1])
        for name, end, address in zip(self.names, ends, self.ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                _ip("-n", name, "link", "set", device, "up")
            _ip("-n", name, "route", "add", "default", "dev", end)
            # As Debian sets machines up: one's own name is 127.0.1.1. And no waiting for name servers.
            etc = Path("/etc/netns") / name
            etc.mkdir(parents=True)
            own = "127.0.1.1" if name == self.names[0] else self.ADDRESSES[0]
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{own} {self.HEAD}\n")
            (etc / "nsswitch.conf").write_text("hosts: files\n")

    def disconnect(self) -> None:
        for node in range(2):
            self.kill(node)
        for process in self.started:
            process.wait(30)
        for name in self.names:
            _ip("netns", "delete", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def start(self, node: int, words: list[object], **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on a machine; what it prints goes to `out` in the machine's folder."""
        folder = self.folders[node]
        variables = {"PATH": f"{BIN}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with (folder / "out").open("ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], *map(str, words)],
                cwd=folder,
                env=os.environ | variables | environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def kill(self, node: int) -> list[int]:
        """Kill whatever runs on a machine."""
        pids = [int(pid) for pid in _ip("netns", "pids", self.names[node]).split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def cut(self, seconds: float) -> None:
        """Pull the cable for a while."""
        _ip("-n", self.names[0], "link", "set", "va", "down")
        time.sleep(seconds)
        _ip("-n", self.names[0], "link", "set", "va", "up")

    def out(self, node: int) -> str:
        return (self.folders[node] / "out").read_text(errors="replace")


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
