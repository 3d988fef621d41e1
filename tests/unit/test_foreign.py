"""Other programs' variables: the table against Accelerate's own source, and what is refused."""

import ast
import re
from pathlib import Path

import accelerate
import pytest

from mnist_dist.errors import ConfigError
from mnist_dist.group import foreign

READERS = ("get", "getenv", "pop", "get_int_from_env", "parse_flag_from_env", "parse_choice_from_env")


PACKAGE = Path(accelerate.__file__).parent
OTHERS = ("commands/", "test_utils/", "launchers.py", "utils/launch.py", "tracking.py", "big_modeling.py",
          "utils/megatron_lm.py", "utils/deepspeed.py")  # fmt: skip
"""Of Accelerate: what starts other processes, logs elsewhere, or trains in a way that is refused."""
MODULES = sorted(
    name
    for file in PACKAGE.rglob("*.py")
    if not (name := file.relative_to(PACKAGE).as_posix()).startswith(OTHERS) and "environ" in file.read_text()
)
READERS = ("get", "getenv", "pop", "get_int_from_env", "parse_flag_from_env", "parse_choice_from_env", "str_to_bool")


def names_read_by(text):
    """Collect each name that a module's source looks up in the environment, and each prefix of such names."""
    found, tree = set(), ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in READERS and node.args:
                found |= texts_in(node.args[0])
        elif isinstance(node, ast.Subscript) and "environ" in ast.unparse(node.value):
            found |= texts_in(node.slice)
        elif isinstance(node, ast.Compare) and "environ" in ast.unparse(node.comparators[0]):
            found |= texts_in(node.left)
        elif isinstance(node, ast.Assign) and "prefix" in ast.unparse(node.targets[0]):
            found |= {f"{prefix}ANY" for prefix in texts_in(node.value)}
    return {name for name in found if NAME.fullmatch(name)}


def texts_in(tree):
    """Collect the texts of an expression, but for what is added to a prefix."""
    if isinstance(tree, ast.BinOp) and isinstance(tree.left, ast.Name) and "prefix" in tree.left.id:
        return set()
    if isinstance(tree, ast.Constant):
        return {tree.value} if isinstance(tree.value, str) else set()
    return set().union(*map(texts_in, ast.iter_child_nodes(tree)))


NAME = re.compile("[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|RANK")


def test_the_modules_that_decide_on_a_run_are_among_those_that_are_read():
    expected = {"accelerator.py", "state.py", "parallelism_config.py", "utils/environment.py", "utils/dataclasses.py"}
    assert expected <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_the_table_knows_every_variable_that_accelerate_reads(module):
    names = names_read_by((PACKAGE / module).read_text())
    known = {*foreign.matching(dict.fromkeys(names, ""), foreign.HIDDEN), *foreign.SHOWN}
    assert names <= known, f"decide on {names - known}"


def test_the_search_finds_names_however_they_are_looked_up():
    text = """
prefix = "ACCELERATE_NEW_"
os.environ.get(prefix + "MODE"), os.environ.get("A_ONE"), os.environ["A_TWO"]
"A_THREE" in os.environ, parse_flag_from_env("A_FOUR", False)
get_int_from_env(["A_FIVE", "A_SIX"], 1), os.getenv("A_SEVEN"), str_to_bool(os.environ.get("A_EIGHT", "no"))
"""
    numbers = ("ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT")
    assert names_read_by(text) == {"ACCELERATE_NEW_ANY", *(f"A_{number}" for number in numbers)}


def test_what_is_refused_or_taken_is_hidden_from_accelerate_too():
    names = dict.fromkeys([*foreign.REFUSED, *foreign.TAKEN], "true")
    assert foreign.matching(names, foreign.HIDDEN) == sorted(names)
    assert not foreign.matching(dict.fromkeys(foreign.SHOWN, ""), foreign.HIDDEN)


@pytest.mark.parametrize("value", ["", "0", "no", "NO", "false", "False", "off"])
def test_a_variable_that_asks_for_nothing_is_no_reason_to_stop(value):
    foreign.refuse(dict.fromkeys(foreign.REFUSED, value))


@pytest.mark.parametrize("name", foreign.REFUSED)
def test_a_variable_that_asks_for_another_training_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"{name} is cuda:1, and it .*: unset it\."):
        foreign.refuse({name: "cuda:1"})
