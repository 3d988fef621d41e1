"""Every option of every command with every kind of value: taken within its limits, or refused in a plain sentence."""

import pytest
import typer

from mnist_dist.cli.app import app
from mnist_dist.cli.flags import KEYS
from mnist_dist.cli.usage import check_words, explain, is_help
from mnist_dist.errors import ConfigError

VALUES = ["five", "", " ", "nan", "inf", "-inf", "1e300", "1e-310", "-1", "0", "1.5", "9" * 5000, "9" * 20, "٣", "0x10",
          "\x1b[31m", "a\nb", "\udcff", "x" * 100_000]  # fmt: skip


def commands(group=None, words=()):
    """Yield every command with its words."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


@pytest.mark.parametrize(("words", "command"), [pytest.param(*row, id=" ".join(row[0])) for row in commands()])
def test_a_value_of_an_option_is_taken_within_limits_or_refused_in_a_sentence(words, command):
    for option in command.params:
        if option.param_type_name != "option" or option.is_flag:
            continue
        refused = 0
        for value in VALUES:
            try:
                command.make_context(words[-1], [option.opts[0], value], resilient_parsing=False)
            except typer.TyperException as error:
                sentence = str(explain(error))
                if "Missing argument" in sentence or "Missing option" in sentence:
                    continue
                refused += 1
                assert option.opts[0] in sentence
                assert "Input should" not in sentence
                assert "unable to parse" not in sentence
                assert len(sentence) < 400
        is_key = words[-1] != "show" and option.name in KEYS  # what the config's schema judges
        assert refused or is_key or option.metavar not in ("N", "X"), f"{option.opts[0]} takes anything"


def refusal(*words):
    """Explain why a command line is refused."""
    with pytest.raises(typer.TyperException) as refused:
        app(list(words), standalone_mode=False)
    assert not is_help(refused.value)
    return str(explain(refused.value))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--gpus", "2"], "No such option: --gpus. Did you mean --processes?"),
        (["launch", "slurm", "--gpus", "2", "--", "train"], "No such option: --gpus. Did you mean --gpus-per-node?"),
        (
            ["evaluate", "r", "--workers", "2"],
            "--workers. Images are decoded once, so there are no loader workers to set.",
        ),
        (["show", "r", "-n"], "No such option: -n. Long options begin with two dashes."),
        (["evaluate", "--run", "r"], "No such option: --run. Write the run without it: `mnist-dist evaluate RUN`."),
        (["predict", "r", "--input", "a"], "Write the image without it: `mnist-dist predict IMAGE...`."),
        (["config", "show", "--config", "a"], "Write the config without it: `mnist-dist config show [CONFIG]`."),
        (["monitor", "--logdir", "a"], "Write the runs without it: `mnist-dist monitor [RUNS]`."),
        (["monitor", "--port", "-5"], "--port is -5: it must be a whole number from 0 to 65,535."),
        (["config", "validate"], "Missing argument 'CONFIG'. See `mnist-dist config validate --help`."),
        (["config", "ls"], "No such command 'ls'."),
        (["tensorboard"], "No such command 'tensorboard'. Did you mean 'monitor'?"),
    ],
)
def test_a_wrong_word_of_a_command_line_is_told_with_ours(words, message):
    assert message in refusal(*words)


def test_a_command_without_its_words_shows_its_help():
    with pytest.raises(typer.TyperException) as shown:
        app(["launch"], standalone_mode=False)
    assert is_help(shown.value)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["train", "--run", ""], "--run"),
        (["train", "--run="], "--run"),
        (["train", "--config", ""], "--config"),
        (["predict", "r", ""], "An argument"),
    ],
)
def test_an_empty_word_is_no_path(words, name):
    with pytest.raises(ConfigError, match=f"^{name} is empty: give it a value"):
        check_words(words)


def test_words_behind_two_dashes_may_be_empty():
    check_words(["launch", "local", "--", "prog", ""])
