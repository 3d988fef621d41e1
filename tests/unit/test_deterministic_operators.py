"""Exact reduction against torch's own list of operators that have no deterministic kernel on CUDA."""

import re

import pytest
import torch
from operators import Watch, config_of, watch_step

from mnist_dist.data import open_dataset
from mnist_dist.models import CATALOGUE

WITHOUT = {
    "torch.nn.AvgPool3d": ["avg_pool3d_backward"],
    "torch.nn.AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "torch.nn.AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "torch.nn.AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "torch.nn.MaxUnpool1d": ["max_unpool2d"],
    "torch.nn.MaxUnpool2d": ["max_unpool2d"],
    "torch.nn.MaxUnpool3d": ["max_unpool3d"],
    "torch.nn.functional.interpolate": [
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "_upsample_bilinear2d_aa_backward",
        "upsample_bicubic2d_backward",
        "_upsample_bicubic2d_aa_backward",
        "upsample_trilinear3d_backward",
    ],
    "torch.nn.ReflectionPad1d": ["reflection_pad1d_backward"],
    "torch.nn.ReflectionPad2d": ["reflection_pad2d_backward"],
    "torch.nn.ReflectionPad3d": ["reflection_pad3d_backward"],
    "torch.nn.NLLLoss": ["nll_loss2d_forward"],  # the loss of one class an image, nll_loss_forward, is deterministic
    "torch.nn.CTCLoss": ["_ctc_loss_backward"],
    "torch.nn.EmbeddingBag": ["_embedding_bag_dense_backward"],
    "torch.Tensor.put_": ["put_", "put"],
    "torch.histc": ["histc"],
    "torch.bincount": ["bincount"],
    "torch.median": ["median", "nanmedian"],
    "torch.nn.functional.grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "torch.Tensor.scatter_reduce": ["scatter_reduce", "scatter_reduce_"],
    "torch.Tensor.resize_": [],  # of quantised tensors alone
}
"""What `torch.use_deterministic_algorithms` documents to raise an error, and the operators that do."""
REFUSED = {f"aten::{operator}" for operators in WITHOUT.values() for operator in operators}


def test_the_table_is_torch_s():
    _, _, refused = torch.use_deterministic_algorithms.__doc__.partition("operations will throw a")
    refused, _, _ = refused.partition("In addition")
    assert set(re.findall(r"\* :(?:class|func):`([\w.]+)`", refused)) == WITHOUT.keys()
    assert all(hasattr(torch.ops.aten, operator.removeprefix("aten::")) for operator in REFUSED)


def test_a_network_that_used_such_an_operator_would_be_seen():
    images = torch.zeros(1, 2, 8, 8, requires_grad=True)
    with Watch() as watch:
        torch.nn.AdaptiveAvgPool2d(3)(images).sum().backward()
        torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear").sum().backward()
    assert REFUSED & watch.operators.keys() == {
        "aten::_adaptive_avg_pool2d_backward",
        "aten::upsample_bilinear2d_backward",
    }


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("model", CATALOGUE)
def test_exact_uses_no_operator_that_is_without_a_deterministic_kernel(model, optimizer):
    config = config_of(
        model__name=model,
        optimizer__name=optimizer,
        train__reduction="exact",
        train__label_smoothing=0.1,
        train__clip_norm=1.0,
        data__augment__rotation_degrees=10,
        data__augment__shift_pixels=2,
    )
    dataset = open_dataset(config.data, seed=0, announce=print)
    operators = watch_step(config, dataset, step=2).operators
    assert "aten::convolution_backward" in operators
    assert "aten::grid_sampler_2d" in operators
    assert not REFUSED & operators.keys()
