"""Networks and optimizers on the meta device, which has shapes and no numbers: whatever runs there asks no device."""

import pytest
import torch

from mnist_dist.config.schema import Adam, AdamW, Sgd
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.models import CATALOGUE, build_model
from mnist_dist.training.optimizers import build_optimizer

META = torch.device("meta")
OPTIMIZERS = [Sgd(), Sgd(nesterov=True, weight_decay=1e-3), Sgd(momentum=0), Adam(weight_decay=1e-3), AdamW()]


def built(name, **sizes):
    with META:
        return build_model(name, **({"classes": 10, "channels": 1, "image_size": 28} | sizes))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_network_learns_with_every_optimizer_on_a_device_without_numbers(name, optimizer):
    model = built(name)
    built_optimizer = build_optimizer(optimizer, model.parameters(), fused=False)
    stepper = Stepper(built_optimizer)
    for _ in range(3):
        images = torch.empty(4, 1, 28, 28, device=META).contiguous(memory_format=torch.channels_last)
        logits = model(images)
        assert logits.shape == (4, 10)
        loss = torch.nn.functional.cross_entropy(logits, torch.empty(4, dtype=torch.int64, device=META))
        loss.backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
        stepper.step()
        assert all(parameter.grad is None for parameter in model.parameters())
    momenta = [value for state in built_optimizer.state.values() for value in state.values() if value.dim()]
    assert all(momentum.device == META for momentum in momenta)


@pytest.mark.parametrize("size", [16, 28, 224])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_network_takes_every_size(name, channels, size):
    model = built(name, classes=7, channels=channels, image_size=size)
    assert model(torch.empty(2, channels, size, size, device=META)).shape == (2, 7)


@pytest.mark.parametrize("optimizer", [Sgd(), Adam(), AdamW()], ids=str)
def test_the_fused_optimizers_are_the_exception_as_torch_has_no_kernel_there(optimizer):
    weight = torch.nn.Parameter(torch.empty(3, device=META))
    weight.grad = torch.empty(3, device=META)
    stepper = Stepper(build_optimizer(optimizer, [weight]))
    with pytest.raises(RuntimeError, match=r"`fused=True` requires"):
        stepper.step()
