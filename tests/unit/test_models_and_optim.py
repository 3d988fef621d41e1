import itertools
import math
from fractions import Fraction

import pytest
import torch

from mnist_dist.config.schema import Adam, AdamW, Constant, Cosine, OneCycle, Sgd, Step
from mnist_dist.fast.dropout import Dropout
from mnist_dist.models import CATALOGUE, build_model, count_parameters
from mnist_dist.training.optimizers import build_optimizer, lr_at


@pytest.mark.parametrize("name", sorted(CATALOGUE))
@pytest.mark.parametrize(("size", "channels", "classes"), [(28, 1, 10), (32, 3, 2), (17, 1, 37), (64, 3, 1000)])
def test_a_network_fits_any_picture_and_class_count(name, size, channels, classes):
    model = build_model(name, classes=classes, channels=channels, image_size=size)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, classes)


def test_the_networks_have_the_sizes_of_their_models():
    digits = {"classes": 10, "channels": 1, "image_size": 28}
    assert count_parameters(build_model("small_cnn", **digits)) == 21_840
    assert count_parameters(build_model("large_cnn", **digits)) == 1_199_882


def rates(schedule, steps=100, epoch_steps=10):
    return [lr_at(k, schedule, peak=1.0, total_steps=steps, epoch_steps=epoch_steps) for k in range(steps)]


def test_constant_stays():
    assert set(rates(Constant())) == {1.0}


def test_warm_up_rises_evenly_to_the_peak():
    values = rates(Constant(warmup_fraction=0.1))
    steps = [b - a for a, b in itertools.pairwise(values[:10])]
    assert values[0] > 0
    assert max(steps) - min(steps) < 1e-12
    assert values[10:] == [1.0] * 90


def test_step_falls_after_each_so_many_epochs():
    values = rates(Step(every_epochs=2, factor=0.5))
    assert [values[k] for k in (0, 19, 20, 39, 40, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.0625]


@pytest.mark.parametrize("every", ["0.1", "0.3", "0.7", "1.1", "2.3", "1/3", "2/3", "0.0625", "0.12345"])
@pytest.mark.parametrize("epoch_steps", [Fraction(10), Fraction(30), Fraction(1438, 32), Fraction(60000, 64)])
def test_a_step_schedule_falls_at_the_very_step_that_the_decimals_give(every, epoch_steps):
    period = Fraction(every) * epoch_steps
    schedule = Step(every_epochs=float(Fraction(every)), factor=0.5)
    near = {math.ceil(times * period) + offset for times in range(200) for offset in (-1, 0, 1)}
    for step in sorted(near)[1:]:
        rate = lr_at(step, schedule, peak=1.0, total_steps=10**6, epoch_steps=epoch_steps)
        assert rate == 0.5 ** (step // period), step


@pytest.mark.parametrize("share", ["0.07", "0.29", "0.57", "1/3"])
def test_a_warm_up_lasts_as_many_steps_as_its_share_gives(share):
    schedule = Constant(warmup_fraction=float(Fraction(share)))
    for steps in (30, 100, 300, 1700):
        values = rates(schedule, steps=steps)
        warmup = Fraction(share) * steps
        assert values[math.ceil(warmup) :] == [1.0] * (steps - math.ceil(warmup))
        assert values[0] == 1 / (math.floor(warmup) + 1)


def test_cosine_goes_from_the_peak_to_its_end():
    values = rates(Cosine(final_fraction=0.1))
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)


def test_one_cycle_agrees_with_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=100, cycle_momentum=False)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(OneCycle(start_fraction=1 / 25, final_fraction=1 / 25e4))
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 0.03
    assert max(ours) > 0.99
    assert ours[0] == pytest.approx(1 / 25)
    assert ours[-1] == pytest.approx(1 / 25e4)


def test_every_step_of_a_short_run_has_a_finite_rate():
    for schedule in (Constant(warmup_fraction=0.9), Cosine(), OneCycle(), Step()):
        for steps in (1, 2, 3):
            assert all(math.isfinite(rate) and rate >= 0 for rate in rates(schedule, steps=steps))


@pytest.mark.parametrize(
    ("config", "kind"), [(Sgd(), torch.optim.SGD), (Adam(), torch.optim.Adam), (AdamW(), torch.optim.AdamW)]
)
def test_the_optimizer_is_the_one_that_the_config_names(config, kind):
    optimizer = build_optimizer(config, [torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == config.learning_rate
    assert optimizer.defaults["weight_decay"] == config.weight_decay


def test_pooling_before_relu_and_mask_gives_the_same_bits_as_after_them():
    torch.manual_seed(0)
    features = torch.randn(8, 6, 10, 10, requires_grad=True)
    mask = torch.nn.functional.dropout2d(torch.ones(8, 6, 1, 1), 0.25)
    pool, relu = torch.nn.functional.max_pool2d, torch.relu
    before, after = relu(pool(features, 2) * mask), pool(relu(features * mask), 2)
    assert torch.equal(before, after)
    weights = torch.randn_like(before)
    gradients = [torch.autograd.grad((value * weights).sum(), features)[0] for value in (before, after)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
@pytest.mark.parametrize("channels", [1, 3])
def test_the_layout_of_a_batch_in_memory_changes_nothing_but_rounding(name, channels):
    torch.manual_seed(0)
    model = build_model(name, classes=10, channels=channels, image_size=28).eval()
    pixels = torch.randn(8, channels, 28, 28)
    logits = model(pixels)
    other = model(pixels.contiguous(memory_format=torch.channels_last))
    assert (logits - other).abs().max() < 1e-5 * logits.abs().max().clamp(min=1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_as_often_as_it_should_and_keeps_the_mean(layout):
    x = torch.ones(64, 32, 20, 20).to(memory_format=layout).requires_grad_()
    torch.manual_seed(0)
    y = Dropout(0.3)(x)
    y.sum().backward()
    assert y.stride() == x.stride()
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.7], rel=1e-4)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.002)  # 4 standard deviations
    assert (y == 0).float().mean(dim=(1, 2, 3)).std().item() == pytest.approx((0.21 / 12800) ** 0.5, rel=0.4)
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(0, 3),
        torch.tensor(1.0),
        torch.ones(70, 90).t(),
        torch.ones(1, 5).expand(70, 5),
        torch.ones(9, 40, 11)[:, ::3, 1:],
        torch.ones(33, 7, dtype=torch.bfloat16),
        torch.ones(33, 7, dtype=torch.float64),
    ],
    ids=["empty", "scalar", "transposed", "expanded", "sliced", "bfloat16", "float64"],
)
def test_dropout_takes_any_tensor_and_draws_the_same_with_any_number_of_threads(x):
    threads, found = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        torch.manual_seed(3)
        found.append(Dropout(0.25)(x))
    torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert (found[0].shape, found[0].dtype) == (x.shape, x.dtype)
    assert set(found[0].unique().tolist()) <= {0.0, torch.tensor(4 / 3, dtype=x.dtype).item()}


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_dropout_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(p)


def test_dropout_repeats_with_its_seed_and_rests_in_evaluation():
    x, dropout = torch.randn(3, 5, 7, 1), Dropout(0.5)
    first, again, other = (dropout(x) for seed in (1, 1, 2) if torch.manual_seed(seed))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()
    assert dropout.eval()(x) is x
