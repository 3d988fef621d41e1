import dataclasses
import io
import json

import pytest
from rich.console import Console

from mnist_dist.bench.advice import Choice, Figures, advise
from mnist_dist.bench.cost import Exchange, StepCost, rounds, volume
from mnist_dist.bench.fitting import Line, fit_line
from mnist_dist.bench.plan import make_plan, shareable
from mnist_dist.bench.records import (
    Arithmetic,
    Case,
    Measured,
    Memory,
    Rate,
    Record,
    Split,
    Window,
    divide,
    rate_of,
    split_of,
)
from mnist_dist.bench.report import Surroundings, assemble
from mnist_dist.bench.table import print_report
from mnist_dist.config import Config
from mnist_dist.config.schema import Train
from mnist_dist.errors import ConfigError
from mnist_dist.machine import cpu_time
from mnist_dist.machine.cpu_time import Moment, Others, others_between

CASE = Case(global_batch=64, micro_batch=None, precision="auto", threads=2)


def test_a_line_goes_through_points_that_lie_on_one():
    line = fit_line([(size, 0.001 + 2e-5 * size) for size in (16, 64, 256)])
    assert line.fixed == pytest.approx(0.001)
    assert line.each == pytest.approx(2e-5)
    assert line.largest_error == pytest.approx(0, abs=1e-9)


def test_a_line_heeds_small_sizes_as_much_as_large_ones():
    # With absolute errors, a tenth more at the largest size would push the fixed part below 0.
    points = [(4096, 1.0e-4), (32768, 1.07e-4), (2**18, 1.6e-4), (2**21, 6e-4), (2**24, 5e-3)]
    line = fit_line(points)
    assert line.fixed == pytest.approx(1e-4, rel=0.1)
    assert line.largest_error < 0.2


@pytest.mark.parametrize("points", [[(1, 2.0), (2, 1.0)], [(1, 1.0), (2, 3.0)]])
def test_neither_part_of_a_line_is_negative(points):
    line = fit_line(points)
    assert line.fixed >= 0
    assert line.each >= 0
    assert line.largest_error > 0


def test_an_exchange_on_a_ring_is_predicted_from_another_number_of_ranks():
    latency, bandwidth, size = 1e-4, 1e9, 400_000
    for collective in ("all-reduce", "all-gather"):
        line = Line(fixed=rounds(collective, 4) * latency, each=volume(collective, 4) / bandwidth, largest_error=0.0)
        exchange = Exchange.from_line(line, collective, ranks=4, gradient_bytes=size)
        assert exchange.latency_seconds == pytest.approx(latency)
        assert exchange.bytes_per_second == pytest.approx(bandwidth)
        assert exchange.seconds(4) == pytest.approx(line.seconds(size))
        assert exchange.seconds(1) == 0
    # 8 ranks: all-reduce 14 messages and 1.75 times the gradient, all-gather 7 and 7 times (here the latter).
    assert exchange.seconds(8) == pytest.approx(7 * 1e-4 + 7 * size / 1e9)


def test_a_step_costs_the_share_of_the_batch_the_overhead_and_the_exchange():
    exchange = Exchange(collective="all-reduce", gradient_bytes=1_000_000, latency_seconds=1e-4, bytes_per_second=1e9)
    cost = StepCost(alone=Line(fixed=0.001, each=1e-4, largest_error=0.0), exchange=exchange, overhead_seconds=0.0005)
    assert cost.seconds(64, 1) == pytest.approx(0.001 + 0.0064)
    four = 0.001 + 0.0016 + 0.0005 + 6 * 1e-4 + 1.5 * 0.001
    assert cost.seconds(64, 4) == pytest.approx(four)
    assert cost.images_per_second(64, 4) == pytest.approx(64 / four)
    assert cost.efficiency(64, 4) == pytest.approx(0.0074 / (4 * four))
    # 2: 0.0074 / (2 * 0.0059) = 0.63, 3: 0.0074 / (3 * 0.00537) = 0.46
    assert cost.pays_up_to(64, 64) == 2
    assert cost.pays_up_to(64, 1) == 1
    assert cost.pays_up_to(6400, 64) > 20


def window(images, seconds, taken=0.1, compute=0.5):
    return Window(images=images, seconds=seconds, input=taken * seconds, compute=compute * seconds)


def test_a_rate_is_the_median_window_with_the_slowest_and_the_fastest():
    rate = rate_of([window(100, 1.0), window(100, 0.5), window(100, 4.0)])
    assert rate == Rate(images_per_second=100, least=25, most=200, windows=3)


@pytest.mark.parametrize(
    ("a_step", "log_every", "windows"),
    [(0.01, 1000, (30, 3)), (0.001, 50, (300, 3)), (0.001, 70, (280, 3)), (0.25, 50, (1, 3)), (2.0, 50, (1, 1))],
)
def test_windows_fill_the_time_and_hold_whole_intervals_of_the_log(a_step, log_every, windows):
    assert divide(2.7, a_step, log_every) == windows


