"""Parts of the launcher by themselves: the end of a log, names of signals, patience with suspended ranks."""

import signal
import time

import pytest

from mnist_dist.group import heartbeat
from mnist_dist.group.heartbeat import Pulses
from mnist_dist.group.signals import name_of
from mnist_dist.launch.group import TAIL_BYTES, TAIL_LINES, last_lines
from mnist_dist.launch.watch import Watch


def test_the_end_of_a_log_is_read_however_long_the_log_is(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(1 << 34)  # takes no room on the disk
        file.seek(0, 2)
        file.write(b"\nthe reason\n")
    lines = last_lines(log)
    assert lines[-1] == "the reason"
    assert sum(map(len, lines)) < TAIL_BYTES


@pytest.mark.parametrize(
    ("content", "last"),
    [
        (b"", None),
        (b"\xff\xfe\x80 no text\n", "\ufffd\ufffd\ufffd no text"),
        ("größer €\n".encode(), "größer €"),
        (b"10%\r20%\r30%", "30%"),
        (b"x" * 10_000_000, "x" * 400 + " ..."),
        (("ä" * TAIL_BYTES).encode(), "ä" * 400 + " ..."),
    ],
    ids=range(6),
)
def test_the_end_of_a_log_of_any_content_is_short_text(tmp_path, content, last):
    (tmp_path / "log").write_bytes(content)
    lines = last_lines(tmp_path / "log")
    assert len(lines) <= TAIL_LINES
    assert (lines[-1] if lines else None) == last


def test_what_a_terminal_would_obey_is_escaped_in_the_end_of_a_log(tmp_path):
    (tmp_path / "log").write_bytes(b"\x1b]0;title\x07\x1b[2J\n")
    (line,) = last_lines(tmp_path / "log")
    assert line.isprintable()


def test_a_log_that_somebody_removed_is_no_error(tmp_path):
    assert last_lines(tmp_path / "log") == ["(No such file or directory)"]


def test_every_signal_has_a_name():
    names = [name_of(number) for number in range(1, 70)]
    assert len(set(names)) == 69
    assert name_of(signal.SIGTERM) == "SIGTERM"
    assert name_of(signal.SIGRTMIN + 3) == "SIGRTMIN+3"
    assert name_of(signal.SIGRTMAX + 1) == f"signal {signal.SIGRTMAX + 1}"


def test_time_suspended_does_not_count_as_silence(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "_memory", None)
    pulses = Pulses(tmp_path / "pulses", 1)
    heartbeat.start(tmp_path / "pulses", 0)
    heartbeat.beat(1)
    watch = Watch(pulses, start_seconds=0.05, hang_seconds=0.05)
    time.sleep(0.1)
    assert watch.silent([0], suspended_seconds=0.1) is None
    assert watch.silent([0], suspended_seconds=0.0) == [0]
    pulses.close()
