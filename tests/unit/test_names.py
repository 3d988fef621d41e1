"""Names are text: whatever they hold, a person reads it and no terminal obeys it."""

import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_dist.observe.names import shown, shown_lines
from mnist_dist.run.checkpoint_files import Meta

names = st.text(st.characters(), max_size=40)  # surrogates too: bytes of a file name that are no text


@given(names)
def test_a_shown_name_is_one_line_of_visible_characters(name):
    assert shown(name).isprintable()
    assert not {unicodedata.bidirectional(c) for c in shown(name)} & {"RLE", "LRE", "RLO", "LRO", "PDF", "RLI", "FSI"}


@given(names)
def test_a_shown_name_can_be_written_in_utf_8(name):
    shown(name).encode("utf-8")


@given(names)
def test_showing_twice_changes_nothing_more(name):
    assert shown(shown(name)) == shown(name)


@given(st.text(st.characters(categories=("L", "N", "P", "S"), exclude_characters="\u115f\u1160\u2800\u3164\uffa0")))
def test_letters_digits_and_signs_of_any_script_stay(name):
    assert shown(name) == name


@given(st.lists(names))
def test_a_text_keeps_its_own_lines_alone(parts):
    text = "\n".join(map(shown, parts))
    assert shown_lines(text) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x9b31mred", r"\x9b31mred"),
        ("a\rb\x08\x07\x7f", r"a\rb\x08\x07\x7f"),
        ("two\nlines\tand a tab", r"two\nlines\tand a tab"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u2066a\u2069\u200f\u061c", r"\u2066a\u2069\u200f\u061c"),
        ("a\u200bb\u200dc\ufeff\u00ad", r"a\u200bb\u200dc\ufeff\xad"),
        ("line\u2028line\u2029line\x85", r"line\u2028line\u2029line\x85"),
        ("heart\ufe0f filler\u3164", r"heart\ufe0f filler\u3164"),
        ("no-break\xa0space\u3000", r"no-break\xa0space\u3000"),
        ("\udce9t\udce9", r"\udce9t\udce9"),
        ("[red]x :dog: a|b <b> `c` ![d](e) C:\\f", "[red]x :dog: a|b <b> `c` ![d](e) C:\\f"),
        ("Łódź Ελλάδα Москва 東京 naïve", "Łódź Ελλάδα Москва 東京 naïve"),
    ],
)
def test_what_acts_or_hides_is_escaped_and_all_else_stays(name, text):
    assert shown(name) == text


@given(st.lists(names, min_size=1))
def test_a_checkpoint_keeps_classes_of_any_name(classes):
    record = {
        "step": 1, "progress": {}, "sizes": {}, "scaler": None, "classes": classes, "data_sha256": "",
        "preprocessing": {"image_size": 28, "channels": 1, "mean": [0.5], "std": [0.5]},
    }  # fmt: skip
    meta = Meta.from_json(json.dumps(record).encode())
    assert meta.classes == tuple(classes)
    assert Meta.from_json(meta.to_json()) == meta


def test_showing_names_needs_neither_numpy_nor_rich():
    probe = "import sys, mnist_dist.observe.names; print(*{'numpy', 'rich', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "\n"
