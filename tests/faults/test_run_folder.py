"""A run folder in which one thing is not as the run left it: damaged by a disk, or made so by somebody else.

Whatever it is, every command ends soon with a result or a sentence, a resumed run has the bits of the run to which
nothing happened, nothing outside the folder changes, and no file that is not the run's is lost.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.numpy import load, save
from watched import Watched

CONFIG = """
data: {root: "embedded:digits", image_size: 16}
optimizer: {name: adam, learning_rate: 0.002}
train: {epochs: 1, global_batch: 128, threads: 1, log_every: 2}
checkpoint: {every_steps: 4, keep: 9}
"""
NEWEST = "checkpoints/step-00000008"
FILES = [
    "config.yaml", "environment.json", "metrics.jsonl", "result.json", ".lock", ".lock-owner", "logs/rank-0.log",
    *(f"{NEWEST}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "meta.json", "MANIFEST.json")),
    "tensorboard/EVENTS",
]  # fmt: skip
FOLDERS = ["checkpoints", NEWEST, "tensorboard", "logs"]


def cut(path, victim):
    os.truncate(path, path.stat().st_size // 2)


def empty(path, victim):
    os.truncate(path, 0)


def flip(path, victim):
    content = bytearray(path.read_bytes())
    if content:
        content[random.Random(str(path.name)).randrange(len(content))] ^= 1
    path.write_bytes(content)


def lose(path, victim):
    clear(path)


def link(path, victim):
    folder = path.is_dir()
    clear(path)
    path.symlink_to(victim if folder else victim / "thesis.txt")


def pipe(path, victim):
    clear(path)
    os.mkfifo(path)


def other_kind(path, victim):
    folder = path.is_dir()
    clear(path)
    path.write_text("mine") if folder else path.mkdir()


def clear(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


FILE_FAULTS = [cut, empty, flip, lose, link, pipe, other_kind]
FOLDER_FAULTS = [lose, link, pipe, other_kind]
ALL = [
    *((target, fault) for target in FILES for fault in FILE_FAULTS),
    *((target, fault) for target in FOLDERS for fault in FOLDER_FAULTS),
]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Run commands, each in a fork of a process that has imported torch already; gives the exit code and the output."""
    home = tmp_path_factory.mktemp("commands")
    script = Path(__file__).with_name("forked.py")
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(*words, cwd=home):
        job = {"words": [*map(str, words)], "cwd": str(cwd), "output": str(home / "output")}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return code, (home / "output").read_text()

    yield run
    process.communicate()


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """A finished run of 12 steps, with checkpoints of steps 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(CONFIG)
    Image.new("L", (16, 16), 200).save(folder / "digit.png")
    code, output = commands("train", "--config", "small.yaml", "--run", "run", cwd=folder)
    assert code == 0, output
    assert Watched(folder / "run").steps == [4, 8, 12]
    return folder


@pytest.fixture
def killed(whole, tmp_path):
    """A copy of it, as if it had been killed after step 8, beside a folder that is not the run's."""
    for name in ("small.yaml", "digit.png"):
        shutil.copy(whole / name, tmp_path)
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "logs").mkdir(exist_ok=True)
    (run / "logs" / "rank-0.log").touch()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    return Watched(run)


def place_of(run, target):
    return next((run / "tensorboard").iterdir()) if target.endswith("EVENTS") else run / target


