"""The table that `verify` prints."""

import pytest

from mnist_dist.cli import verify
from mnist_dist.config import load

DIFFERENT = {"metrics": 4e-4, "gradients": 2e-2, "loss": 1e-1, "weights": 3e-3}  # not in the table's order


@pytest.mark.parametrize("order", [1, -1])
def test_each_difference_stands_under_its_own_title(capsys, monkeypatch, order):
    monkeypatch.setenv("COLUMNS", "100")
    same = dict.fromkeys(DIFFERENT, 0.0)
    other = dict(list(DIFFERENT.items())[::order])
    verify._print_table({1: same, 2: other}, load("quick"), steps=3)
    cells = [line.strip("│┃|").replace("┃", "│").split("│") for line in capsys.readouterr().out.splitlines()]
    titles = next(row for row in cells if "processes" in row[0])
    values = next(row for row in cells if row[0].strip() == "2")
    found = dict(zip((title.strip() for title in titles), (value.strip() for value in values), strict=True))
    assert found.pop("processes") == "2"
    assert found == {name: f"{value:.1e}" for name, value in DIFFERENT.items()}
