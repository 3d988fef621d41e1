import pytest

from mnist_dist.config import load, parse_setting
from mnist_dist.config.explain import all_keys
from mnist_dist.config.suggestions import _KEYS, suggest_command, suggest_option
from mnist_dist.errors import ConfigError

OPTIONS = ["--config", "--data", "--run", "--processes", "--device", "--precision", "--epochs", "--seed", "--model",
           "--batch-size", "--lr", "--set", "--resume", "--init-from", "--max-restarts", "--json"]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("lr", "'optimizer.learning_rate'"),
        ("optimizer.lr", "'optimizer.learning_rate'"),
        ("train.learning-rate", "'optimizer.learning_rate'"),
        ("batch_size", "'train.global_batch'"),
        ("data.batch_size", "'train.global_batch'"),
        ("per_device_train_batch_size", "'train.micro_batch'"),
        ("epochs", "'train.epochs'"),
        ("trainer.max_epochs", "'train.epochs'"),
        ("data.path", "'data.root'"),
        ("dataset.dir", "'data.root'"),
        ("img_size", "'data.image_size'"),
        ("amp", "'train.precision'"),
        ("device", "'train.device'"),
        ("seed", "'train.seed'"),
        ("optimizer.gamma", "'schedule.factor'"),
        ("scheduler", "'schedule.name'"),
        ("optimiser.momentum", "'optimizer.momentum'"),
        ("train.epcohs", "'train.epochs'"),
        ("train.name", "'model.name', 'optimizer.name' or 'schedule.name'"),
    ],
)
def test_a_key_of_another_tool_leads_to_ours(key, suggestion):
    with pytest.raises(ConfigError, match=f"no config key '{key}'.*Did you mean {suggestion}\\?"):
        load(None, (parse_setting(f"{key}=1"),))


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("num_workers", "decoded once"),
        ("data.pin_memory", "decoded once"),
        ("model.pretrained", "--init-from RUN"),
        ("train.gpus", "--processes"),
        ("name", "--run"),
        ("output_dir", "--run"),
        ("train.patience", "no early stopping"),
        ("gradient_accumulation_steps", "train.micro_batch"),
        ("data.augment.mixup", "data.augment.rotation_degrees"),
        ("model.num_classes", "folders below train"),
    ],
)
def test_where_there_is_no_such_key_a_sentence_says_what_there_is_instead(key, instead):
    with pytest.raises(ConfigError, match=f"no config key '{key}'.*{instead}") as refused:
        load(None, (parse_setting(f"{key}=1"),))
    assert "Did you mean" not in str(refused.value)


@pytest.mark.parametrize("key", ["foo", "train.foo", "optimizer.xyz", "a.b.c", ".", "train..", "é"])
def test_where_nothing_is_alike_nothing_is_suggested(key):
    with pytest.raises(ConfigError, match=r"no config key.*`mnist-dist config show` lists all") as refused:
        load(None, (parse_setting(f"{key}=1"),))
    assert "Did you mean" not in str(refused.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model=large_cnn", "model is 'large_cnn'.*it is a section of keys. Did you mean 'model.name'"),
        ("optimizer=adam", "Did you mean 'optimizer.name'"),
        ("data=Images", "Did you mean 'data.root'"),
        ("train.device=gpu", "it must be auto, cpu, cuda or mps. Did you mean 'cuda'"),
        ("train.precision=float16", "Did you mean 'fp16'"),
        ("optimizer.name=Adam", "it must be adam, adamw or sgd. Did you mean 'adam'"),
        ("schedule.name=onecycle", "Did you mean 'one_cycle'"),
        ("optimizer.beta1=0.5", "that is sgd, and it belongs to adam and adamw"),
        ("train.epochs=five", "train.epochs is 'five'.*: it must be a number from"),
        ("train.global_batch=6.5", "it must be a whole number from 1 to"),
        ("train.global_batch=true", "train.global_batch is True.*it must be a whole number"),
        ("data.channels=true", "it must be 1 or 3"),
        ("data.mean=[125, 3]", "a list of numbers from 0 to 1, or null"),
        ("data.root=3", "it must be text"),
        ("optimizer.nesterov=3", "true or false"),
    ],
)
def test_a_value_is_refused_in_one_plain_sentence(setting, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load(None, (parse_setting(setting),))
    assert "Input should" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("option", "suggestion"),
    [
        ("--learning-rate", "Did you mean --lr?"),
        ("--batch_size", "Did you mean --batch-size?"),
        ("--LR", "Did you mean --lr?"),
        ("--bs", "Did you mean --batch-size?"),
        ("--gpus", "Did you mean --processes?"),
        ("--nproc", "Did you mean --processes?"),
        ("--nproc_per_node", "Did you mean --processes?"),
        ("--output-dir", "Did you mean --run?"),
        ("--name", "Did you mean --run?"),
        ("--data-dir", "Did you mean --data?"),
        ("--arch", "Did you mean --model?"),
        ("--fp16", "Did you mean --precision?"),
        ("--momentum", "Did you mean --set optimizer.momentum=VALUE?"),
        ("--scheduler", "Did you mean --set schedule.name=VALUE?"),
        ("--procesess", "Did you mean --processes?"),
        ("--workers", "no loader workers"),
        ("--num-workers", "no loader workers"),
        ("--patience", "no early stopping"),
        ("--per-device-batch-size", "--set train.micro_batch=N"),
        ("--tensorboard", "mnist-dist monitor"),
    ],
)
def test_an_option_of_another_tool_leads_to_ours(option, suggestion):
    assert suggestion in suggest_option(option, OPTIONS, all_keys())


@pytest.mark.parametrize("option", ["--frobnicate", "--x", "-z"])
def test_an_option_like_no_other_gets_no_suggestion(option):
    assert suggest_option(option, OPTIONS, all_keys()) == ""


def test_a_command_of_another_tool_leads_to_ours():
    commands = ["train", "evaluate", "predict", "show"]
    assert [suggest_command(word, commands) for word in ("eval", "fit", "infer", "trian", "frobnicate")] == [
        " Did you mean 'evaluate'?",
        " Did you mean 'train'?",
        " Did you mean 'predict'?",
        " Did you mean 'train'?",
        "",
    ]


def test_every_suggested_key_exists():
    assert set(_KEYS) <= set(all_keys())
