"""How presets, files and flags become one validated config.

Precedence: defaults < preset or file < `--set` and flags. Each value remembers where it came from.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mnist_dist.config.schema import Config, Section
from mnist_dist.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A value for a dotted key, and who gave it."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A complete config, with the origin of every value that is no default."""

    config: Config
    origins: Mapping[str, str]

    def to_yaml(self) -> str:
        """Write the config as YAML, each value with its origin as a comment."""
        lines: list[str] = []
        previous: list[str] = []
        for key, value in flatten(self.config.model_dump(mode="json")):
            *sections, name = key.split(".")
            for depth, section in enumerate(sections):
                if previous[: depth + 1] != sections[: depth + 1]:
                    lines.append(f"{'  ' * depth}{section}:")
            previous = sections
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
            entry = f"{'  ' * len(sections)}{name}: {text}"
            lines.append(f"{entry:<40}  # {self.origins.get(key, 'default')}")
        return "\n".join(lines) + "\n"


def load(source: str | Path | None = None, overrides: tuple[Setting, ...] = ()) -> Resolved:
    """Resolve an experiment from defaults, a preset or file, and overrides.

    Args:
        source: A preset's name, a YAML file, or None for the defaults.
        overrides: Applied in order, later ones win.

    Raises:
        ConfigError: Unknown preset, unreadable file, unknown key, or a value out of its range.
    """
    settings: dict[str, Setting] = {}
    for setting in (*(read_file(source) if source is not None else ()), *overrides):
        _apply(settings, setting)
    origins = {key: setting.origin for key, setting in settings.items()}
    tree = _nest(settings)
    for section, default in (("optimizer", "sgd"), ("schedule", "cosine")):
        tree.setdefault(section, {})
        if isinstance(tree[section], dict):
            tree[section].setdefault("name", default)
    try:
        return Resolved(config=Config.model_validate(tree), origins=origins)
    except ValidationError as error:
        messages = [_explain(detail, origins) for detail in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(messages))) from None


def differences(saved: Config, asked: Config) -> list[str]:
    """List how a config differs from that of a saved run, in words; what it leaves to the hardware never does."""
    was = dict(flatten(saved.model_dump(mode="json")))
    undecided = {("train.precision", "auto"), ("train.threads", None)}
    return [
        f"{key} is {value!r}, the run has {was.get(key)!r}"
        for key, value in flatten(asked.model_dump(mode="json"))
        if value != was.get(key, ...) and key != "train.device" and not any((key, value) == pair for pair in undecided)
    ]


def parse_setting(text: str) -> Setting:
    """Read one `section.key=value` of the command line; the value is YAML, so null and lists work.

    Raises:
        ConfigError: There is no key, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: write it as section.key=value, e.g. --set train.epochs=3.")
    try:
        return Setting(key=key.strip(), value=yaml.safe_load(value), origin="--set")
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: {value!r} is not a YAML value.") from None


def read_file(source: str | Path) -> list[Setting]:
    """Read a preset or a YAML file as settings.

    Raises:
        ConfigError: There is no such preset or file, or it is not a mapping in YAML.
    """
    path = find_config(source)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} holds no sections: write e.g. `train:` and below it `  epochs: 3`.")
    leaves = set(all_keys())
    return [
        Setting(key=key, value=value, origin=str(source))
        for key, value in flatten(tree or {})
        if value is not None or key in leaves  # a section with nothing below it
    ]


def find_config(source: str | Path) -> Path:
    """Find a config file by its path or, for a bare name, among the presets.

    Raises:
        ConfigError: There is neither.
    """
    if Path(source).is_file():
        return Path(source)
    names = presets()
    if str(source) in names:
        return names[str(source)]
    raise ConfigError(
        f"There is no config file and no preset {str(source)!r}.{did_you_mean(str(source), names)} "
        f"Presets: {', '.join(names)}."
    )


def presets() -> dict[str, Path]:
    """List the presets by name: those inside an installed package, else those of the checkout."""
    package = Path(__file__).parent.parent
    folders = (package / "configs", package.parent / "configs")
    folder = next((path for path in folders if path.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a nested mapping with its dotted key."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def did_you_mean(word: str, choices: Mapping[str, Any] | list[str]) -> str:
    """Phrase the closest of `choices` as a question, or nothing where none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """List every dotted key that a config may have, those of all optimizers and schedules included."""
    keys: dict[str, None] = {}
    for name, field in model.model_fields.items():
        variants = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_section(kind)]
        for variant in variants:
            keys.update(dict.fromkeys(all_keys(variant, f"{prefix}{name}.")))
        if not variants:
            keys[f"{prefix}{name}"] = None
    return list(keys)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _apply(settings: dict[str, Setting], setting: Setting) -> None:
    """Add a setting; another optimizer or schedule starts from its own defaults, not the former one's values."""
    section, _, name = setting.key.partition(".")
    if section in ("optimizer", "schedule") and name == "name":
        former = settings.get(setting.key)
        if former is not None and former.value != setting.value:
            for key in [key for key in settings if key.startswith(f"{section}.")]:
                if settings[key].origin == former.origin:
                    del settings[key]
    settings[setting.key] = setting


def _nest(settings: Mapping[str, Setting]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, setting in settings.items():
        *sections, name = key.split(".")
        branch = tree
        for section in sections:
            child = branch.setdefault(section, {})
            if not isinstance(child, dict):
                raise ConfigError(_unknown(key, setting.origin))
            branch = child
        branch[name] = setting.value
    return tree


def _explain(detail: Any, origins: Mapping[str, str]) -> str:
    """Turn one of pydantic's findings into a sentence with the key, the value and the remedy."""
    tags = {"sgd", "adam", "adamw", "constant", "step", "cosine", "one_cycle"}
    path = [str(part) for part in detail["loc"]]
    if len(path) > 1 and path[0] in ("optimizer", "schedule") and path[1] in tags:
        del path[1]
    key = ".".join(path)
    origin = origins.get(key)
    if detail["type"] == "extra_forbidden":
        given = next((name for name in origins if name == key or name.startswith(f"{key}.")), key)
        return _unknown(given, origins.get(given))
    if detail["type"] == "union_tag_invalid":
        key, origin = f"{key}.name", origins.get(f"{key}.name")
        message = f"it must be one of {detail['ctx']['expected_tags']}"
        value = detail["ctx"]["tag"]
    else:
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        message = f"it must be {message}" if detail["msg"].startswith("Input should be") else message
        if detail["type"] in ("model_type", "model_attributes_type"):
            message = "it must be a section of keys"
        value = detail["input"]
    source = f" (from {origin})" if origin else ""
    if isinstance(value, BaseModel | dict) or not key:
        return f"{key + ': ' if key else ''}{message}{source}."
    return f"{key} is {value!r}{source}: {message}."


def _unknown(key: str, origin: str | None) -> str:
    keys = all_keys()
    source = f" (from {origin})" if origin else ""
    section = key.partition(".")[0]
    if key in keys and section in ("optimizer", "schedule"):
        return f"{key}{source} does not belong to the {section} that {section}.name chooses."
    return f"There is no config key {key!r}{source}.{did_you_mean(key, keys)}"
