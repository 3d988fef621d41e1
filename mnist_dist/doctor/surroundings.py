"""Checks of environment variables, Accelerate's config and the images. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from mnist_dist.data.scan import scan
from mnist_dist.doctor.finding import Finding, first_line
from mnist_dist.errors import ConfigError, DataError
from mnist_dist.group import foreign
from mnist_dist.group.place import PLACE, worker_of

ENVIRONMENT, ACCELERATE_CONFIG = "environment", "accelerate"

WEIGHTY = ("mixed_precision", "distributed_type", "num_machines", "use_cpu", "dynamo_config", "compute_environment")
"""Keys of Accelerate's config that change what a run computes, or where."""
SHOWN = ("num_processes", "distributed_type", "mixed_precision")
"""Keys that are always shown."""
NEUTRAL = ("no", "false", "none", "1", "multi_gpu", "local_machine")
"""Values of those keys that change nothing."""


def environment(variables: Mapping[str, str], cpus: int) -> list[Finding]:
    """Return findings about environment variables that disturb a run.

    Args:
        variables: All of them.
        cpus: How many this process may use.
    """
    findings = [
        *_launcher_variables(variables),
        *_accelerate_variables(variables),
        *_thread_variables(variables, cpus),
        *_gpu_variables(variables),
    ]
    return findings or [Finding(check=ENVIRONMENT, state="ok", found="no variable that would disturb a run")]


def accelerate_config(variables: Mapping[str, str]) -> Finding:
    """Check the config that `accelerate launch` reads by default.

    Args:
        variables: The environment's.
    """
    file = accelerate_config_file(variables)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = "none that a bare `accelerate launch` would read"
        return Finding(check=ACCELERATE_CONFIG, state="ok", found=found)
    except (OSError, ValueError, yaml.YAMLError) as error:
        return _bad_config(file, f"cannot be read: {first_line(error)}")
    if not isinstance(content, dict):
        return _bad_config(file, "is no mapping of keys to values")
    changing = [key for key in WEIGHTY if not _is_neutral(content.get(key))]
    shown = [key for key in (*SHOWN, *changing) if key in content]
    found = f"{file}: {', '.join(f'{key} {content[key]}' for key in dict.fromkeys(shown)) or 'nothing of weight'}"
    if not changing:
        return Finding(check=ACCELERATE_CONFIG, state="ok", found=found)
    advice = f"A bare `accelerate launch` takes {_listed(changing)} from it: pass all options, or remove the file."
    return Finding(check=ACCELERATE_CONFIG, state="warning", found=found, advice=advice)


def accelerate_config_file(variables: Mapping[str, str]) -> Path:
    """Return the path where Accelerate looks for its config (accelerate/commands/config/config_args.py).

    Args:
        variables: The environment's.
    """
    cache = variables.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(variables.get("HF_HOME", str(Path(cache) / "huggingface"))).expanduser()
    return home / "accelerate" / "default_config.yaml"


def pictures(root: Path | None) -> Finding:
    """Count the images and classes of a data folder, without decoding them.

    Args:
        root: The folder; `None` is `Dataset`, which may be absent.
    """
    if root is None and not Path("Dataset").exists():
        found = "no folder Dataset here: `train` uses the 1,797 embedded digits"
        return Finding(check="data", state="ok", found=found)
    root = root or Path("Dataset")
    try:
        listing = scan(root, follow_links=True)
    except DataError as error:
        advice = "Correct that; `mnist-dist data check` then decodes every image."
        return Finding(check="data", state="problem", found=str(error), advice=advice)
    counts = ", ".join(f"{len(pictures.files):,} {split}" for split, pictures in listing.splits.items())
    of_class = np.bincount(listing.splits["train"].labels)
    spread = f"{of_class.min():,} to {of_class.max():,}" if of_class.min() < of_class.max() else f"{of_class[0]:,}"
    found = f"{root}: {counts}; {len(listing.classes)} classes with {spread} training images each"
    if listing.leads_out:
        advice = "Links lead out of it: training follows them only with `--set data.follow_links=true`."
        return Finding(check="data", state="warning", found=found, advice=advice)
    return Finding(check="data", state="ok", found=found)


