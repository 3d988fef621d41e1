"""Turns what is wrong with a config into sentences: the key, its value, where it comes from, and what is allowed."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mnist_dist.config.reading import shorten
from mnist_dist.config.schema import VARIANTS, Config, Section, auto_is_null
from mnist_dist.config.suggestions import any_of, suggest_key, suggest_value


def fields(
    model: type[BaseModel] = Config, prefix: str = "", name: str | None = None
) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield each key with its field and, where the section has variants, the variant's name."""
    for own, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_section(kind)]
        for kind in kinds:
            variant = kind.model_fields["name"].default if len(kinds) > 1 else None
            yield from fields(kind, f"{prefix}{own}.", variant)
        if not kinds:
            yield f"{prefix}{own}", field, name


def all_keys() -> list[str]:
    """List every dotted key that a config may have, those of all optimizers and schedules included."""
    return list(dict.fromkeys(key for key, _, _ in fields()))


def sections() -> set[str]:
    """List the dotted names of all sections."""
    keys = all_keys()
    return {".".join(key.split(".")[:depth]) for key in keys for depth in range(1, key.count(".") + 1)}


def explain(finding: Any, origins: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """Turn one of pydantic's findings into a sentence.

    Args:
        finding: One of `ValidationError.errors()`.
        origins: Where each value that is no default comes from, by key.
        values: These values, by key.
    """
    path = [str(part) for part in finding["loc"]]
    section = path[0] if path else ""
    tag = path.pop(1) if len(path) > 1 and section in VARIANTS else None
    if finding["type"] == "union_tag_invalid":
        path, tag = [section, "name"], None
    while path and path[-1].isdecimal():  # a place in a list
        path.pop()
    key = ".".join(path)
    value = values.get(key, finding["input"])
    if finding["type"] == "extra_forbidden":
        return unknown(key, origins.get(key), chosen=tag)
    if finding["type"] == "union_tag_invalid":
        choices = sorted(names_of(section))
        value = finding["ctx"]["tag"]
        return _refused(key, value, origins, f"{any_of(choices)}.{suggest_value(value, choices)}")
    field = next((field for ours, field, name in fields() if ours == key and name in (None, tag)), None)
    if field is None:  # it concerns several keys
        message = finding["msg"].removeprefix("Value error, ")
        return f"{key + ': ' if key else ''}{message}."
    if finding["type"] == "string_unicode":
        return _refused(key, value, origins, "text in UTF-8. Rename the folder, or name it through a link.")
    return _refused(key, value, origins, f"{requirement(field)}.{suggest_value(value, _choices(field.annotation))}")


def unknown(key: str, origin: str | None, *, chosen: str | None = None) -> str:
    """Return a sentence: there is no such key, or it does not belong to the chosen optimizer or schedule.

    Args:
        key: Dotted, as the user wrote it.
        origin: Who gave it.
        chosen: The name of the optimizer or schedule.
    """
    source = f" (from {origin})" if origin else ""
    section = key.partition(".")[0]
    owners = [name for ours, _, name in fields() if ours == key and name is not None]
    if owners:
        chosen = chosen or "another"
        return (
            f"{key}{source} does not belong to the {section} that {section}.name chooses: that is {chosen}, and it "
            f"belongs to {' and '.join(owners)}."
        )
    return f"There is no config key {shorten(key)}{source}.{suggest_key(key, all_keys()) or _SEE}"


_SEE = " `mnist-dist config show` lists all."


def not_a_section(key: str, value: object, origin: str) -> str:
    """Return a sentence: a section was given a value of its own."""
    keys = [ours for ours in all_keys() if ours.startswith(f"{key}.")]
    meant = {"data": "data.root"}.get(key, f"{key}.name" if f"{key}.name" in keys else keys[0])
    return f"{key} is {shorten(value)} (from {origin}): it is a section of keys. Did you mean {meant!r}?"


def requirement(field: FieldInfo) -> str:
    """Describe what a key can be, e.g. "a whole number from 1 to 64, or null"."""
    kinds = get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
    nullable = ", or null" if type(None) in kinds else ""
    if any(getattr(item, "func", None) is auto_is_null for item in field.metadata):
        nullable = ", auto or null"
    kind = next(kind for kind in kinds if kind is not type(None))
    limits = list(field.metadata)
    if get_origin(kind) is tuple:
        kind, limits = _unwrap(get_args(kind)[0])
        return f"a list of numbers{_range(limits)}{nullable}"
    kind, inner = _unwrap(kind)
    limits += inner
    if get_origin(kind) is Literal:
        return any_of([str(choice) for choice in get_args(kind)]) + nullable
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text, in quotes if YAML would read "
             "something else"}  # fmt: skip
    return f"{names[kind]}{_range(limits)}{nullable}"


def names_of(section: str) -> list[str]:
    """List the optimizers or schedules that there are."""
    return [name for key, _, name in fields() if key == f"{section}.name" and name is not None]


def _refused(key: str, value: object, origins: Mapping[str, str], must_be: str) -> str:
    source = f" (from {origins[key]})" if key in origins else ""
    return f"{key} is {shorten(value)}{source}: it must be {must_be}"


def _range(metadata: list[Any]) -> str:
    """Phrase the limits in a field's metadata, which has an object with `ge`, `gt`, `le` or `lt` for each."""
    limits = {
        name: getattr(part, name) for part in metadata for name in ("ge", "gt", "le", "lt") if hasattr(part, name)
    }
    figures = {name: _figure(value) for name, value in limits.items()}
    match figures:
        case {"ge": least, "le": most}:
            return f" from {least} to {most}"
        case {"ge": least, "lt": most}:
            return f" from {least} to below {most}"
        case {"gt": least, "le": most}:
            return f" above {least} and up to {most}"
        case {"gt": least, "lt": most}:
            return f" above {least} and below {most}"
    return ""


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}".replace("e-0", "e-")


def _unwrap(kind: Any) -> tuple[Any, list[Any]]:
    """Return the parts of `Annotated[float, ...]`."""
    metadata = list(getattr(kind, "__metadata__", ()))
    limits = [limit for part in metadata for limit in getattr(part, "metadata", [part])]
    return getattr(kind, "__origin__", kind) if metadata else kind, limits


def _choices(kind: Any) -> list[str]:
    kinds = get_args(kind) if _is_union(kind) else (kind,)
    return [str(choice) for one in kinds if get_origin(one) is Literal for choice in get_args(one)]


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
