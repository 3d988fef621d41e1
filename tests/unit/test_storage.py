import errno
import hashlib
import json
import os
import shutil
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch

from mnist_dist import errors
from mnist_dist.disk import locks
from mnist_dist.disk.storage import ContentError, cut, exchange, open_append, parse_record, read_plain, write_whole
from mnist_dist.errors import CheckpointError, ConfigError, DamagedError, GroupError, StoppedError
from mnist_dist.observe.journal import Journal
from mnist_dist.run import checkpoint, checkpoint_files
from mnist_dist.run.checkpoint_files import FILES, MANIFEST, remove, step_of, steps, verify
from mnist_dist.run.folder import RunFolder, claim_run_folder


def test_a_file_is_replaced_and_a_link_at_its_place_is_not_followed(tmp_path):
    outside, path = tmp_path / "outside", tmp_path / "file"
    outside.write_text("precious")
    path.symlink_to(outside)
    (tmp_path / ".file.writing").symlink_to(outside)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()
    assert outside.read_text() == "precious"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "outside"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is missing"),
        (lambda path: path.symlink_to("elsewhere"), "is a link"),
        (lambda path: path.symlink_to("/dev/zero"), "is a link"),
        (lambda path: path.mkdir(), "is a folder"),
        (os.mkfifo, "is a pipe"),
        (lambda path: path.write_bytes(b"x" * 101), "is longer than 100 bytes"),
    ],
)
def test_only_plain_files_up_to_a_limit_are_read(tmp_path, make, message):
    make(tmp_path / "file")
    with pytest.raises(ContentError, match=message):
        read_plain(tmp_path / "file", limit=100)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("elsewhere"), lambda path: path.mkdir(), os.mkfifo])
