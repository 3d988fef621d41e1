"""Every config key with every kind of value: refused in a sentence, or all arithmetic of a run goes through with it."""

import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_dist.config import Setting, load, parse_flag
from mnist_dist.config.explain import all_keys, fields, requirement
from mnist_dist.config.reading import parse_leaves
from mnist_dist.data import Sampler
from mnist_dist.data.dataset import divide
from mnist_dist.data.scan import embedded_digits
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.training.optimizers import lr_at

NUMBERS = [0, -1, 1, 2, 3, 7, 64, 1024, 10**6, 0.5, -0.5, 0.1, 1e-6, 1e308, -1e308, 1e-310, 5e-324, 1 - 2**-53, 1.5,
           2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, math.nan, math.inf, -math.inf]  # fmt: skip
OTHERS = ["", " ", "five", "1e308", "nan", "0x10", "x" * 100_000, "9" * 5000, "\0", "a\nb", "\x1b[31m", "é\U0001f600",
          "\ud800", "auto", "adam", "step", "exact", "2021-02-30", "1:30", "=", "~", "*a", "!!float x", "- a", None,
          True, False, [], [0.5], [1, 2, 3], [math.nan], [[[]]], [None], ["x"], {"a": 1}, {}]  # fmt: skip
IMAGES = 1438
LABELS = embedded_digits(8)["train"][1]
VARIANTS = [(optimizer, schedule) for optimizer in ("sgd", "adam", "adamw")
            for schedule in ("constant", "step", "cosine", "one_cycle")]  # fmt: skip


def limits_of(key):
    """List the limits of a key's range, and what lies just beyond them."""
    found = []
    for own, field, _ in fields():
        for part in field.metadata if own == key else ():
            for limit in (getattr(part, name) for name in ("ge", "gt", "le", "lt") if hasattr(part, name)):
                found += [limit, limit - 1, limit + 1]
                if isinstance(limit, float) or limit <= 2**53:
                    found += [math.nextafter(limit, math.inf), math.nextafter(limit, -math.inf)]
    return found


def check(*given_settings):
    """Load a config; where it is accepted, do the arithmetic of a run with it. Return whether it was."""
    resolved, message = None, ""
    try:
        resolved = load(None, given_settings)
    except ConfigError as refused:
        message = str(refused)
    if resolved is None:
        assert 10 < len(message) < 2000
        assert "Input should" not in message
        assert "validation error" not in message
        return False
    config = resolved.config
    saved = [Setting(key=leaf.key, value=leaf.value, origin="run") for leaf in parse_leaves(resolved.to_yaml(), "run")]
    assert load(None, tuple(saved)).config == config
    config.model_dump_json()
    for ranks in (1, 2, 3):
        with contextlib.suppress(ConfigError):
            micro_batch, accumulation = config.train.split_batch(ranks)
            assert micro_batch * accumulation * ranks == config.train.global_batch
    with contextlib.suppress(ConfigError, DataError):
        divide(LABELS, (), config.data, seed=config.train.seed, classes=("a", "b"), others={"test"})
    total = config.train.total_steps(IMAGES)
    assert 1 <= total < 2**63
    try:
        sampler = Sampler(images=IMAGES, global_batch=config.train.global_batch, seed=config.train.seed)
    except ConfigError:
        return True
    for step in {0, total // 3, total - 1}:
        images, epochs = sampler.batch(step)
        assert len(images) == len(epochs) == config.train.global_batch
        rate = lr_at(
            step,
            config.schedule,
            peak=config.optimizer.learning_rate,
            total_steps=total,
            epoch_steps=sampler.epoch_steps,
        )
        assert 0 <= rate <= config.optimizer.learning_rate * (1 + 1e-9)
        assert sampler.epoch_end(sampler.epoch_of(step)) > step
    return True


def of_variants(optimizer, schedule):
    return [Setting(key=f"{section}.name", value=name, origin="--set")
            for section, name in (("optimizer", optimizer), ("schedule", schedule))]  # fmt: skip


@pytest.mark.parametrize("key", all_keys())
def test_each_value_of_a_key_is_refused_in_a_sentence_or_can_be_computed_with(key):
    owners = [name for own, _, name in fields() if own == key and name is not None] or [None]
    for owner in owners:
        chosen = [Setting(key=f"{key.split('.')[0]}.name", value=owner, origin="--set")] if owner else []
        accepted = [check(*chosen, Setting(key=key, value=value, origin="--set"))
                    for value in (*NUMBERS, *OTHERS, *limits_of(key))]  # fmt: skip
        assert not all(accepted), "nothing is refused"


def pairs_of_settings():
    values = st.sampled_from(NUMBERS) | st.sampled_from(OTHERS) | st.floats() | st.integers() | st.text(max_size=20)
    one = st.sampled_from(all_keys()).flatmap(
        lambda key: st.tuples(st.just(key), st.sampled_from(limits) | values if (limits := limits_of(key)) else values)
    )
    return st.lists(one, min_size=1, max_size=2, unique_by=lambda pair: pair[0])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(pairs=pairs_of_settings(), variant=st.sampled_from(VARIANTS))
def test_two_values_together_are_refused_in_a_sentence_or_can_be_computed_with(pairs, variant):
    check(*of_variants(*variant), *(Setting(key=key, value=value, origin="--set") for key, value in pairs))


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None, database=None)
@given(pairs=pairs_of_settings(), variant=st.sampled_from(VARIANTS))
def test_five_thousand_pairs_are_refused_in_a_sentence_or_can_be_computed_with(pairs, variant):
    check(*of_variants(*variant), *(Setting(key=key, value=value, origin="--set") for key, value in pairs))


@given(text=st.text(max_size=30) | st.sampled_from(["1e308", "nan", "9" * 5000, "-0", "1_0", "0x1", "٣"]))
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_any_text_after_a_flag_is_refused_in_a_sentence_or_can_be_computed_with(text):
    for key in ("train.epochs", "train.seed", "train.global_batch", "optimizer.learning_rate", "model.name"):
        check(parse_flag(key, "--flag", text))


def test_every_key_has_a_range_or_a_list_of_words():
    for key, field, _ in fields():
        text = requirement(field)
        unbounded = text in ("a number", "a whole number") or text.startswith(("a number,", "a whole number,"))
        assert not unbounded, f"{key} can be any number"
