import errno
import gzip
import os
import signal
import struct
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnist_dist.data.formats import decode
from mnist_dist.data.idx import read_idx_folder, write_image_folder
from mnist_dist.data.scan import scan
from mnist_dist.disk import locks
from mnist_dist.errors import ConfigError, DataError, StorageError, WorkerError


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    """A small set in MNIST's names, half of it gzipped: 30 and 12 images of 12 classes."""
    generator = np.random.default_rng(0)
    for stem, count in (("train", 30), ("t10k", 12)):
        images = generator.integers(0, 256, (count, 20, 20))
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(idx(images))
        labels = gzip.compress(idx(np.arange(count) % 12))
        (tmp_path / f"{stem}-labels-idx1-ubyte.gz").write_bytes(labels)
    return tmp_path


def test_every_picture_arrives_under_its_class(folder, tmp_path):
    read = read_idx_folder(folder)
    assert not read.is_mnist
    write_image_folder(read, tmp_path / "Dataset", print)
    listing = scan(tmp_path / "Dataset")
    assert listing.classes == tuple(f"{label:02}" for label in range(12))  # sorts by number
    for split in ("train", "test"):
        assert len(listing.splits[split].files) == len(read.images[split])
        for number, (image, label) in enumerate(zip(read.images[split], read.labels[split], strict=True)):
            file = tmp_path / "Dataset" / split / f"{label:02}" / f"{number:05}.png"
            assert np.array_equal(decode(file, 20, 1)[0], image)


def test_a_folder_that_is_not_empty_is_left_alone(folder, tmp_path):
    (tmp_path / "Dataset").mkdir()
    (tmp_path / "Dataset" / "mine").write_text("")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        write_image_folder(read_idx_folder(folder), tmp_path / "Dataset", print)
    assert [path.name for path in (tmp_path / "Dataset").iterdir()] == ["mine"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def write(name, content):
    def damage(folder):
        (folder / name).write_bytes(content(folder / name) if callable(content) else content)

    return damage


def header(*dimensions, code=8):
    return struct.pack(f">HBB{len(dimensions)}I", 0, code, len(dimensions), *dimensions)


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz"


def as_folder(folder):
    (folder / IMAGES).unlink()
    (folder / IMAGES).mkdir()


def as_pipe(folder):
    (folder / IMAGES).unlink()
    os.mkfifo(folder / IMAGES)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / LABELS).unlink(), "has no t10k-labels"),
        (lambda f: cut(f / LABELS), "t10k-labels-idx1-ubyte.gz cannot be read"),
        (lambda f: cut(f / IMAGES), "should hold 30x20x20 bytes .* but holds 11995"),
        (write(IMAGES, lambda path: path.read_bytes() + b"more"), "should hold 30x20x20 bytes .* but holds more"),
        (write(IMAGES, b"PNG!"), "no IDX file"),
        (write(IMAGES, b""), "no IDX file"),
        (write(IMAGES, header(30, 20, 20)[:9]), "ends within its header"),
        (write(IMAGES, header(30, 20, 20, code=13) + bytes(48000)), "no IDX file of bytes in 3 dimensions"),
        (write(IMAGES, header(30, 400) + bytes(12000)), "no IDX file of bytes in 3 dimensions"),
        (write(IMAGES, header(30, 0, 20)), r"has no images \(30x0x20\)"),
        (write(IMAGES, header(0, 20, 20)), r"has no images"),
        (write(IMAGES, header(30, 2**32 - 1, 2**32 - 1)), "at most 4 GiB"),
        (write(IMAGES, header(29, 20, 20) + bytes(29 * 400)), "has 29 images, but there are 30 labels"),
        (write(LABELS, gzip.compress(idx(np.zeros(0)))), "has no labels"),
        (write(LABELS, gzip.compress(idx(np.zeros(11)))), "has 12 images, but there are 11 labels"),
        (write(LABELS, gzip.compress(idx(np.full(12, 137)))), "have 137, which no training image has"),
        (write(LABELS, b"\x1f\x8b\x08garbage in zip"), "cannot be read"),
        (as_folder, "has no train-images"),
        (as_pipe, "it is no regular file"),
    ],
)
def test_a_set_that_is_not_whole_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        read_idx_folder(folder)


