from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mnist_dist.config.schema import EMBEDDED_DIGITS, Augmentation, Data
from mnist_dist.data import open_dataset
from mnist_dist.data.batches import Batches, Gather
from mnist_dist.data.residency import bytes_of, choose_residency
from mnist_dist.errors import ConfigError


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize(
    ("asked", "needed", "free", "expected"),
    [
        ("auto", 100, 400, "device"),
        ("auto", 101, 400, "host"),
        ("auto", 100, 0, "host"),
        ("device", 400, 400, "device"),
        ("host", 1, 400, "host"),
    ],
)
def test_pixels_stay_on_a_device_that_has_room(device, asked, needed, free, expected):
    assert choose_residency(asked, device=device, needed_bytes=needed, least_free_bytes=free) == expected


def test_a_device_without_room_is_refused_where_it_was_asked_for():
    with pytest.raises(ConfigError, match=r"data.residency is device.*401 bytes.*400.*auto or host"):
        choose_residency("device", device="cuda", needed_bytes=401, least_free_bytes=400)


@pytest.mark.parametrize("asked", ["auto", "device", "host"])
def test_the_cpu_leaves_pixels_in_the_mapped_store(asked):
    assert choose_residency(asked, device="cpu", needed_bytes=10**12, least_free_bytes=0) == "host"


@pytest.fixture(scope="module")
def digits():
    return open_dataset(Data(root=EMBEDDED_DIGITS, validation_fraction=0.2), seed=0, announce=print)


def test_splits_that_share_their_pixels_need_them_once(digits):
    needed = bytes_of(split.stored for split in digits.splits.values())
    assert needed == 1797 * (28 * 28 + 8)


def both(digits, device):
    images, epochs = np.array([5, 0, 700, 5]), np.array([0, 0, 1, 3])
    augmentation = Augmentation(rotation_degrees=15, shift_pixels=2, scale=0.2)
    for residency in ("device", "host"):
        gather = Gather(digits.train.stored, device, residency)
        options = {"mean": digits.mean, "std": digits.std, "device": device, "augmentation": augmentation}
        source = Batches(digits.train, gather=gather, **options)
        assert source.residency == residency
        with torch.inference_mode():
            source.take(images[:2])
        yield [source.take(images), source.take(images[::-1].copy()), source.take(images, epochs)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_are_the_same_wherever_their_pixels_wait_and_are_turned(digits, device):
    expected = next(both(digits, torch.device("cpu")))
    assert not torch.equal(expected[0][0], expected[2][0])  # it was turned
    for found in both(digits, torch.device(device)):
        for (pixels, labels), (same_pixels, same_labels) in zip(found, expected, strict=True):
            assert pixels.device.type == labels.device.type == device
            assert torch.equal(labels.cpu(), same_labels)
            assert torch.allclose(pixels.cpu(), same_pixels, atol=1e-6 if device == "cpu" else 1e-3)


@pytest.mark.parametrize(
    ("settings", "claim"),
    [
        ({"model.dropout": 0.25}, "micro-batches of 16 images: set train.micro_batch lower (each step still takes "
         "train.global_batch 32 images; other dropout is drawn, as with another seed)."),
        ({"model.dropout": 0}, "train.global_batch 32 images; only rounding changes)."),
        ({"model.dropout": 0, "train.micro_batch": 1}, "set data.image_size lower, or take a smaller network."),
    ],
)  # fmt: skip
def test_the_message_for_lack_of_memory_claims_only_what_holds(settings, claim):
    from mnist_dist.config import Setting, load
    from mnist_dist.run.build import _out_of_memory

    given = {"train.global_batch": 32} | settings
    config = load("quick", tuple(Setting(key=key, value=value, origin="--set") for key, value in given.items())).config
    parts = SimpleNamespace(config=config, runtime=SimpleNamespace(device="cuda:1", ranks=2))
    message = _out_of_memory(parts, "tensors")
    assert message.startswith("cuda:1 has not enough memory for micro-batches of ")
    assert message.endswith(claim)
