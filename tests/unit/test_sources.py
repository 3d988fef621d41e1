import os
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from mnist_dist.data.sources import embedded_digits, scan
from mnist_dist.errors import DataError


def test_classes_and_files_are_those_of_torchvision(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=3, train=4, test=2)
    nested = root / "train" / "class-1" / "more"
    nested.mkdir()
    (nested / "deep.PNG").write_bytes((root / "train" / "class-1" / "0.png").read_bytes())
    (root / "train" / "class-1" / "notes.txt").write_text("not a picture")
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


def test_the_working_folder_itself_can_be_the_data_folder(tmp_path, folder_of, monkeypatch):
    monkeypatch.chdir(folder_of(tmp_path / "data", classes=2, train=1, test=1))
    assert scan(Path()).splits["train"].files == ("train/class-0/0.png", "train/class-1/0.png")


def test_a_link_to_nowhere_is_named(tmp_path, folder_of):
    root = folder_of(tmp_path / "data")
    (root / "train" / "class-0" / "gone.png").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"class-0/gone.png cannot be read .*repair or remove it"):
        scan(root)


def remove(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: root.rename(root.with_name("gone")), "There is no data folder .*data"),
        (lambda root: (root / "test").rename(root / "tset"), "has no folder 'test'"),
        (lambda root: (root / "test" / "class-2").rename(root / "other"), "1 folder is missing: .*test/class-2"),
        (lambda root: (root / "train" / "class-1").rename(root / "other"), "missing: .*train/class-1"),
        (lambda root: remove(root / "test" / "class-0"), "1 class folder has no pictures: .*test/class-0"),
        (lambda root: (root / "train" / "new").mkdir(), "missing: .*test/new"),
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
