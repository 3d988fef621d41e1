import pytest
import torch

from mnist_dist.config.schema import Adam, AdamW, Sgd
from mnist_dist.fast import optimizer_step
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.models import build_model
from mnist_dist.training.optimizers import build_optimizer

CONFIGS = [
    Sgd(),
    Sgd(nesterov=True, weight_decay=1e-3),
    Sgd(momentum=0),
    Adam(weight_decay=1e-3),
    AdamW(beta1=0.7, beta2=0.9),
]


def trained(config, step_with, steps=5):
    torch.manual_seed(0)
    model = build_model("small_cnn", classes=10, channels=1, image_size=28)
    optimizer = build_optimizer(config, model.parameters())
    step = step_with(optimizer)
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 / (number + 1)
        model(torch.randn(4, 1, 28, 28)).square().sum().backward()
        step()
        assert all(parameter.grad is None for parameter in model.parameters())
    state = [value for tensors in optimizer.state.values() for value in tensors.values() if value is not None]
    return [*model.parameters(), *state]


def publicly(optimizer):
    def step():
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_steps_without_torch_s_layers_have_the_same_bits(config):
    theirs = trained(config, publicly)
    ours = trained(config, lambda optimizer: Stepper(optimizer).step)
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_where_torch_has_no_such_kernel_the_public_step_does_the_work(config, monkeypatch):
    theirs = trained(config, publicly)
    monkeypatch.setattr(optimizer_step, "KERNELS", dict.fromkeys(optimizer_step.KERNELS, "_a_kernel_that_is_gone_"))
    ours = trained(config, lambda optimizer: Stepper(optimizer).step)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_optimizer_with_a_hook_has_it_called_every_step():
    calls = []

    def stepper(optimizer):
        optimizer.register_step_pre_hook(lambda *_: calls.append(1))
        return Stepper(optimizer).step

    trained(Sgd(), stepper, steps=4)
    assert len(calls) == 4
