"""`data check`, `data stats` and `data import` as a user types them."""

import json
import os
import shutil

import pytest


def test_check_lists_every_bad_file_and_all_that_is_passed_over_at_once(tmp_path, folder_of, command):
    root = folder_of(tmp_path / "my data", classes=2, train=3, test=1)
    picture = (root / "train" / "class-0" / "0.png").read_bytes()
    (root / "train" / "class-0" / "cut.png").write_bytes(picture[: len(picture) // 2])
    (root / "train" / "class-0" / "empty.png").touch()
    (root / "test" / "class-1" / "gone.png").symlink_to("/nowhere")
    os.mkfifo(root / "test" / "class-1" / "pipe.png")
    (root / "train" / "stray.png").write_bytes(picture)
    shutil.copytree(root / "test", root / "held out", ignore=lambda *_: ["class-1"])
    (root / "train" / "class-0" / os.fsdecode(b"b\xe9.txt")).touch()
    checked = command("data", "check", "--data", root, timeout=60)
    assert checked.code == 3
    lines = checked.out.splitlines()
    bad = [line.split("/")[-1] for line in lines if line.startswith("unreadable")]
    assert [line.split("  ")[0] for line in bad] == ["gone.png", "pipe.png", "cut.png", "empty.png"]
    ignored = [line for line in lines if line.startswith("ignored")]
    assert [reason for line in ignored for reason in line.split("  (")[1:]] == [
        "beside train, val and test)",
        "not an image by its ending)",
        "beside the class folders)",
    ]
    assert "b\\xe9.txt" in ignored[1] or "b\\udce9.txt" in ignored[1]
    assert lines[-1] == "12 images, 4 unreadable; 3 other files ignored"
    record = command("data", "check", root, "--json").json()
    assert len(record["unreadable"]) == 4
    assert record["ignored"] == sorted(record["reasons"])


def test_check_names_what_makes_a_folder_unusable_after_its_files(tmp_path, folder_of, command):
    root = folder_of(tmp_path / "data", classes=2, train=2, test=1)
    shutil.rmtree(root / "train" / "class-1")
    checked = command("data", "check", root)
    assert checked.code == 3
    assert "fault       Each class needs training images, and 1 folder is missing" in checked.out
    assert "Traceback" not in checked.err


@pytest.mark.parametrize("words", [["check"], ["stats", "--json"]])
def test_a_data_folder_can_be_named_as_train_takes_it(tmp_path, folder_of, command, words):
    root = folder_of(tmp_path / "data", classes=2, train=2, test=1)
    named = command("data", *words, "--data", root)
    assert named.code == 0, named.err
    assert command("data", *words, root).out == named.out
    other = command("data", *words, root, "--data", tmp_path)
    assert other.code == 2
    assert "name one" in other.err


@pytest.mark.parametrize("option", ["--image-size=2000", "--image-size=7", "--image-size=-1", "--channels=2"])
def test_options_of_stats_have_the_bounds_of_the_config(tmp_path, folder_of, command, option):
    root = folder_of(tmp_path / "data", classes=2, train=2, test=1)
    refused = command("data", "stats", root, option)
    assert refused.code == 2
    assert option.split("=")[0] in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_stats_read_linked_pictures_only_when_told(tmp_path, folder_of, command):
    root = folder_of(tmp_path / "data", classes=2, train=2, test=1)
    (root / "train" / "class-0").rename(tmp_path / "outside")
    (root / "train" / "class-0").symlink_to(tmp_path / "outside")
    refused = command("data", "stats", root)
    assert refused.code == 3
    assert "data.follow_links=true" in refused.err
    counts = command("data", "stats", root, "--follow-links", "--json").json()["counts"]
    assert counts["train"] == {"class-0": 2, "class-1": 2}


def test_a_flipped_bit_in_the_store_is_said_in_one_line(tmp_path, folder_of, command):
    root = folder_of(tmp_path / "data", classes=2, train=2, test=1)
    good = command("data", "stats", root, "--json")
    (labels,) = root.glob(".mnist-dist/*/train-labels.npy")
    content = bytearray(labels.read_bytes())
    content[-8] ^= 1
    labels.write_bytes(content)
    again = command("data", "stats", root, "--json")
    assert json.loads(again.out) == json.loads(good.out)
    assert "are damaged (bits of train-labels.npy have flipped)" in again.err
    assert len(again.err.splitlines()) == 2  # and that they are decoded
