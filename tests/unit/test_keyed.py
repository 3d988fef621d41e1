import numpy as np
import pytest

from mnist_dist.keyed import Purpose, keyed_hash, keyed_permutation, keyed_uniform, permuted


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


def everywhere(count, *keys):
    return permuted(np.arange(count), Purpose.SHUFFLE, count, *keys)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 9, 1000, 1023, 1024, 1025, 59_999, 60_000, 131_073, 1_000_003])
def test_a_permutation_in_pieces_has_every_index_once(count):
    for seed in range(3):
        assert np.array_equal(np.sort(everywhere(count, seed, 0)), np.arange(count))


def test_a_piece_of_a_permutation_needs_no_other():
    whole = everywhere(6_000, 1, 2)
    places = np.array([5_999, 0, 17, 17])
    assert permuted(places, Purpose.SHUFFLE, 6_000, 1, 2).tolist() == whole[places].tolist()
    far = permuted(np.arange(6 * 10**12, 6 * 10**12 + 1000), Purpose.SHUFFLE, 10**13, 1, 2)
    assert len(set(far.tolist())) == 1000
    assert 0 <= far.min() < far.max() < 10**13


def test_a_permutation_in_pieces_is_the_same_for_ever():
    # Runs that are resumed with a later version depend on these values.
    assert permuted(np.arange(4), Purpose.SHUFFLE, 6_000_000, 0, 0).tolist() == [3836499, 191137, 1250471, 1165205]


def test_permutations_in_pieces_of_other_seeds_and_epochs_differ():
    orders = {tuple(everywhere(1000, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("order", [everywhere, lambda *keys: keyed_permutation(Purpose.SHUFFLE, *keys)])
@pytest.mark.parametrize("count", [1000, 60_000])
def test_a_shuffle_has_no_visible_structure(order, count):
    """Where an image goes does not depend on where it was, nor on its neighbour, as far as these measures tell."""
    blocks, seeds = 20, 40
    table = np.zeros((blocks, blocks))
    steps, correlations, fixed = np.zeros(blocks), [], 0
    for seed in range(seeds):
        images = order(count, seed, seed % 3)
        places = np.arange(count)
        np.add.at(table, (places * blocks // count, images * blocks // count), 1)
        np.add.at(steps, np.diff(images) % count * blocks // count, 1)
        correlations += [np.corrcoef(places, images)[0, 1], np.corrcoef(images[:-1], images[1:])[0, 1]]
        fixed += int((images == places).sum())
    freedom = (blocks - 1) ** 2
    expected = seeds * count / blocks**2
    # Each within five standard deviations of what chance gives.
    assert abs(((table - expected) ** 2 / expected).sum() - freedom) < 5 * (2 * freedom) ** 0.5
    expected = steps.sum() / blocks
    assert abs(((steps - expected) ** 2 / expected).sum() - blocks) < 5 * (2 * blocks) ** 0.5
    assert abs(np.array(correlations)).max() < 5 / count**0.5
    assert abs(fixed - seeds) < 5 * seeds**0.5