def _launcher_variables(variables: Mapping[str, str]) -> list[Finding]:
    """Find variables that make Accelerate or this program treat a command as one of several processes."""
    given = [name for name in PLACE if name in variables]
    missing = [name for name in PLACE if name not in variables]
    try:
        worker = worker_of(variables)
    except ConfigError as error:
        return [Finding(check=ENVIRONMENT, state="problem", found=str(error), advice=_unset(given) if given else "")]
    if worker is not None:
        names = ["ACCELERATE_DYNAMO_MODE"] if missing else given
        advice = f"`train` takes itself for a worker and starts nothing: unless a launcher set this, {_unset(names)}"
    elif given:
        names, advice = given, f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} not set: {_unset(given)}"
    else:
        return []
    return [Finding(check=ENVIRONMENT, state="warning", found=_assigned(variables, names), advice=advice)]


def _accelerate_variables(variables: Mapping[str, str]) -> list[Finding]:
    findings = []
    for name, reason in foreign.refused(variables).items():
        advice = f"`train` stops: {reason}. {_unset([name])}"
        findings.append(Finding(check=ENVIRONMENT, state="problem", found=_assigned(variables, [name]), advice=advice))
    taken = [name for name in foreign.TAKEN if variables.get(name, "").lower() not in foreign.OFF]
    if taken:
        advice = f"`train` takes this whatever the config says: unless you mean it, {_unset(taken)}"
        findings.append(Finding(check=ENVIRONMENT, state="warning", found=_assigned(variables, taken), advice=advice))
    others = [
        name
        for name in foreign.matching(variables, foreign.HIDDEN)
        if name not in (*foreign.TAKEN, *foreign.REFUSED) and variables[name].lower() not in foreign.OFF
    ]
    if others:
        advice = "Nothing to do: these are hidden from Accelerate, which would obey them."
        findings.append(Finding(check=ENVIRONMENT, state="ok", found=_assigned(variables, others), advice=advice))
    return findings


def _thread_variables(variables: Mapping[str, str], cpus: int) -> list[Finding]:
    findings = []
    threads = variables.get("OMP_NUM_THREADS")
    if threads is not None and threads.split(",")[0].strip() != str(cpus):  # a list is one number a nested level
        found = f"OMP_NUM_THREADS={threads}, with {cpus} CPU{'s' if cpus > 1 else ''} to use"
        advice = f"Every process takes that many threads, however many CPUs it has: {_unset(['OMP_NUM_THREADS'])}"
        findings.append(Finding(check=ENVIRONMENT, state="warning", found=found, advice=advice))
    if variables.get("OMP_WAIT_POLICY", "").lower() == "passive":
        advice = f"It halves the speed on CPUs, as threads sleep between operations: {_unset(['OMP_WAIT_POLICY'])}"
        findings.append(Finding(check=ENVIRONMENT, state="warning", found="OMP_WAIT_POLICY=PASSIVE", advice=advice))
    return findings


def _gpu_variables(variables: Mapping[str, str]) -> list[Finding]:
    name = "CUDA_VISIBLE_DEVICES"
    if name not in variables:
        return []
    found, value = f"{name}={variables[name]}", variables[name].strip()
    if value and not value.startswith("-1"):
        return [Finding(check=ENVIRONMENT, state="ok", found=f"{found}: other GPUs stay out of sight")]
    advice = f"Hides every GPU: unless you mean it, {_unset([name])}"
    return [Finding(check=ENVIRONMENT, state="warning", found=found, advice=advice)]


def _is_neutral(value: object) -> bool:
    """Return whether a value changes nothing, in any notation: YAML 1.1 reads a bare `no` as False."""
    if isinstance(value, dict):
        return all(map(_is_neutral, value.values()))
    return str(value).lower() in NEUTRAL


def _bad_config(file: Path, what: str) -> Finding:
    advice = "A bare `accelerate launch` stops at it: repair it, remove it, or pass --config_file."
    return Finding(check=ACCELERATE_CONFIG, state="warning", found=f"{file} {what}", advice=advice)


def _unset(names: list[str]) -> str:
    return f"`unset {' '.join(names)}`."


def _assigned(variables: Mapping[str, str], names: list[str]) -> str:
    return " ".join(f"{name}={variables[name]}" for name in names)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
