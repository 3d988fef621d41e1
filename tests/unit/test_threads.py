"""How many threads a run takes, alone and beside other programs."""

import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mnist_dist.config import Config, load, parse_setting
from mnist_dist.group import threads
from mnist_dist.group.threads import Cpus, Crowding, choose, crowded_by_itself, prepare, step_flop
from mnist_dist.machine.cpu_time import Moment
from mnist_dist.models import CATALOGUE, build_model

TWO = Cpus(bound=2, allowed=2, ranks=1)


def config(*settings):
    return load(None, tuple(map(parse_setting, settings))).config


@pytest.mark.parametrize("name", [name for name, row in CATALOGUE.items() if row.multiply_adds])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 64)])
def test_the_estimated_work_of_a_network_is_what_torch_counts(name, channels, size):
    with torch.device("meta"):
        model = build_model(name, classes=10, channels=channels, image_size=size)
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, channels, size, size))
    estimate = 2 * CATALOGUE[name].multiply_adds(channels, size)
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_work_of_a_step_is_that_of_a_rank_and_its_micro_batch():
    whole = step_flop(config("train.global_batch=64"), 1)
    assert step_flop(config("train.global_batch=64"), 2) == whole / 2
    assert step_flop(config("train.global_batch=64", "train.micro_batch=16"), 2) == whole / 4


@pytest.mark.parametrize(
    ("others", "cpus", "expected"),
    [
        (0.0, TWO, 2),
        (0.3, TWO, 2),  # a little noise is no reason
        (0.5, TWO, 1),
        (1.0, TWO, 1),
        (5.0, TWO, 1),
        (1.0, Cpus(bound=16, allowed=16, ranks=1), 15),
        (3.0, Cpus(bound=16, allowed=16, ranks=4), 3),
        (9.0, Cpus(bound=16, allowed=4, ranks=1), 4),  # a quota, and CPUs enough beside it
        (0.0, Cpus(bound=2, allowed=2, ranks=4), 1),
    ],
)
def test_a_rank_has_as_many_threads_as_other_programs_leave_cpus(others, cpus, expected):
    assert cpus.threads_beside(others) == expected


def test_a_run_takes_no_more_threads_than_its_work_is_worth():
    wide = Cpus(bound=64, allowed=64, ranks=1)
    small, large = config("train.global_batch=64"), config("model.name=large_cnn", "train.global_batch=256")
    few = choose(small, wide, ranks=1, most=64, others=0.0)
    assert 2 <= few.threads <= 8
    assert few.reason == "a step has little work"
    assert choose(large, wide, ranks=1, most=64, others=0.0).threads == 64
    beside = choose(large, TWO, ranks=1, most=2, others=1.2)
    assert (beside.threads, beside.reason) == (1, "other programs use 1.2 of 2 CPUs")


@pytest.mark.parametrize("others", [0.0, 0.2])
def test_ranks_that_fill_the_cpus_do_not_blame_other_programs(others):
    four = Cpus(bound=4, allowed=4, ranks=4)
    chosen = choose(config("model.name=large_cnn"), four, ranks=4, most=4, others=others)
    assert (chosen.threads, chosen.reason) == (1, "")


def test_more_threads_than_cpus_are_warned_about_where_the_user_can_mend_it():
    assert "train.threads is 3, which gives one process 3 threads on 2 CPUs" in crowded_by_itself(3, {}, TWO)
    assert "OMP_NUM_THREADS is 8, for 2 CPUs" in crowded_by_itself(None, {"OMP_NUM_THREADS": "8"}, TWO)
    four = Cpus(bound=2, allowed=2, ranks=4)
    for fixed, environment in [(None, {"OMP_NUM_THREADS": "1"}), (1, {"OMP_NUM_THREADS": "8"}), (None, {})]:
        assert crowded_by_itself(fixed, environment, four) is None


def test_a_number_and_exact_fix_the_threads_and_nothing_else_does():
    assert config("train.threads=3").train.fixed_threads == 3
    assert config("train.threads=3", "train.reduction=exact").train.fixed_threads == 3
    assert config("train.reduction=exact").train.fixed_threads == 1
    assert Config().train.fixed_threads is None
    assert config("train.threads=auto") == config("train.threads=null") == Config()


@pytest.mark.parametrize(("model", "spins"), [("small_cnn", threads.SPINS), ("large_cnn", threads.FEW_SPINS)])
def test_threads_spin_long_only_where_operations_are_short(monkeypatch, model, spins):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    prepare(config(f"model.name={model}", "train.global_batch=64"), 1)
    assert os.environ["GOMP_SPINCOUNT"] == str(spins)
    prepare(config("model.name=small_cnn"), 1)
    assert os.environ["GOMP_SPINCOUNT"] == str(spins)  # what is set stays


