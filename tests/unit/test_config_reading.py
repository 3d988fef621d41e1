"""Configs from strangers: what YAML can do beyond keys and values is refused, with line and column."""

import os
import resource

import pytest

from mnist_dist.config import load, parse_setting
from mnist_dist.config.reading import MOST_BYTES
from mnist_dist.errors import ConfigError, StorageError

MULTIPLYING = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MULTIPLYING, r"line 2, column 10: aliases \(\*name\) are not used"),
        ("train: &a {seed: *a}\n", "line 1, column 18: aliases"),
        ("train:\n  seed: " + "[" * 3000, "line 2, column 15: keys and lists are nested more than 8 deep"),
        ("".join(" " * depth + "k:\n" for depth in range(60)), "nested more than 8 deep"),
        ("train: {epochs: !!float x}\n", "line 1, column 17: tags"),
        ("train: !!python/object/apply:os.system [id]\n", "line 1, column 8: tags"),
        ("train: !mine {epochs: 3}\n", "tags"),
        ("data: {root: 2021-02-30}\n", "line 1, column 14: '2021-02-30' is a date in YAML; put it in quotes"),
        ("data: {root: 2021-02-03}\n", "is a date in YAML"),
        ("train: {epochs: 010}\n", "010 is an octal number in YAML"),
        ("train: {epochs: 1:30}\n", "1:30 is a number to the base 60"),
        ("train: {epochs: 1:30.5}\n", "to the base 60"),
        (f"train: {{seed: {'9' * 5000}}}\n", "a number has 5,000 characters"),
        ("train: {seed: 0x_}\n", "'0x_' is not a value"),
        ("train:\n  epochs: 3\ntrain:\n  seed: 2\n", "gives 'train' twice, at line 1 and at line 3, column 1"),
        ("train:\n  epochs: 3\n  epochs: 4\n", "gives 'train.epochs' twice, at line 2 and at line 3, column 3"),
        ("train.epochs: 3\ntrain: {epochs: 4}\n", "gives 'train.epochs' twice, at line 1 and at line 2, column 9"),
        ("train: {epochs: 3}\n---\nmodel: {}\n", "line 2, column 1: a second document begins"),
        ("train:\n\tepochs: 3\n", "line 2, column 1: there is a tab"),
        ("train: epochs: 3\n", "line 1, column 14: this line has a second colon"),
        ("train:\n    epochs: 3\n  seed: 4\n", "line 3, column 3: this line is indented differently"),
        ("train: {epochs: 3\n", "line 1, column 8: a section that begins with { is not closed"),
        ("data: {root: 'a}\n", "line 1, column 14: text in quotes has no closing quote"),
        ("data: {root: @a}\n", "line 1, column 14: text cannot begin with this character"),
        ('data: {root: "\\q"}\n', "a backslash in double quotes"),
        ('data: {root: "a\x1b[31m"}\n', "line 1, column 16: there is a control character"),
        ("? [a]\n: 3\n", "line 1, column 3: a key must be a word"),
        ("<<: {train: 3}\n", "no config key '<<.train'"),
        ("data: {root: a}\n'b'\n", "line 2, column 1"),
        ("'a' 'b'\n", "line 1, column 5: there is more text where the config has ended"),
        ("%YAML 9.9\n---\n{}\n", "line 1, column 1: a line that begins with % is not needed"),
        ("- 3\n", "holds no sections"),
        ("train\n", "holds no sections"),
    ],
)
def test_yaml_that_is_no_plain_config_is_refused_with_its_place(tmp_path, text, message):
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as refused:
        load(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("train: {epochs: 3}".encode("utf-16"), "line 1, column 1: it is UTF-16. Save it as UTF-8"),
        ("train:\n  a: ä".encode("latin-1"), "line 2, column 6: it is not UTF-8 text"),
        (b"\0\0\0", "line 1, column 1: there is a control character"),
        (b"#" * (MOST_BYTES + 1), "longer than 65,536 bytes"),
    ],
)
def test_a_file_in_another_encoding_or_too_long_is_refused(tmp_path, data, message):
    file = tmp_path / "a.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load(file)


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path):
    file = tmp_path / "a.yaml"
    file.touch()
    os.truncate(file, 1 << 40)
    with pytest.raises(ConfigError, match="longer than"):
        load(file)


def test_a_pipe_or_a_device_is_refused_without_waiting(tmp_path):
    pipe = tmp_path / "a.yaml"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        with pytest.raises(ConfigError, match="is not a regular file"):
            load(path)


def test_a_file_that_is_there_and_cannot_be_opened_is_the_disks_fault(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {epochs: 3}\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(StorageError, match=r"a.yaml cannot be read: Too many open files"):
            load(file)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["nowhere.yaml", "file.yaml/a.yaml", "loop.yaml", "a" * 5000, "\0", "", "folder"])
def test_a_path_that_leads_to_no_config_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.yaml").write_text("")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError):
        load(name)


@pytest.mark.parametrize("name", ["a\nmodel: {dropout: 0.9}\n.yaml", "a\u202eb.yaml", "a\udce9.yaml", "a\x1b[31m.yaml"])
def test_the_name_of_a_config_is_one_line_of_text_in_the_resolved_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("train: {epochs: 3}\n")
    resolved = load(name)
    text = resolved.to_yaml()
    assert all(line.isprintable() for line in text.splitlines())
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert load("config.yaml").config == resolved.config


def test_of_thousands_of_mistakes_ten_are_listed(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("".join(f"key{number}: 1\n" for number in range(4000)))
    with pytest.raises(ConfigError, match=r"no config key 'key0'") as refused:
        load(file)
    assert str(refused.value).count("\n") == 10
    assert str(refused.value).endswith("... and 3,990 more.")


def test_a_byte_order_mark_dashes_and_windows_line_ends_are_taken(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbf---\r\ntrain:\r\n  epochs: 3  # three\r\n  seed: 0x_ff\r\n")
    options = load(file).config.train
    assert (options.epochs, options.seed) == (3, 255)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epochs=[1", r"--set 'train.epochs=\[1' is not valid YAML at line 1, column 1: a list"),
        ("train.epochs=!!float x", "tags"),
        ("train.epochs=*a", "aliases"),
        ("train.epochs=1e400", "train.epochs is '1e400'|train.epochs is inf"),
        ("data.root=2021-02-30", "is a date in YAML"),
        ("data.root={a: 1, a: 2}", "gives 'a' twice"),
        (f"data.mean={'[' * 500}", "nested more than"),
    ],
)
def test_a_value_of_the_command_line_is_read_as_carefully(setting, message):
    with pytest.raises(ConfigError, match=message):
        load(None, (parse_setting(setting),))
