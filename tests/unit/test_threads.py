"""How many threads a run takes, alone and beside other programs."""

import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mnist_dist import threads
from mnist_dist.config import Config, load, parse_setting
from mnist_dist.cpu_time import Moment
from mnist_dist.models import MODELS, build_model
from mnist_dist.threads import Cpus, Crowding, choose, prepare, step_flop

TWO = Cpus(machine=2, allowed=2, local_ranks=1)


def config(*settings):
    return load(None, tuple(map(parse_setting, settings))).config


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 64)])
def test_the_estimated_work_of_a_network_is_what_torch_counts(name, channels, size):
    with torch.device("meta"):
        model = build_model(name, classes=10, channels=channels, image_size=size)
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, channels, size, size))
    estimate = 2 * threads.MULTIPLY_ADDS[name](channels, size)
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
        (1.0, Cpus(machine=16, allowed=16, local_ranks=1), 15),
        (3.0, Cpus(machine=16, allowed=16, local_ranks=4), 3),
        (9.0, Cpus(machine=16, allowed=4, local_ranks=1), 4),  # a quota, and CPUs enough beside it
        (0.0, Cpus(machine=2, allowed=2, local_ranks=4), 1),
    ],
)
def test_a_rank_has_as_many_threads_as_other_programs_leave_cpus(others, cpus, expected):
    assert cpus.threads_beside(others) == expected


def test_a_run_takes_no_more_threads_than_its_work_is_worth():
    wide = Cpus(machine=64, allowed=64, local_ranks=1)
    small, large = config("train.global_batch=64"), config("model.name=large_cnn", "train.global_batch=256")
    few = choose(small, wide, ranks=1, most=64, others=0.0)
    assert 2 <= few.threads <= 8
    assert few.reason == "a step has little work"
    assert choose(large, wide, ranks=1, most=64, others=0.0).threads == 64
    beside = choose(large, TWO, ranks=1, most=2, others=1.2)
    assert (beside.threads, beside.reason) == (1, "other programs use 1.2 of 2 CPUs")


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
    """CPU times that a test moves on."""

    def __init__(self, monkeypatch):
        self.clock = self.machine = self.ours = 0.0
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.clock)

    def now(self):
        return Moment(clock=self.clock, machine=self.machine, stolen=0.0, ours=self.ours)

    def second(self, *, ours, others):
        self.clock += 1.01
        self.ours += ours
        self.machine += ours + others


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_a_run_is_crowded_after_three_crowded_seconds_in_a_row(machine):
    crowding = Crowding(TWO, 2, machine.now)
    found = []
    for others in (1.0, 1.0, 0.0, 1.0, 1.0, 1.0):
        machine.second(ours=1.0, others=others)
        found.append(crowding.look())
    assert found == [0, 0, 0, 0, 0, 1]
    assert crowding.look() == 0  # only once a second


def test_time_outside_of_training_does_not_count_as_crowded(machine):
    crowding = Crowding(TWO, 2, machine.now)
    for _ in range(6):
        machine.second(ours=0.5, others=1.5)  # rank 0 alone evaluates, say
        crowding.restart()
        assert crowding.look() == 0


def test_the_other_ranks_of_a_machine_are_no_other_programs(machine):
    crowding = Crowding(Cpus(machine=8, allowed=8, local_ranks=2), 4, machine.now)
    for _ in range(5):
        machine.second(ours=4.0, others=4.0)  # of which all is the other rank's
        assert crowding.look() == 0


@pytest.mark.parametrize("given", [None, 1])
def test_a_run_whose_threads_may_not_or_cannot_become_fewer_does_not_look(machine, given):
    crowding = Crowding(TWO, given, machine.now)
    for _ in range(5):
        machine.second(ours=0.1, others=1.9)
        assert crowding.look() == 0


def test_once_lowered_a_run_is_lowered_again_only_when_still_fewer_fit(machine):
    crowding = Crowding(Cpus(machine=4, allowed=4, local_ranks=1), 4, machine.now)
    found = []
    for others in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0):
        machine.second(ours=2.0, others=others)
        fitting = crowding.look()
        if fitting:
            found.append(fitting)
            crowding.lower(fitting)
    assert found == [3, 2]


def test_a_system_that_shows_no_cpu_times_is_taken_for_quiet(monkeypatch):
    monkeypatch.setattr(threads.Moment, "now", lambda *_: None)
    prepare(Config(), 1)
    assert threads.others_since_prepare(1) == 0.0
    assert Crowding(TWO, 2, lambda: None).look() == 0
