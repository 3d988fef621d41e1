"""The experiment's config: its schema, and how it is resolved from files and flags."""

from mnist_dist.config.explain import all_keys
from mnist_dist.config.resolve import Resolved, Setting, find_config, flatten, load, parse_flag, parse_setting, presets
from mnist_dist.config.schema import EMBEDDED_DIGITS, Config

__all__ = [
    "EMBEDDED_DIGITS",
    "Config",
    "Resolved",
    "Setting",
    "all_keys",
    "find_config",
    "flatten",
    "load",
    "parse_flag",
    "parse_setting",
    "presets",
]