def test_the_parts_of_a_step_add_up_to_it_and_the_exchange_is_what_it_adds():
    windows = [window(640, 1.0, compute=0.8), window(640, 2.0), window(640, 0.5)]
    split = split_of(windows, 64, [window(320, 0.5, compute=0.6)] * 3)
    assert split.seconds == pytest.approx(0.1)
    assert split.input == pytest.approx(0.01)
    assert split.communication == pytest.approx(0.02)  # 0.08 with, 0.06 without
    assert split.compute == pytest.approx(0.06)
    assert split.other == pytest.approx(0.01)


def test_an_exchange_within_the_noise_counts_as_nothing():
    split = split_of([window(64, 1.0)] * 3, 64, [window(64, 1.0, compute=0.7)] * 3)
    assert split.communication == 0
    assert split.compute == pytest.approx(0.5)


FIGURES = Figures(
    global_batch=64,
    step_seconds=0.010,
    compute_seconds=0.009,
    input_seconds=0.0005,
    communication_seconds=0.0,
    attained=0.4,
    needed_cpus=2,
    free_cpus=2.0,
    larger_batch=None,
    others=(),
)
LARGER = Choice(setting="train.global_batch=256", gain=1.4, caution=", with a learning rate to be chosen anew")


@pytest.mark.parametrize(
    ("changes", "limit", "suggestion"),
    [
        ({}, "compute", "Nothing that was measured is faster"),
        ({"larger_batch": LARGER}, "small steps", "train.global_batch=256 trained 1.40 times as many images "
         "a second here, with a learning rate to be chosen anew."),
        ({"larger_batch": dataclasses.replace(LARGER, gain=1.1)}, "compute", "Nothing that was measured"),
        ({"input_seconds": 0.005}, "input", "at most 2.00 times"),
        ({"communication_seconds": 0.005}, "communication", "side by side"),
        ({"communication_seconds": 0.005, "larger_batch": LARGER}, "communication", "train.global_batch=256"),
        ({"others": (Choice(setting="--precision bf16", gain=1.6),), "larger_batch": LARGER}, "compute",
         "--precision bf16 trained 1.60 times"),
        ({"free_cpus": 1.0}, "another process", "when the machine is quiet"),
        ({"free_cpus": 1.9}, "compute", "Nothing that was measured"),
        ({"free_cpus": None}, "compute", "Nothing that was measured"),
    ],
)  # fmt: skip
def test_the_nearest_limit_is_what_would_gain_most(changes, limit, suggestion):
    advice = advise(dataclasses.replace(FIGURES, **changes))
    assert advice.limit == limit
    assert suggestion in advice.suggestion
    assert "64 images takes 10 ms" in advice.reason or limit == "another process"


def test_a_plan_has_each_case_once_and_the_config_as_it_is_first():
    plan = make_plan(Train(global_batch=64), usual=1, threads={1: 2, 2: 1, 4: 1}, cpus=2)
    assert plan.modelled == 2  # four would share two CPUs
    alone = plan.cases(1)
    assert len(set(alone)) == len(alone)
    assert alone[0] == CASE
    assert dataclasses.replace(CASE, global_batch=256) in alone
    assert [(case.global_batch, case.threads) for case in plan.sizes] == [(4, 1), (16, 1), (32, 1), (64, 1)]
    assert plan.cases(4) == (dataclasses.replace(CASE, threads=1),)
    assert plan.possible == (2, 4, 8, 16, 32, 64)


def test_gpus_are_measured_all_together_with_the_larger_batch_too():
    plan = make_plan(Train(global_batch=64), usual=4, threads={1: 4, 2: 4, 4: 4}, cpus=None)
    assert plan.modelled == 4
    assert [case.global_batch for case in plan.cases(4)] == [64, 256]
    assert [case.global_batch for case in plan.cases(2)] == [64]


def test_exact_keeps_the_size_of_its_micro_batches_and_is_not_expected_beyond_their_number():
    plan = make_plan(Train(global_batch=64, reduction="exact"), usual=1, threads={1: 1, 2: 1}, cpus=2)
    assert [(case.global_batch, case.micro_batch) for case in plan.sizes] == [(16, 16), (32, 16), (64, 16)]
    assert plan.larger == Case(global_batch=256, micro_batch=None, precision="auto", threads=1)
    assert plan.possible == (2, 4)


def test_a_number_of_processes_is_refused_only_where_it_was_asked_for():
    options = Train(global_batch=33)
    assert shareable(options, 2, asked=False) == (1,)
    assert shareable(options, 3, asked=True) == (1, 3)
    with pytest.raises(ConfigError, match="use 32 or 34"):
        shareable(options, 2, asked=True)


