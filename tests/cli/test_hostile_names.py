"""Names from strangers, through the real commands, in several encodings: text everywhere, and never a traceback."""

import csv
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

import numpy as np
import pytest
from PIL import Image

CLASSES = ["\x1b[31mred", "[bold]x", ":dog:", "two\nlines", "\udce9t\udce9", "Łódź", "東京", "\u202egnp", "a|b",
           "Tomato___Tomato_Yellow_Leaf_Curl_Virus_of_the_south", "Tomato___Tomato_mosaic_virus",
           "<img src=x>"]  # fmt: skip
IMAGES = ["0.png", "\x1b]0;title\x07.png", "b\udcff\n.png"]
SHOWN = [r"\x1b[31mred", "[bold]x", ":dog:", r"two\nlines", r"\udce9t\udce9", r"\u202egnp", "a|b", *CLASSES[9:]]
"""Those that look the same in every encoding."""
ACTING = set(map(chr, [*range(9), *range(11, 32), *range(127, 160), 0x202E]))
ENCODINGS = ["latin-1", "utf-8", "ascii"]


def run(folder, *words, encoding="utf-8", **environment):
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | environment
    return subprocess.run(
        [sys.executable, "-m", "mnist_dist", *words],
        cwd=folder,
        env=environment | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=120,
    )


def text_of(ended, encoding="utf-8"):
    """What a command printed, where nothing acts on a terminal."""
    output = (ended.stdout + ended.stderr).decode(encoding)
    assert ended.returncode == 0, output
    assert "Traceback" not in output
    assert not ACTING & set(output)
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with hostile images, and a run on them in a Latin-1 terminal."""
    root = tmp_path_factory.mktemp("names")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 1)):
        for label, name in enumerate(CLASSES):
            (root / "my data" / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = generator.integers(0, 100, (28, 28), dtype=np.uint8)
                pixels[2 * label : 2 * label + 3] += 120
                file = IMAGES[image] if image < len(IMAGES) else f"{image}.png"
                with (root / "my data" / split / name / file).open("wb") as stream:
                    Image.fromarray(pixels).save(stream, "PNG")
    (root / "my data" / "train" / ":dog:" / "note\x9b\udcfe.txt").write_text("")
    words = ["--epochs", "1", "--set", "train.global_batch=8", "--run", "my run [x]\x1b"]
    ended = run(root, "train", "--data", "my data", *words, encoding="latin-1", COLUMNS="80")
    (root / "output").write_text(text_of(ended, "latin-1"))
    return root


def test_a_run_shows_its_names_as_text(folder):
    output = (folder / "output").read_text()
    assert r"12 (\x1b[31mred, " in output
    assert ", ...)" in output
    assert r"predict $'my run [x]\x1b' IMAGE.png" in output  # as bash reads it
    assert json.loads((folder / "my run [x]\x1b" / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_data_commands_show_names_as_text(folder, encoding):
    output = text_of(run(folder, "data", "check", "my data", encoding=encoding), encoding)
    assert r"my data/train/:dog:/note\udcc2\x9b\udcfe.txt" in output or r":dog:/note\x9b\udcfe.txt" in output
    output = text_of(run(folder, "data", "stats", "my data", encoding=encoding), encoding)
    assert all(name in output for name in SHOWN)
    found = json.loads(run(folder, "data", "stats", "my data", "--json", encoding=encoding).stdout.decode("ascii"))
    assert sorted(found["counts"]["train"]) == sorted(CLASSES)


@pytest.mark.parametrize("encoding", ["latin-1"])
def test_evaluate_has_every_class_with_its_whole_name(folder, encoding):
    output = text_of(run(folder, "evaluate", "my run [x]\x1b", encoding=encoding), encoding)
    assert all(re.search(rf"^[│|] {re.escape(name)} ", output, re.M) for name in SHOWN)


def test_predictions_reach_file_json_and_figure(folder):
    images = ["my data/test", "--csv", "labels.csv", "--grid", "grid.png"]
    output = text_of(run(folder, "predict", "my run [x]\x1b", *images, encoding="latin-1"), "latin-1")
    assert len(output.splitlines()) == len(CLASSES)
    with (folder / "labels.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert sorted(row[0] for row in rows[1:]) == sorted(f"my data/test/{name}/0.png" for name in CLASSES)
    with Image.open(folder / "grid.png") as figure:
        assert figure.width > 900
    ended = run(folder, "predict", "my run [x]\x1b", "my data/test", "--json", encoding="latin-1")
    assert [[row["file"], row["label"]] for row in json.loads(ended.stdout)] == [row[:2] for row in rows[1:]]


def test_a_figure_that_cannot_be_written_is_refused_before_the_work(folder):
    for option in (["--grid", "grid.h5"], ["--grid", "nowhere/grid.png"], ["--grid", "my data"], ["--csv", "my data"]):
        ended = run(folder, "predict", "my run [x]\x1b", "my data/test", *option)
        assert (ended.returncode, ended.stdout) == (2, b"")
        assert ended.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("encoding", "columns"), [("latin-1", "15"), ("ascii", "1"), ("utf-8", "x")])
def test_show_draws_in_a_narrow_terminal(folder, encoding, columns):
    link = folder / "my run [x]\x1b" / "predictions.png"
    link.unlink(missing_ok=True)
    link.symlink_to(folder / "victim")
    words = ["show", "my run [x]\x1b", "--seed", "1", "-c", "3"]
    output = text_of(run(folder, *words, encoding=encoding, COLUMNS=columns), encoding)
    assert r"drawn in my run [x]\x1b/predictions.png" in output
    assert not link.is_symlink()
    assert not (folder / "victim").exists()


def test_a_message_is_one_line_whatever_it_names(folder):
    ended = run(folder, "evaluate", "no\nrun\x1b[2J", encoding="ascii")
    assert ended.returncode == 2
    assert ended.stderr.startswith(rb"error: ")
    assert rb"no\nrun\x1b[2J" in ended.stderr
    assert ended.stderr.count(b"\n") == 1


def test_a_run_folder_that_is_no_text_is_refused_before_anything_is_made(folder):
    before = sorted(folder.iterdir())
    ended = run(folder, "train", "--config", "quick", "--run", "r\udce9")
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"error: The run folder r\\udce9 is not text in UTF-8: rename it")
    assert sorted(folder.iterdir()) == before


def test_in_a_terminal_there_are_colours_and_names_are_still_text(folder):
    words = ["train", "--data", "my data", "--epochs", "1", "--set", "train.global_batch=8", "--run", "in a terminal"]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-m", "mnist_dist", *words])
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    output = b""
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    text = output.decode()
    assert "\x1b[2K" in text  # a progress bar
    assert r"\x1b[2K" not in text
    assert r"\x1b[31mred, " in text
    assert "\x1b[31mred" not in text
    assert not ACTING - {"\x1b", "\r"} & set(text)
