"""How presets, files and flags become one validated config.

Precedence: defaults < preset or file < `--set` and flags. Each value remembers where it came from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mnist_dist.config.explain import all_keys, explain, not_a_section, sections, unknown
from mnist_dist.config.reading import read_leaves, read_value, shorten
from mnist_dist.config.schema import VARIANTS, Config
from mnist_dist.config.seal import is_whole
from mnist_dist.config.suggestions import did_you_mean
from mnist_dist.disk.storage import ContentError, read_plain
from mnist_dist.errors import ConfigError

MOST_SHOWN = 10
"""Mistakes of a config that are listed."""


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
            origin = self.origins.get(key, "default")  # may be a file's name: a line break in it would end the comment
            lines.append(f"{entry:<40}  # {origin if origin.isprintable() else ascii(origin)}")
        return "\n".join(lines) + "\n"


def load(source: str | Path | None = None, overrides: tuple[Setting, ...] = ()) -> Resolved:
    """Resolve an experiment from defaults, a preset or file, and overrides.

    Args:
        source: A preset's name, a YAML file, a run folder, or None for the defaults.
        overrides: Applied in order, later ones win.

    Raises:
        ConfigError: Unknown preset, unreadable file, unknown key, or a value out of its range.
    """
    settings: dict[str, Setting] = {}
    given = [*(read_file(source) if source is not None else ()), *overrides]
    for setting in _leaves(given):
        _apply(settings, setting)
    origins = {key: setting.origin for key, setting in settings.items()}
    tree = _nest(settings)
    for section, default in VARIANTS.items():
        tree.setdefault(section, {}).setdefault("name", default)
    try:
        return Resolved(config=Config.model_validate(tree), origins=origins)
    except ValidationError as error:
        values = {key: setting.value for key, setting in settings.items()}
        messages = [explain(finding, origins, values) for finding in error.errors()]
        raise _refusal(messages) from None


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
    return Setting(key=key.strip(), value=read_value(value, f"--set {shorten(text)}"), origin="--set")


def parse_flag(key: str, flag: str, text: str) -> Setting:
    """Read the value of a flag that stands for a config key: a number if it is one, else text as it is."""
    for kind in (int, float):
        try:
            return Setting(key=key, value=kind(text), origin=flag)
        except ValueError:
            continue
    return Setting(key=key, value=text, origin=flag)


def read_file(source: str | Path) -> list[Setting]:
    """Read a preset, a YAML file or a run's config as settings.

    Raises:
        ConfigError: There is no such preset or file, it is not a mapping in YAML, or a run's is damaged.
    """
    path = find_config(source)
    if path.parent == Path(source) and os.path.lexists(path.with_name("environment.json")):
        _refuse_altered(path)
    leaves = read_leaves(path)
    return [Setting(key=leaf.key, value=leaf.value, origin=str(source)) for leaf in leaves]


def _refuse_altered(path: Path) -> None:
    """Raise a ConfigError if a run's config, named by the run's folder, is not as it was written."""
    try:
        whole = is_whole(read_plain(path))
    except ContentError as error:
        raise ConfigError(f"{error}: name another config.") from None
    if not whole:
        raise ConfigError(
            f"{path} is not as the run wrote it: it is damaged, or was edited. If it says what you want, name the file "
            f"itself."
        )


def find_config(source: str | Path) -> Path:
    """Find a config file by its path, a bare name among the presets, or that of a run by its folder.

    Raises:
        ConfigError: There is none.
    """
    path = Path(source)
    is_folder = os.path.isdir(path)  # noqa: PTH112  does not raise for a name that no file can have
    if not is_folder and os.path.lexists(path):
        return path
    names = presets()
    if str(source) in names:
        return names[str(source)]
    if is_folder:
        if os.path.lexists(path / "config.yaml"):
            return path / "config.yaml"
        raise ConfigError(f"{path} is a folder without a config.yaml: name a preset, a YAML file or a run's folder.")
    raise ConfigError(
        f"There is no config file and no preset {shorten(str(source))}.{did_you_mean(str(source), names)} "
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


def _leaves(settings: list[Setting]) -> Iterator[Setting]:
    """Split sections among the values into keys, leave out empty ones, and refuse unknown keys.

    Raises:
        ConfigError: Names each unknown key.
    """
    keys, known_sections, problems = set(all_keys()), sections(), []
    leaves = [
        Setting(key=key, value=value, origin=setting.origin)
        for setting in settings
        for key, value in flatten({setting.key: setting.value})
    ]
    for leaf in leaves:
        if leaf.key in known_sections and leaf.value not in (None, {}):
            problems.append(not_a_section(leaf.key, leaf.value, leaf.origin))
        elif leaf.key not in keys | known_sections:
            problems.append(unknown(leaf.key, leaf.origin))
    if problems:
        raise _refusal(problems)
    yield from (leaf for leaf in leaves if leaf.key in keys)


def _refusal(problems: list[str]) -> ConfigError:
    """List what is wrong with a config, each once, and not more of it than one reads."""
    different = list(dict.fromkeys(problems))
    more = [f"... and {len(different) - MOST_SHOWN:,} more."] if len(different) > MOST_SHOWN else []
    return ConfigError(*different[:MOST_SHOWN], *more)


def _apply(settings: dict[str, Setting], setting: Setting) -> None:
    """Add a setting; another optimizer or schedule starts from its own defaults, not the former one's values."""
    section, _, name = setting.key.partition(".")
    if section in VARIANTS and name == "name":
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
            branch = branch.setdefault(section, {})
        branch[name] = setting.value
    return tree
