"""Reads configs that may come from strangers: a small, plain part of YAML, bounded in size and depth.

Files hold nested keys with text, numbers, true or false, null and flat lists. Aliases, tags and keys that are given
twice are refused with their line and column: they multiply, construct or lose something.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mnist_dist.errors import ConfigError, StorageError

MOST_BYTES = 1 << 16
"""The longest config that is read; the resolved one of a run has about 2,000 bytes."""
DEEPEST = 8
"""How deep keys and lists may be nested; the schema needs three levels."""
LONGEST_NUMBER = 64
"""In characters; Python refuses to read integers of thousands of digits."""
SHOWN = 60
"""Characters of a value that a message shows."""

_PLAIN = {
    "mapping values are not allowed": "this line has a second colon, or stands further right than the key before it; "
    "put text that holds a colon in quotes",
    "found character '\\t'": "there is a tab; indent with spaces",
    "that cannot start any token": "text cannot begin with this character; put it in quotes",
    "expected <block end>": "this line is indented differently from the lines that it belongs to",
    "expected ',' or ']'": "a list that begins with [ is not closed",
    "expected ',' or '}'": "a section that begins with { is not closed",
    "expected '<document start>'": "there is more text where the config has ended; put all of it in quotes",
    "duplicate YAML directive": "a line that begins with % is not needed here; remove it",
    "incompatible YAML document": "a line that begins with % is not needed here; remove it",
    "expected the node content": "a value is missing, or a bracket is one too many",
    "could not find expected ':'": "a key needs a colon and a value",
    "found unexpected end of stream": "text in quotes has no closing quote",
    "found unexpected document separator": "text in quotes has no closing quote",
    "found unknown escape character": "a backslash in double quotes; use single quotes",
    "expected a single document": "a second document begins; a config is one document",
    "undefined tag handle": "tags (words that begin with !) are not used here; write the value alone",
    "expected alphabetic or numeric character": "text cannot begin with & or *; put it in quotes",
    "found undefined alias": "aliases (*name) are not used here; write the value out",
}
"""What PyYAML says, by a part of it, in plain words."""
_UNFINISHED = ("stream", "separator", "',' or", "expected ':'")
"""Parts of what PyYAML says of something that began earlier."""
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""Errors that mean there is no such file. All others come from the disk or the system."""
_SPECIAL = {"timestamp": "a date", "value": "a special value", "merge": "a special value"}
"""What no key of a config can be, by YAML's kind of scalar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A value at the end of its dotted key."""

    key: str
    value: Any


def read_leaves(path: Path) -> list[Leaf]:
    """Read the values of a YAML file, each with its dotted key.

    Raises:
        ConfigError: There is no such file, or it is not a plain mapping in YAML; with line and column.
        StorageError: The file is there, and cannot be read.
    """
    return parse_leaves(_read(path), str(path))


def parse_leaves(text: str, where: str) -> list[Leaf]:
    """Read the values of a YAML text, each with its dotted key.

    Args:
        text: Of a config.
        where: What messages call it.

    Raises:
        ConfigError: It is not a plain mapping in YAML; with line and column.
    """
    node = _compose(text, where)
    if node is None or (isinstance(node, ScalarNode) and not node.value):
        return []
    if not isinstance(node, MappingNode):
        raise ConfigError(f"{where} holds no sections: write e.g. `train:` and below it `  epochs: 3`.")
    leaves: dict[str, Leaf] = {}
    keys: dict[str, Node] = {}
    for leaf, key_node in _leaves(node, "", where):
        if leaf.key in keys:  # once as `train.epochs`, once as `epochs` below `train`
            raise _twice(where, leaf.key, key_node, keys[leaf.key])
        leaves[leaf.key], keys[leaf.key] = leaf, key_node
    return list(leaves.values())


def read_value(text: str, where: str) -> Any:
    """Read one YAML value, as after `--set key=`.

    Args:
        text: The value; nothing at all is null.
        where: What messages call it.

    Raises:
        ConfigError: It is not a plain YAML value.
    """
    node = _compose(text, where)
    return None if node is None else _value(node, where)


