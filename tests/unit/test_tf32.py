"""torch keeps these settings also where there is no GPU; what its kernels make of them, a GPU must show."""

import pytest
import torch
from torch.nn import functional

from mnist_dist.runtime import start
from mnist_dist.runtime.tf32 import without_tf32

BACKENDS = torch.backends


@pytest.fixture(autouse=True)
def as_torch_starts():
    yield
    BACKENDS.fp32_precision = BACKENDS.cudnn.fp32_precision = "none"
    BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32 = False, True
    BACKENDS.cuda.matmul.fp32_precision = "none"


def switch(owner):
    try:
        return owner.allow_tf32
    except RuntimeError:
        return "contradicted"


def settings():
    newer = (BACKENDS.cudnn, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul)
    return [place.fp32_precision for place in newer], [switch(BACKENDS.cudnn), switch(BACKENDS.cuda.matmul)]


def nothing():
    pass


def older_settings():
    BACKENDS.cuda.matmul.allow_tf32 = BACKENDS.cudnn.allow_tf32 = True


def high_precision():
    torch.set_float32_matmul_precision("high")


def newer_setting_for_all():
    BACKENDS.fp32_precision = "tf32"


def newer_setting_after_older():
    BACKENDS.cudnn.allow_tf32 = False
    BACKENDS.cudnn.conv.fp32_precision = "tf32"


OFF = (["ieee"] * 4, [False] * 2)
CALLERS = [nothing, older_settings, high_precision, newer_setting_for_all, newer_setting_after_older]


@pytest.mark.parametrize("set_up", CALLERS)
def test_tf32_is_off_in_every_place_whatever_the_caller_has_set_and_back_afterwards(set_up):
    set_up()
    former = settings()
    with without_tf32():
        assert settings() == OFF
    assert settings() == former


def test_torch_itself_leaves_tf32_on_in_convolutions():
    (_, convolutions, _, products), _ = settings()
    assert (convolutions, products) == ("tf32", "none")


def test_a_run_keeps_tf32_off():
    with start(device="cpu", precision="fp32", threads=None):
        assert settings() == OFF
    assert settings() != OFF


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_and_convolutions_have_the_precision_of_fp32_on_a_gpu():
    torch.manual_seed(0)
    matrix, images, kernels = torch.randn(512, 512), torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
    wanted = [matrix.double() @ matrix.double(), functional.conv2d(images.double(), kernels.double())]
    older_settings()
    with start(device="cuda", precision="fp32", threads=None) as runtime:
        matrix, images, kernels = (values.to(runtime.device) for values in (matrix, images, kernels))
        found = [(matrix @ matrix).cpu(), functional.conv2d(images, kernels).cpu()]
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-5 * other.abs().max()  # with TF32 about 3e-4
