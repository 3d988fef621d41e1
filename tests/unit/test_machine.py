import pytest

from mnist_dist.machine import asked_threads


@pytest.mark.parametrize(
    ("value", "threads"),
    [
        ("3", 3),
        ("4,2", 4),
        (" 2 ", 2),
        ("", None),
        ("0", None),
        ("-1", None),
        ("two", None),
        ("²", None),
        ("9" * 5000, None),
    ],
)
def test_a_number_of_threads_in_the_environment_counts_where_openmp_takes_it(value, threads):
    assert asked_threads({"OMP_NUM_THREADS": value}) == threads


def test_without_the_variable_no_threads_are_asked_for():
    assert asked_threads({}) is None
