import numpy as np
import pytest

from mnist_dist.keyed import Purpose, keyed_hash, keyed_permutation, keyed_uniform


def test_a_hash_is_the_same_value_for_ever():
    # Checkpoints and splits of earlier versions depend on these values.
    assert keyed_hash(Purpose.SHUFFLE, 0, np.arange(3)).tolist() == [
        12793040940332582595,
        7806873273932414515,
        2086163135720482291,
    ]


def test_purposes_and_keys_do_not_share_values():
    values = [int(keyed_hash(purpose, seed, 5)[0]) for purpose in Purpose for seed in range(100)]
    assert len(set(values)) == len(values)


def test_order_of_keys_matters():
    assert keyed_hash(Purpose.SHUFFLE, 1, 2) != keyed_hash(Purpose.SHUFFLE, 2, 1)


def test_uniform_numbers_fill_the_unit_interval_evenly():
    draws = keyed_uniform(Purpose.AUGMENT, 7, np.arange(100_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert abs(counts - 10_000).max() < 500  # five standard deviations


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_a_permutation_has_every_index_once(count):
    assert sorted(keyed_permutation(Purpose.SHUFFLE, count, 3, 4).tolist()) == list(range(count))


def test_permutations_of_other_seeds_and_epochs_differ():
    orders = {tuple(keyed_permutation(Purpose.SHUFFLE, 50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
