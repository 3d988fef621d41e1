import gzip
import struct

import numpy as np
import pytest

from mnist_dist.data.decoding import decode
from mnist_dist.data.idx import read_idx_folder, write_image_folder
from mnist_dist.data.sources import scan
from mnist_dist.errors import ConfigError, DataError


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path):
    """A small set in MNIST's names, half of it gzipped: 30 and 12 pictures of 12 classes."""
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "t10k-labels-idx1-ubyte.gz").unlink(), "has no t10k-labels"),
        (lambda f: cut(f / "t10k-labels-idx1-ubyte.gz"), "t10k-labels-idx1-ubyte.gz cannot be read"),
        (lambda f: cut(f / "train-images-idx3-ubyte"), "should hold 30x20x20 bytes .* but holds 11995"),
        (lambda f: (f / "train-images-idx3-ubyte").write_bytes(b"PNG!"), "no IDX file"),
        (
            lambda f: (f / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(11)))),
            "12 test images but 11 labels",
        ),
    ],
)
def test_a_set_that_is_not_whole_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(DataError, match=message):
        read_idx_folder(folder)


@pytest.mark.mnist
def test_the_four_original_files_are_recognised(mnist_idx):
    read = read_idx_folder(mnist_idx)
    assert read.is_mnist
    assert {split: len(labels) for split, labels in read.labels.items()} == {"train": 60_000, "test": 10_000}