def test_nothing_but_a_plain_file_is_appended_to(tmp_path, make):
    make(tmp_path / "file")
    with pytest.raises(ContentError):
        open_append(tmp_path / "file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_hard_link_keeps_what_is_cut_off(tmp_path):
    path, copy = tmp_path / "file", tmp_path / "copy"
    path.write_bytes(b"abcdef")
    cut(path, 5)
    copy.hardlink_to(path)
    cut(path, 2)
    cut(path, 9)
    assert path.read_bytes() == b"ab"
    assert copy.read_bytes() == b"abcde"


@pytest.mark.parametrize("content", [b"", b"\0\0", b"[1]", b"{", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_record_is_a_json_object_or_an_error(content):
    with pytest.raises(ContentError):
        parse_record(content, "it")


@pytest.mark.skipif(not os.path.exists("/proc"), reason="only Linux can")  # noqa: PTH110
def test_two_folders_trade_their_names_where_the_system_can(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot")
    assert (tmp_path / "one" / "two").exists()
    assert not exchange(tmp_path / "one", tmp_path / "missing")


@pytest.mark.parametrize("name", ["step-00000010", "step-123456789"])
def test_a_checkpoints_name_has_its_step(name):
    assert step_of(name) == int(name[5:])


@pytest.mark.parametrize(
    "name",
    ["step-10", "step-00000010.bak", "step-00000010 (copy)", "step-10-keep", "step-000000010", "step-١٢٣٤٥٦٧٨", "last"],
)
def test_no_other_name_is_a_checkpoints(name):
    assert step_of(name) is None


@pytest.fixture
def written(tmp_path):
    """Checkpoints of three steps, around the one at which names become longer."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in (100_000_000, 99_999_999, 99_999_998):
        checkpoint.write(tmp_path, step, model, optimizer, {})
    return tmp_path


@pytest.fixture
def save_again(written, monkeypatch):
    """Save the newest step once more, on a file system that can exchange two names or not, and remove old ones."""

    def save(can_exchange):
        model = torch.nn.Linear(2, 2)
        with monkeypatch.context() as patch:
            if not can_exchange:
                patch.setattr(checkpoint, "exchange", lambda one, other: False)
            checkpoint.write(written, 100_000_000, model, torch.optim.SGD(model.parameters(), lr=0.1), {})
            checkpoint.prune(written, keep=3, best=None)

    return save


def test_checkpoints_are_sorted_by_their_number(written):
    assert list(steps(written)) == [99_999_998, 99_999_999, 100_000_000]
    checkpoint.prune(written, keep=2, best=None)
    assert list(steps(written)) == [99_999_999, 100_000_000]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(written):
    (written / "step-99999998" / "notes.txt").write_text("mine")
    lines = []
    checkpoint.prune(written, keep=1, best=None, warn=lines.append)
    assert len(lines) == 1
    assert "step-99999998 is no longer needed and cannot be removed (Directory not empty)" in lines[0]
    assert [path.name for path in (written / "step-99999998").iterdir()] == ["notes.txt"]
    assert list(steps(written)) == [99_999_998, 100_000_000]


def test_a_link_in_place_of_a_checkpoint_is_not_followed_when_old_ones_are_removed(written, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "step-99999998"
    (written / "step-99999998").rename(elsewhere)
    for name in ("step-99999998", "writing-step-00000005", "replaced-step-00000006"):
        (written / name).symlink_to(elsewhere)
    lines = []
    checkpoint.prune(written, keep=1, best=None, warn=lines.append)
    assert sorted(path.name for path in elsewhere.iterdir()) == sorted((MANIFEST, *FILES))
    assert sum("cannot be removed (it is a link, not a folder)" in line for line in lines) == len(lines) == 3
    assert list(steps(written))[-1] == 100_000_000


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("left", ["nothing", "whole", "half", "foreign", "link", "file"])
def test_a_step_is_saved_again_whatever_a_kill_or_a_user_has_left(save_again, written, tmp_path, can_exchange, left):
    """Checkpoints that a kill left go; what is not the run's is kept, and the step can be saved ever again."""
    former, outside = written / "step-100000000", tmp_path / "outside"
    shutil.copytree(former, outside)
    (former / "notes.txt").write_text("mine")
    for name in ("writing-step-100000000", "replaced-step-100000000"):
        place = written / name
        if left in ("whole", "half", "foreign"):
            shutil.copytree(outside, place)
        if left == "half":
            (place / "MANIFEST.json").unlink()
        if left == "foreign":
            (place / "more.txt").write_text("mine too")
        if left == "link":
            place.symlink_to(outside)
        if left == "file":
            place.write_text("mine too")
    for _ in range(3):
        save_again(can_exchange)
        assert checkpoint.newest_whole(written, pytest.fail) == former
        assert sorted(path.name for path in former.iterdir()) == sorted((MANIFEST, *FILES))
    notes = [path.read_bytes() for path in written.rglob("*") if path.is_file()]
    assert notes.count(b"mine") == 1
    assert notes.count(b"mine too") == (2 if left in ("foreign", "file") else 0)
    assert sorted(path.name for path in outside.iterdir()) == sorted((MANIFEST, *FILES))


@pytest.mark.parametrize("number", range(1, 13))
def test_a_step_that_is_saved_again_is_whole_after_a_kill_at_any_change(save_again, written, monkeypatch, number):
    """The kill comes before each change of a name, with a `replaced-step-N` that an earlier kill has left."""
    shutil.copytree(written / "step-100000000", written / "replaced-step-100000000")
    calls = []

    def counted(change):
        def call(*arguments, **options):
            calls.append(change.__name__)
            if len(calls) == number:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "unlink", "rmdir"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        with pytest.raises(KeyboardInterrupt):
            save_again(False)
    found = checkpoint.newest_whole(written, pytest.fail)
    assert found.name.removeprefix("replaced-") == "step-100000000"
    save_again(False)
    assert checkpoint.newest_whole(written, pytest.fail) == written / "step-100000000"


def test_the_former_checkpoint_of_a_step_is_found_when_the_new_one_is_damaged(written):
    newest = written / "step-100000000"
    shutil.copytree(newest, written / f"replaced-{newest.name}")
    (newest / "model.safetensors").write_bytes(b"")
    lines = []
    assert checkpoint.newest_whole(written, lines.append) == written / f"replaced-{newest.name}"
    assert len(lines) == 1


@pytest.mark.parametrize(
    "manifest",
    [
        {},
        {"meta.json": "0"},
        {"/dev/zero": "0"},
        {"../../secret": "0"},
        {"meta.json": 7},
        [],
    ],
)
def test_a_manifest_names_exactly_the_files_of_a_checkpoint(written, manifest):
    path = written / "step-100000000"
    content = json.loads((path / "MANIFEST.json").read_text())
    changed = {**content, **manifest} if manifest else manifest
    (path / "MANIFEST.json").write_text(json.dumps(changed))
    with pytest.raises(DamagedError):
        verify(path)


def test_a_checkpoint_that_cannot_be_read_is_not_a_damaged_one(written, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        checkpoint.newest_whole(written, print)
    monkeypatch.undo()
    assert list(steps(written)) == [99_999_998, 99_999_999, 100_000_000]


def test_only_a_damaged_checkpoint_is_moved_aside(written):
    newest = written / "step-100000000"
    (newest / "model.safetensors").write_bytes(b"")
    lines = []
    assert checkpoint.newest_whole(written, lines.append) == written / "step-99999999"
    assert len(lines) == 1
    remove(written / "step-99999999")
    (written / "step-99999998").rename(written / "step-99999997")
    with pytest.raises(CheckpointError, match="is that of step 99999998"):
        checkpoint.newest_whole(written, lines.append)


def long_one(checkpoint, name):
    """Give a checkpoint a sparse file of four terabytes whose header fits it, and a manifest that does not tell."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    (checkpoint / name).write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(checkpoint / name, 8 + len(header) + (1 << 42))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_long_file_of_another_network_is_refused_before_it_is_hashed(written, monkeypatch, name):
    newest, model = written / "step-100000000", torch.nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters())
    weights = (newest / "model.safetensors").read_bytes()
    long_one(newest, name)
    digest = hashlib.file_digest

    def hash_short(file, algorithm):
        assert os.fstat(file.fileno()).st_size < 1 << 30
        return digest(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", hash_short)
    fits = partial(checkpoint.refuse_unfit, model=model, optimizer=adam)
    with pytest.raises(CheckpointError, match="is of another"):
        checkpoint.newest_whole(written, pytest.fail, refuse_unfit=fits)
    if name == "model.safetensors":
        with pytest.raises(CheckpointError, match="is of another network"):
            checkpoint.read_weights(newest, model)
    else:
        assert checkpoint.read_weights(newest, model) == weights


@pytest.mark.parametrize("damage", ["flip", "cut", "none"])
def test_a_long_file_of_the_same_network_is_hashed_as_any_other(written, monkeypatch, damage):
    monkeypatch.setattr(checkpoint_files, "UNCHECKED_BYTES", 10)
    newest, model = written / "step-100000000", torch.nn.Linear(2, 2)
    content = bytearray((newest / "model.safetensors").read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content[: -3 if damage == "cut" else None])
    lines = []
    fits = partial(checkpoint.refuse_unfit, model=model)
    whole = checkpoint.newest_whole(written, lines.append, refuse_unfit=fits)
    assert whole == (newest if damage == "none" else written / "step-99999999")
    assert len(lines) == (damage != "none")


@pytest.mark.parametrize("which", ["9" * 18, "9" * 5000, "٣" * 5000, "none"])
def test_a_step_of_any_length_is_refused_by_name(written, which):
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        checkpoint.find(written, which)


@pytest.mark.parametrize("make", [lambda path, to: path.symlink_to(to), lambda path, to: os.mkfifo(path)])
def test_a_lock_file_that_is_not_a_plain_file_is_refused_before_it_is_opened(tmp_path, monkeypatch, make):
    precious, path = tmp_path / "precious", tmp_path / "lock"
    precious.write_text("precious")
    make(path, precious)

    def opened(*arguments, **options):
        pytest.fail("it was opened")

    monkeypatch.setattr(locks, "FileLock", opened)
    with pytest.raises(OSError, match="where a lock file must be"):
        locks.take(path)
    assert precious.read_text() == "precious"


def test_a_folder_in_which_a_run_was_killed_as_it_locked_it_is_new(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for name in (".lock", "..lock-owner.writing"):
        (folder.path / name).touch()
    folder.check_new()
    (folder.path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        folder.check_new()


def test_logs_of_a_run_that_is_starting_in_the_same_folder_stay(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.log(1).parent.mkdir(parents=True)
    folder.log(1).touch()
    lock = folder.lock()
    folder.remove_unstarted()
    assert folder.log(1).exists()
    lock.release()
    folder.remove_unstarted()
    assert not folder.log(1).exists()


@pytest.mark.parametrize("length", [3_000_000, 2_000_010, 1_500_000])
def test_a_journal_of_any_length_is_cut_back_in_little_memory(tmp_path, length):
    """The file is sparse and has a terabyte; of its first two megabytes the run had written some."""
    folder = RunFolder(tmp_path)
    lines = b'{"kind": "step"}\n' * 120_000
    size, digest = 2_000_010, hashlib.sha256(lines[:2_000_010]).hexdigest()
    folder.metrics.write_bytes(lines[:length])
    if length > size:
        os.truncate(folder.metrics, 1 << 40)
    tracemalloc.start()
    warnings = folder.cut_back({"metrics.jsonl": size}, digest)
    journal = Journal(folder.metrics)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    journal.close()
    kept = folder.metrics.read_bytes()
    assert most < 1 << 23
    assert kept == lines[: size if length >= size else lines.rfind(b"\n", 0, length) + 1]
    assert ["is shorter than it was" in line for line in warnings] == [True] * (length < size)
    assert journal.journal_sha256() == hashlib.sha256(kept).hexdigest()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names open files by /proc")
def test_the_folders_above_a_new_run_are_synced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    run = claim_run_folder("train")
    assert sorted(synced) == [".", "runs"]
    synced.clear()
    RunFolder(Path("a/b/run")).lock().release()
    assert synced[:3] == ["a/b", "a", "."]
    assert run.is_dir()


def test_runs_that_start_in_the_same_second_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {claim_run_folder("train") for _ in range(5)}
    assert len(names) == 5
    assert all(name.is_dir() for name in names)


@pytest.mark.parametrize("error", [StoppedError("Stopped.", 15), GroupError("one", "two", code=3), DamagedError("no")])
def test_an_error_comes_back_from_json_as_it_was(error):
    copy = errors.from_json(json.loads(json.dumps(errors.to_json(error))))
    assert (type(copy), str(copy), copy.exit_code) == (type(error), str(error), error.exit_code)


@pytest.mark.parametrize("number", [errno.EFBIG, errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_an_error_of_a_disk_says_what_to_do(number):
    error = errors.storage_error(OSError(number, os.strerror(number)))
    assert error.exit_code == 5
    assert str(error).startswith(f"The disk: {os.strerror(number)}: ")
