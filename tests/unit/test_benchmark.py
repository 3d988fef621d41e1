import dataclasses
import io
import json

import pytest
from cost_model import CostModel, Line, fit_line, messages, volume
from rich.console import Console

from mnist_dist.bench.cases import plan_cases, shareable
from mnist_dist.bench.records import (
    Arithmetic,
    Case,
    ExchangeTimes,
    GroupResult,
    PeakMemory,
    Speed,
    StepTime,
    Window,
    divide_time,
    speed_of,
)
from mnist_dist.bench.report import advice_for, assemble
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


def cost_model(collective="all-reduce", **changes):
    alone = Line(fixed=0.001, each=1e-4, largest_error=0.0)
    values = {"global_batch": 64, "alone": alone, "gradient_bytes": 1_000_000, "latency": 1e-4, "bandwidth": 1e9,
              "overhead": 0.0005}  # fmt: skip
    return CostModel(collective=collective, **values | changes)


def test_an_exchange_on_a_ring_is_predicted_from_another_number_of_ranks():
    # 8 ranks: all-reduce sends 14 messages and 1.75 times the gradient, all-gather 7 messages and 7 times the gradient.
    for collective, expected in (("all-reduce", 14e-4 + 1.75e-3), ("all-gather", 7e-4 + 7e-3)):
        found = {"collective": collective, "processes": 4, "gradient_bytes": 1_000_000}
        each = volume(collective, 4) / 1e9
        times = [(size, messages(collective, 4) * 1e-4 + each * size) for size in (4096, 10**6)]
        rows = [{"global_batch": size, "images_per_second": size / (0.001 + 1e-4 * size)} for size in (16, 64)]
        report = {"global_batch": 64, "collective": found | {"seconds_by_bytes": times}, "parts_of_batch": rows,
                  "scaling": [{"processes": 4, "step": {"communication": times[1][1] + 0.0005}}]}  # fmt: skip
        model = CostModel.of(report)
        assert model.exchange(8) == pytest.approx(expected)
        assert model.exchange(1) == 0
        assert model.overhead == pytest.approx(0.0005)
        assert model.seconds(1) == pytest.approx(0.0074)


def test_a_step_costs_the_share_of_the_batch_the_overhead_and_the_exchange():
    model = cost_model()
    assert model.seconds(1) == pytest.approx(0.001 + 0.0064)
    four = 0.001 + 0.0016 + 0.0005 + 6 * 1e-4 + 1.5 * 0.001
    assert model.seconds(4) == pytest.approx(four)
    assert model.efficiency(4) == pytest.approx(0.0074 / (4 * four))
    # 2: 0.0074 / (2 * 0.0059) = 0.63, 3: 0.0074 / (3 * 0.00537) = 0.46
    assert model.pays_up_to(64) == 2
    assert model.pays_up_to(1) == 1
    assert cost_model(global_batch=6400).pays_up_to(64) > 20


def test_a_report_of_one_process_is_refused_by_the_cost_model():
    with pytest.raises(SystemExit, match="bench --processes 2"):
        CostModel.of({"collective": None, "parts_of_batch": []})


def window(images, seconds, taken=0.1, compute=0.5):
    return Window(images=images, seconds=seconds, input=taken * seconds, compute=compute * seconds)


def test_a_rate_is_the_median_window_with_the_slowest_and_the_fastest():
    windows = [window(100, 1.0), window(100, 0.5), window(100, 4.0)]
    speed = speed_of(CASE, 1, windows, windows)
    assert (speed.images_per_second, speed.least, speed.most, speed.windows) == (100, 25, 200, 3)


@pytest.mark.parametrize(
    ("a_step", "log_every", "windows"),
    [(0.01, 1000, (30, 3)), (0.001, 50, (300, 3)), (0.001, 70, (280, 3)), (0.25, 50, (1, 3)), (2.0, 50, (1, 1))],
)
def test_windows_fill_the_time_and_hold_whole_intervals_of_the_log(a_step, log_every, windows):
    assert divide_time(2.7, a_step, log_every) == windows


