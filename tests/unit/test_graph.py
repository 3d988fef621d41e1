"""Prepared steps: the bits of the loop, step by step and when one recorded step is replayed for all later ones."""

from dataclasses import replace

import pytest
import torch
from operators import Elsewhere, StepsOver, config_of, parts_elsewhere, watch_steps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnist_dist.config.schema import Train
from mnist_dist.data import open_dataset
from mnist_dist.errors import ConfigError
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.observe import Observer, Observers
from mnist_dist.run.build import build_parts, join
from mnist_dist.run.checkpoint import weights_sha256
from mnist_dist.training import graph, loop
from mnist_dist.training.graph import PreparedSteps, describe, obstacle
from mnist_dist.training.state import Progress

AUGMENTED = {"data__augment__rotation_degrees": 10, "data__augment__shift_pixels": 2, "data__augment__scale": 0.1}
RUNS = [
    {},
    AUGMENTED | {"train__clip_norm": 1.0, "train__label_smoothing": 0.1},
    {"optimizer__momentum": 0, "optimizer__weight_decay": 0.01},
    {"model__name": "fast_cnn", "optimizer__name": "adam", "train__precision": "bf16"},
    {"model__name": "large_cnn", "optimizer__name": "adamw", "train__global_batch": 8},
]


@pytest.fixture(scope="module")
def digits():
    return open_dataset(config_of().data, seed=0, announce=print)


@pytest.fixture(autouse=True)
def _few_steps_at_once(monkeypatch):
    monkeypatch.setattr(graph, "STEPS", 7)


class Journal(Observer):
    """Keeps losses and test losses, and ends the loop after some steps."""

    def __init__(self, steps):
        self.rows = []
        self._steps = steps

    def progress(self, step):
        if step == self._steps:
            raise StepsOver

    def step(self, report):
        self.rows.append((report.step, report.loss, report.accuracy, report.learning_rate))

    def epoch(self, report, test):
        self.rows.append((report.step, report.train_loss, test.loss))


def trained(digits, settings, steps=60, **more):
    """Train into the second epoch; returns the journal and the weights' hash."""
    settings = {"train__global_batch": 32, "train__log_every": 5} | settings | more
    config = config_of(**settings)
    journal = Journal(steps)
    with join(config) as runtime:
        parts = build_parts(config, digits, runtime)
        with pytest.raises(StepsOver):
            loop.train(replace(parts, observers=Observers((journal,))), Progress())
        return journal.rows, weights_sha256(parts.model)


@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_prepared_steps_have_the_bits_of_the_loop(digits, settings):
    assert trained(digits, settings, train__graph="auto") == trained(digits, settings)


class Tape(TorchDispatchMode):
    """Does on a CPU what a CUDA graph does: a step's operators again, on the same memory, without Python's part."""

    def __init__(self):
        super().__init__()
        self._calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, recorded in self._calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorded(PreparedSteps):
    """Prepared steps as a GPU takes them: some eagerly, one recorded, all later ones replayed."""

    replays = 0
    tape = None

    def _step(self):
        if self.tape is not None:
            type(self).replays += 1
            self.tape.replay()
            return tuple(value.clone() for value in self.sums)
        self._eager_steps += 1
        if self._eager_steps <= graph.EAGER_STEPS:
            return super()._step()
        with Tape() as tape:
            self.sums = super()._step()
        self.tape = tape
        return tuple(value.clone() for value in self.sums)


@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_one_recorded_step_replayed_has_the_bits_of_the_loop(digits, settings, monkeypatch):
    expected = trained(digits, settings)
    monkeypatch.setattr(loop, "prepare", Recorded)
    Recorded.replays = 0
    assert trained(digits, settings, train__graph="auto") == expected
    assert Recorded.replays == 60 - graph.EAGER_STEPS - 1


class LeftOut(Stepper):
    """Skips the update: torch has no fused optimizer on the meta device, and the others read the rate on the host."""

    def step(self):
        assert self.optimizer.param_groups[0]["lr"].device.type == "meta"
        self.optimizer.zero_grad()


@pytest.mark.parametrize("settings", [{}, AUGMENTED | {"train__clip_norm": 1.0}], ids=["plain", "augmented"])
def test_a_prepared_step_asks_the_host_for_nothing(digits, settings):
    config = config_of(train__graph="auto", **settings)
    with join(config) as runtime:
        parts = parts_elsewhere(config, digits, runtime)
        parts = replace(parts, stepper=LeftOut(parts.optimizer))
        assert len(watch_steps(parts, last=1).transfers) == (3 if settings else 2)  # the tables
        step = watch_steps(parts, last=5)
    assert step.transfers == []
    assert step.operators["aten::_local_scalar_dense"] == 1  # the loop's vote


@pytest.mark.parametrize(
    ("changed", "posing", "reason"),
    [
        ({"reduction": "exact"}, {}, "exact adds gradients in an order of its own"),
        ({"micro_batch": 16}, {}, "a step has 4 micro-batches"),
        ({"compile": True}, {}, "torch.compile makes graphs of its own"),
        ({}, {"ranks": 2}, "2 processes exchange gradients"),
        ({}, {"device": torch.device("mps")}, "Apple GPUs have no graphs"),
        ({}, {"device": torch.device("cuda")}, "the pixels are not in the GPU's memory"),
        ({}, {"precision": "fp16"}, "the loss scale of fp16 is asked for at each step"),
    ],
)
def test_where_the_host_has_a_part_in_each_step_the_plan_says_so_and_steps_are_taken_one_by_one(
    digits, changed, posing, reason
):
    config = config_of(train__graph="auto")
    with join(config) as runtime:
        parts = build_parts(config, digits, runtime)
        assert describe(parts) == "up to 7 steps prepared at a time, run one by one on the CPU"
        other = Elsewhere(runtime)
        if "precision" in posing:
            posing = {"precision": replace(runtime.precision, value="fp16")}
        vars(other).update({"device": runtime.device} | posing)
        train = config.train.model_copy(update=changed)
        parts = replace(parts, runtime=other, config=config.model_copy(update={"train": train}))
        assert obstacle(parts).startswith(reason)
        assert describe(parts).startswith(f"steps one by one: {reason}")
        assert graph.prepare(parts, lambda step: 0.1, 10) is None


def test_an_optimizer_hook_sees_each_step(digits):
    config, seen = config_of(train__graph="auto"), []
    with join(config) as runtime:
        parts = build_parts(config, digits, runtime)
        parts.optimizer.register_step_pre_hook(lambda *_: seen.append(1))
        with pytest.raises(StepsOver):
            loop.train(replace(parts, observers=Observers((Journal(4),))), Progress())
    assert len(seen) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA can capture a step here")
def test_a_step_that_cuda_cannot_capture_is_an_error_that_says_what_to_do(digits):
    config = config_of(train__graph="auto")
    with join(config) as runtime:
        parts = build_parts(config, digits, runtime)
        steps = graph.prepare(parts, lambda step: 0.1, 10)
        steps.take(0)
        with pytest.raises(
            ConfigError, match=r"^train.graph is auto, and CUDA cannot capture a step \(.+\): set it to off.$"
        ):
            steps._capture(None)


def test_off_is_the_default_and_may_be_written_as_yaml_reads_it():
    assert Train().graph == Train(graph=False).graph == Train(graph="off").graph == "off"
    with pytest.raises(ValueError, match="'auto' or 'off'"):
        Train(graph=True)
