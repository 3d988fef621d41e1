import pytest

BATCH = 5


@pytest.mark.quick
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_every_image_is_scored_once_when_ranks_do_not_divide_the_set(on_ranks, ranks):
    """Set sizes around the number of ranks and the batch; the same bits as one process, on every rank."""
    sizes = sorted({1, ranks - 1, ranks, ranks + 1, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH * ranks + 2})
    (expected,) = on_ranks(1, "scoring", sizes=sizes, batch=BATCH)
    assert [record["images"] for record in expected] == sizes
    for record in on_ranks(ranks, "scoring", sizes=sizes, batch=BATCH):
        assert record == expected


def test_an_image_counted_twice_or_never_is_an_error(on_ranks):
    for message in on_ranks(2, "mistaken_rank"):
        assert "or some twice" in message
