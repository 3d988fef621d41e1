"""What a step may ask of torch: a change that adds operators, waits of the host or transfers has to say so here."""

import numpy as np
import pytest
import torch
from operators import Transfer, Watch, config_of, watch_step
from torch._subclasses.fake_tensor import FakeTensorMode

from mnist_dist.config.schema import Sgd
from mnist_dist.data import open_dataset
from mnist_dist.data.batches import Batches, Gather
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.runtime import join, start
from mnist_dist.training.optimizers import build_optimizer

AUGMENTED = {"data__augment__rotation_degrees": 10, "data__augment__scale": 0.1}
STEPS = [
    # settings; at most so many operators on a CPU, and so many transfers to a device that keeps the pixels
    ({}, 85, 1),
    (AUGMENTED, 90, 2),
    ({"train__precision": "bf16"}, 104, 1),
    ({"train__clip_norm": 1.0}, 93, 1),
    ({"train__label_smoothing": 0.1}, 101, 1),
    ({"train__micro_batch": 16}, 332, 4),
    ({"train__reduction": "exact"}, 365, 4),
    ({"model__name": "large_cnn"}, 89, 1),
    ({"model__name": "fast_cnn"}, 82, 1),
    ({"optimizer__name": "adamw"}, 86, 1),
]
"""With torch 2.14; where another version needs other numbers, measure them with `watch_step`."""


@pytest.fixture(scope="module")
def digits():
    config = config_of()
    return open_dataset(config.data, seed=0, announce=print)


@pytest.mark.parametrize(("settings", "operators", "transfers"), STEPS, ids=lambda value: str(value))
def test_a_step_asks_for_no_more_than_its_budget(digits, settings, operators, transfers):
    on_cpu = watch_step(config_of(**settings), digits).operators
    assert sum(on_cpu.values()) <= operators, on_cpu
    assert on_cpu["aten::_local_scalar_dense"] == 1  # the vote of a step ago, in the host's memory
    if settings.get("optimizer__name") != "adamw":  # counts its steps on the host where it is not fused
        elsewhere = watch_step(config_of(**settings), digits, elsewhere=True)
        assert elsewhere.operators["aten::_local_scalar_dense"] == 1
        assert len(elsewhere.transfers) <= transfers, elsewhere.transfers


@pytest.mark.parametrize("settings", [{}, AUGMENTED], ids=["plain", "augmented"])
@pytest.mark.parametrize(("residency", "transfers"), [("device", 1), ("host", 2)])
def test_nothing_goes_to_a_gpu_but_from_pinned_memory_and_without_waiting(digits, settings, residency, transfers):
    device = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        batches = Batches(
            digits.train,
            mean=digits.mean,
            std=digits.std,
            device=device,
            gather=Gather(digits.train.stored, device, residency),
            augmentation=config_of(**settings).data.augment,
        )
        watch.forget()
        pixels, labels = batches.take(np.arange(8), np.zeros(8, np.int64))
    assert pixels.device == labels.device == device
    assert watch.transfers == [Transfer("cpu", "cuda", pinned=True, non_blocking=True)] * (
        transfers + len(settings) // 2
    )
    assert watch.waits == 0


def test_a_step_under_fp16_waits_for_the_device_once_for_overflows_and_once_for_the_scale(monkeypatch):
    class Scaled(join.Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    monkeypatch.setattr(join, "Accelerator", Scaled)
    weight = torch.nn.Parameter(torch.ones(3))
    stepper = Stepper(build_optimizer(Sgd(), [weight], fused=False))
    lowered = []
    with start(device="cpu", precision="fp32", threads=None) as runtime, Watch() as watch:
        for slope in (1.0, float("inf"), 1.0, float("inf")):
            runtime.backward((weight * slope).sum())
            watch.forget()
            lowered.append(runtime.step(stepper, clip_norm=None))
            assert watch.waits == 2
        runtime.restore_scaler({**runtime.scaler_state(), "scale": 64.0})
        runtime.backward((weight * float("inf")).sum())
        lowered.append(runtime.step(stepper, clip_norm=None))
    assert lowered == [None, 4.0, None, 2.0, 32.0]


def test_deterministic_algorithms_fill_no_memory_that_is_about_to_be_written_and_leave_torch_as_it_was(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which it sets

    def flags():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cudnn.benchmark,
        )

    before = flags()
    with join._deterministic_cuda():
        assert flags() == (True, False, False)
    assert flags() == before == (False, True, False)
