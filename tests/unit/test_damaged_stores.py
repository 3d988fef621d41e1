"""A store's files cut, emptied, flipped or replaced: the images come out right, and a line says so."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from mnist_dist.data import files, scan, store, store_files
from mnist_dist.data.decode import Decoding

ARRAYS = ("images", "labels", "moments", "names", "ends", "stamps")
FILES = ("index.json", "folders.json", *(f"{split}-{array}.npy" for split in ("train", "test") for array in ARRAYS))


@pytest.fixture
def said():
    return []


@pytest.fixture
def open_store(said):
    return lambda root, **options: store.open_or_build(root, Decoding(image_size=8, channels=1), said.append, **options)


@pytest.fixture
def root(tmp_path, folder_of, monkeypatch):
    monkeypatch.setattr(scan, "UNSETTLED_NANOSECONDS", 0)  # as if the images were old
    return folder_of(tmp_path / "data", classes=3, train=4, test=2, size=8)


def empty(path, outside):
    os.truncate(path, 0)


def cut(path, outside):
    os.truncate(path, path.stat().st_size - 3)


def flip(path, outside):
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)


def lengthen(path, outside):
    os.truncate(path, 1 << 33)  # sparse


def remove(path, outside):
    path.unlink()


def link(path, outside):
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def pipe(path, outside):
    path.unlink()
    os.mkfifo(path)


def folder(path, outside):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [empty, cut, flip, lengthen, remove, link, pipe, folder])
def test_damage_to_any_file_of_a_store_is_reported_and_repaired(root, open_store, said, tmp_path, damage):
    for name in FILES:
        good = open_store(root)
        pixels, labels = np.array(good.splits["train"].images), np.array(good.splits["train"].labels)
        names = tuple(good.splits["test"].files)
        outside = tmp_path / f"outside-{name}"
        damage(good.folder / name, outside)
        before = outside.read_bytes() if outside.exists() else None
        said.clear()
        again = open_store(root)
        assert again.sha256 == good.sha256, name
        assert np.array_equal(again.splits["train"].images, pixels), name
        assert np.array_equal(again.splits["train"].labels, labels), name
        assert tuple(again.splits["test"].files) == names, name
        assert sum("damaged" in line for line in said) == 1, name
        assert (outside.read_bytes() if outside.exists() else None) == before, name
        said.clear()
        open_store(root)
        assert not said, name  # and all is well from then on


def forge(folder_, change):
    """Change the index as somebody does who knows how it is sealed."""
    index = files.read_sealed(folder_ / store_files.INDEX)
    change(index)
    files.write_sealed(folder_ / store_files.INDEX, index)


def set_path(index):
    index["splits"]["../../elsewhere"] = index["splits"].pop("test")


@pytest.mark.parametrize(
    "change",
    [
        set_path,
        lambda index: index.update(image_size=10**9),
        lambda index: index.update(image_size="8"),
        lambda index: index.update(channels=None),
        lambda index: index.update(classes=[1, 2, 3]),
        lambda index: index.update(splits=[]),
        lambda index: index.pop("sha256"),
        lambda index: index["splits"]["train"].update(images=1 << 60),
        lambda index: index["splits"]["train"].update(images=-1),
        lambda index: index["splits"]["train"].update(totals=[[1, 2, 3]]),
        lambda index: index["splits"]["train"].update(totals=[[10**30, 1]]),
        lambda index: index["splits"]["train"].update(crc32={}),
        lambda index: index["splits"]["train"]["crc32"].update(images=[]),
        lambda index: index.update(channels=1.0),
        lambda index: index.update(channels=True),
        lambda index: index.update(image_size=float("inf")),
        lambda index: index["splits"]["train"].update(totals=[[123, 45678]]),
    ],
)
def test_an_index_with_impossible_values_is_refused(root, open_store, said, change):
    good = open_store(root)
    forge(good.folder, change)
    said.clear()
    assert open_store(root).sha256 == good.sha256
    assert sum("damaged" in line for line in said) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"settled": float("inf")},
        {"settled": float("nan")},
        {"settled": 1 << 80},
        {"settled": None},
        {"folders": {"../..": None}},
        {"folders": ["train"]},
        {"stamps": []},
        {"leads_out": 0},
    ],
)
def test_a_file_record_with_impossible_values_is_refused(root, open_store, said, change):
    good = open_store(root)
    record = files.read_sealed(good.folder / "folders.json") | change
    files.write_sealed(good.folder / "folders.json", record)
    said.clear()
    assert open_store(root).sha256 == good.sha256
    assert sum("damaged" in line for line in said) == 1


@pytest.mark.parametrize("record", [[], [["format", 4]], "format", None, 4])
@pytest.mark.parametrize("name", ["index.json", "folders.json"])
def test_a_sealed_record_of_another_kind_is_damage(root, open_store, said, name, record):
    good = open_store(root)
    files.write_sealed(good.folder / name, record)
    said.clear()
    assert open_store(root).sha256 == good.sha256
    assert sum("damaged" in line for line in said) == 1


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"[]", b"3", b"{}", b'{"record": 1}']
)
@pytest.mark.parametrize("name", ["index.json", "folders.json"])
def test_json_that_is_none_or_bottomless_is_damage(root, open_store, said, name, content):
    good = open_store(root)
    (good.folder / name).write_bytes(content)
    said.clear()
    assert open_store(root).sha256 == good.sha256
    assert sum("damaged" in line for line in said) == 1


def test_no_more_of_a_json_file_is_read_than_any_store_needs(root, open_store, monkeypatch):
    good = open_store(root)
    monkeypatch.setattr(files, "MOST_JSON_BYTES", 100)
    with pytest.raises(files.DamagedStoreError):
        store_files.open_folder(good.folder)


def test_a_pickled_array_is_never_opened(root, open_store, said):
    good = open_store(root)
    np.save(good.folder / "train-labels.npy", np.array([object()] * 12), allow_pickle=True)
    said.clear()
    assert open_store(root).sha256 == good.sha256
    assert sum("damaged" in line for line in said) == 1


def test_labels_that_name_no_class_are_damage(root, open_store):
    good = open_store(root)
    path = good.folder / "train-labels.npy"
    sums = files.write_array(path, np.full(12, 3))
    forge(good.folder, lambda index: index["splits"]["train"]["crc32"].update(labels=sums))
    with pytest.raises(files.DamagedStoreError, match="classes that do not exist"):
        store_files.verify(store_files.open_folder(good.folder))


def test_of_very_many_pixels_some_blocks_are_verified_and_over_many_starts_all(root, open_store, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 64)  # one image
    monkeypatch.setattr(store_files, "BLOCK", 64)
    good = open_store(root)
    flip(good.folder / "train-images.npy", None)
    found = 0
    for _ in range(200):
        try:
            store_files.verify(good, few_bytes=12 * 64)
        except files.DamagedStoreError:
            found += 1
    assert 0 < found < 200


@pytest.mark.parametrize("target", ["folder", "nowhere"])
def test_a_store_folder_that_is_a_link_is_neither_read_nor_written_through(root, open_store, said, tmp_path, target):
    elsewhere = tmp_path / "elsewhere"
    if target == "folder":
        elsewhere.mkdir()
        (elsewhere / "1x8x8-mine").mkdir()
        (elsewhere / "1x8x8-mine" / "file").write_text("mine")
    (root / scan.OWN_FOLDER).symlink_to(elsewhere)
    built = open_store(root)
    assert any("it is a link" in line for line in said)
    assert os.environ["XDG_CACHE_HOME"] in str(built.folder)
    assert not elsewhere.exists() or [path.name for path in elsewhere.iterdir()] == ["1x8x8-mine"]
    said.clear()
    assert open_store(root).sha256 == built.sha256
    assert not said


def test_links_inside_the_store_folder_are_removed_and_what_they_lead_to_stays(root, open_store, said, tmp_path):
    good = open_store(root)
    mine = tmp_path / "mine"
    shutil.copytree(good.folder, mine)
    (mine / "more").write_text("mine")
    shutil.rmtree(good.folder)
    good.folder.symlink_to(mine)
    (good.folder.parent / "building-1x8x8").symlink_to(mine)
    before = sorted(mine.iterdir())
    assert open_store(root).sha256 == good.sha256
    assert good.folder.is_dir()
    assert not good.folder.is_symlink()
    assert sorted(mine.iterdir()) == before


@pytest.mark.parametrize("make", [lambda lock: lock.mkdir(), lambda lock: lock.symlink_to("/nowhere/lock")])
def test_a_lock_that_cannot_be_taken_sends_the_store_to_the_cache(root, open_store, said, make):
    (root / scan.OWN_FOLDER).mkdir()
    make(root / scan.OWN_FOLDER / "lock")
    assert os.environ["XDG_CACHE_HOME"] in str(open_store(root).folder)
    assert any("cannot be kept in" in line for line in said)


@pytest.mark.parametrize("make", [lambda own: own.write_text("a file"), os.mkfifo])
def test_a_file_in_place_of_the_store_folder_sends_the_store_to_the_cache(root, open_store, said, make):
    make(root / scan.OWN_FOLDER)
    assert os.environ["XDG_CACHE_HOME"] in str(open_store(root).folder)


def test_a_store_of_an_earlier_version_is_replaced_without_a_word_of_damage(root, open_store, said):
    good = open_store(root)
    (good.folder / store_files.INDEX).write_text(json.dumps({"format": 2, "classes": [], "splits": {}, "sha256": ""}))
    said.clear()
    assert open_store(root).sha256 == good.sha256
    assert [line.split()[0] for line in said] == ["Decoding"]


def test_a_store_that_cannot_be_read_is_not_damaged_and_left_alone(root, open_store, said, monkeypatch):
    def refuse(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    good = open_store(root)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in good.folder.parent.rglob("*"))
    with monkeypatch.context() as planted:
        planted.setattr(store_files, "read_sealed", refuse)
        said.clear()
        assert open_store(root).sha256 == good.sha256
    assert said[-1] == "They are kept in memory instead, and decoded again at the next start."
    assert "Input/output error" in said[0]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in good.folder.parent.rglob("*")) == before
    said.clear()
    assert open_store(root).folder == good.folder
    assert not said


def test_an_unreachable_cache_does_not_matter_if_the_store_is_beside_the_images(root, open_store, said, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + 300 * "x")
    good = open_store(root)
    assert [line.split()[0] for line in said] == ["Decoding"]
    said.clear()
    assert open_store(root).folder == good.folder
    assert not said
