"""The tree of commands, empty until `app` hangs them into it, and the words of a command read as it would."""

from __future__ import annotations

from typing import Any

import typer

from mnist_dist.cli.usage import check_words

app = typer.Typer(
    name="mnist-dist",
    help="Train an image classifier from a folder of images, on one CPU or many GPUs, with the same result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, in two thirds of the time
    context_settings={"help_option_names": ["-h", "--help"]},
)


def parse(words: tuple[str, ...]) -> Any:
    """Return the context of a command, with its values in `params`, as if it were called with these words.

    Raises:
        ConfigError, typer.TyperException: A word is wrong; nothing has run.
    """
    check_words(words)
    root: Any = typer.main.get_command(app)
    return root.commands[words[0]].make_context(words[0], list(words[1:]))
