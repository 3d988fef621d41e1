import itertools
import os
import socket
import unicodedata
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from mnist_dist.data.scan import embedded_digits, scan, survey
from mnist_dist.data.walk import find_pictures
from mnist_dist.errors import DataError


def test_classes_and_files_are_those_of_torchvision(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=3, train=4, test=2)
    nested = root / "train" / "class-1" / "more"
    nested.mkdir()
    (nested / "deep.PNG").write_bytes((root / "train" / "class-1" / "0.png").read_bytes())
    (root / "train" / "class-1" / "notes.txt").write_text("not an image")
    theirs = ImageFolder(str(root / "train"))
    ours = scan(root)
    assert list(ours.classes) == theirs.classes
    expected = sorted((os.path.relpath(path, root), label) for path, label in theirs.samples)
    assert list(zip(ours.splits["train"].files, ours.splits["train"].labels.tolist(), strict=True)) == expected


def test_one_class_index_serves_all_splits(tmp_path, folder_of):
    listing = scan(folder_of(tmp_path / "data", classes=3, val=2))
    assert list(listing.splits) == ["train", "val", "test"]
    for pictures in listing.splits.values():
        for file, label in zip(pictures.files, pictures.labels, strict=True):
            assert file.split("/")[1] == listing.classes[label]


def test_a_link_back_into_its_own_folder_is_not_followed(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=1)
    (root / "train" / "class-0" / "loop").symlink_to(root / "train" / "class-0")
    assert len(scan(root).splits["train"].files) == 6


def test_folders_may_be_nested_as_deeply_as_paths_may_be_long(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=1)
    deepest = root / "train" / "class-0"
    for _ in range(1200):
        deepest /= "d"
        deepest.mkdir()
    (deepest / "9.png").write_bytes((root / "train" / "class-0" / "0.png").read_bytes())
    assert len(scan(root).splits["train"].files) == 7
    deepest.parents[600].rename(tmp_path / "below")  # pytest's own clean-up recurses


def test_of_links_to_one_folder_one_is_followed_so_that_a_walk_ends(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=1)
    levels = [root / "train" / "class-0" / f"{level:02}" for level in range(40)]
    for level, below in itertools.pairwise(levels):
        level.mkdir()
        for name in "ba":
            (level / name).symlink_to(below)
    levels[-1].mkdir()
    (levels[-1] / "9.png").write_bytes((root / "train" / "class-0" / "0.png").read_bytes())
    found = survey(root)
    assert not found.bad
    deepest = [file for file in found.listing.splits["train"].files if file.endswith("9.png")]
    assert deepest == ["train/class-0/38/a/9.png", "train/class-0/39/9.png"]
    assert "one more link to the same folder" in found.ignored.values()


@pytest.mark.parametrize("place", [".loop", "train/.loop", "train/class-0/.loop", "loop", "__MACOSX"])
def test_a_link_that_leads_in_a_circle_is_passed_over_where_no_picture_is_missed(tmp_path, folder_of, place):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=1)
    (root / place).symlink_to(Path(place).name)
    found = survey(root)
    assert not found.bad
    assert list(found.ignored) == [str(root / place)]
    assert len(found.listing.splits["train"].files) == 6


def test_the_working_folder_itself_can_be_the_data_folder(tmp_path, folder_of, monkeypatch):
    monkeypatch.chdir(folder_of(tmp_path / "data", classes=2, train=1, test=1))
    assert scan(Path()).splits["train"].files == ("train/class-0/0.png", "train/class-1/0.png")


