import pytest
import yaml

from mnist_dist.config import Config, Setting, load, parse_setting, presets
from mnist_dist.config.explain import all_keys
from mnist_dist.config.resolve import flatten
from mnist_dist.errors import ConfigError


def resolve(*settings, source=None):
    return load(source, tuple(parse_setting(text) for text in settings))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=3", "no config key 'train.epoch'.*Did you mean 'train.epochs'"),
        ("optimiser.momentum=0.5", "no config key 'optimiser.momentum'.*Did you mean 'optimizer.momentum'"),
        ("train.epochs=many", "train.epochs is 'many'.*it must be a number from 1e-6 to 1,000,000"),
        ("train.threads=many", "a whole number from 1 to 1,024, auto or null"),
        ("train.global_batch=0", "train.global_batch is 0.*a whole number from 1 to 10,000,000"),
        ("train=3", "train is 3.*section"),
        ("data.root.x=1", "data.root.*"),
        ("optimizer.name=sdg", "optimizer.name is 'sdg'.*'sgd'"),
        ("optimizer.beta1=0.5", "optimizer.beta1.*does not belong to the optimizer"),
        ("data.mean=[0.1]", "mean and std must be given together"),
        ("data.image_size=12", "small_cnn needs a data.image_size of at least 16"),
        ("train.precision=fp8", "train.precision is 'fp8'"),
        ("train.epochs=.inf", "train.epochs is inf.*a number from"),
        ("optimizer.momentum=1", "optimizer.momentum is 1.*from 0 to below 1"),
    ],
)
def test_a_wrong_value_is_named_with_key_and_remedy(setting, message):
    with pytest.raises(ConfigError, match=message):
        resolve(setting)


@pytest.mark.parametrize("text", ["train.epochs", "=3", "train.epochs=[1"])
def test_a_malformed_setting_is_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_setting(text)


def test_flags_win_over_the_file_and_each_value_remembers_its_origin(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {epochs: 3, seed: 5}\noptimizer: {learning_rate: 0.5}\n")
    resolved = load(file, (parse_setting("train.epochs=4"), Setting(key="train.seed", value=6, origin="--seed")))
    assert (resolved.config.train.epochs, resolved.config.train.seed) == (4, 6)
    assert resolved.origins == {
        "train.epochs": "--set",
        "train.seed": "--seed",
        "optimizer.learning_rate": str(file),
    }
    assert f"learning_rate: 0.5 # {file}" in " ".join(resolved.to_yaml().split())


def test_a_section_with_nothing_below_it_changes_nothing(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\ndata:\n  augment:\n")
    assert load(file).config == Config()


def test_another_optimizer_starts_from_its_own_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer: {name: sgd, learning_rate: 0.5, momentum: 0.3}\n")
    optimizer = resolve("optimizer.name=adam", source=file).config.optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("adam", 0.001)


def test_the_resolved_yaml_loads_to_the_same_config(tmp_path):
    settings = ("optimizer.name=adamw", "schedule.name=step", "train.micro_batch=16", "train.global_batch=32")
    resolved = resolve(*settings, "data.mean=[0.1]", "data.std=[1e-5]")
    file = tmp_path / "config.yaml"
    file.write_text(resolved.to_yaml())
    assert load(file).config == resolved.config


def test_every_key_can_be_set_to_its_own_default():
    values = dict(flatten(Config().model_dump(mode="json")))
    for key in set(all_keys()) & set(values):
        text = yaml.safe_dump(values[key], default_flow_style=True).removesuffix("...\n").strip()
        assert resolve(f"{key}={text}").config == Config(), key


@pytest.mark.parametrize(
    ("batch", "micro_batch", "ranks", "expected"),
    [(64, None, 1, (64, 1)), (64, None, 4, (16, 1)), (64, 8, 2, (8, 4)), (60, 5, 3, (5, 4))],
)
def test_a_global_batch_is_micro_batch_times_accumulation_times_ranks(batch, micro_batch, ranks, expected):
    options = Config().train.model_copy(update={"global_batch": batch, "micro_batch": micro_batch})
    assert options.split_batch(ranks) == expected


@pytest.mark.parametrize(
    ("batch", "micro_batch", "ranks", "message"),
    [
        (64, None, 3, "64, which 3 processes cannot share equally: use 63 or 66"),
        (2, None, 4, "2, which 4 processes cannot share equally: use 4"),
        (64, 24, 1, "64, which one process cannot share in micro-batches of 24: use 48 or 72"),
    ],
)
def test_a_global_batch_that_cannot_be_shared_is_refused_with_the_nearest(batch, micro_batch, ranks, message):
    options = Config().train.model_copy(update={"global_batch": batch, "micro_batch": micro_batch})
    with pytest.raises(ConfigError, match=message):
        options.split_batch(ranks)


@pytest.mark.parametrize(
    ("epochs", "images", "steps"),
    [
        (1, 60000, 938),
        (10, 60000, 9375),
        (0.5, 60000, 469),
        (0.1, 640, 1),
        (1e-9, 10, 1),
        (2 / 3, 96, 1),
        (1 / 3, 192 * 10**9, 10**9),
        (1e6, 10**9, 15_625_000_000_000),
    ],
)
def test_steps_cover_the_asked_epochs(epochs, images, steps):
    assert Config().train.model_copy(update={"epochs": epochs}).total_steps(images) == steps


@pytest.mark.parametrize("name", sorted(presets()))
def test_each_preset_is_valid_and_opens_with_purpose_command_and_result(name):
    load(name)
    head = presets()[name].read_text().splitlines()[:3]
    assert all(line.startswith("# ") for line in head)
    assert f"--config {name}" in head[1] or f"configs/{name}.yaml" in head[1]
    assert "%" in head[2]


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no preset 'quik'.*Did you mean 'quick'.*baseline"):
        load("quik")


@pytest.mark.parametrize(
    ("text", "message"), [("train: [", "not valid YAML"), ("- 3\n", "no sections"), ("3\n", "no sections")]
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(file)