def test_no_more_is_unzipped_than_the_header_says(folder):
    bomb = gzip.compress(idx(np.zeros((12, 20, 20))) + bytes(1 << 28))
    assert len(bomb) < 1 << 19
    (folder / "t10k-images-idx3-ubyte").unlink()
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(DataError, match="but holds more"):
        read_idx_folder(folder)
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


@pytest.mark.parametrize("beside", [True, False])
def test_files_in_folders_of_their_names_are_found(folder, beside):
    expected = read_idx_folder(folder)
    for file in list(folder.iterdir()):
        if not file.is_file():
            continue
        content = file.read_bytes()
        if not beside:
            file.unlink()
        home = folder / (file.name.replace("-idx", ".idx") if beside else file.name)
        home.mkdir()
        (home / file.name).write_bytes(content)
        (home / "._").touch()
    found = read_idx_folder(folder)
    for split in ("train", "test"):
        assert np.array_equal(found.images[split], expected.images[split])


def test_the_working_folder_can_be_the_target(folder, tmp_path, monkeypatch):
    read = read_idx_folder(folder)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    write_image_folder(read, Path(), print)
    assert sorted(path.name for path in here.iterdir()) == ["test", "train"]
    assert Path.cwd() == here
    assert len(scan(Path()).splits["train"].files) == 30


def test_what_a_killed_import_left_is_removed_by_the_next(folder, tmp_path):
    read, target = read_idx_folder(folder), tmp_path / "Dataset"
    for number in (1, os.getpid()):  # processes of two containers may have the same number
        left = target / f".importing-{number}"
        (left / "train" / "00").mkdir(parents=True)
        (left / "lock").touch()
    write_image_folder(read, target, print)
    assert sorted(path.name for path in target.iterdir()) == ["test", "train"]
    assert len(scan(target).splits["train"].files) == 30


def test_a_folder_that_another_import_writes_is_left_to_it(folder, tmp_path):
    read, target = read_idx_folder(folder), tmp_path / "Dataset"
    left = target / ".importing-1"
    left.mkdir(parents=True)
    with locks.held(left / "lock"), pytest.raises(ConfigError, match="another import is writing there"):
        write_image_folder(read, target, print)
    assert [path.name for path in target.iterdir()] == [".importing-1"]


def test_pictures_that_a_user_put_where_an_import_was_killed_are_kept(folder, tmp_path):
    target = tmp_path / "Dataset"
    (target / ".importing-1" / "test").mkdir(parents=True)
    mine = target / "train" / "cat" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        write_image_folder(read_idx_folder(folder), target, print)
    assert mine.exists()


def test_an_import_of_the_same_process_number_keeps_its_folder(folder, tmp_path):
    read, target = read_idx_folder(folder), tmp_path / "Dataset"
    other = target / f".importing-{os.getpid()}"
    other.mkdir(parents=True)
    with locks.held(other / "lock"), pytest.raises(ConfigError, match="another import is writing there"):
        write_image_folder(read, target, print)
    assert other.is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="one process writes elsewhere")
def test_a_writing_process_that_is_killed_is_one_message(folder, tmp_path, monkeypatch):
    read = read_idx_folder(folder)
    monkeypatch.setattr(Image, "fromarray", lambda image: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(WorkerError, match="A process that was writing images was killed"):
        write_image_folder(read, tmp_path / "Dataset", print)
    assert not (tmp_path / "Dataset").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_file_that_cannot_be_read_now_is_the_disks_fault(folder, monkeypatch, number):
    def refuse(path, *words):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=rf"train-labels.*{os.strerror(number)}"):
        read_idx_folder(folder)


def test_an_import_that_fails_leaves_nothing(folder, tmp_path):
    read = read_idx_folder(folder)
    monster = replace(read, images=read.images | {"test": np.zeros((12, 0, 3), np.uint8)})  # no PNG has no rows
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever Pillow says
        write_image_folder(monster, tmp_path / "Dataset", print)
    assert not (tmp_path / "Dataset").exists()


@pytest.mark.mnist
def test_the_four_original_files_are_recognised(mnist_idx):
    read = read_idx_folder(mnist_idx)
    assert read.is_mnist
    assert {split: len(labels) for split, labels in read.labels.items()} == {"train": 60_000, "test": 10_000}