def test_a_link_to_nowhere_is_named(tmp_path, folder_of):
    root = folder_of(tmp_path / "data")
    (root / "train" / "class-0" / "gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"1 file cannot be read: .*class-0/gone.png .*nowhere.*Repair or remove"):
        scan(root)


def remove(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: root.rename(root.with_name("gone")), "There is no data folder .*data"),
        (lambda root: (root / "test").rename(root / "tset"), "has no folder 'test'"),
        (lambda root: (root / "test").rename(root / "Test images"), "Is .*Test images meant"),
        (lambda root: (root / "train" / "class-2").rename(root / "other"), "1 folder is missing: .*train/class-2"),
        (lambda root: (root / "train" / "class-1").rename(root / "other"), "missing: .*train/class-1"),
        (lambda root: remove(root / "train" / "class-0"), "1 class folder has no images: .*train/class-0"),
        (lambda root: (root / "train" / "new").mkdir(), "has no images: .*train/new"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(tmp_path, folder_of, damage, message):
    root = folder_of(tmp_path / "data", classes=3, train=2, test=1)
    damage(root)
    with pytest.raises(DataError, match=message):
        scan(root)


def test_a_single_class_is_refused(tmp_path, folder_of):
    with pytest.raises(DataError, match=r"only the class 'class-0'.*two classes or more"):
        scan(folder_of(tmp_path / "data", classes=1))


def test_the_embedded_digits_are_split_for_good():
    digits = embedded_digits(28)
    (train, train_labels), (test, test_labels) = digits["train"], digits["test"]
    assert (train.shape, test.shape) == ((1438, 1, 28, 28), (359, 1, 28, 28))
    assert set(train_labels) == set(test_labels) == set(range(10))
    assert train.max() > 250


PLACES = (
    "train/class-0/.ipynb_checkpoints/0.png",
    "train/class-0/@eaDir/0.png/thumb.png",
    "train/class-0/__MACOSX/0.png",
    "train/class-0/.hidden.png",
    "train/.old/0.png",
    "train/__MACOSX/0.png",
    "train/stray.png",
    "train/class-0/notes.txt",
    "test/stray.txt",
    "other/class-0/0.png",
    "extra/0.png",
    "readme.md",
)


def test_what_systems_and_tools_leave_among_pictures_is_passed_over_and_each_is_named(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=1)
    before = scan(root)
    for place in PLACES:
        file = root / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((root / "train" / "class-0" / "0.png").read_bytes())
    (root / "train" / "class-0" / "old.txt").symlink_to("nowhere.txt")
    os.mkfifo(root / "train" / "class-0" / "pipe")
    found = survey(root)
    assert found.listing.classes == before.classes
    assert found.listing.splits["train"].files == before.splits["train"].files
    assert not found.bad
    assert not found.faults
    assert {os.path.relpath(path, root): reason for path, reason in found.ignored.items()} == {
        "train/class-0/.ipynb_checkpoints": "hidden",
        "train/class-0/@eaDir": "made by a system, not part of the data",
        "train/class-0/__MACOSX": "made by a system, not part of the data",
        "train/class-0/.hidden.png": "hidden",
        "train/.old": "hidden",
        "train/__MACOSX": "made by a system, not part of the data",
        "train/stray.png": "beside the class folders",
        "train/class-0/notes.txt": "not an image by its ending",
        "train/class-0/old.txt": "a link that leads nowhere",
        "train/class-0/pipe": "a named pipe",
        "test/stray.txt": "beside the class folders",
        "other": "beside train, val and test",
        "extra": "beside train, val and test",
        "readme.md": "beside train, val and test",
    }


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.path.relpath(path))  # its path may have 100 bytes
    server.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_pipe, "a named pipe, not a file"),
        (make_socket, "a socket, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "a link that leads out of the data folder, to /dev/zero"),
        (lambda path: path.symlink_to("nowhere.png"), "a link that leads nowhere"),
        (lambda path: path.symlink_to(path.name), "a link that leads nowhere"),  # to itself
        (lambda path: path.touch(), "an empty file"),
    ],
)
def test_what_only_looks_like_a_picture_is_refused_and_never_waited_for(tmp_path, folder_of, monkeypatch, make, reason):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=1)
    monkeypatch.chdir(root)
    places = [root / "train" / "class-0" / "x.png", root / "test" / "class-1" / "y.PNG"]
    for place in places:
        make(place)
    assert survey(root).bad == {str(place): reason for place in places}
    with pytest.raises(DataError, match=rf"2 files cannot be read: .*x.png \({reason}\); .*y.PNG"):
        scan(root)
    assert find_pictures(root / "test" / "class-1")[1] == {str(places[1]): reason}


