import numpy as np
import pytest

from mnist_dist.data import Sampler, sampler
from mnist_dist.errors import ConfigError
from mnist_dist.keyed import Purpose, keyed_permutation, permuted


@pytest.mark.parametrize(("images", "batch"), [(10, 3), (10, 10), (7, 1), (64, 64), (101, 8)])
def test_each_epoch_has_every_image_once(images, batch):
    sampler = Sampler(images=images, global_batch=batch, seed=1)
    steps = [sampler.batch(step) for step in range(3 * images)]
    stream = np.concatenate([ids for ids, _ in steps])
    epochs = np.concatenate([epoch for _, epoch in steps])
    for epoch in range(3):
        assert sorted(stream[epochs == epoch]) == list(range(images))


def test_no_batch_is_ever_short_and_epochs_join_without_a_gap():
    sampler = Sampler(images=10, global_batch=4, seed=0)
    images, epochs = sampler.batch(2)  # positions 8 to 11
    assert len(images) == 4
    assert epochs.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_same_images_are_in_a_step_at_any_process_count(ranks, micro_batch):
    order = Sampler(images=100, global_batch=24, seed=5)
    for step in (0, 4, 31):  # step 4 goes on in the next epoch
        pieces = [order.share(step, rank=rank, ranks=ranks, micro_batch=micro_batch) for rank in range(ranks)]
        for whole, parts in zip(order.batch(step), zip(*pieces, strict=True), strict=True):
            assert all(part.shape == (24 // ranks // micro_batch, micro_batch) for part in parts)
            assert np.concatenate([part.ravel() for part in parts]).tolist() == whole.tolist()


def test_a_late_step_needs_no_earlier_one():
    late = Sampler(images=1000, global_batch=10, seed=2)
    walked = Sampler(images=1000, global_batch=10, seed=2)
    for step in range(250):
        walked.batch(step)
    assert late.batch(250)[0].tolist() == walked.batch(250)[0].tolist()


@pytest.mark.parametrize(("images", "batch"), [(10, 3), (10, 5), (10, 10), (60000, 64)])
def test_an_epoch_ends_with_the_step_that_covers_its_last_image(images, batch):
    sampler = Sampler(images=images, global_batch=batch, seed=0)
    for epoch in range(4):
        end = sampler.epoch_end(epoch)
        assert end * batch >= (epoch + 1) * images > (end - 1) * batch
        assert sampler.epoch_of(end - 1) == epoch


@pytest.mark.parametrize("images", [sampler.MOST_SORTED, sampler.MOST_SORTED + 1])
@pytest.mark.parametrize("batch", [1000, 40_000])
def test_steps_that_go_on_in_the_next_block_have_every_image_once(images, batch):
    order = Sampler(images=images, global_batch=batch, seed=3)
    steps = [order.batch(step) for step in range(-(-images // batch) + 1)]
    stream, epochs = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    assert np.array_equal(np.sort(stream[:images]), np.arange(images))
    assert epochs.tolist() == (np.arange(len(stream)) // images).tolist()
    assert all(len(ids) == batch for ids, _ in steps)


def test_the_order_of_a_set_that_is_sorted_is_that_of_earlier_versions():
    order = Sampler(images=60_000, global_batch=50_000, seed=1)
    stream = np.concatenate([order.batch(step)[0] for step in range(3)])
    expected = [keyed_permutation(Purpose.SHUFFLE, 60_000, 1, epoch) for epoch in range(3)]
    assert np.array_equal(stream, np.concatenate(expected)[:150_000])


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_order_of_a_set_that_is_not_sorted_is_that_of_earlier_versions(ranks):
    images, batch, seed = sampler.MOST_SORTED + 100, 40_000, 2
    order = Sampler(images=images, global_batch=batch, seed=seed)
    for step in (0, 3, 100):  # step 3 goes on in the next epoch
        shares = [order.share(step, rank=rank, ranks=ranks, micro_batch=batch // ranks) for rank in range(ranks)]
        stream = np.concatenate([ids.ravel() for ids, _ in shares])
        epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), images)
        for epoch in np.unique(epochs).tolist():
            there = epochs == epoch
            assert np.array_equal(stream[there], permuted(places[there], Purpose.SHUFFLE, images, seed, epoch))


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ConfigError, match=r"train.global_batch is 11.*only 10.*use 10"):
        Sampler(images=10, global_batch=11, seed=0)
