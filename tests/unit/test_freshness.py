import os
import shutil
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mnist_dist.data import freshness, scan, store, store_files
from mnist_dist.data.dataset import approved_store
from mnist_dist.data.decode import Decoding
from mnist_dist.errors import WorkerError
from mnist_dist.group.messages import Approval
from mnist_dist.group.place import GroupFolder


@pytest.fixture
def root(tmp_path, folder_of, monkeypatch):
    """A data set that was changed long ago, by the clock of its file system."""
    monkeypatch.setattr(scan, "UNSETTLED_NANOSECONDS", 0)
    root = folder_of(tmp_path / "data", classes=3, train=5, test=2)
    nested = root / "train" / "class-1" / "more"
    nested.mkdir()
    (nested / "5.png").write_bytes((root / "train" / "class-1" / "0.png").read_bytes())
    settle(root)
    return root


def settle(root):
    for folder, _, _ in os.walk(root):
        os.utime(folder, (1e9, 1e9))


def open_store(root):
    return store.open_or_build(root, Decoding(image_size=28, channels=1), lambda line: None)


@pytest.fixture
def scans(monkeypatch):
    """Counts how often a data folder is listed."""
    calls = []
    monkeypatch.setattr(store, "scan", lambda root, **options: calls.append(root) or scan.scan(root, **options))
    return calls


def test_a_second_start_lists_nothing(root, scans):
    first = open_store(root)
    second = open_store(root)
    assert len(scans) == 1
    assert second.sha256 == first.sha256
    assert second.state == f"decoded earlier, {second.folder}"


def add(root):
    (root / "train" / "class-0" / "new.png").write_bytes((root / "train" / "class-0" / "0.png").read_bytes())


def add_deep(root):
    (root / "train" / "class-1" / "more" / "6.png").write_bytes((root / "train" / "class-0" / "0.png").read_bytes())


def overwrite(root):
    (root / "train" / "class-0" / "0.png").write_bytes((root / "train" / "class-1" / "0.png").read_bytes())


def replace(root):
    (root / "train" / "class-1" / "0.png").replace(root / "train" / "class-0" / "0.png")


def add_class(root):
    for split in ("train", "test"):
        (root / split / "new").mkdir()
        (root / split / "new" / "0.png").write_bytes((root / "train" / "class-0" / "0.png").read_bytes())


def add_split(root):
    for label in range(3):
        (root / "val" / f"class-{label}").mkdir(parents=True)
        (root / "val" / f"class-{label}" / "0.png").write_bytes((root / "train" / "class-0" / "0.png").read_bytes())


def add_and_set_the_time_back(root):
    add(root)
    settle(root)  # as unpacking an archive may


