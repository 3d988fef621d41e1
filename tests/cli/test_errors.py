"""Each mistake through the real command: one message with the remedy, the contract's exit code, nothing trained."""

import os
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

CLAIM = ["--image", "mnist-dist:0.1.0", "--run-claim", "runs"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["train", "--set", "train.epoch=3"],
            2,
            "no config key 'train.epoch' (from --set). Did you mean 'train.epochs'?",
        ),
        (["train", "--config", "quik"], 2, "no preset 'quik'. Did you mean 'quick'?"),
        (
            ["train", "--epochs", "0"],
            2,
            "train.epochs is 0 (from --epochs): it must be a number from 1e-6 to 1,000,000.",
        ),
        (["launch", "torchrun", "--", "train"], 2, "train needs --run-dir here"),
        (["launch", "torchrun", "--", "evaluate", "r"], 2, "'evaluate' cannot be launched there"),
        (["launch", "torchrun", "--nodes", "2", "--", "train", "--run", "r"], 2, "give --head HOST:PORT"),
        (
            ["launch", "torchrun", "--nodes", "2", "--head", "localhost:x", "--", "train", "--run", "r"],
            2,
            "give HOST or HOST:PORT of machine 0, the port from 1 to 65535",
        ),
        (["launch", "torchrun", "--nodes", "2", "--head", "no.where", "--", "train", "--run", "r"], 2, "be reached"),
        (["launch", "torchrun", "--node-rank", "1", "--", "train", "--run", "r"], 2, "they count from 0 to 0"),
        (["launch", "torchrun", "--", "train", "--run", "r", "--processes", "2"], 2, "belongs before the two dashes"),
        (["launch", "torchrun", "--", "train", "--run", "r", "-n2"], 2, "--processes belongs before the two dashes"),
        (["launch", "local", "--hang-timeout", "9", "--", "resume", "r"], 2, "No such option: --hang-timeout"),
        (["launch", "slurm", "--nodes", "3", "--", "train", "--run", "r"], 2, "which 3 processes cannot share"),
        (["launch", "slurm", "--time", "soon", "--", "train", "--run", "r"], 2, "--time is 'soon': write minutes"),
        (
            ["launch", "slurm", "--gpus-per-node", "4", "--processes-per-node", "2", "--", "train", "--run", "r"],
            2,
            "each process has one GPU",
        ),
        (["launch", "slurm", "--", "train", "--run", "r"], 2, "There is no sbatch here"),
        (["launch", "kubernetes", *CLAIM, "--", "train"], 2, "There is no kubectl here"),
        (["launch", "kubernetes", *CLAIM, "--nodes", "3", "--", "train"], 2, "which 3 processes cannot share"),
        (["launch", "kubernetes", *CLAIM, "--", "train", "--run", "r"], 2, "lost with its pod: take a folder in /runs"),
        (["launch", "torchrun", "--", "train", "--epoch", "3"], 2, "No such option: --epoch"),
        (["launch", "local", "--", "nothing-like-this"], 2, "nothing-like-this cannot be started"),
        (["train", "--processes", "3"], 2, "which 3 processes cannot share equally: use 30 or 33."),
        (["train", "--device", "cuda"], 2, "no CUDA GPU is visible here"),
        (["train", "--run", ""], 2, "--run is empty: give it a value, or leave it out"),
        (["launch", "torchrun", "--", "train", "--run-dir", ""], 2, "--run-dir is empty: give it a value"),
        (["train", "--device", "mps"], 2, "there is no Apple GPU here"),
        (["train", "--precision", "fp16", "--device", "cpu"], 2, "fp16 needs a CUDA GPU, and this run is on cpu"),
        (["train", "--set", "train.global_batch=2000"], 2, "only 1438 training images"),
        (["train", "--data", "nowhere"], 3, "There is no data folder nowhere."),
        (["train", "--procesess", "2"], 2, "No such option"),
        (["evaluate", "."], 2, "not a run: it has no config.yaml"),
        (["data", "import"], 2, "either --from IDX_DIR or --download"),
        (["data", "import", "--from", "nowhere"], 3, "no folder nowhere"),
        (["monitor", "nowhere"], 2, "There is no folder nowhere"),
        (["config", "show", "nothing"], 2, "no preset 'nothing'"),
        (["train", "--lr", "fast"], 2, "optimizer.learning_rate is 'fast' (from --lr): it must be a number from"),
        (["train", "--batch-size", "0"], 2, "train.global_batch is 0 (from --batch-size): it must be a whole number"),
        (["train", "--model", "resnet18"], 2, "model.name is 'resnet18' (from --model): it must be small_cnn"),
        (["train", "--device", "gpu"], 2, "it must be auto, cpu, cuda or mps. Did you mean 'cuda'?"),
        (["predict", "r", "a.png", "--device", "gpu"], 2, "--device is 'gpu': it must be auto, cpu, cuda or mps."),
        (["train", "--processes", "five"], 2, "--processes is 'five': it must be a whole number from 1 to 1,024."),
        (["train", "--start-timeout", "nan"], 2, "--start-timeout is nan: it must be a number from 1 to 31,622,400."),
        (["bench", "--seconds", "1e300"], 2, "--seconds is 1e+300: it must be a number from 0.01 to 3,600."),
        (["launch", "slurm", "--nodes", "0", "--", "train"], 2, "--nodes is 0: it must be a whole number from 1"),
        (["train", "--workers", "4"], 2, "No such option: --workers. Images are decoded once"),
        (["train", "--output-dir", "a"], 2, "No such option: --output-dir. Did you mean --run?"),
        (["resume", "r", "--epochs", "9"], 2, "A resumed run keeps its config"),
        (["evaluate", "r", "--batch-size", "9"], 2, "This command chooses its own batches"),
        (["train", "-lr", "0.1"], 2, "No such option: -l. Long options begin with two dashes."),
        (["train", "Dataset"], 2, "The folder of pictures is given with --data"),
        (["evaluate"], 2, "Missing argument 'RUN'."),
        (["evaluate", "nowhere"], 2, "nowhere is not a run: there is no such folder."),
        (["eval", "r"], 2, "No such command 'eval'. Did you mean 'evaluate'?"),
        (["launch", "local", "--dry-run", "--", "train", "--lr", "x"], 2, "optimizer.learning_rate is 'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gives_its_message_and_exit_code(command, tmp_path, words, code, message):
    ended = command(*words, CUDA_VISIBLE_DEVICES="", PATH="")
    assert ended.code == code, ended.err
    assert message in " ".join(ended.err.split())
    assert ended.err.startswith("error: ")
    assert "Input should" not in ended.err
    assert "Traceback" not in ended.err
    assert not list(tmp_path.glob("runs/*/config.yaml"))


@pytest.mark.quick
@pytest.mark.parametrize("processes", [1, 2])
def test_pictures_that_cannot_be_read_are_named_before_anything_is_trained(command, tmp_path, folder_of, processes):
    root = folder_of(tmp_path / "Dataset")
    (root / "train" / "class-1" / "0.png").write_bytes(b"no picture")
    ended = command("train", "--processes", processes, "--run", "run", "--set", "train.global_batch=4")
    assert ended.code == 3
    assert ended.err.count("error:") == 1
    assert "1 image cannot be read: Dataset/train/class-1/0.png" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_class_in_only_one_split_is_named(command, tmp_path, folder_of):
    root = folder_of(tmp_path / "Dataset")
    (root / "test" / "class-1").rename(tmp_path / "elsewhere")
    ended = command("train", "--run", "run", "--set", "train.global_batch=4")
    assert ended.code == 3
    assert "1 folder is missing: Dataset/test/class-1" in ended.err
    assert not (tmp_path / "run").exists()


def test_data_check_lists_every_bad_file(command, tmp_path, folder_of):
    root = folder_of(tmp_path / "Dataset")
    bad = [root / "train" / "class-0" / "1.png", root / "test" / "class-2" / "4.png"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:200])
    (root / "train" / "notes.txt").write_text("")
    ended = command("data", "check")
    assert ended.code == 3
    assert all(f"unreadable  {path.relative_to(tmp_path)}" in ended.out for path in bad)
    assert "81 pictures, 2 unreadable; 1 other files ignored" in ended.out
    assert set(command("data", "check", "--json").json()["unreadable"]) == {
        "train/class-0/1.png",
        "test/class-2/4.png",
    }


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Stand a program on the PATH that lists two GPUs and their driver as nvidia-smi does."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\ncase $1 in\n-L) echo 'GPU 0: A (UUID: GPU-1a)'; echo 'GPU 1: B (UUID: GPU-1b)' ;;\n"
        "--query-gpu=driver_version) echo 535.104.05; echo 535.104.05 ;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.mark.usefixtures("nvidia_smi")
