"""What the benchmarks make of their measurements: medians, ratios, intervals, tables and the chart."""

import json
import re
from xml.etree import ElementTree

import compare
import pytest
import time_to_accuracy
from chart import Bar, axis_of, bar_chart
from summary import markdown_table, mean_interval, spread_of, steady_rate, student_t

SVG = "{http://www.w3.org/2000/svg}"


def measured(name, rates, *, batch=64, peak=2**30):
    return [
        compare.Measurement(name=name, batch=batch, round=round_, images_per_second=rate, peak_bytes=peak, device="cpu")
        for round_, rate in enumerate(rates, start=1)
    ]


def timed(name, seconds, accuracies):
    return [
        time_to_accuracy.Measurement(name=name, seed=seed, seconds=taken, test_accuracy=accuracy)
        for seed, (taken, accuracy) in enumerate(zip(seconds, accuracies, strict=True))
    ]


def test_a_spread_is_the_median_with_its_range():
    assert spread_of([3000.0, 1000.4, 2000.0, 9000.0]).to_text(",.0f") == "2,500 (1,000 to 9,000)"
    assert spread_of([7.0]).to_text(".1f") == "7.0 (7.0 to 7.0)"


def test_the_steady_rate_is_all_images_over_all_seconds_after_the_first_epoch():
    assert steady_rate([1.0, 100.0, 300.0]) == pytest.approx(2 / (1 / 100 + 1 / 300))
    assert steady_rate([5.0]) == 5.0


@pytest.mark.parametrize(("freedom", "tabulated"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045)])
def test_students_t_is_that_of_the_tables(freedom, tabulated):
    assert student_t(0.95, freedom) == pytest.approx(tabulated, abs=5e-4)


def test_the_interval_of_a_mean_is_that_of_a_worked_example():
    # Mean 3, standard deviation sqrt(2.5), t 2.776 with 4 degrees of freedom.
    assert mean_interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.963, 3 + 1.963), abs=5e-4)


def test_ours_is_compared_at_the_same_batch_by_medians():
    plain = "PyTorch, ImageFolder, 0 workers"
    measurements = [
        *measured(compare.OURS, [10.0, 30.0, 20.0]),
        *measured(plain, [5.0, 4.0, 80.0]),
        *measured(compare.OURS, [90.0], batch=256),
        *measured(plain, [30.0], batch=256, peak=None),
    ]
    rows = {(row["name"], row["batch"]): row for row in compare.summarise(measurements)}
    assert rows[plain, 64]["images_per_second"] == {"median": 5.0, "least": 4.0, "most": 80.0, "count": 3}
    assert [rows[plain, batch]["ours_over_this"] for batch in (64, 256)] == [4.0, 3.0]
    assert rows[plain, 256]["peak_bytes"] is None
    assert json.dumps(list(rows.values()))
    assert compare.table(measurements).splitlines()[2:] == [
        "| **`mnist-dist train`** | 20 (10 to 30) |  | 1,024 MiB | 90 (90 to 90) |  | 1,024 MiB |",
        f"| {plain} | 5 (4 to 80) | 4.00 | 1,024 MiB | 30 (30 to 30) | 3.00 |  |",
    ]


def test_there_is_no_ratio_without_ours():
    (row,) = compare.summarise(measured("PyTorch, tensors, channels_last", [5.0]))
    assert row["ours_over_this"] is None


def test_time_to_accuracy_names_the_worst_seed_and_the_ratio_of_the_medians():
    measurements = [
        *timed("fast", [4.0, 6.0, 5.0], [0.99, 0.97, 0.98]),
        *timed(time_to_accuracy.PLAIN, [20.0], [0.975]),
    ]
    ours, plain = time_to_accuracy.summarise(measurements)
    assert (ours["plain_over_this"], ours["least_accuracy"], ours["least_seed"]) == (4.0, 0.97, 1)
    assert ours["mean_accuracy"] == pytest.approx(0.98)
    assert ours["mean_interval"] == pytest.approx((0.98 - 0.02484, 0.98 + 0.02484), abs=1e-5)
    assert plain["mean_interval"] is None
    row = "| `mnist-dist train --config fast` | 5.00 (4.00 to 6.00) | 4.00 | 98.00% (95.52% to 100.48%) |"
    assert time_to_accuracy.table(measurements).splitlines()[2].startswith(row)


@pytest.mark.parametrize(("seeds", "runs", "expected"), [(10, 5, [1, 3, 5, 7, 9]), (3, 1, [2]), (2, 5, [0, 1])])
def test_plain_runs_are_spread_over_the_seeds(seeds, runs, expected):
    assert [seed for seed in range(seeds) if time_to_accuracy.plain_is_due(seed, seeds, runs)] == expected


def test_a_table_is_markdown():
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize(("most", "step", "end"), [(27_107, 5_000, 30_000), (60, 10, 60), (0.7, 0.2, 0.8)])
def test_an_axis_has_round_ticks(most, step, end):
    assert axis_of(most) == pytest.approx((step, end))


def test_the_chart_is_well_formed_and_draws_bars_to_scale():
    ours = Bar(label="ours & <best>", spread=spread_of([900.0, 1000.0, 1100.0]), ours=True)
    other = Bar(label="other", spread=spread_of([500.0, 500.0]), ours=False)
    root = ElementTree.fromstring(
        bar_chart("Speed < light", ["n = 3"], {"Batch 64": [ours, other], "Batch 256": [ours]})
    )
    words = [text.text for text in root.iter(f"{SVG}text")]
    assert {"Speed < light", "n = 3", "Batch 64", "Batch 256", "ours & <best>", "1,000", "500"} <= set(words)
    _, *bars = (float(rectangle.get("width")) for rectangle in root.iter(f"{SVG}rect"))
    assert bars[0] == pytest.approx(2 * bars[1], abs=0.1)
    whiskers = [re.findall(r"[\d.]+", path.get("d")) for path in root.iter(f"{SVG}path")]
    assert float(whiskers[0][2]) - float(whiskers[0][0]) == pytest.approx(bars[0] / 5, abs=0.2)