def test_what_others_had_of_the_machine_is_what_was_not_ours(tmp_path):
    (tmp_path / "stat").write_text("cpu  100 20 30 5000 7 8 9 40 3 0\nintr 7 8\n")
    moment = Moment.now(tmp_path / "stat")
    assert moment.cpus == pytest.approx(1.67)  # in hundredths of a second: user, nice, system, irq, softirq
    assert moment.stolen == pytest.approx(0.4)
    before = Moment(clock=0.0, cpus=10.0, stolen=0.0, ours=2.0)
    after = Moment(clock=10.0, cpus=25.0, stolen=1.0, ours=12.0)
    assert others_between(before, after) == Others(busy=0.5, stolen=0.1)
    assert Moment.now(tmp_path / "absent") is None
    for text in ("", "cpu 1 2 3 4\n", "cpu a b c d e f g h\n"):
        (tmp_path / "stat").write_text(text)
        assert Moment.now(tmp_path / "stat") is None


def test_of_the_cpus_those_count_on_which_this_process_may_run(tmp_path, monkeypatch):
    lines = ["cpu  900 0 0 0 0 0 0 0 0 0", *(f"cpu{number} {10**number} 0 0 0 0 0 0 1 0 0" for number in range(4))]
    (tmp_path / "stat").write_text("\n".join(lines))
    monkeypatch.setattr(cpu_time, "CPUS", frozenset({1, 3}))
    moment = Moment.now(tmp_path / "stat")
    assert (moment.cpus, moment.stolen) == (pytest.approx(10.1), pytest.approx(0.02))


def report():
    plan = make_plan(Train(global_batch=64), usual=1, threads={1: 2, 2: 1}, cpus=2)

    def measured(case, rate):
        step = Split(seconds=64 / rate, input=0.0, compute=48 / rate, communication=16 / rate, other=0.0)
        resolved = dataclasses.replace(case, precision="fp32" if case.precision == "auto" else case.precision)
        return Measured(case=resolved, rate=Rate(images_per_second=rate, least=rate, most=rate, windows=9), step=step)

    rates = {(64, 2): 1000.0, (256, 2): 1200.0, (4, 1): 300.0, (16, 1): 500.0, (32, 1): 550.0, (64, 1): 600.0}
    alone = [case for case in plan.cases(1) if case.precision in ("auto", "bf16")]
    known = {"device": "cpu", "device_reason": "no GPU found", "precision": "fp32", "parameters": 25_000,
             "gradient_bytes": 100_000}  # fmt: skip
    records = {
        1: Record(
            **known,
            measured=tuple(measured(case, rates[case.global_batch, case.threads]) for case in alone),
            memory=Memory(peak=2**30, imports=2**29, cuda_peak=None),
            arithmetic=Arithmetic(matrix_flop_per_second=1e11, flop_per_image=1e7),
        ),
        2: Record(
            **known,
            measured=(measured(plan.base[2], 900.0),),
            exchanges=tuple((size, 1e-4 + size / 1e9) for size in (4096, 2**20)),
        ),
    }
    others = Others(busy=0.0, stolen=0.0)
    return assemble(Config(), plan, records, Surroundings(cpus=2, machine_cpus=2, others=others, seconds_each=3.0))


def test_a_report_compares_what_was_measured():
    found = report()
    one, two = found.scaling
    assert (one.speedup, one.efficiency) == (1.0, 1.0)
    assert two.speedup == pytest.approx(0.9)
    assert two.efficiency == pytest.approx(900 / (2 * 600))
    assert {(other.precision, other.global_batch): other.speedup for other in found.alternatives} == {
        ("bf16", 64): 1.0,
        ("fp32", 256): pytest.approx(1.2),
    }
    assert found.arithmetic.share == pytest.approx(0.1)
    model = found.prediction
    assert model.overhead_seconds == pytest.approx(16 / 900 - 1e-4 - 100_000 / 1e9)
    expected = model.fixed_seconds + 32 * model.seconds_per_image + 16 / 900
    assert model.predictions[0].images_per_second == pytest.approx(64 / expected)
    assert found.advice.limit == "communication"  # a quarter of each step here
    assert found.advice.suggestion.startswith("train.global_batch=256 trained 1.20 times")
    json.dumps(dataclasses.asdict(found), allow_nan=False)


@pytest.mark.parametrize("width", [80, 160])
def test_the_tables_fit_into_a_terminal(width):
    output = io.StringIO()
    print_report(report(), Console(file=output, width=width))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    words = " ".join(output.getvalue().split())
    assert "2 processes x 1 thread each 900 900 to 900 0.90 75%" in words
    assert "Suggestion:" in words


def test_a_record_survives_its_file(tmp_path):
    record = Record(
        device="cpu",
        device_reason="as asked",
        precision="fp32",
        parameters=10,
        gradient_bytes=40,
        measured=(
            Measured(
                case=CASE,
                rate=Rate(images_per_second=1.0, least=1.0, most=1.0, windows=3),
                step=Split(seconds=1.0, input=0.0, compute=1.0, communication=0.0, other=0.0),
            ),
        ),
        exchanges=((4096, 0.001),),
    )
    record.write(tmp_path / "record.json")
    assert Record.read(tmp_path / "record.json") == record