@pytest.mark.parametrize("visible", [{}, {"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "1,0,7"}])
def test_more_processes_than_gpus_are_refused(command, visible):
    ended = command("train", "--device", "cuda", "--processes", "3", **visible)
    assert ended.code == 2
    assert "--processes is 3, and 2 GPUs are visible: one process a GPU, so 2." in ended.err


@pytest.mark.usefixtures("nvidia_smi")
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch is without CUDA")
def test_gpus_that_torch_cannot_use_are_told_and_not_replaced_by_the_cpu_unasked(command, tmp_path):
    ended = command("train", "--run", "run")
    assert ended.code == 2, ended.err
    assert ended.err.count("error:") == 1
    assert f"nvidia-smi lists 2 GPUs with driver 535.104.05, and torch {torch.__version__}, built for" in ended.err
    assert not (tmp_path / "run").exists()
    ended = command("train", "--run", "run", "--device", "cpu", "--epochs", "1")
    assert ended.code == 0, ended.err


def test_a_run_never_writes_into_another(command, trained_run):
    before = sorted(path.name for path in trained_run.iterdir())
    ended = command("train", "--run", trained_run)
    assert ended.code == 2
    assert "holds a run already" in ended.err
    assert sorted(path.name for path in trained_run.iterdir()) == before


def test_a_diverged_run_stops_with_its_own_code_and_says_so_in_the_result(command, tmp_path):
    ended = command("train", "--run", "run", "--set", "optimizer.name=sgd", "--set", "optimizer.learning_rate=1e6")
    assert ended.code == 6, ended.err
    assert "is not finite" in ended.err
    assert '"status": "failed"' in (tmp_path / "run" / "result.json").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_folder_that_cannot_be_made_is_a_storage_error(command, tmp_path):
    (tmp_path / "file").write_text("")
    ended = command("train", "--run", "file/run")
    assert ended.code == 5, ended.err
    assert "file" in ended.err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_a_storage_error(command, tmp_path, processes):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        ended = command("train", "--run", mount / "run", "--processes", processes)
        assert ended.code == 5, ended.err
        assert "No space left on device" in ended.err
        assert "Traceback" not in ended.err
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("words", [["train", "--epochs", "1"], ["data", "check", "."]])
def test_variables_of_half_a_launcher_disturb_nothing(command, tmp_path, folder_of, words):
    folder_of(tmp_path, train=30)
    extra = ["--config", "quick"] if words[0] == "train" else []
    assert command(*words, *extra, WORLD_SIZE="2", RANK="0").code == 0


def test_a_run_in_use_names_who_uses_it(command, started, tmp_path):
    process = started("train", "--epochs", "100000", "--run", "run", OMP_NUM_THREADS="1")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ended = command("train", "--run", "run")
    assert ended.code == 2
    owner = (tmp_path / "run" / ".lock-owner").read_text()
    assert f"is in use by {owner}" in ended.err
    assert owner.startswith("process ")
    process.terminate()
    process.wait(30)


def test_a_variable_that_accelerate_would_obey_is_refused(command):
    ended = command("train", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert ended.code == 2
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4" in ended.err


def test_a_precision_that_contradicts_accelerates_is_refused(command):
    ended = command("train", "--precision", "fp32", ACCELERATE_MIXED_PRECISION="bf16")
    assert ended.code == 2
    assert "train.precision is fp32, but ACCELERATE_MIXED_PRECISION is bf16" in ended.err


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 100), 4, "is damaged: model.safetensors"),
        (lambda path: (path / "meta.json").unlink(), 4, "meta.json is missing"),
        (lambda path: (path / "MANIFEST.json").write_text("[]"), 4, "is not whole"),
    ],
)
def test_a_damaged_checkpoint_is_not_used(command, tmp_path, trained_run, damage, code, message):
    import shutil

    run = tmp_path / "copy"
    shutil.copytree(trained_run, run)
    damage(max((run / "checkpoints").iterdir()))
    ended = command("evaluate", run)
    assert ended.code == code
    assert message in ended.err


