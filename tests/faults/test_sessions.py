"""What a rank starts ends with it, and a launcher that is suspended suspends its ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = [sys.executable, "-m", "mnist_dist", "launch", "local", "-n", "2", "--max-restarts", "0", "--"]


@pytest.fixture(autouse=True)
def _temporary_folder(tmp_path, monkeypatch):
    """A killed launcher leaves its folder to the next one."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def launched(tmp_path):
    """Launch a shell script as two ranks; each notes in `started-RANK` what it has started.

    What stands before ` first; ` is done before that: `set -m` gives it a process group of its own.
    """
    running = []

    def launch(script):
        file = tmp_path / "script.sh"
        first, _, script = script.rpartition(" first; ")
        file.write_text(f"{first}\nsleep 600 & echo $! > started.$RANK; mv started.$RANK started-$RANK\n{script}\n")
        words = [*LAUNCH, "bash", str(file)]
        launcher = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(launcher)
        wait_for(lambda: all((tmp_path / f"started-{rank}").exists() for rank in range(2)))
        return launcher, [int((tmp_path / f"started-{rank}").read_text()) for rank in range(2)]

    yield launch
    for launcher in running:
        launcher.kill()
        launcher.communicate()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(pid):
    """The letter with which Linux shows a process: T is suspended; none is gone."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if letter == "Z" else letter


@pytest.mark.parametrize(
    ("script", "signals", "code"),
    [
        ("[ $RANK = 1 ] && exit 9; wait", [], 9),
        ("exit 0", [], 0),
        ("set -m first; exit 0", [], 0),
        ("set -m first; [ $RANK = 1 ] && exit 9; wait", [], 9),
        ("trap 'exit 3' TERM; [ $RANK = 1 ] && exit 9; wait", [], 9),
        ("wait", [signal.SIGTERM], 143),
        ("wait", [signal.SIGINT], 130),
        ("trap '' INT TERM; wait; wait", [signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_what_a_rank_has_started_ends_with_it(launched, script, signals, code):
    launcher, started = launched(script)
    for number in signals:
        time.sleep(0.2)  # two at once would be one
        launcher.send_signal(number)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == code, err
    assert "Traceback" not in err
    wait_for(lambda: not any(map(state, started)))


@pytest.mark.parametrize("inherited", ["signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
                                       "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))"])  # fmt: skip
def test_signals_that_were_ignored_or_blocked_where_this_was_started_are_no_hindrance(tmp_path, inherited):
    code = f"import os, signal, sys; {inherited}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    words = [sys.executable, "-c", code, *LAUNCH[1:], "bash", "-c", "[ $RANK = 0 ] || exit 9; sleep 600"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 9, ended.stderr


@pytest.mark.parametrize("script", ["wait", "set -m first; wait"])
def test_what_ranks_have_started_ends_with_a_launcher_that_is_killed(launched, script):
    launcher, started = launched(script)
    assert all(map(state, started))
    launcher.kill()
    launcher.communicate(timeout=30)
    wait_for(lambda: not any(map(state, started)))


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGTTOU, signal.SIGTTIN])
def test_a_suspended_launcher_suspends_its_ranks_and_all_go_on_together(launched, number):
    launcher, started = launched("wait")
    launcher.send_signal(number)
    wait_for(lambda: [state(pid) for pid in (launcher.pid, *started)] == ["T", "T", "T"])
    launcher.send_signal(signal.SIGCONT)
    wait_for(lambda: "T" not in [state(pid) for pid in (launcher.pid, *started)])
    launcher.send_signal(signal.SIGTERM)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 143, err


def test_time_spent_suspended_is_no_hanging(started, watched, ranks_of):
    """The patience is shorter than the suspension, and shorter than what a machine that slept would explain."""
    run = watched("my run")
    process = started("train", "--epochs", "1000", "--run", run.path, "--processes", 2, "--hang-timeout", 2,
                      "--max-restarts", 0, OMP_NUM_THREADS="1")  # fmt: skip
    run.wait_for(lambda: (run.path / "metrics.jsonl").exists() and len(run.journal()) > 0, process)
    process.send_signal(signal.SIGTSTP)
    wait_for(lambda: [state(pid) for pid in (process.pid, *ranks_of(process))] == ["T", "T", "T"])
    size = (run.path / "metrics.jsonl").stat().st_size
    time.sleep(3)
    assert (run.path / "metrics.jsonl").stat().st_size == size
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: (run.path / "metrics.jsonl").stat().st_size > size)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "hangs" not in err
    assert "error" not in err
    assert f"saved; go on with `mnist-dist resume '{run.path}'`." in err


@pytest.mark.parametrize("number", [signal.SIGRTMIN + 6, signal.SIGRTMIN, 33])
def test_a_rank_that_dies_of_a_signal_without_a_name_is_reported_like_any_other(launched, number):
    launcher, _ = launched("wait")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[1]), number)
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 7, err
    name = {33: "signal 33", signal.SIGRTMIN: "SIGRTMIN"}.get(number, "SIGRTMIN+6")
    assert f"Rank 1 of 2 was killed by {name} " in err
