import errno
import fcntl
import os
import subprocess
import threading

import numpy as np
import pytest
from PIL import Image

from mnist_dist.config.schema import EMBEDDED_DIGITS, Data
from mnist_dist.data import open_dataset, scan, store
from mnist_dist.data.decode import Decoding
from mnist_dist.data.formats import decode
from mnist_dist.disk import locks
from mnist_dist.errors import ConfigError, DataError, StorageError
from mnist_dist.launch.supervise import private_folder
from mnist_dist.run.folder import RunFolder


@pytest.fixture
def said():
    return []


@pytest.fixture
def open_store(said):
    return lambda root, size=28, channels=1: store.open_or_build(
        root, Decoding(image_size=size, channels=channels), said.append
    )


def test_pictures_come_out_of_the_store_as_they_went_in(tmp_path, folder_of, open_store):
    root = folder_of(tmp_path / "data", classes=3, train=400, test=7)  # more than one chunk
    built = open_store(root)
    train = built.splits["train"]
    assert train.images.shape == (1200, 1, 28, 28)
    for row in (0, 511, 512, 1199):
        assert np.array_equal(train.images[row, 0], np.asarray(Image.open(root / train.files[row])))
        assert train.files[row].split("/")[1] == built.classes[train.labels[row]]
    values = train.images.astype(np.uint64)
    assert np.array_equal(train.moments[:, 0, 0], values.sum(axis=(1, 2, 3)))
    assert np.array_equal(train.moments[:, 0, 1], (values**2).sum(axis=(1, 2, 3)))


def test_a_second_start_decodes_nothing(tmp_path, folder_of, open_store, said):
    root = folder_of(tmp_path / "data")
    first = open_store(root)
    assert any("Decoding" in line for line in said)
    said.clear()
    second = open_store(root)
    assert not said
    assert second.sha256 == first.sha256
    assert isinstance(second.splits["train"].images, np.memmap)


@pytest.mark.parametrize("change", ["touch", "add", "remove", "rename"])
def test_a_changed_folder_rebuilds_the_store_and_removes_the_old_one(tmp_path, folder_of, open_store, said, change):
    root = folder_of(tmp_path / "data")
    open_store(root)
    file = root / "train" / "class-0" / "3.png"
    if change == "touch":
        Image.new("L", (28, 28), 99).save(file)
        os.utime(file, ns=(1, 1))
    elif change == "add":
        Image.new("L", (28, 28), 99).save(file.with_name("new.png"))
    elif change == "remove":
        file.unlink()
    else:
        file.rename(file.with_name("renamed.png"))
    said.clear()
    open_store(root)
    assert any("Decoding" in line for line in said)
    assert len(list((root / scan.OWN_FOLDER).glob("1x28x28-*"))) == 1


def test_the_identity_follows_the_pixels_and_not_the_time_or_place(tmp_path, folder_of, open_store):
    one, two = folder_of(tmp_path / "one"), folder_of(tmp_path / "two")
    assert open_store(one).sha256 == open_store(two).sha256
    Image.new("L", (28, 28), 99).save(two / "test" / "class-0" / "0.png")
    assert open_store(one).sha256 != open_store(two).sha256