def test_the_parts_of_a_step_add_up_to_it_and_the_exchange_is_what_it_adds():
    windows = [window(640, 1.0, compute=0.8), window(640, 2.0), window(640, 0.5)]
    split = speed_of(CASE, 2, windows, windows, [window(320, 0.5, compute=0.6)] * 3).step
    assert split.seconds == pytest.approx(0.1)
    assert split.input == pytest.approx(0.01)
    assert split.communication == pytest.approx(0.02)  # 0.08 with, 0.06 without
    assert split.compute == pytest.approx(0.06)
    assert split.other == pytest.approx(0.01)


def test_an_exchange_within_the_noise_counts_as_nothing():
    windows = [window(64, 1.0)] * 3
    split = speed_of(CASE, 2, windows, windows, [window(64, 1.0, compute=0.7)] * 3).step
    assert split.communication == 0
    assert split.compute == pytest.approx(0.5)


def speed(rate=6400.0, *, batch=64, precision="fp32", threads=2, processes=1, speedup=1.0, **parts):
    step = {"input": 0.0, "compute": 0.0, "communication": 0.0, "other": 0.0} | parts
    return Speed(processes=processes, threads=threads, precision=precision, global_batch=batch, micro_batch=None,
                 images_per_second=rate, least=rate, most=rate, windows=9, speedup=speedup,
                 step=StepTime(seconds=batch / rate, **step))  # fmt: skip


LARGER = speed(batch=256, speedup=1.4)


@pytest.mark.parametrize(
    ("parts", "alternatives", "free_cpus", "limit", "suggestion"),
    [
        ({}, (), 2.0, "compute", "Nothing that was measured is faster"),
        ({}, (LARGER,), 2.0, "small steps", "train.global_batch=256 trained 1.40 times as many images "
         "a second here, with a learning rate to be chosen anew."),
        ({}, (speed(batch=256, speedup=1.1),), 2.0, "compute", "Nothing that was measured"),
        ({"input": 0.005}, (), 2.0, "input", "at most 2.00 times"),
        ({"communication": 0.005}, (), 2.0, "communication", "side by side"),
        ({"communication": 0.005}, (LARGER,), 2.0, "communication", "train.global_batch=256"),
        ({}, (speed(precision="bf16", speedup=1.6), LARGER), 2.0, "compute", "--precision bf16 trained 1.60 times"),
        ({}, (), 1.0, "another process", "when the machine is quiet"),
        ({}, (), 1.9, "compute", "Nothing that was measured"),
        ({}, (), None, "compute", "Nothing that was measured"),
    ],
)  # fmt: skip
def test_the_nearest_limit_is_what_would_gain_most(parts, alternatives, free_cpus, limit, suggestion):
    usual = speed(**parts)
    advice = advice_for(usual, (usual,), alternatives, 0.4, 2, free_cpus)
    assert advice.limit == limit
    assert suggestion in advice.suggestion
    assert "64 images takes 10 ms" in advice.reason or limit == "another process"


def test_more_processes_are_suggested_where_they_trained_faster():
    advice = advice_for(speed(), (speed(), speed(9600.0, processes=2)), (), 0.4, 2, 2.0)
    assert advice.suggestion == "--processes 2 trained 1.50 times as many images a second here."


def test_a_plan_has_each_case_once_and_the_config_as_it_is_first():
    cases = plan_cases(Train(global_batch=64), usual=1, threads={1: 2, 2: 1, 4: 1}, cpus=2)
    assert cases.grouped == 2  # four would share two CPUs
    alone = cases.of_group(1)
    assert len(set(alone)) == len(alone)
    assert alone[0] == CASE
    assert dataclasses.replace(CASE, global_batch=256) in alone
    assert [(case.global_batch, case.threads) for case in cases.sizes] == [(4, 1), (16, 1), (32, 1), (64, 1)]
    assert cases.of_group(4) == (dataclasses.replace(CASE, threads=1),)


