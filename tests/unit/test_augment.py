"""Augmentation: keyed, the same in any batch, and the operations of torchvision for given parameters."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mnist_dist.config.schema import Augmentation
from mnist_dist.data import augment
from mnist_dist.data.augment import GEOMETRY, VALUES, Augment

LIMITS = {name: next(limit.le for limit in field.metadata if hasattr(limit, "le"))
          for name, field in Augmentation.model_fields.items()}  # fmt: skip
EVERYTHING = Augmentation(**{name: min(3, 0.4 * most) for name, most in LIMITS.items()})
IMAGES = np.arange(64)
EPOCHS = np.arange(64) // 16
PIXELS = torch.randint(0, 256, (64, 3, 24, 24), generator=torch.Generator().manual_seed(0)).float()


def augmented(augmentation, pixels=PIXELS, images=IMAGES, epochs=EPOCHS, seed=0):
    operation = Augment(augmentation, size=pixels.shape[-1], seed=seed)
    return operation.apply(pixels, operation.draw(images, epochs))


def test_no_two_operations_share_a_random_number_and_every_field_has_one():
    rows = [*GEOMETRY, *VALUES]
    places = [place for row in rows for place in range(row.draws.start, row.draws.stop)]
    assert len(set(places)) == len(places)
    fields = [name for row in GEOMETRY for name in row.fields] + [row.field for row in VALUES]
    assert sorted(fields) == sorted(Augmentation.model_fields)


@pytest.mark.parametrize("name", list(Augmentation.model_fields))
def test_an_image_is_changed_in_the_same_way_in_any_batch_and_order(name):
    one = Augmentation(**{name: getattr(EVERYTHING, name)})
    whole = augmented(one)
    assert not torch.equal(whole, PIXELS)
    order = np.random.default_rng(0).permutation(64)
    for piece in np.split(order, [1, 8, 40]):
        assert torch.equal(augmented(one, PIXELS[piece], IMAGES[piece], EPOCHS[piece]), whole[piece])


def test_all_operations_together_are_the_same_in_any_batch_and_differ_by_epoch_and_seed():
    whole = augmented(EVERYTHING)
    assert torch.equal(torch.cat([augmented(EVERYTHING, PIXELS[i : i + 4], IMAGES[i : i + 4], EPOCHS[i : i + 4])
                                  for i in range(0, 64, 4)]), whole)  # fmt: skip
    assert not torch.equal(augmented(EVERYTHING, epochs=EPOCHS + 1), whole)
    assert not torch.equal(augmented(EVERYTHING, seed=1), whole)
    assert 0 <= whole.min() <= whole.max() <= 255


def test_a_flip_mirrors_pixels_exactly_and_as_often_as_asked():
    flipped = augmented(Augmentation(horizontal_flip=0.25))
    mirrored = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped.round(), PIXELS, strict=True)]
    same = [torch.equal(new, old) for new, old in zip(flipped.round(), PIXELS, strict=True)]
    assert sum(mirrored) + sum(same) == 64
    draws = np.arange(4000)
    maps = Augment(Augmentation(horizontal_flip=0.25), size=24, seed=0).draw(draws, draws * 0)["maps"]
    assert (maps[:, 0, 0] < 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_a_flip_and_a_turn_are_resampled_once_as_one_after_the_other():
    both = Augment(Augmentation(rotation_degrees=30, shift_pixels=2, vertical_flip=1.0), size=24, seed=3)
    turned = Augment(Augmentation(rotation_degrees=30, shift_pixels=2), size=24, seed=3)
    smooth = torch.linspace(0, 200, 24).view(1, 1, 1, 24) + torch.linspace(0, 50, 24).view(1, 1, 24, 1)
    smooth = smooth.expand(8, 3, 24, 24).contiguous()
    images, epochs = np.arange(8), np.zeros(8, np.int64)
    once = both.apply(smooth, both.draw(images, epochs))
    twice = turned.apply(smooth.flip(-2), turned.draw(images, epochs))
    middle = (slice(None), slice(None), slice(6, 18), slice(6, 18))
    assert_close(once[middle], twice[middle], atol=1e-2, rtol=0)


@pytest.mark.parametrize(("ours", "theirs"), [("brighten", "adjust_brightness"), ("contrast", "adjust_contrast"),
                                              ("saturate", "adjust_saturation")])  # fmt: skip
def test_colour_changes_are_those_of_torchvision(ours, theirs):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    draws = torch.rand(64, 1, generator=torch.Generator().manual_seed(1))
    found = getattr(augment, ours)(PIXELS, draws, 0.5)
    for new, old, draw in zip(found, PIXELS / 255, draws, strict=True):
        wanted = 255 * getattr(functional, theirs)(old, 1 + (2 * draw.item() - 1) * 0.5)
        assert_close(new, wanted, atol=0.01, rtol=0)


def test_a_gray_image_has_no_colour_to_change():
    gray = PIXELS[:, :1]
    assert torch.equal(augmented(Augmentation(saturation=1.0), gray), gray)


def test_an_erased_box_has_the_images_mean_and_a_share_of_its_area():
    found = augmented(Augmentation(erase=1.0))
    shares = (found != PIXELS).any(dim=1).float().mean(dim=(1, 2))
    assert shares.min() > 0.01
    assert shares.max() < 0.36
    changed = (found != PIXELS).any(dim=1, keepdim=True).expand_as(found)
    means = PIXELS.mean(dim=(2, 3), keepdim=True).expand_as(found)
    assert torch.equal(found[changed], means[changed])
    some = augmented(Augmentation(erase=0.25))
    assert 4 <= (some != PIXELS).flatten(1).any(dim=1).sum() <= 30
