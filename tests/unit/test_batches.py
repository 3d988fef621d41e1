import numpy as np
import pytest
import torch

from mnist_dist.config.schema import EMBEDDED_DIGITS, Augmentation, Data
from mnist_dist.data import open_dataset
from mnist_dist.data.augment import Augment, warp
from mnist_dist.data.batches import Batches

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return open_dataset(Data(root=EMBEDDED_DIGITS), seed=0, announce=print)


def batches(digits, augmentation=None, seed=0):
    return Batches(digits.train, mean=digits.mean, std=digits.std, device=CPU, augmentation=augmentation, seed=seed)


def test_training_pixels_have_mean_zero_and_deviation_one(digits):
    pixels, labels = batches(digits).take(np.arange(len(digits.train)))
    assert pixels.dtype == torch.float32
    assert pixels.mean().item() == pytest.approx(0, abs=1e-4)
    assert pixels.std().item() == pytest.approx(1, abs=1e-3)
    assert labels.tolist() == digits.train.labels.tolist()


def test_an_image_is_augmented_the_same_in_any_batch(digits):
    source = batches(digits, Augmentation(rotation_degrees=15, shift_pixels=2, scale=0.1), seed=4)
    images, epochs = np.array([5, 9, 700, 3]), np.array([2, 2, 2, 3])
    together, _ = source.take(images, epochs)
    for place, (image, epoch) in enumerate(zip(images, epochs, strict=True)):
        alone, _ = source.take(np.array([image]), np.array([epoch]))
        assert torch.equal(alone[0], together[place])


def test_augmentation_changes_with_epoch_and_seed_and_is_off_without_epochs(digits):
    augmentation = Augmentation(rotation_degrees=15)
    image, epoch = np.array([5]), np.array([0])
    drawn = [
        batches(digits, augmentation, seed=1).take(image, epoch)[0],
        batches(digits, augmentation, seed=2).take(image, epoch)[0],
        batches(digits, augmentation, seed=1).take(image, epoch + 1)[0],
        batches(digits, augmentation, seed=1).take(image)[0],
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(drawn[3], batches(digits).take(image)[0])


def moved(augmentation, count=2000):
    images = np.arange(count)
    return Augment(augmentation, size=28, seed=0).draw(images, np.zeros_like(images))["maps"].numpy()


def test_rotation_stays_within_its_range_and_fills_it():
    matrices = moved(Augmentation(rotation_degrees=20))
    angles = np.degrees(np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0]))
    assert abs(angles).max() <= 20
    assert angles.max() > 19
    assert angles.min() < -19


def test_scale_stays_within_its_range_and_fills_it():
    factors = 1 / np.linalg.det(moved(Augmentation(scale=0.2))[:, :, :2]) ** 0.5
    assert 0.8 <= factors.min() < 0.81
    assert 1.19 < factors.max() <= 1.2 + 1e-6


def test_a_shift_moves_a_picture_by_whole_pixels():
    picture = torch.zeros(1, 1, 28, 28)
    picture[0, 0, 10, 10] = 1
    matrix = torch.tensor([[[1.0, 0.0, -2 * 3 / 28], [0.0, 1.0, -2 * 1 / 28]]])  # 3 right, 1 down
    assert warp(picture, matrix)[0, 0, 11, 13].item() == pytest.approx(1, abs=1e-4)
    shifts = moved(Augmentation(shift_pixels=3))[:, :, 2] * 28 / 2
    assert 2.9 < abs(shifts).max() <= 3 + 1e-5