def test_two_processes_that_build_at_once_get_the_same_whole_store(tmp_path, folder_of, open_store):
    root = folder_of(tmp_path / "data", train=300)
    results = []
    threads = [threading.Thread(target=lambda: results.append(open_store(root))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({built.sha256 for built in results}) == 1
    assert sum("decoded in" in built.state for built in results) == 1


def test_a_store_with_pictures_from_outside_is_not_taken_where_links_may_not_lead_out(tmp_path, folder_of, said):
    root = folder_of(tmp_path / "data")
    (root / "train" / "class-0").rename(tmp_path / "outside")
    (root / "train" / "class-0").symlink_to(tmp_path / "outside")
    decoding = Decoding(image_size=28, channels=1)
    built = store.open_or_build(root, decoding, said.append, follow_links=True)
    assert store.open_or_build(root, decoding, said.append, follow_links=True).folder == built.folder
    with pytest.raises(DataError, match="leads out of the data folder"):
        store.open_or_build(root, decoding, said.append)


def test_a_store_keeps_names_of_any_bytes(tmp_path, folder_of, open_store, said):
    root = folder_of(tmp_path / "data")
    odd = os.fsdecode(b"caf\xe9\n")
    for split in ("train", "test"):
        (root / split / "class-0").rename(root / split / odd)
    (root / "train" / odd / "0.png").rename(root / "train" / odd / f"{odd}.png")
    built = open_store(root)
    said.clear()
    again = open_store(root)
    assert not said
    assert again.classes == built.classes == (odd, "class-1", "class-2")
    assert f"train/{odd}/{odd}.png" in tuple(again.splits["train"].files)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_store_works_on_a_disk_without_locks(tmp_path, folder_of, open_store, monkeypatch, number):
    def refuse(file, operation):
        refused.append(operation)
        raise OSError(number, os.strerror(number))

    refused = []
    monkeypatch.setattr(fcntl, "flock", refuse)
    root = folder_of(tmp_path / "data")
    built = open_store(root)
    assert built.folder is not None
    assert built.folder.is_relative_to(root)
    assert RunFolder(tmp_path / "run").lock().is_locked is False
    with private_folder() as private:
        assert private.is_dir()
    assert len(refused) == 3


@pytest.mark.parametrize("size", [500, 0])
def test_a_damaged_store_is_built_again(tmp_path, folder_of, open_store, said, size):
    root = folder_of(tmp_path / "data")
    good = open_store(root)
    (images,) = (root / scan.OWN_FOLDER).glob("*/train-images.npy")
    os.truncate(images, size)
    said.clear()
    assert open_store(root).sha256 == good.sha256
    assert any("Decoding" in line for line in said)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("options", ["size=64k", "ro"])
def test_a_full_or_read_only_disk_falls_back_to_memory_with_a_message(
    tmp_path, folder_of, open_store, said, options, monkeypatch
):
    here = folder_of(tmp_path / "here")
    mount = tmp_path / "small"
    mount.mkdir()
    (here / scan.OWN_FOLDER).mkdir()
    size = "size=64k" if options == "ro" else options
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        home = mount / "home"
        home.mkdir()
        if options == "ro":
            subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        subprocess.run(["mount", "--bind", home, here / scan.OWN_FOLDER], check=True)
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        built = open_store(here)
        assert built.state == "in memory"
        assert sum("cannot be kept" in line for line in said) == 2
        assert not list(home.glob("*/*.npy"))
    finally:
        subprocess.run(["umount", here / scan.OWN_FOLDER], check=False)
        subprocess.run(["umount", mount], check=True)
    assert open_store(folder_of(tmp_path / "there")).sha256 == built.sha256


def test_every_unreadable_picture_is_named_and_no_store_is_left(tmp_path, folder_of, open_store):
    root = folder_of(tmp_path / "data")
    (root / "train" / "class-1" / "0.png").write_bytes(b"not an image")
    whole = (root / "train" / "class-2" / "5.png").read_bytes()
    (root / "train" / "class-2" / "5.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"2 images cannot be read: .*class-1/0.png.*class-2/5.png.*data check"):
        open_store(root)
    assert not list((root / scan.OWN_FOLDER).glob("*/index.json"))


def save(path, picture, **options):
    picture.save(path, **options)
    return path


def test_16_bit_gray_keeps_its_range(tmp_path):
    ramp = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8))
    assert decode(save(tmp_path / "a.png", ramp), 8, 1).mean() == pytest.approx(127, abs=1)


def test_transparent_pictures_lie_on_white(tmp_path):
    assert decode(save(tmp_path / "a.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0))), 8, 1).min() == 255


def test_a_picture_is_turned_upright(tmp_path):
    picture = Image.new("L", (8, 8))
    picture.paste(255, (0, 0, 8, 2))  # a bar on top
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    assert decode(save(tmp_path / "a.png", picture, exif=exif), 8, 1)[0, -1].min() == 255


def test_colour_and_size_are_as_asked(tmp_path):
    pixels = decode(save(tmp_path / "a.png", Image.new("RGB", (30, 20), (10, 20, 30))), 16, 3)
    assert pixels.shape == (3, 16, 16)
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]


def test_mean_and_std_are_those_of_the_training_pictures(tmp_path, folder_of, said):
    root = folder_of(tmp_path / "data", train=30)
    dataset = open_dataset(Data(root=str(root), validation_fraction=0.2), seed=3, announce=said.append)
    pixels = dataset.train.stored.images[dataset.train.rows] / 255
    assert dataset.mean[0] == pytest.approx(pixels.mean(), rel=1e-12)
    assert dataset.std[0] == pytest.approx(pixels.std(), rel=1e-9)


def test_validation_pictures_are_held_out_by_class_and_seed():
    def rows(seed):
        data = Data(root=EMBEDDED_DIGITS, validation_fraction=0.1)
        return open_dataset(data, seed=seed, announce=print)

    one, again, other = rows(1), rows(1), rows(2)
    assert one.validation is not None
    assert again.validation is not None
    assert other.validation is not None
    assert not set(one.train.rows) & set(one.validation.rows)
    assert len(one.train) + len(one.validation) == 1438
    shares = np.bincount(one.validation.labels) / np.bincount(one.train.stored.labels)
    assert abs(shares - 0.1).max() < 0.005
    assert np.array_equal(one.validation.rows, again.validation.rows)
    assert not np.array_equal(one.validation.rows, other.validation.rows)


def test_two_sources_of_validation_pictures_are_refused(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", val=2)
    with pytest.raises(ConfigError, match=r"validation_fraction is 0.5, but .*validation images"):
        open_dataset(Data(root=str(root), validation_fraction=0.5), seed=0, announce=print)


def test_a_fraction_that_leaves_a_class_empty_is_refused(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", train=3)
    with pytest.raises(DataError, match="leaves none of a class's"):
        open_dataset(Data(root=str(root), validation_fraction=0.1), seed=0, announce=print)


def test_a_new_picture_that_cannot_be_read_costs_no_store(tmp_path, folder_of, open_store, said):
    root = folder_of(tmp_path / "data")
    built = open_store(root)
    (root / "train" / "class-1" / "new.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="1 image cannot be read"):
        open_store(root)
    (root / "train" / "class-1" / "new.png").unlink()
    said.clear()
    assert open_store(root).folder == built.folder
    assert not said


def test_what_another_process_is_writing_down_is_waited_for_and_not_taken_for_damaged(
    tmp_path, folder_of, open_store, said, monkeypatch
):
    root = folder_of(tmp_path / "data")
    built = open_store(root)
    folders = (built.folder / "folders.json").read_bytes()
    (built.folder / "folders.json").write_bytes(b"")
    lock = locks.take(built.folder.parent / "lock")
    said.clear()
    opened = []
    reader = threading.Thread(target=lambda: opened.append(open_store(root)))
    reader.start()
    reader.join(0.2)
    assert not opened
    (built.folder / "folders.json").write_bytes(folders)
    lock.release()
    reader.join(10)
    assert opened[0].folder == built.folder
    assert not said


def test_nothing_is_written_down_in_a_store_while_another_process_writes_there(tmp_path, folder_of, open_store):
    root = folder_of(tmp_path / "data")
    built = open_store(root)
    os.utime(root / "train" / "class-0", (1, 1))
    before = (built.folder / "folders.json").read_bytes()
    with locks.held(built.folder.parent / "lock"):
        assert open_store(root).folder == built.folder
        assert (built.folder / "folders.json").read_bytes() == before
    open_store(root)
    assert (built.folder / "folders.json").read_bytes() != before


def test_a_picture_that_cannot_be_read_now_costs_no_store(tmp_path, folder_of, open_store, said, monkeypatch):
    def refuse(path, *words, plain=os.open):
        if str(path) == f"{file}":
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return plain(path, *words)

    root = folder_of(tmp_path / "data")
    file = root / "train" / "class-0" / "0.png"
    built = open_store(root)
    os.utime(file, (1, 1))
    said.clear()
    with monkeypatch.context() as planted:
        planted.setattr(os, "open", refuse)
        with pytest.raises(StorageError, match=r"0\.png: Input/output error"):
            open_store(root)
    assert open_store(root).folder == built.folder
    assert not said
