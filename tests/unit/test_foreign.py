"""Other programs' variables: the table against Accelerate's own source, and what is refused."""

import ast
import inspect

import accelerate.accelerator
import accelerate.state
import accelerate.utils.environment
import pytest

from mnist_dist import foreign
from mnist_dist.errors import ConfigError

READERS = ("get", "getenv", "pop", "get_int_from_env", "parse_flag_from_env", "parse_choice_from_env")


def names_read_by(module):
    """Collect each name that a module looks up in the environment, wherever it stands as text."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in READERS and node.args:
                found |= {text.value for text in ast.walk(node.args[0]) if isinstance(text, ast.Constant)}
        elif isinstance(node, ast.Subscript) and "environ" in ast.unparse(node.value):
            found |= {text.value for text in ast.walk(node.slice) if isinstance(text, ast.Constant)}
        elif isinstance(node, ast.Compare) and "environ" in ast.unparse(node.comparators[0]):
            found |= {text.value for text in ast.walk(node.left) if isinstance(text, ast.Constant)}
    return {name for name in found if isinstance(name, str) and name.isupper()}


@pytest.mark.parametrize("module", [accelerate.state, accelerate.accelerator, accelerate.utils.environment])
def test_the_table_knows_every_variable_that_accelerate_reads(module):
    names = names_read_by(module)
    assert len(names) > 5
    known = {*foreign.matching(dict.fromkeys(names, ""), foreign.HIDDEN), *foreign.SHOWN}
    assert names <= known, f"decide on {names - known}"


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
