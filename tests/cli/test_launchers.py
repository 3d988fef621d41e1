"""The same run through every launcher, and what happens to groups of processes that are disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
RECIPES = Path(__file__).parents[2] / "launch"
TRAIN = ["train", "--epochs", "2", "--run", "run"]
MODULE = ["-m", "mnist_dist", "train", "--epochs", "2", "--run-dir", "run"]
LAUNCH = [sys.executable, "-m", "mnist_dist", "launch"]
LAUNCHERS = {
    "processes": [sys.executable, "-m", "mnist_dist", "train", "--epochs", "2", "--run", "run", "--processes", "2"],
    "launch local": [*LAUNCH, "local", "-n", "2", "--", *TRAIN],
    "launch torchrun": [*LAUNCH, "torchrun", "--processes-per-node", "2", "--", *TRAIN],
    "launch accelerate": [*LAUNCH, "accelerate", "--processes-per-node", "2", "--", *TRAIN],
}  # fmt: skip


def run(words, cwd, **environment):
    return subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def by_launcher(tmp_path_factory):
    """Run the same two epochs through each launcher, and in one process."""
    folders = {}
    for name, words in LAUNCHERS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        ended = run(words, folders[name], ACCELERATE_USE_CPU="true")
        assert ended.returncode == 0, ended.stderr
        logs = "".join(log.read_text() for log in (folders[name] / "run" / "logs").glob("*.log"))
        assert "Grad strides" not in ended.stderr + logs  # DDP's complaint about the layout in memory
    folders["alone"] = tmp_path_factory.mktemp("alone")
    ended = run(LAUNCHERS["processes"][:-2], folders["alone"])
    assert ended.returncode == 0, ended.stderr
    return folders


def result(folder):
    return json.loads((folder / "run" / "result.json").read_text())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_do_what_one_process_does(by_launcher, launcher):
    alone, group = result(by_launcher["alone"]), result(by_launcher[launcher])
    assert json.loads((by_launcher[launcher] / "run" / "environment.json").read_text())["ranks"] == 2
    assert group["step"] == alone["step"] == 90
    assert group["evaluated"] == "359/359"
    assert group["metrics"]["images"] == alone["metrics"]["images"]
    assert group["metrics"]["test_accuracy"] == pytest.approx(alone["metrics"]["test_accuracy"], abs=0.02)
    assert len(list((by_launcher[launcher] / "run" / "tensorboard").iterdir())) == 1


def test_all_launchers_end_with_the_same_weights(by_launcher):
    hashes = {launcher: result(by_launcher[launcher])["weights_sha256"] for launcher in LAUNCHERS}
    assert len(set(hashes.values())) == 1, hashes


def test_accelerate_launch_without_ranks_starts_nothing_more(tmp_path):
    words = [BIN / "accelerate", "launch", "--config_file", RECIPES / "accelerate" / "cpu.yaml"]
    ended = run([*words, *MODULE], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 1
    assert not (tmp_path / "run" / "logs").exists()


def test_a_group_of_another_size_than_the_recipe_says_is_refused(tmp_path):
    words = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    ended = run(
        [*words, "--mixed_precision", "no", "--dynamo_backend", "no", *MODULE], tmp_path, MNIST_DIST_WORLD_SIZE="2"
    )
    assert ended.returncode != 0
    assert "MNIST_DIST_WORLD_SIZE is 2, but this group has 1" in ended.stderr


def test_a_dry_run_under_a_launcher_trains_nothing(tmp_path):
    words = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", *MODULE, "--dry-run"]
    ended = run(words, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("global batch   32 = 16 x 1 x 2") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def slow_pictures(tmp_path, folder_of):
    """A folder whose images take many seconds to decode: one large image under 1,500 names."""
    root = folder_of(tmp_path / "Dataset", train=1, test=1, size=1500)
    for number in range(1, 500):
        for label in range(3):
            first = root / "train" / f"class-{label}" / "0.png"
            first.with_name(f"{number}.png").hardlink_to(first)
    return root


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_pictures_are_decoded_ends_everything_soon(started, slow_pictures, number, code):
    process = started("train", "--run", "run")
    assert any("Decoding" in process.stdout.readline() for _ in range(2))
    time.sleep(0.3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err == f"Stopped by {number.name} before anything was saved.\n"
    assert not list((slow_pictures / ".mnist-dist").glob("*/index.json"))


@pytest.mark.usefixtures("slow_pictures")
def test_decoding_processes_die_with_a_killed_command(started):
    process = started("data", "check")
    helpers = []
    deadline = time.monotonic() + 30
    while len(helpers) < 2:
        assert time.monotonic() < deadline
        helpers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while not all(gone(pid) for pid in helpers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def training(started, tmp_path):
    """Two ranks in the middle of a run that would take minutes; gives the launcher and the ranks' pids."""
    process = started("train", "--epochs", "100000", "--run", "run", "--processes", "2", "--max-restarts", "0",
                      OMP_NUM_THREADS="1")  # fmt: skip
    journal = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    return process, list(map(int, children))


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_group_with_one_message(training, rank):
    process, children = training
    os.kill(children[rank], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 7
    assert f"error: Rank {rank} of 2 was killed by SIGKILL" in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert all(map(gone, children))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_group_with_its_code(training, tmp_path, number, code):
    process, children = training
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in err
    assert all(map(gone, children))
    assert result(tmp_path)["status"] == "stopped"


def test_ranks_die_with_a_killed_launcher(training):
    process, children = training
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while not all(map(gone, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("engine", ["torchrun", "accelerate"])
def test_a_signal_to_an_engine_stops_its_ranks_with_a_checkpoint_and_leaves_none_behind(started, tmp_path, engine):
    words = ["--processes-per-node", "2", "--", "train", "--epochs", "100000", "--run", "run"]
    process = started("launch", engine, *words, OMP_NUM_THREADS="1")
    journal = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=30)
    assert result(tmp_path)["status"] == "stopped"
    saved = max(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == result(tmp_path)["step"]


def test_ranks_keep_their_memory_unless_the_user_says_how_to_allocate_it(tmp_path):
    print_it = "import os; print(os.environ['MALLOC_TOP_PAD_'], os.environ['MALLOC_TRIM_THRESHOLD_'])"
    ended = run([*LAUNCH, "local", "--", sys.executable, "-c", print_it], tmp_path, MALLOC_TOP_PAD_="4096")
    assert ended.stdout.split() == ["4096", "2147483647"]


def test_a_program_of_ones_own_is_started_again_too(tmp_path):
    script = tmp_path / "thirdly.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\ntries = Path(f\"tries-{os.environ['RANK']}\")\n"
        "tries.open('a').write('x')\nsys.exit(1 if tries.stat().st_size < 3 else 0)\n"
    )
    ended = run([*LAUNCH, "local", "-n", "2", "--", sys.executable, script], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("warning:") == 2
    ended = run([*LAUNCH, "local", "-n", "1", "--max-restarts", "0", "--", "false"], tmp_path)
    assert ended.returncode == 1


def test_a_rank_that_is_killed_before_it_could_save_is_no_clean_stop(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, time\nsignal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), 9))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        list(map(str, [*LAUNCH, "local", "-n", "1", "--", sys.executable, script])),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 7
    assert "was killed by SIGKILL" in err


def test_a_rank_that_fails_alone_is_shown_with_its_own_error(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('the reason')\ntime.sleep(600)\n")
    call = (
        "import sys; from pathlib import Path; from mnist_dist.launch.supervise import Group, run_local\n"
        f"run_local(Group(command=(sys.executable, {str(script)!r}), ranks=3, log=lambda r: Path(f'log-{{r}}')))"
    )
    ended = run([sys.executable, "-c", call], tmp_path)
    assert ended.returncode == 1
    assert "GroupError: Rank 1 of 3 failed with exit code 1; log-1 ends with:\nthe reason" in ended.stderr