CHANGES = [
    add,
    add_and_set_the_time_back,
    add_deep,
    overwrite,
    replace,
    add_class,
    add_split,
    lambda root: (root / "test" / "class-0" / "0.png").unlink(),
    lambda root: (root / "test" / "class-0" / "0.png").rename(root / "test" / "class-0" / "9.png"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_seen(root, change):
    before = open_store(root)
    change(root)
    assert open_store(root).folder != before.folder


def test_a_folder_that_only_looks_changed_is_listed_once_and_never_decoded(root, scans):
    before = open_store(root)
    other = root / "train" / "class-0" / "notes.txt"
    other.touch()
    other.unlink()
    os.utime(root / "train" / "class-0", (1e9, 1.1e9))
    assert open_store(root).folder == before.folder
    open_store(root)
    assert len(scans) == 2


def test_what_was_changed_a_moment_ago_may_change_again_under_the_same_time(root, scans, monkeypatch):
    monkeypatch.setattr(scan, "UNSETTLED_NANOSECONDS", 60_000_000_000)
    open_store(root)
    open_store(root)
    assert len(scans) == 2
    monkeypatch.setattr(scan, "UNSETTLED_NANOSECONDS", 0)
    open_store(root)
    open_store(root)
    assert len(scans) == 3


def test_a_change_within_one_tick_of_the_clock_is_seen_by_the_pixels(root, monkeypatch):
    """Planted: the file system gives a file that was changed the same times again."""
    monkeypatch.setattr(scan, "UNSETTLED_NANOSECONDS", 60_000_000_000)
    file = root / "train" / "class-0" / "0.png"
    Image.new("L", (28, 28), 7).save(file, compress_level=0)
    before, first = file.stat(), open_store(root)
    Image.new("L", (28, 28), 8).save(file, compress_level=0)  # as long

    def ticking(status):
        same = status.st_ino == before.st_ino
        return sources_stamp(before if same else status)

    sources_stamp = scan.file_stamp
    monkeypatch.setattr(scan, "file_stamp", ticking)
    monkeypatch.setattr(freshness, "file_stamp", ticking)
    assert ticking(file.stat()) == sources_stamp(before)
    assert open_store(root).sha256 != first.sha256


@pytest.fixture
def twins(root):
    """Two classes whose files have the same names, sizes and times, as in archives made reproducibly."""
    for split in ("train", "test"):
        for label in (0, 1):
            for file in (root / split / f"class-{label}").glob("*.png"):
                Image.new("L", (28, 28), 20 * label + int(file.stem)).save(file, compress_level=0)
                os.utime(file, (1e9, 1e9))
    return root


def swap_files(root):
    one, two = root / "train" / "class-0" / "0.png", root / "train" / "class-1" / "0.png"
    one.rename(root / "aside")
    two.rename(one)
    (root / "aside").rename(two)


def swap_folders(root):
    one, two = root / "train" / "class-0", root / "train" / "class-1"
    one.rename(root / "aside")
    two.rename(one)
    (root / "aside").rename(two)
    settle(root)


def swap_splits(root):
    for label in (0, 1):
        (root / "train" / f"class-{label}" / "0.png").replace(root / "aside")
        (root / "test" / f"class-{label}" / "1.png").replace(root / "train" / f"class-{label}" / "0.png")
        (root / "aside").replace(root / "test" / f"class-{label}" / "1.png")


def copy_over(root):
    shutil.copy2(root / "train" / "class-1" / "0.png", root / "train" / "class-0" / "0.png")  # as cp -p and rsync -t


def write_in_place_and_set_the_time_back(root):
    file = root / "train" / "class-0" / "0.png"
    file.write_bytes((root / "train" / "class-1" / "0.png").read_bytes())
    os.utime(file, (1e9, 1e9))
    settle(root)


def link_to_another(root):
    (root / "train" / "class-0" / "0.png").unlink()
    (root / "train" / "class-0" / "0.png").symlink_to("../class-1/0.png")


def hard_link_to_another(root):
    (root / "train" / "class-0" / "0.png").unlink()
    os.link(root / "train" / "class-1" / "0.png", root / "train" / "class-0" / "0.png")
    settle(root)


def restore_another(root):
    """Put another tree with the same names, sizes and times in its place, as tar does."""
    other = root.with_name("other")
    shutil.copytree(root / "train", other)  # keeps times
    shutil.rmtree(root / "train")
    for label in (0, 1):
        shutil.copytree(other / f"class-{1 - label}", root / "train" / f"class-{label}")
    shutil.copytree(other / "class-2", root / "train" / "class-2")
    settle(root)


@pytest.mark.parametrize(
    "change",
    [
        swap_files,
        swap_folders,
        swap_splits,
        copy_over,
        write_in_place_and_set_the_time_back,
        link_to_another,
        hard_link_to_another,
        restore_another,
    ],
)
def test_pictures_of_equal_size_and_time_that_trade_places_are_seen(twins, change):
    before = open_store(twins)
    sizes = sorted((file.stat().st_size, file.stat().st_mtime_ns) for file in (twins / "train").rglob("?.png"))
    change(twins)
    assert sorted((f.stat().st_size, f.stat().st_mtime_ns) for f in (twins / "train").rglob("?.png")) == sizes
    after = open_store(twins)
    assert after.sha256 != before.sha256
    shutil.rmtree(twins / scan.OWN_FOLDER)
    assert open_store(twins).sha256 == after.sha256


def restore_itself(root):
    shutil.copytree(root, root.with_name("other"), symlinks=True)
    shutil.rmtree(root)
    root.with_name("other").rename(root)


@pytest.mark.parametrize(
    "change",
    [
        restore_itself,  # with its store, as an archive of the whole folder does
        lambda root: [file.chmod(0o600) for file in root.rglob("*.png")],
        lambda root: os.utime(root / "test" / "class-0" / "0.png", (1, 1)),
    ],
)
def test_pictures_that_are_the_same_under_other_times_keep_their_store(root, monkeypatch, change):
    before = open_store(root)
    change(root)
    said = []
    again = store.open_or_build(root, Decoding(image_size=28, channels=1), said.append)
    assert (again.folder, again.sha256, said) == (before.folder, before.sha256, [])
    monkeypatch.setattr(freshness, "agrees", None)  # compared once, remembered from then on
    monkeypatch.setattr(store, "agrees", None)
    assert open_store(root).folder == before.folder


def test_times_before_1970_and_beyond_2262_are_times(root):
    for file, seconds in (("0.png", -(10**9)), ("1.png", 2**34)):
        os.utime(root / "train" / "class-0" / file, (seconds, seconds))
    first = open_store(root)
    assert open_store(root).folder == first.folder
    os.utime(root / "train" / "class-0" / "1.png", (2**34 - 1, 2**34 - 1))
    assert open_store(root).sha256 == first.sha256


def test_of_very_many_files_some_are_looked_at_and_the_state_says_so(root, monkeypatch):
    open_store(root)
    monkeypatch.setattr(freshness, "MOST_FILES", 11)
    assert open_store(root).state.endswith(", 11 of 22 files looked at")


@pytest.mark.parametrize("name", ["folders.json", "train-stamps.npy", "train-names.npy"])
def test_a_store_that_has_forgotten_what_it_was_made_from_is_compared_anew(root, scans, name):
    first = open_store(root)
    os.truncate(first.folder / name, 130 if name.endswith("npy") else 0)
    assert open_store(root).sha256 == first.sha256
    assert len(scans) == 2


def test_rows_are_spread_evenly():
    assert freshness.spread(5, 10, 7).tolist() == [0, 1, 2, 3, 4]
    assert freshness.spread(6, 6, 12).tolist() == [0, 2, 4]
    assert freshness.spread(3, 10, 10**9).tolist() == [0]


@pytest.mark.parametrize("name", ["../train/x.png", "/train/x.png", "train/../../x.png", "./x.png"])
def test_names_that_lead_out_of_the_data_folder_are_never_looked_at(name):
    assert store_files.Names.of(["train/a/..b.png", "train/c../0.png"]).stay_below()
    assert not store_files.Names.of([name, "train/a/0.png"]).stay_below()
    assert not store_files.Names.of(["train/a/0.png", name]).stay_below()


def test_names_are_read_one_by_one_or_in_slices(root):
    files = open_store(root).splits["train"].files
    expected = scan.scan(root).splits["train"].files
    assert tuple(files) == expected
    assert (files[0], files[3], files[-1], files[2:4]) == (expected[0], expected[3], expected[-1], [*expected[2:4]])
    with pytest.raises(IndexError):
        files[len(expected)]


def test_a_store_is_the_same_whether_mapped_or_in_memory(root):
    built = open_store(root)
    split = built.splits["train"]
    again = store_files.in_memory(np.array(split.images), np.array(split.labels), split.files)
    assert np.array_equal(again.totals, split.totals)
    assert again.totals.dtype == split.totals.dtype == np.uint64
    assert np.array_equal(again.moments, split.moments)


def test_ranks_wait_for_the_launcher_and_open_what_it_has_approved(root, tmp_path):
    built, group = open_store(root), GroupFolder(tmp_path)
    group.approval.touch()
    opened = []
    rank = threading.Thread(target=lambda: opened.append(approved_store(group)))
    rank.start()
    time.sleep(0.05)
    assert not opened
    overwrite(root)  # the launcher has looked before: all ranks shall train on the same
    Approval(folder=str(built.folder), state="decoded in 0.1 s", sha256=built.sha256).write(group)
    rank.join(5)
    assert (opened[0].sha256, opened[0].state) == (built.sha256, "decoded in 0.1 s")


def test_ranks_see_for_themselves_where_the_launcher_says_nothing_or_has_no_store(tmp_path):
    assert approved_store(GroupFolder(tmp_path)) is None
    Approval(folder=None).write(GroupFolder(tmp_path))
    assert approved_store(GroupFolder(tmp_path)) is None


def test_ranks_do_not_wait_for_a_launcher_that_is_gone(tmp_path, monkeypatch):
    GroupFolder(tmp_path).approval.touch()
    monkeypatch.setenv("MNIST_DIST_LAUNCHER", str(os.getppid() + 1))
    with pytest.raises(WorkerError, match="launcher"):
        approved_store(GroupFolder(tmp_path))
