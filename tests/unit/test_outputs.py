"""Files that a user asks for: refused before the work, written whole, and never through a stranger's link."""

import os

import pytest
from PIL import Image

from mnist_dist.cli.outputs import check_picture, check_place, save_picture, write_csv
from mnist_dist.errors import ConfigError, StorageError


@pytest.mark.parametrize("name", ["grid.h5", "grid.fits", "grid.xbm", "grid.psd", "grid.txt", "grid", ".png", "grid."])
def test_an_ending_that_names_no_format_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"use \.png or \.jpg"):
        check_picture(tmp_path / name)


@pytest.mark.parametrize("name", ["grid.png", "grid.PNG", "grid.jpg", "a b.webp", "grid.tiff", "grid.gif", "grid.pdf"])
def test_an_ending_that_names_a_format_is_drawn(tmp_path, name):
    check_picture(tmp_path / name)
    save_picture(Image.new("RGB", (20, 10)), tmp_path / name)
    assert (tmp_path / name).stat().st_size
    assert len(list(tmp_path.iterdir())) == 1


def test_a_place_where_no_file_can_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is a folder: name a file"):
        check_place(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        check_place(tmp_path / "nowhere" / "file.csv")


def test_a_picture_that_is_too_large_for_its_format_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"70000 x 1 pixels.*\.png"):
        save_picture(Image.new("RGB", (70_000, 1)), tmp_path / "grid.jpg")
    assert not list(tmp_path.iterdir())


PICTURE = Image.new("RGB", (8, 8))


def test_a_file_of_the_runs_replaces_a_link_and_the_users_own_goes_through(tmp_path):
    target = tmp_path / "target.png"
    for follow in (True, False):
        target.write_text("before")
        link = tmp_path / f"link-{follow}.png"
        link.symlink_to(target)
        save_picture(PICTURE, link, follow=follow)
        assert link.read_bytes().startswith(b"\x89PNG")
        assert link.is_symlink() is follow
        assert (target.read_bytes() == b"before") is not follow


@pytest.mark.parametrize("what", ["folder", "pipe", "nothing"])
def test_a_link_to_anything_is_replaced_and_never_waited_for(tmp_path, what):
    target = tmp_path / "target"
    if what == "folder":
        target.mkdir()
    elif what == "pipe":
        os.mkfifo(target)
    link = tmp_path / "link.png"
    link.symlink_to(target)
    save_picture(PICTURE, link, follow=False)
    assert link.read_bytes().startswith(b"\x89PNG")
    assert not link.is_symlink()


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(StorageError, match="cannot be written"):
        write_csv(tmp_path / "file" / "below.csv", [])
    with pytest.raises(StorageError, match="cannot be written"):
        save_picture(PICTURE, tmp_path / "folder.png", follow=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
    assert (tmp_path / "file").read_text() == "before"


def test_a_device_is_written_to(tmp_path):
    (tmp_path / "device").symlink_to("/dev/null")
    write_csv(tmp_path / "device", [("a",)])
    assert (tmp_path / "device").is_char_device()


def test_a_file_name_that_is_no_text_keeps_its_bytes(tmp_path):
    write_csv(tmp_path / "a.csv", [("file", "label"), (os.fsdecode(b"\xe9\n.png"), "a,b")])
    assert (tmp_path / "a.csv").read_bytes() == b'file,label\r\n"\xe9\n.png","a,b"\r\n'