def hold_against_the_whole_run(commands, whole, killed, target, fault):
    """Plant a fault in copies of a killed run, run each command on one, and return what it did wrong."""
    folder, wrong = killed.path.parent, []
    uses = {
        "resume": ["resume", "copy"],
        "train": ["train", "--config", "small.yaml", "--run", "copy", "--resume"],
        "evaluate": ["evaluate", "copy", "--json"],
        "predict": ["predict", "copy", "digit.png", "--json"],
        "show": ["show", "copy", "--seed", 1],
    }
    for name, words in uses.items():
        shutil.rmtree(folder / "copy", ignore_errors=True)
        shutil.copytree(killed.path, folder / "copy")
        copy = Watched(folder / "copy")
        if target != "result.json" and name in ("resume", "train"):
            (copy.path / "result.json").unlink()
        before = hashes(copy.path / "checkpoints")
        fault(place_of(copy.path, target), folder / "victim")
        damaged = hashes(copy.path / "checkpoints")
        if (target, fault) == (NEWEST, lose):
            before = damaged  # as if it had never been written: the one before is the newest
        code, output = commands(*words, cwd=folder)
        said = f"{name} after {fault.__name__} of {target}: exit {code}: {output[-400:]}"
        if code not in (0, 2, 4, 5) or "Traceback" in output:
            wrong.append(said)
        if code and "error: " not in output:
            wrong.append(f"no sentence: {said}")
        if [path.name for path in (folder / "victim").iterdir()] != ["thesis.txt"]:
            wrong.append(f"written outside: {said}")
        if (folder / "victim" / "thesis.txt").read_text() != "precious":
            wrong.append(f"changed outside: {said}")
        if not damaged <= hashes(copy.path / "checkpoints"):
            wrong.append(f"a file of a checkpoint is lost: {said}")
        if code == 0 and name in ("resume", "train"):
            reference = Watched(whole / "run")
            warned = "warning: " in output
            if copy.result["weights_sha256"] != reference.result["weights_sha256"]:
                wrong.append(f"other weights: {said}")
            if copy.journal() != reference.journal() and not warned:
                wrong.append(f"another journal: {said}")
            if damaged != before and not warned:
                wrong.append(f"a silent loss: {said}")
        step = 4 if (target, fault) == (NEWEST, lose) else 8
        if code == 0 and name == "evaluate" and json.loads(output[output.index("{") :])["step"] != step:
            wrong.append(f"another checkpoint: {said}")
    return wrong


def hashes(folder):
    """Hash every plain file below a folder."""
    if folder.is_symlink() or not folder.is_dir():
        return set()
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("config.yaml", cut), ("environment.json", empty), ("metrics.jsonl", flip), ("result.json", other_kind),
        (".lock-owner", link), (f"{NEWEST}/model.safetensors", pipe), ("checkpoints", link), ("tensorboard", link),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_no_fault_in_a_run_folder_loses_or_alters_anything(commands, whole, killed, target, fault):
    assert hold_against_the_whole_run(commands, whole, killed, target, fault) == []


@pytest.mark.slow
@pytest.mark.parametrize(("target", "fault"), ALL, ids=lambda value: getattr(value, "__name__", value))
def test_no_fault_of_any_kind_in_any_file_loses_or_alters_anything(commands, whole, killed, target, fault):
    assert hold_against_the_whole_run(commands, whole, killed, target, fault) == []


def sign(checkpoint):
    """Write the manifest anew, as somebody does who alters a checkpoint on purpose."""
    names = ("model.safetensors", "optimizer.safetensors", "meta.json")
    manifest = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def alter_meta(**values):
    def alter(checkpoint):
        meta = json.loads((checkpoint / "meta.json").read_text())
        for key, value in values.items():
            section, _, name = key.rpartition("__")
            (meta[section] if section else meta)[name] = value
        (checkpoint / "meta.json").write_text(json.dumps(meta))

    return alter


def alter_tensors(change, name="model.safetensors"):
    def alter(checkpoint):
        tensors = load((checkpoint / name).read_bytes())
        first = min(key for key in tensors if tensors[key].ndim)
        change(tensors, first)
        (checkpoint / name).write_bytes(save(tensors))

    return alter


def not_finite(tensors, first):
    tensors[first] = tensors[first] * float("nan")


def no_header(checkpoint):
    (checkpoint / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


def gigabytes(checkpoint):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 34], "data_offsets": [0, 1 << 36]}}).encode()
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (alter_meta(format=2), "install a newer mnist-dist"),
        (alter_meta(format="1"), "has no format"),
        (alter_meta(step=7), "is that of step 7"),
        (alter_meta(classes=[]), "is not valid (classes"),
        (alter_meta(preprocessing__image_size=5000), "disagree on the images' size"),
        (alter_meta(preprocessing__mean=[]), "has not one mean and std a channel"),
        (alter_meta(config_sha256="0" * 64), "is not as the run wrote it"),
        (no_header, "it has no header"),
        (gigabytes, "its length is not that of its tensors"),
        (alter_tensors(not_finite), "has numbers that are not finite"),
        (alter_tensors(lambda tensors, first: tensors.pop(first)), "is missing"),
        (alter_tensors(lambda tensors, first: tensors.update({first: tensors[first].astype("f8")})), "is F64"),
        (alter_tensors(lambda tensors, first: tensors.update({first: tensors[first][:1]})), "of another network: "),
    ],
)
def test_a_checkpoint_altered_on_purpose_is_refused_with_a_reason(commands, killed, alter, message):
    alter(killed.path / NEWEST)
    sign(killed.path / NEWEST)
    code, output = commands("evaluate", killed.path)
    assert code == 4, output
    assert message in " ".join(output.split())


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (alter_meta(progress__step=999), "says that 999 of 12 steps are done"),
        (alter_meta(progress__epoch={"images": -1}), "is not valid"),
        (alter_meta(scaler="no"), "is not valid (scaler"),
        (alter_tensors(not_finite, "optimizer.safetensors"), "has numbers that are not finite"),
        (alter_tensors(lambda tensors, first: tensors.pop(first), "optimizer.safetensors"), "of another optimizer: "),
    ],
)
def test_a_resume_from_a_checkpoint_altered_on_purpose_changes_nothing(commands, killed, alter, message):
    (killed.path / "result.json").unlink()
    journal = (killed.path / "metrics.jsonl").read_bytes()
    alter(killed.path / NEWEST)
    sign(killed.path / NEWEST)
    code, output = commands("resume", killed.path)
    assert code == 4, output
    assert message in " ".join(output.split())
    assert (killed.path / "metrics.jsonl").read_bytes() == journal
    assert killed.steps == [4, 8]


