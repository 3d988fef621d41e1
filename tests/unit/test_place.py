"""Whether a process is a worker, and that a place which cannot be is refused in one sentence."""

import pytest

from mnist_dist.errors import ConfigError
from mnist_dist.group.place import timeout_of, worker_of

PLACE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_a_worker_knows_its_place():
    worker = worker_of(PLACE)
    assert (worker.rank, worker.ranks, worker.local_rank, worker.local_ranks) == (1, 2, 1, 2)
    assert worker_of(PLACE | {"LOCAL_WORLD_SIZE": "2"}).local_ranks == 2
    assert worker_of({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}).ranks == 1  # alone it needs no address
    assert worker_of({"PMI_SIZE": "4", "PMI_RANK": "0", "WORLD_SIZE": "2"}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "-1"},
        {"RANK": "2"},
        {"RANK": "1.0"},
        {"RANK": ""},
        {"RANK": "²"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "-2"},
        {"LOCAL_RANK": "-1"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"LOCAL_WORLD_SIZE": "1"},
        {"LOCAL_WORLD_SIZE": "3"},
        {"LOCAL_WORLD_SIZE": "all"},
        {"MASTER_ADDR": " "},
        {"MASTER_ADDR": None},
        {"MASTER_PORT": None},
        {"MASTER_PORT": "abc"},
        {"MASTER_PORT": "0"},
        {"MASTER_PORT": "65536"},
        {"MASTER_PORT": "-1"},
        {"MNIST_DIST_TIMEOUT": "abc"},
        {"MNIST_DIST_TIMEOUT": "nan"},
        {"MNIST_DIST_TIMEOUT": "inf"},
        {"MNIST_DIST_TIMEOUT": "-5"},
        {"MNIST_DIST_TIMEOUT": "1e300"},
        {"MNIST_DIST_WORLD_SIZE": "3"},
        {"MNIST_DIST_WORLD_SIZE": "two"},
        {"MNIST_DIST_LAUNCHER": "me"},
        {"MNIST_DIST_GROUP_FOLDER": "/nothing/here"},
    ],
    ids=str,
)
def test_a_place_that_cannot_be_is_refused_with_the_variable_named(wrong):
    environment = {name: value for name, value in (PLACE | wrong).items() if value is not None}
    with pytest.raises(ConfigError) as refused:
        worker_of(environment)
    assert next(iter(wrong)) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "left",
    [
        {"MNIST_DIST_GROUP_FOLDER": "/tmp"},
        {"MNIST_DIST_LAUNCHER": "4711"},
        {"MNIST_DIST_RANK_LOG": "log", "RANK": "0"},
        {"MNIST_DIST_WORLD_SIZE": "2", "RANK": "0", "WORLD_SIZE": "2"},
        {"MNIST_DIST_TIMEOUT": "soon"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"MV2_COMM_WORLD_SIZE": "2"},
    ],
    ids=str,
)
def test_what_a_launcher_left_behind_is_refused_with_the_variable_named(left):
    with pytest.raises(ConfigError, match=next(iter(left))):
        worker_of(left)


def test_a_rank_waits_as_long_as_it_is_told():
    assert timeout_of({}) == 1800
    assert timeout_of({"MNIST_DIST_TIMEOUT": "2400.0"}) == 2400