def shorten(value: object) -> str:
    """Show a value in a message, on one line and not too long of it."""
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _read(path: Path) -> str:
    """Read a file of bounded length that is no pipe and no device, so that nothing is waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path} is not a regular file: save the config as a file of its own.")
            data = file.read(MOST_BYTES + 1) or b""  # None: nothing is there yet, of some files below /proc
    except OSError as error:
        kind = ConfigError if error.errno in _NO_FILE else StorageError
        raise kind(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path} is longer than {MOST_BYTES:,} bytes, so it is not a config.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path} is not valid YAML at line 1, column 1: it is UTF-16. Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", errors="replace")
        place = _place(before.count("\n"), len(before) - before.rfind("\n") - 1)
        raise ConfigError(f"{path} is not valid YAML at {place}: it is not UTF-8 text. Save it as UTF-8.") from None


def _compose(text: str, where: str) -> Node | None:
    """Parse text into nodes, without constructing anything.

    Raises:
        ConfigError: It is not YAML, or more of YAML than configs need.
    """
    try:
        node: Node | None = _Composer(text).get_single_node()
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = _place(before.count("\n"), len(before) - before.rfind("\n") - 1)
        raise ConfigError(f"{where} is not valid YAML at {place}: there is a control character; remove it.") from None
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context or "it cannot be parsed"
        # What is not closed, or has no colon, is noticed further down; where it begins says more.
        is_open = error.context_mark is not None and any(word in problem for word in _UNFINISHED)
        mark = error.context_mark if is_open else error.problem_mark
        place = _place(mark.line, mark.column) if mark else "its end"
        known = next((plain for part, plain in _PLAIN.items() if part in f"{error.context} {problem}"), problem)
        raise ConfigError(f"{where} is not valid YAML at {place}: {known}.") from None
    return node


class _Composer(yaml.SafeLoader):
    """PyYAML's parser; refuses what multiplies, nests without end or constructs."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not used here; write the value out"
        elif getattr(event, "tag", None) is not None:
            problem = "tags (words that begin with !) are not used here; write the value alone"
        elif self._depth == DEEPEST:
            problem = f"keys and lists are nested more than {DEEPEST} deep"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self._depth += 1
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _leaves(node: MappingNode, prefix: str, where: str) -> Iterator[tuple[Leaf, Node]]:
    """Yield each value below a mapping with the node of its key."""
    seen: dict[str, Node] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode) or not key_node.value:
            raise _refusal(where, key_node, "a key must be a word")
        name = key_node.value
        key = f"{prefix}{name}"
        if name in seen:
            raise _twice(where, key, key_node, seen[name])
        seen[name] = key_node
        if isinstance(value_node, MappingNode) and value_node.value:
            yield from _leaves(value_node, f"{key}.", where)
        else:
            yield Leaf(key=key, value=_value(value_node, where)), key_node


def _value(node: Node, where: str) -> Any:
    """Turn a node into text, a number, a truth value, None, a list or a dictionary."""
    match node:
        case SequenceNode():
            return [_value(item, where) for item in node.value]
        case MappingNode():
            return {leaf.key: leaf.value for leaf, _ in _leaves(node, "", where)}
    return _scalar(node, where)


def _scalar(node: Node, where: str) -> str | int | float | bool | None:
    kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
    if kind in _SPECIAL:
        raise _refusal(where, node, f"{shorten(text)} is {_SPECIAL[kind]} in YAML; put it in quotes if it is text")
    if kind in ("int", "float"):
        if len(text) > LONGEST_NUMBER:
            raise _refusal(where, node, f"a number has {len(text):,} characters")
        if ":" in text:
            raise _refusal(where, node, f"{text} is a number to the base 60 in YAML; put it in quotes if it is text")
        if kind == "int" and re.match(r"[-+]?0[0-9_]", text):
            raise _refusal(where, node, f"{text} is an octal number in YAML; write it without the leading 0, or in "
                           "quotes if it is text")  # fmt: skip
    try:
        value: str | int | float | bool | None = _CONSTRUCTOR.construct_object(node)
    except ValueError:
        raise _refusal(where, node, f"{shorten(text)} is not a value; put it in quotes if it is text") from None
    return value


_CONSTRUCTOR = yaml.constructor.SafeConstructor()


def _refusal(where: str, node: Node, what: str) -> ConfigError:
    return ConfigError(f"{where} is not usable at {_place(node.start_mark.line, node.start_mark.column)}: {what}.")


def _twice(where: str, key: str, node: Node, former: Node) -> ConfigError:
    mark = node.start_mark
    return ConfigError(
        f"{where} gives {shorten(key)} twice, at line {former.start_mark.line + 1} and at "
        f"{_place(mark.line, mark.column)}: keep one of them."
    )


def _place(line: int, column: int) -> str:
    return f"line {line + 1}, column {column + 1}"