def test_files_that_are_not_the_runs_stay(commands, whole, killed):
    (killed.path / "result.json").unlink()
    (killed.path / "tensorboard" / "notes.txt").write_text("mine")
    (killed.path / "tensorboard" / "plugins").mkdir()
    events = killed.path / "tensorboard" / "events.out.tfevents.1.host.2.3"
    events.write_text("of another program")
    copies = [killed.path / "checkpoints" / name for name in ("step-00000008.bak", "step-4", "step-00000004 (copy)")]
    for copy in copies:
        shutil.copytree(killed.path / NEWEST, copy)
    code, output = commands("resume", killed.path)
    assert code == 0, output
    assert (killed.path / "tensorboard" / "notes.txt").read_text() == "mine"
    assert (killed.path / "tensorboard" / "plugins").is_dir()
    assert events.read_text() == "of another program"
    assert all(len(list(copy.iterdir())) == 4 for copy in copies)
    assert killed.result["weights_sha256"] == Watched(whole / "run").result["weights_sha256"]


def test_a_copy_with_hard_links_keeps_the_journal_that_a_resume_cuts_back(commands, killed):
    (killed.path / "result.json").unlink()
    journal = (killed.path / "metrics.jsonl").read_bytes()
    copy = killed.path.parent / "snapshot.jsonl"
    copy.hardlink_to(killed.path / "metrics.jsonl")
    assert commands("resume", killed.path)[0] == 0
    assert copy.read_bytes() == journal


def test_a_run_folder_behind_a_link_is_resumed(commands, killed, whole):
    (killed.path / "result.json").unlink()
    elsewhere = killed.path.parent / "disk"
    killed.path.rename(elsewhere)
    killed.path.symlink_to(elsewhere)
    code, output = commands("resume", killed.path)
    assert code == 0, output
    assert killed.bits() == Watched(whole / "run").bits()


def test_a_hand_edited_config_is_refused_with_what_to_do(commands, killed):
    config = killed.path / "config.yaml"
    text = config.read_text()
    for edited in (text.replace("epochs: 1.0", "epochs: 2.0"), text.partition("\n")[2].replace("1.0", "2.0", 1)):
        config.write_text(edited)
        for words in (["resume", killed.path], ["evaluate", killed.path]):
            code, output = commands(*words)
            assert code == 4, output
            assert "is not as the run wrote it" in output
            assert "start a new run" in output


def test_a_checkpoint_without_a_config_is_no_new_run(commands, killed):
    (killed.path / "config.yaml").unlink()
    for words in (
        ["resume", killed.path],
        ["train", "--run", killed.path],
        ["train", "--run", killed.path, "--resume"],
    ):
        code, output = commands(*words)
        assert code in (2, 4), output
    assert killed.steps == [4, 8]


def test_a_damaged_journal_is_said(commands, killed):
    (killed.path / "result.json").unlink()
    journal = killed.path / "metrics.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"loss": ', b'"loss": 1', 1))
    code, output = commands("resume", killed.path)
    assert code == 0, output
    assert "metrics.jsonl is not as the run wrote it: lines of it are damaged." in " ".join(output.split())


def test_a_new_run_is_not_started_from_a_damaged_config(commands, killed):
    config = killed.path / "config.yaml"
    for damage in (cut, empty):
        damage(config, None)
        code, output = commands("config", "show", killed.path)
        assert code == 2, output
        assert "is not as the run wrote it" in output
