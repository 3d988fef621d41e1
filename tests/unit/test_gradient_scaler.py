"""fp16's gradient scaler, on the CPU: scaled by powers of two, all arithmetic of fp32 keeps its bits.

So a run with a scaler must end with the bits of one without, and a step whose gradients overflow must be as if it had
never been.
"""

import json

import pytest
import torch
from torch.nn import functional

from mnist_dist.config.schema import Adam, AdamW, Sgd
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.models import build_model
from mnist_dist.runtime import start
from mnist_dist.training.optimizers import build_optimizer
from mnist_dist.training.reduction import Ddp, Exact

CONFIGS = [Sgd(), Sgd(nesterov=True, weight_decay=1e-3), Sgd(momentum=0), Adam(), AdamW(weight_decay=1e-2)]
MICRO_BATCHES = 2
SIZE = 4

combinations = pytest.mark.parametrize(
    ("config", "kind", "clip_norm"),
    [(config, kind, clip_norm) for config in CONFIGS for kind in (Ddp, Exact) for clip_norm in (None, 0.05)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)


def trained(config, kind, clip_norm, *, steps, overflowing=(), scaler=None):
    """Take the given steps, each of two micro-batches; in those that overflow, the second one's gradients are infinite.

    Returns:
        Weights and optimizer state, and what each step said.
    """
    said = []
    with start(device="cpu", precision="fp32", threads=1) as runtime:
        runtime._accelerator.scaler = scaler
        runtime.restore_scaler(scaler and scaler.state_dict())  # as a resumed run begins
        torch.manual_seed(0)
        model = build_model("small_cnn", classes=10, channels=1, image_size=28, dropout=0.0)
        reduction = kind(runtime, model, global_batch=MICRO_BATCHES * SIZE)
        optimizer = build_optimizer(config, model.parameters(), fused=False)  # as under fp16
        stepper = Stepper(optimizer)
        for step in steps:
            for micro in range(MICRO_BATCHES):
                generator = torch.Generator().manual_seed(MICRO_BATCHES * step + micro)
                pixels = torch.randn(SIZE, 1, 28, 28, generator=generator)
                labels = torch.randint(10, (SIZE,), generator=generator)
                with reduction.micro_batch(last=micro == MICRO_BATCHES - 1):
                    logits = reduction.model(pixels)
                    if step in overflowing and micro == 1:
                        logits.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
                    loss = functional.cross_entropy(logits, labels, reduction="sum")
                    reduction.backward(loss, (logits.argmax(dim=1) == labels).sum())
            reduction.finish()
            said.append(runtime.step(stepper, clip_norm=clip_norm))
            assert all(parameter.grad is None for parameter in model.parameters())
    state = [value for slots in optimizer.state.values() for value in slots.values() if value is not None]
    return [*model.parameters(), *state], said


def scaler_of(scale=2.0**10, interval=1000):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)


def same_bits(ones, others):
    return len(ones) == len(others) and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@combinations
def test_a_scaler_changes_no_bit_also_where_it_grows(config, kind, clip_norm):
    plain, _ = trained(config, kind, clip_norm, steps=range(5))
    scaler = scaler_of(interval=2)
    scaled, said = trained(config, kind, clip_norm, steps=range(5), scaler=scaler)
    assert same_bits(scaled, plain)
    assert said == [None] * 5
    assert scaler.get_scale() == 2.0**12


@combinations
@pytest.mark.parametrize("overflowing", [{0}, {2}, {1, 2}], ids=["first", "middle", "two"])
def test_a_step_that_overflows_in_one_micro_batch_changes_nothing(config, kind, clip_norm, overflowing):
    without, _ = trained(config, kind, clip_norm, steps=[step for step in range(5) if step not in overflowing])
    scaler = scaler_of()
    found, said = trained(config, kind, clip_norm, steps=range(5), overflowing=overflowing, scaler=scaler)
    assert same_bits(found, without)
    scales = iter([2.0**9, 2.0**8])
    assert said == [next(scales) if step in overflowing else None for step in range(5)]
    assert scaler.get_scale() == 2.0 ** (10 - len(overflowing))


def test_a_scaler_goes_on_from_what_a_checkpoint_keeps_of_it():
    scaler = scaler_of(interval=3)
    trained(Sgd(), Ddp, 0.05, steps=range(3), overflowing={1}, scaler=scaler)
    with start(device="cpu", precision="fp32", threads=1) as runtime:
        runtime._accelerator.scaler = scaler
        kept = json.loads(json.dumps(runtime.scaler_state()))
        runtime._accelerator.scaler = resumed = scaler_of(scale=1.0, interval=3)
        runtime.restore_scaler(kept)
    assert resumed.state_dict() == scaler.state_dict()
    for _ in range(2):  # one good step is behind it: two more, and it grows
        assert resumed.get_scale() == 2.0**9
        trained(Sgd(), Ddp, 0.05, steps=range(1), scaler=resumed)
    assert resumed.get_scale() == 2.0**10
