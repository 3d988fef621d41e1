"""Standard streams that are closed, a terminal that goes, and folders that have gone."""

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest

PROGRAM = [sys.executable, "-m", "mnist_dist"]
QUICK = ["train", "--config", "quick", "--epochs", "1", "--run", "run"]
CLOSED = {"input": "<&-", "output": ">&-", "errors": "2>&-", "all": "<&- >&- 2>&-"}


def run(words, cwd, redirection="", **environment):
    """Run a command behind a shell that closes what it says."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *map(str, words)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize(
    "words", [["config", "list"], ["data", "stats", "Dataset"], ["--version"], ["train", "--dry-run"]], ids=" ".join
)
def test_a_command_does_its_work_without_standard_streams(tmp_path, folder_of, words, closed):
    folder_of(tmp_path / "Dataset", train=40)
    ended = run([*PROGRAM, *words], tmp_path, CLOSED[closed])
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert bool(ended.stdout) == (closed not in ("output", "all"))


def test_a_mistake_without_standard_streams_has_its_exit_code(tmp_path):
    assert run([*PROGRAM, "train", "--config", "nothing"], tmp_path, CLOSED["all"]).returncode == 2


@pytest.mark.parametrize(("closed", "processes"), [("output", 2), ("errors", 1), ("all", 2)])
def test_what_ranks_print_without_standard_streams_goes_into_no_file(tmp_path, watched, closed, processes):
    """The first file that is opened would take the number of a closed stream."""
    ended = run([*PROGRAM, *QUICK, "-n", processes], tmp_path, CLOSED[closed])
    assert ended.returncode == 0, ended.stderr
    assert watched("run").result["status"] == "finished"
    assert [line["kind"] for line in watched("run").journal()]
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"next: " not in file.read_bytes(), file


@pytest.fixture
def terminal(tmp_path):
    """Start a command as the one that a new terminal belongs to; gives it and the terminal's other side."""
    started = []

    def start(*words, hangup=signal.SIG_DFL):
        ours, theirs = pty.openpty()

        def prepare():
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, hangup)

        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
        process = subprocess.Popen([*PROGRAM, *map(str, words)], cwd=tmp_path, env=environment, preexec_fn=prepare,
                                   stdin=theirs, stdout=theirs, stderr=theirs)  # fmt: skip
        os.close(theirs)
        os.set_blocking(ours, False)
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.wait()


def read_until(condition, ours, process):
    """Read what a terminal shows until something is there."""
    shown, deadline = b"", time.monotonic() + 60
    while not condition():
        assert process.poll() is None, shown
        assert time.monotonic() < deadline
        try:
            shown += os.read(ours, 1 << 16)
        except BlockingIOError:
            time.sleep(0.01)
    return shown


def test_a_terminal_that_is_closed_stops_the_run_with_a_checkpoint(watched, terminal):
    run_ = watched("run")
    process, ours = terminal("train", "--config", "quick", "--epochs", "1000", "--run", run_.path, "-n", 2)
    shown = read_until(lambda: (run_.path / "checkpoints").exists() and run_.steps, ours, process)
    assert b"Plan" in shown
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert run_.result["status"] == "stopped"
    assert run_.steps[-1] == run_.result["step"]


def test_ctrl_c_on_a_terminal_says_in_plain_words_how_to_go_on(watched, terminal):
    run_ = watched("run")
    process, ours = terminal("train", "--config", "quick", "--epochs", "1000", "--run", run_.path)
    read_until(lambda: (run_.path / "checkpoints").exists() and run_.steps, ours, process)
    os.write(ours, b"\x03")
    shown, deadline = b"", time.monotonic() + 60
    while process.poll() is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(BlockingIOError):
            shown += os.read(ours, 1 << 16)
        time.sleep(0.01)
    with contextlib.suppress(OSError):
        shown += os.read(ours, 1 << 16)
    os.close(ours)
    assert process.returncode == 130
    assert b"\x1b[?25h" in shown  # the cursor is back
    words = " ".join(shown.decode().split())
    assert "Stopped by SIGINT after step" in words
    assert "saved; go on with `mnist-dist resume" in words
    assert "error" not in words
    assert "\\x" not in words


def test_a_run_that_ignores_hangups_outlives_its_terminal(watched, terminal, ranks_of):
    run_ = watched("run")
    process, ours = terminal("train", "--config", "quick", "--epochs", "8", "--run", run_.path, hangup=signal.SIG_IGN)
    read_until(lambda: (run_.path / "checkpoints").exists() and run_.steps, ours, process)
    os.close(ours)
    (rank,) = ranks_of(process)
    os.kill(rank, signal.SIGKILL)  # one that starts anew finds no terminal at all
    assert process.wait(90) == 0
    assert run_.result["status"] == "finished"


@pytest.mark.parametrize(
    "words",
    [["config", "list"], ["train"], ["data", "check"], ["doctor"], ["launch", "local", "--", "true"]],
    ids=" ".join,
)
def test_a_working_folder_that_was_removed_is_told(tmp_path, words):
    folder = tmp_path / "gone"
    folder.mkdir()
    removed = ["sh", "-c", f'rmdir "{folder}"; exec "$@"', "sh", *PROGRAM, *words]
    ended = subprocess.run(removed, cwd=folder, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr == "error: The working folder has been removed: change to a folder that exists.\n"


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs unshare and root")
@pytest.mark.parametrize(
    "words",
    [["train", "--run", "/dev/shm/never"], ["verify"], ["bench"], ["launch", "local", "--", "true"]],
    ids=" ".join,
)
def test_a_machine_without_a_temporary_folder_is_told_so(words):
    script = (
        "for folder in /tmp /var/tmp /usr/tmp; do\n"
        "  [ ! -d $folder ] || { mount --bind $folder $folder && mount -o remount,ro,bind $folder; } || exit 99\n"
        'done; cd /proc; exec "$@"'
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("TMPDIR", "TEMP", "TMP")}
    ended = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *PROGRAM, *words], env=environment,
                           capture_output=True, text=True, timeout=60)  # fmt: skip
    if ended.returncode == 99 or "unshare failed" in ended.stderr:
        pytest.skip("mounting is not permitted here")
    assert ended.returncode == 5, ended.stderr
    assert "set TMPDIR to one that has free space." in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("words", [["config", "list"], ["config", "show"], QUICK], ids=" ".join)
def test_a_full_disk_behind_standard_output_is_a_storage_error(tmp_path, words):
    ended = run([*PROGRAM, *words], tmp_path, "> /dev/full")
    assert ended.returncode == 5, ended.stderr
    assert "No space left on device: make room." in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr


def test_a_reader_that_has_gone_ends_a_command_as_sigpipe_would(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [*PROGRAM, "config", "list"], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, timeout=60
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "abc"}, {"RANK": "foo"}, {"WORLD_SIZE": "3"}], ids=str)
def test_variables_left_beside_accelerates_change_nothing(tmp_path, left):
    ended = run([*PROGRAM, *QUICK, "--json"], tmp_path, ACCELERATE_DYNAMO_MODE="default", **left)
    assert ended.returncode == 0, ended.stderr
    assert '"finished"' in ended.stdout