def test_gpus_are_measured_all_together_with_the_larger_batch_too():
    cases = plan_cases(Train(global_batch=64), usual=4, threads={1: 4, 2: 4, 4: 4}, cpus=None)
    assert cases.grouped == 4
    assert [case.global_batch for case in cases.of_group(4)] == [64, 256]
    assert [case.global_batch for case in cases.of_group(2)] == [64]


def test_exact_keeps_the_size_of_its_micro_batches():
    cases = plan_cases(Train(global_batch=64, reduction="exact"), usual=1, threads={1: 1, 2: 1}, cpus=2)
    assert [(case.global_batch, case.micro_batch) for case in cases.sizes] == [(16, 16), (32, 16), (64, 16)]
    assert cases.larger == Case(global_batch=256, micro_batch=None, precision="auto", threads=1)


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
    cases = plan_cases(Train(global_batch=64), usual=1, threads={1: 2, 2: 1}, cpus=2)

    def measured(case, processes, rate):
        precision = "fp32" if case.precision == "auto" else case.precision
        return speed(rate, batch=case.global_batch, precision=precision, threads=case.threads, processes=processes,
                     compute=48 / rate, communication=16 / rate)  # fmt: skip

    rates = {(64, 2): 1000.0, (256, 2): 1200.0, (4, 1): 300.0, (16, 1): 500.0, (32, 1): 550.0, (64, 1): 600.0}
    alone = [case for case in cases.of_group(1) if case.precision in ("auto", "bf16")]
    known = {"device": "cpu", "device_reason": "no GPU found", "precision": "fp32", "parameters": 25_000}
    sizes = (4096, 100_000, 2**20)
    results = {
        1: GroupResult(
            **known,
            speeds=tuple(measured(case, 1, rates[case.global_batch, case.threads]) for case in alone),
            memory=PeakMemory(peak=2**30, imports=2**29, cuda_peak=None),
            arithmetic=Arithmetic(matrix_flop_per_second=1e11, flop_per_image=1e7, threads=2, share=0.1),
        ),
        2: GroupResult(
            **known,
            speeds=(measured(cases.base[2], 2, 900.0),),
            collective=ExchangeTimes(collective="all-reduce", processes=2, gradient_bytes=100_000,
                                     seconds_by_bytes=tuple((size, 1e-4 + size / 1e9) for size in sizes)),
        ),
    }  # fmt: skip
    others = Others(busy=0.0, stolen=0.0)
    return assemble(Config(), cases, results, cpus=2, machine_cpus=2, others=others, seconds_each=3.0)


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
    assert [row.global_batch for row in found.parts_of_batch] == [4, 16, 32, 64]
    model = CostModel.of(json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False)))
    assert model.overhead == pytest.approx(16 / 900 - 1e-4 - 100_000 / 1e9)
    assert model.seconds(2) == pytest.approx(model.alone.fixed + 32 * model.alone.each + 16 / 900)
    assert found.advice.limit == "communication"  # a quarter of each step here
    assert found.advice.suggestion.startswith("train.global_batch=256 trained 1.20 times")


@pytest.mark.parametrize("width", [80, 160])
def test_the_tables_fit_into_a_terminal(width):
    output = io.StringIO()
    print_report(report(), Console(file=output, width=width))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    words = " ".join(output.getvalue().split())
    assert "2 processes x 1 thread each 900 900 to 900 0.90 75%" in words
    assert "0.20 ms for 98 KiB of gradients." in words
    assert "Suggestion:" in words


def test_a_result_survives_its_file(tmp_path):
    exchange = ExchangeTimes(
        collective="all-gather", processes=2, gradient_bytes=4096, seconds_by_bytes=((4096, 0.001),)
    )
    result = GroupResult(device="cpu", device_reason="as asked", precision="fp32", parameters=10, speeds=(speed(),),
                         collective=exchange)  # fmt: skip
    result.write(tmp_path / "result.json")
    assert GroupResult.read(tmp_path / "result.json") == result
    assert result.find(CASE) == speed()
    assert result.find(dataclasses.replace(CASE, threads=1)) is None