class Machine:
    """CPU times that a test moves on, a quarter of a second at a time."""

    def __init__(self, monkeypatch):
        self.clock = self.cpus = self.ours = 0.0
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.clock)

    def now(self):
        return Moment(clock=self.clock, cpus=self.cpus, stolen=0.0, ours=self.ours)

    def work(self, *, ours, others, seconds=0.26):
        self.clock += seconds
        self.ours += ours * seconds
        self.cpus += (ours + others) * seconds


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def seconds_until_lowered(machine, crowding, others, *, steps_left=10**9, most=100):
    """Work beside other programs until threads are to be lowered, and tell after how long and to what."""
    began = machine.clock
    for _ in range(most):
        machine.work(ours=1.0, others=others)
        if fitting := crowding.look(steps_left):
            return machine.clock - began, fitting
    return None


def test_a_run_is_crowded_after_three_seconds(machine):
    crowding = Crowding(TWO, 2, machine.now)
    seconds, fitting = seconds_until_lowered(machine, crowding, 1.0)
    assert 3.0 <= seconds < 3.5
    assert fitting == 1


def test_a_busy_second_now_and_then_is_no_reason_and_a_free_moment_no_excuse(machine):
    crowding = Crowding(TWO, 2, machine.now)
    for _ in range(5):
        assert seconds_until_lowered(machine, crowding, 1.0, most=6) is None
        assert seconds_until_lowered(machine, crowding, 0.0, most=6) is None
    found = []
    for _ in range(3):
        found += [seconds_until_lowered(machine, crowding, 1.0, most=6)]
        found += [seconds_until_lowered(machine, crowding, 0.0, most=1)]
    assert any(found)


def test_a_run_that_is_soon_over_does_not_wait_as_long(machine):
    crowding = Crowding(TWO, 2, machine.now)
    assert seconds_until_lowered(machine, crowding, 0.0, most=8) is None  # four steps a second
    seconds, _ = seconds_until_lowered(machine, crowding, 1.0, steps_left=8)
    assert 0.5 <= seconds < 1.0


def test_a_run_that_was_suspended_is_not_crowded(machine):
    crowding = Crowding(TWO, 2, machine.now)
    for seconds in (5.0, 3600.0):
        assert seconds_until_lowered(machine, crowding, 0.0, most=8) is None
        machine.work(ours=0.0, others=2.0, seconds=seconds)  # other programs worked while it could not
        assert crowding.look(10**9) == 0


def test_a_run_of_long_steps_is_crowded_after_three_of_them(machine):
    crowding = Crowding(TWO, 2, machine.now)
    found = []
    for _ in range(3):
        machine.work(ours=1.0, others=1.0, seconds=20.0)
        found.append(crowding.look(10**9))
    assert found == [0, 0, 1]


def test_what_happens_between_spans_of_training_does_not_count(machine):
    crowding = Crowding(TWO, 2, machine.now)
    for _ in range(30):
        with crowding.paused():
            machine.work(ours=0.5, others=1.5)  # rank 0 alone evaluates, say
        machine.work(ours=2.0, others=0.0)
        assert crowding.look(10**9) == 0


def test_spans_of_training_shorter_than_a_window_are_added_up(machine):
    crowding = Crowding(TWO, 2, machine.now)
    found = []
    for _ in range(100):
        machine.work(ours=1.0, others=1.0, seconds=0.06)
        found.append(crowding.look(10**9))
        with crowding.paused():
            machine.work(ours=1.0, others=0.0)
    assert 1 in found


def test_the_other_ranks_of_a_machine_are_no_other_programs(machine):
    crowding = Crowding(Cpus(bound=8, allowed=8, ranks=2), 4, machine.now)
    for _ in range(30):
        machine.work(ours=4.0, others=4.0)  # of which all is the other rank's
        assert crowding.look(10**9) == 0


@pytest.mark.parametrize("given", [None, 1])
def test_a_run_whose_threads_may_not_or_cannot_become_fewer_does_not_look(machine, given):
    assert seconds_until_lowered(machine, Crowding(TWO, given, machine.now), 1.9) is None


def test_a_run_is_lowered_again_only_when_still_fewer_threads_fit(machine):
    crowding = Crowding(Cpus(bound=4, allowed=4, ranks=1), 4, machine.now)
    _, fitting = seconds_until_lowered(machine, crowding, 1.0)
    crowding.lower(fitting)
    assert fitting == 3
    assert seconds_until_lowered(machine, crowding, 1.0) is None
    _, fitting = seconds_until_lowered(machine, crowding, 2.0)
    assert fitting == 2


def test_a_system_that_shows_no_cpu_times_is_taken_for_quiet(monkeypatch):
    monkeypatch.setattr(threads.Moment, "now", lambda *_: None)
    prepare(Config(), 1)
    assert threads.others_since_prepare(1) == 0.0
    assert Crowding(TWO, 2, lambda: None).look(1) == 0
