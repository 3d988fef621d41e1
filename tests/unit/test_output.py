"""Standard output and error take any text, on any encoding."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnist_dist.errors import ConfigError, GroupError, typed
from mnist_dist.observe.names import message_of
from mnist_dist.observe.output import Visible, glyph, make_visible, open_console, print_line, say, tolerant, written

texts = st.text(st.characters(), max_size=40)
ENCODINGS = ["utf-8", "latin-1", "ascii", "cp1252"]


def stream_of(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def visible_output(monkeypatch, encoding):
    """Take the place of standard output and error; gives back what was written to the first."""
    stream = stream_of(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream_of(encoding))
    make_visible()
    return lambda: stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_line_with_any_name_is_one_line(monkeypatch, encoding):
    stdout = visible_output(monkeypatch, encoding)
    say("class \x1b[31m\ud800東京\r\n✓ é")
    print("a message\nof two lines \x9b", end="\n")
    lines = stdout().split("\n")
    assert len(lines) == 4
    assert lines[0].startswith(r"class \x1b[31m\ud800")
    assert lines[2] == r"of two lines \x9b"
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_table_takes_names_for_text_and_colours_pass(monkeypatch, encoding):
    stdout = visible_output(monkeypatch, encoding)
    console = open_console()
    console.print("[red]x :dog: a[b]")
    print_line(console, "[red]x \x07")
    console.file.write("\x1b[31m")
    assert stdout() == "[red]x :dog: a[b]\n[red]x \\x07\n\x1b[31m"


@given(texts)
def test_any_text_can_be_written_to_any_stream(text):
    for encoding in ENCODINGS:
        stream = stream_of(encoding)
        stream.reconfigure(errors="backslashreplace")
        Visible(stream).write(text)
        assert stream.buffer.getvalue().decode(encoding).replace("\n", "").replace("\t", "").isprintable()


def test_a_visible_stream_cannot_be_gone_around():
    assert not hasattr(Visible(stream_of("ascii")), "buffer")
    with pytest.raises(TypeError):
        Visible(stream_of("ascii")).write(b"bytes")


def test_a_stream_is_tolerant_for_a_while():
    stream = stream_of("latin-1")
    with tolerant(stream):
        stream.write("✓")
    assert stream.buffer.getvalue() == rb"\u2713"
    with pytest.raises(UnicodeEncodeError):
        stream.write("✓")


@pytest.mark.parametrize(("columns", "width"), [("120", 120), ("64", 64), ("15", 64), ("1", 64)])
def test_a_table_has_room_in_a_narrow_terminal(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    assert open_console(tables=True).width == width


@pytest.mark.parametrize("columns", ["0", "-5", "abc", "", "²", "9" * 12])
def test_a_width_that_is_none_is_forgotten(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    visible_output(monkeypatch, "utf-8")
    assert open_console().width == 80
    assert open_console(tables=True).width == 1000


def test_a_sign_falls_back_where_an_encoding_lacks_it():
    from rich.console import Console

    consoles = [Console(file=stream_of(encoding)) for encoding in ENCODINGS]
    assert [glyph(console, "…", "...") for console in consoles] == ["…", "...", "...", "…"]
    assert written(consoles[1], "é東") == r"é\u6771"


def test_a_message_keeps_its_own_lines_alone():
    assert message_of(ConfigError("no key a\nb", "no key c")) == "no key a\\nb\nno key c"
    assert message_of(GroupError("a", "b\x1b", code=3)) == "a\nb\\x1b"
    assert message_of(ValueError("a\nb")) == r"a\nb"


def test_a_command_in_a_message_can_be_typed():
    assert typed("resume", "runs/a") == "`mnist-dist resume runs/a`"
    assert typed("resume", "my run's") == """`mnist-dist resume 'my run'"'"'s'`"""
