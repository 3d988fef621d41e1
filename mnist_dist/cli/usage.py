"""Turns what Typer says of a command line into one sentence of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import typer

from mnist_dist.errors import ConfigError


def check_words(words: Sequence[str]) -> None:
    """Refuse an empty word in a command line of ours: as a path it would be the working folder.

    Args:
        words: Those behind two dashes belong to another command.

    Raises:
        ConfigError: A word or an option's value is empty.
    """
    for before, word in pairwise(("", *words)):
        if word == "--":
            return
        if word == "" or re.fullmatch("--[a-z-]+=", word):
            name = word[:-1] or (before if before.startswith("-") else "An argument")
            raise ConfigError(f"{name} is empty: give it a value, or leave it out (a variable may be unset).")


def is_help(error: typer.TyperException) -> bool:
    """Return whether an error is only the help of a command that was called without any words."""
    context = getattr(error, "ctx", None)
    return context is not None and str(error) == context.get_help()


def explain(error: typer.TyperException) -> ConfigError:
    """Return an error that says what is wrong with a command line, and what was probably meant."""
    facts: Any = error
    context = getattr(facts, "ctx", None)
    words = _words(context)
    message = error.format_message()
    if hasattr(facts, "possibilities"):
        message = f"No such option: {facts.option_name}.{_instead_of_option(facts.option_name, context, words)}"
    elif message.startswith("No such command"):
        message = f"{message}{_instead_of_command(message, context)}"
    elif "extra argument" in message and "--data" in _options(context):
        message = f"{message.rstrip('.')}. The folder of images is given with --data, the run's with --run."
    elif getattr(facts, "param", None) is not None and "Invalid value" in message:
        message = f"{_name(facts.param)} is {_refusal(error)}"
    if words and not message.endswith("?"):
        message = f"{message} See `{' '.join(['mnist-dist', *words])} --help`."
    return ConfigError(message)


def _refusal(error: typer.TyperException) -> str:
    """Describe a value and what it must be, in the words of our parsers, or in ours for what Typer itself reads."""
    findings: list[Any] = getattr(error.__cause__, "errors", list)()
    if not findings:
        return error.message
    from mnist_dist.config.reading import shorten

    kind, limits = findings[0]["type"].partition("_")[0], findings[0].get("ctx", {})
    must_be = {"int": "a whole number", "float": "a number", "finite": "a finite number"}.get(kind)
    if "ge" in limits or "le" in limits:
        must_be = f"at least {limits['ge']:,}" if "ge" in limits else f"at most {limits['le']:,}"
    value = shorten(findings[0]["input"])
    return f"{value}: it must be {must_be}." if must_be else f"{value}, which cannot be used."


def _instead_of_option(option: str, context: Any, words: list[str]) -> str:
    from mnist_dist.config.explain import all_keys
    from mnist_dist.config.suggestions import options_meant, suggest_option

    if not option.startswith("--"):
        return " Long options begin with two dashes."
    for argument, shown in _arguments(context):
        if argument.rstrip("s") in options_meant(option):  # [RUNS] is a run, or several
            return f" Write the {shown.strip('[].').lower()} without it: `mnist-dist {' '.join([*words, shown])}`."
    suggestion = suggest_option(option, _options(context), all_keys())
    if words == ["resume"] and suggest_option(option, _options(context, of="train"), all_keys()).startswith(" Did"):
        return " A resumed run keeps its config: `mnist-dist train --config RUN --init-from RUN` starts another one."
    return suggestion


def _instead_of_command(message: str, context: Any) -> str:
    from mnist_dist.config.suggestions import suggest_command

    group: Any = context.command
    return "" if "Did you mean" in message else suggest_command(message.split("'")[1], list(group.commands))


def _options(context: Any, of: str | None = None) -> list[str]:
    """List the long options of a command that its help shows."""
    if context is None:
        return []
    command: Any = context.command
    if of is not None:
        root: Any = context.find_root().command
        command = getattr(root, "commands", {of: command})[of]
    return [
        name
        for parameter in command.params
        if not getattr(parameter, "hidden", False) and parameter.param_type_name == "option"
        for name in parameter.opts
        if name.startswith("--")
    ]


def _arguments(context: Any) -> list[tuple[str, str]]:
    """List the words that a command takes without an option: what each is called, and how help shows it."""
    arguments = [parameter for parameter in context.command.params if parameter.param_type_name == "argument"]
    return [
        (str(argument.metavar or argument.name).strip("[].").lower(), str(argument.metavar)) for argument in arguments
    ]


def _name(parameter: Any) -> str:
    return str(parameter.opts[0] if parameter.param_type_name == "option" else parameter.make_metavar(None))


def _words(context: Any) -> list[str]:
    """List the words of the command: `["launch", "slurm"]`."""
    words: list[str] = []
    while context is not None:
        if context.parent is not None or not hasattr(context.command, "commands"):
            words.insert(0, str(context.info_name))
        context = context.parent
    return words