def test_devices_are_no_pictures_even_where_links_may_lead_out(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=1)
    (root / "train" / "class-0" / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="a device, not a file"):
        scan(root, follow_links=True)


@pytest.mark.parametrize("place", ["train/class-0/linked.png", "train/class-0/linked", "train", "train/class-0"])
def test_links_out_of_the_data_folder_are_followed_only_where_the_user_says_so(tmp_path, folder_of, place):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=1)
    expected = len(scan(root).splits["train"].files)
    outside = tmp_path / "outside"
    if place.endswith("linked"):
        outside.mkdir()
        (outside / "9.png").write_bytes((root / "train" / "class-0" / "0.png").read_bytes())
        expected += 1
    elif place.endswith("png"):
        outside.write_bytes((root / "train" / "class-0" / "0.png").read_bytes())
        expected += 1
    else:
        (root / place).rename(outside)
    (root / place).symlink_to(outside)
    with pytest.raises(DataError, match=r"leads out of the data folder, to .*outside.*data.follow_links=true"):
        scan(root)
    listing = scan(root, follow_links=True)
    assert listing.leads_out
    assert len(listing.splits["train"].files) == expected


def test_links_within_the_data_folder_and_a_link_to_it_are_followed(tmp_path, folder_of):
    real = folder_of(tmp_path / "real", classes=2, train=3, test=1)
    (real / "train" / "class-0" / "same.png").symlink_to("../class-1/0.png")
    (real / "train" / "class-1" / "more").symlink_to(real / "test" / "class-1")
    (tmp_path / "data").symlink_to(real)
    listing = scan(tmp_path / "data")
    assert {"train/class-0/same.png", "train/class-1/more/0.png"} < set(listing.splits["train"].files)
    assert not listing.leads_out


def test_a_class_on_a_drive_that_is_gone_is_not_left_out_in_silence(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=3, train=2, test=1)
    for split in ("train", "test"):
        (root / split / "class.3").symlink_to(f"/nowhere/{split}")
    with pytest.raises(DataError, match=r"2 files cannot be read: .*train/class.3 .*nowhere"):
        scan(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=2, test=1)
    (root / "train" / "class-0").chmod(0)
    with pytest.raises(DataError, match=r"class-0 \(Permission denied"):
        scan(root)


@pytest.mark.parametrize(
    ("one", "other"), [("\u00c5", "A\u030a"), ("Stra\u00dfe \u00e9", "Stra\u00dfe e\u0301"), ("Cat", "cat")]
)
def test_two_spellings_of_one_class_are_told_apart_in_the_message(tmp_path, folder_of, one, other):
    root = folder_of(tmp_path / "data", classes=2, train=2, test=1)
    (root / "train" / "class-0").rename(root / "train" / one)
    (root / "test" / "class-0").rename(root / "test" / other)
    with pytest.raises(DataError) as raised:
        scan(root)
    assert "not spelt the same" in str(raised.value)
    assert ascii(one) in str(raised.value)
    assert ascii(other) in str(raised.value)
    assert unicodedata.normalize("NFC", one).casefold() == unicodedata.normalize("NFC", other).casefold()


def test_names_of_any_bytes_are_listed_as_they_are(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=2, test=1)
    name = os.fsdecode(b"caf\xe9\n\x1b[31m.png")
    (root / "train" / "class-0" / name).write_bytes((root / "train" / "class-0" / "0.png").read_bytes())
    for split in ("train", "test"):
        (root / split / "class-1").rename(root / split / os.fsdecode(b"\xff"))
    listing = scan(root)
    assert f"train/class-0/{name}" in listing.splits["train"].files
    assert listing.classes[1] == os.fsdecode(b"\xff")
