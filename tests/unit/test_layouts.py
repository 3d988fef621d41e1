"""Layouts of data folders: splits under their usual names, without a test split, or without any."""

import shutil

import numpy as np
import pytest
from PIL import Image

from mnist_dist.config.schema import Data
from mnist_dist.data import open_dataset
from mnist_dist.data.dataset import hold_out
from mnist_dist.data.scan import natural_key, scan
from mnist_dist.errors import ConfigError, DataError


def opened(root, **settings):
    data = Data(root=str(root), image_size=8, **settings)
    return open_dataset(data, seed=0, announce=lambda line: None)


@pytest.fixture
def flat(tmp_path, folder_of):
    """A folder without splits: two classes of forty images each."""
    whole = folder_of(tmp_path / "whole", classes=2, train=40, test=1)
    root = (whole / "train").rename(tmp_path / "flat")
    shutil.rmtree(whole)
    return root


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ({"train": "train", "test": "val"}, ["train", "validation"]),
        ({"train": "Training", "test": "Validation"}, ["train", "validation"]),
        ({"train": "TRAIN", "test": "dev"}, ["train", "validation"]),
        ({"train": "train", "test": "Testing"}, ["train", "test"]),
    ],
)
def test_splits_are_found_under_their_usual_names(tmp_path, folder_of, names, splits):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=2)
    for former, name in names.items():
        (root / former).rename(root / name)
    dataset = opened(root)
    assert list(dataset.splits) == splits
    assert dataset.reported.name == splits[-1]
    assert (len(dataset.train), len(dataset.reported)) == (6, 4)
    assert dataset.train.file(0).startswith(f"{names['train']}/")


def test_two_folders_for_one_split_are_refused(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=2)
    shutil.copytree(root / "test", root / "val")
    shutil.copytree(root / "test", root / "valid")
    with pytest.raises(DataError, match="both folders for the val split"):
        scan(root)


def test_training_images_alone_in_a_train_folder_are_refused(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=2)
    shutil.rmtree(root / "test")
    with pytest.raises(DataError, match="has no folder 'test'"):
        scan(root)


def test_a_folder_without_splits_holds_out_a_share_of_each_class(flat):
    dataset = opened(flat)
    assert list(dataset.splits) == ["train", "validation"]
    assert dataset.test is None
    assert len(dataset.train) + len(dataset.validation) == 80
    assert 4 <= len(dataset.validation) <= 28  # a fifth, by a hash
    assert len(opened(flat, validation_fraction=0.5).validation) > len(dataset.validation)
    assert {dataset.train.file(i) for i in range(len(dataset.train))}.isdisjoint(
        dataset.validation.file(i) for i in range(len(dataset.validation))
    )


def test_adding_and_removing_images_moves_no_other_image_to_the_other_side(flat):
    def sides():
        dataset = opened(flat)
        return {split.file(i): name for name, split in dataset.splits.items() for i in range(len(split))}

    before = sides()
    image = (flat / "class-0" / "0.png").read_bytes()
    for number in range(100, 130):
        (flat / "class-1" / f"new-{number}.png").write_bytes(image)
    (flat / "class-0" / "1.png").unlink()
    after = sides()
    assert len(after) == len(before) + 29
    assert {file: after[file] for file in before if file in after} == {
        file: side for file, side in before.items() if file in after
    }


def test_a_class_with_too_few_images_for_both_sides_is_named():
    with pytest.raises(DataError, match="class 'b' has too few images"):
        hold_out(np.array([0] * 60 + [1]), [f"a/{i}" for i in range(60)] + ["b/1"], Data(root="x"), ("a", "b"))


def test_a_fraction_beside_a_validation_folder_is_refused(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=2)
    (root / "test").rename(root / "valid")
    with pytest.raises(ConfigError, match="use one of the two"):
        opened(root, validation_fraction=0.5)


def test_a_whole_folder_without_splits_can_be_evaluated(flat):
    dataset = open_dataset(Data(root=str(flat), image_size=8), seed=0, announce=lambda line: None, whole=True)
    assert len(dataset.test) == 80


def test_classes_stand_in_natural_order():
    names = ["10", "2", "1", "b", "a10", "a2", "B"]
    assert sorted(names, key=natural_key) == ["1", "2", "10", "B", "a2", "a10", "b"]


def test_a_folder_whose_splits_are_renamed_is_decoded_again_or_found_equal(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=2, train=3, test=2)
    first = opened(root)
    shutil.copytree(root / "test", root / "valid")
    second = opened(root)
    assert list(first.splits) == ["train", "test"]
    assert list(second.splits) == ["train", "validation", "test"]


def test_a_class_without_test_images_is_trained_and_said(tmp_path, folder_of):
    root = folder_of(tmp_path / "data", classes=3, train=3, test=2)
    shutil.rmtree(root / "test" / "class-1")
    said = []
    dataset = open_dataset(Data(root=str(root), image_size=8), seed=0, announce=said.append)
    assert len(dataset.classes) == 3
    assert len(dataset.test) == 4
    assert "The test images have none of the class class-1." in said


@pytest.mark.parametrize(
    ("mode", "size", "settings", "line"),
    [
        (
            "RGB",
            (500, 333),
            {},
            "in colour, 500x333 (median), and are converted to gray 8x8: to keep more, set data.channels=3 and a",
        ),
        ("RGB", (10, 10), {}, "converted to gray 8x8: to keep more, set data.channels=3."),
        ("RGB", (500, 333), {"channels": 3}, "converted to 8x8: to keep more, set a larger data.image_size."),
        ("L", (10, 10), {}, None),
        ("RGB", (10, 10), {"channels": 3}, None),
    ],
)
def test_colour_and_size_are_never_lost_in_silence(tmp_path, mode, size, settings, line):
    random = np.random.default_rng(0)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(2):
            noise = Image.fromarray(random.integers(0, 256, (*size[::-1], 3), np.uint8))
            noise.convert(mode).save(tmp_path / place / f"{number}.png")
    said = []
    open_dataset(Data(root=str(tmp_path), image_size=8, **settings), seed=0, announce=said.append)
    found = [text for text in said if "to keep more" in text]
    assert len(found) == (line is not None)
    assert line is None or line in found[0]
    again = []
    open_dataset(Data(root=str(tmp_path), image_size=8, **settings), seed=0, announce=again.append)
    assert not again