def test_a_checkpoint_is_named_by_its_step_or_its_folder(command, trained_run):
    newest = max(path.name for path in (trained_run / "checkpoints").glob("step-*"))
    assert command("evaluate", trained_run, "--checkpoint", newest, "--json").json()["step"] == int(newest[5:])
    ended = command("evaluate", trained_run, "--checkpoint", "9" * 5000)
    assert ended.code == 2
    assert "it must be best, last or a step." in ended.err


def test_an_unknown_checkpoint_lists_those_that_are_there(command, trained_run):
    ended = command("evaluate", trained_run, "--checkpoint", "7")
    assert ended.code == 4
    assert "no checkpoint '7'" in ended.err


def test_pictures_of_other_classes_are_refused(command, tmp_path, trained_run, folder_of):
    folder_of(tmp_path / "bars")
    ended = command("evaluate", trained_run, "--data", "bars")
    assert ended.code == 4
    assert "knows the classes 0, 1" in ended.err
    assert not (tmp_path / "bars" / ".mnist-dist").exists(), "the pictures were decoded"


def test_a_network_that_memory_does_not_hold_is_out_of_memory(tmp_path):
    words = "train --epochs 1 --run run --set data.image_size=1024 --set model.name=large_cnn"  # 8 GB of weights
    ended = subprocess.run(
        ["sh", "-c", f"ulimit -v 6000000; exec {sys.executable} -m mnist_dist {words}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 8, ended.stderr
    assert "Memory ran out" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_predict_labels_what_it_can_read_and_names_the_rest(command, tmp_path, trained_run):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "bad.png").write_bytes(b"no")
    for name in ("good.png", "also.png"):
        Image.new("L", (28, 28)).save(folder / name)
    assert command("predict", trained_run, folder / "good.png").code == 0
    ended = command("predict", trained_run, folder, "missing.png", "--csv", "labels.csv", "--json")
    assert ended.code == 3
    assert [row["file"] for row in ended.json()] == [str(folder / "also.png"), str(folder / "good.png")]
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 3
    assert "bad.png  (it is none of" in ended.err
    assert "missing.png  (No such file or directory)" in ended.err
    assert "2 of 4 pictures cannot be read" in ended.err
    assert "Traceback" not in ended.err


def test_predict_that_can_read_nothing_says_so(command, tmp_path, trained_run):
    (tmp_path / "bad.png").write_bytes(b"no")
    for words in (["bad.png"], ["missing.png", "gone.png"]):
        ended = command("predict", trained_run, *words)
        assert ended.code == 3
        assert all(word in ended.err for word in words)


@pytest.mark.parametrize("own", ["verify", "bench"])
def test_a_command_that_starts_its_own_processes_refuses_another_launcher(command, own):
    outcome = command(own, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    assert outcome.code == 2
    assert "without another launcher" in outcome.err
    assert "Traceback" not in outcome.err
