"""Checkpoints from one implementation of an optimizer, or one kind of device, to another.

A checkpoint holds an optimizer's state alone. How the steps are computed (all at once by a fused kernel or tensor by
tensor), and where the state lies, is the resuming run's. What is kept has the same bits; later steps differ by rounding
where the implementation is another one, as fused kernels round the same formula in another order.
"""

import pytest
import torch

from mnist_dist.config.schema import Adam, AdamW, Sgd
from mnist_dist.fast.optimizer_step import Stepper
from mnist_dist.models import build_model
from mnist_dist.run import checkpoint
from mnist_dist.training.optimizers import build_optimizer

CONFIGS = [Sgd(), Sgd(nesterov=True, weight_decay=1e-3), Sgd(momentum=0), Adam(weight_decay=1e-3), AdamW()]
ROUNDING = 1e-6
"""Of weights below 1, after three steps."""

configs = pytest.mark.parametrize("config", CONFIGS, ids=str)


def parts(config, *, fused, seed=0, device="cpu"):
    torch.manual_seed(seed)
    with torch.device(device):
        model = build_model("small_cnn", classes=10, channels=1, image_size=28)
    return model, build_optimizer(config, model.parameters(), fused=fused)


def take_steps(model, optimizer, steps, *, step_with=None):
    update = step_with or optimizer.step
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        update()


def state_of(model, optimizer):
    slots = optimizer.state_dict()["state"]
    tensors = {f"{index}/{slot}": value for index, held in slots.items() for slot, value in held.items()}
    return {**dict(model.named_parameters()), **{name: value for name, value in tensors.items() if value is not None}}


def restored(path, config, *, fused, device="cpu"):
    model, optimizer = parts(config, fused=fused, seed=1, device=device)
    checkpoint.refuse_unfit(path, model, optimizer)
    if device != "meta":  # its weights have no values to fill
        checkpoint.restore_model(checkpoint.read_tensors(path, "model.safetensors"), model, path)
    content = checkpoint.read_tensors(path, "optimizer.safetensors")
    checkpoint.restore_optimizer(content, optimizer, model, path)
    return model, optimizer


@configs
@pytest.mark.parametrize("to_fused", [True, False])
@pytest.mark.parametrize("from_fused", [True, False])
def test_a_run_resumes_with_another_optimizer_implementation(tmp_path, config, from_fused, to_fused):
    model, optimizer = parts(config, fused=from_fused)
    take_steps(model, optimizer, range(3))
    path = checkpoint.write(tmp_path, 3, model, optimizer, {})
    other, its_optimizer = restored(path, config, fused=to_fused)
    assert its_optimizer.param_groups[0]["fused"] == to_fused
    saved, found = state_of(model, optimizer), state_of(other, its_optimizer)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    take_steps(model, optimizer, range(3, 6))
    take_steps(other, its_optimizer, range(3, 6))
    saved, found = state_of(model, optimizer), state_of(other, its_optimizer)
    if from_fused == to_fused:
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    else:
        assert all(torch.allclose(found[name], saved[name], rtol=1e-5, atol=ROUNDING) for name in saved)


@configs
def test_steps_without_torch_s_layers_go_on_from_any_checkpoint_with_the_same_bits(tmp_path, config):
    model, optimizer = parts(config, fused=True)
    take_steps(model, optimizer, range(3), step_with=Stepper(optimizer).step)
    path = checkpoint.write(tmp_path, 3, model, optimizer, {})
    other, its_optimizer = restored(path, config, fused=True)
    take_steps(model, optimizer, range(3, 6))
    take_steps(other, its_optimizer, range(3, 6), step_with=Stepper(its_optimizer).step)
    saved, found = state_of(model, optimizer), state_of(other, its_optimizer)
    assert all(torch.equal(found[name], saved[name]) for name in saved)


@configs
@pytest.mark.parametrize("fused", [True, False])
def test_state_goes_to_the_device_of_the_resuming_run(tmp_path, config, fused):
    """The meta device stands for a GPU: tensors there have all but their values."""
    model, optimizer = parts(config, fused=not fused)
    take_steps(model, optimizer, range(3))
    path = checkpoint.write(tmp_path, 3, model, optimizer, {})
    other, its_optimizer = restored(path, config, fused=fused, device="meta")
    for name, value in state_of(other, its_optimizer).items():
        # The step of an optimizer that is not fused counts on the host, and costs the device nothing.
        assert value.device.type == ("cpu" if name.endswith("/step") and not fused else "meta"), name
    if not fused:  # there is no fused kernel for the meta device
        take_steps(other, its_optimizer, range(3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@configs
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_goes_from_cpu_to_gpu_and_back(tmp_path, config, fused, here, there):
    model, optimizer = parts(config, fused=fused, device=here)
    take_steps(model, optimizer, range(3))
    path = checkpoint.write(tmp_path, 3, model, optimizer, {})
    other, its_optimizer = restored(path, config, fused=fused, device=there)
    saved, found = state_of(model, optimizer), state_of(other, its_optimizer)
    assert all(torch.equal(found[name].cpu(), saved[name].cpu()) for name in saved)
    take_steps(model, optimizer, range(3, 6))
    take_steps(other, its_optimizer, range(3, 6))
    saved, found = state_of(model, optimizer), state_of(other, its_optimizer)
    assert all(torch.allclose(found[name].cpu(), saved[name].cpu(), rtol=1e-5, atol=ROUNDING) for name in saved)
