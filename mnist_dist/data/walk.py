"""Walk the folders of a data set: what is an image, what is passed over, and what is refused, each with its reason.

Only regular files are images: opening a named pipe would block. Links are followed, except back into a folder
that they lie in; where several links of a class lead to one folder, one is followed. A link that leads out of the data
folder is followed only where the user says so: in a folder from somebody else, it could point at private images,
which would then end in a store that travels with the folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What counts as an image: torchvision's own list."""
SYSTEM_FOLDERS = {"@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "system volume information",
                  "lost+found", "__pycache__"}  # fmt: skip
"""What systems put beside a user's files, in small letters: thumbnails, copies, waste."""
HIDDEN, SYSTEM = "hidden", "made by a system, not part of the data"
NOWHERE, OUTSIDE = "a link that leads nowhere", "a link that leads out of the data folder"
KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class Walk:
    """A walk over the folders of one data set.

    Args:
        root: The data folder.
        follow_links: Follow links that lead out of it, too.
    """

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        self.bad: dict[str, str] = {}
        """Why a path that looks like part of the data cannot be used."""
        self.ignored: dict[str, str] = {}
        """Why a path is passed over; folders end in a slash."""
        self.times: dict[str, list[int]] = {}
        """What `folder_stamp` says of each folder, from before it was listed."""
        self.leads_out = False
        """Whether a link out of the data folder was followed."""
        self._real_root = os.path.realpath(root)
        self._follow_links = follow_links

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a split's folder, sorted; everything else there is skipped or refused."""
        found = []
        for entry in self._entries(folder):
            if entry.is_symlink() and not self.check_link(entry.path, may_be_folder=True):
                continue
            if is_folder(entry):
                found.append(entry.name)
            else:
                self.ignored[entry.path] = "beside the class folders"
        return sorted(found)

    def pictures(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the path and status of every image below a folder.

        Of several links to one folder, the one with the shortest path is followed.

        Args:
            folder: Of a class.
        """
        folders: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]  # and those that it lies in
        links: list[tuple[int, str, frozenset[tuple[int, int]]]] = []  # a heap, by the length of their paths
        followed: set[tuple[int, int]] = set()
        while folders or links:
            by_link = not folders  # links come last: the order on disk never decides which of them is followed
            path, above = heappop(links)[1:] if by_link else folders.pop()
            if (status := self._status(path)) is None:
                continue
            identity = status.st_dev, status.st_ino
            if identity in above:
                self.ignored[path + "/"] = "a link back into a folder that it lies in"
                continue
            if by_link and identity in followed:
                self.ignored[path + "/"] = "one more link to the same folder"
                continue
            if by_link:
                followed.add(identity)
            for entry in self._entries(path):
                is_link = entry.is_symlink()
                if is_link and not self.check_link(entry.path):
                    continue
                if is_folder(entry):
                    if is_link:
                        heappush(links, (len(entry.path), entry.path, above | {identity}))
                    else:
                        folders.append((entry.path, above | {identity}))
                elif (file := self._status(entry.path)) is None:
                    continue
                elif not is_picture(entry.name):
                    self.ignored[entry.path] = KINDS.get(stat.S_IFMT(file.st_mode), "not an image by its ending")
                elif reason := _why_no_picture(file):
                    self.bad[entry.path] = reason
                else:
                    yield entry.path, file

    def check_link(self, path: str, *, may_be_folder: bool = False) -> bool:
        """Return whether a link may be followed; where not, note why.

        Args:
            path: The link.
            may_be_folder: A link that leads nowhere is missed there, whatever its name.
        """
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)  # noqa: PTH116 - a Path for each would take twice as long
        except OSError:
            return self._refuse(path, NOWHERE, matters=may_be_folder or not Path(path).suffix)
        real = os.path.realpath(path)
        if real == self._real_root or real.startswith(self._real_root.rstrip(os.sep) + os.sep):
            return True
        if not self._follow_links:
            return self._refuse(path, f"{OUTSIDE}, to {real}", matters=is_folder)
        self.leads_out = True
        return True

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """Yield what lies in a folder, but for what is hidden or a system's."""
        try:
            self.times[folder] = folder_stamp(os.stat(folder))  # noqa: PTH116
            with os.scandir(folder) as entries:
                for entry in entries:
                    if reason := _why_passed_over(entry):
                        self.ignored[entry.path + "/" * is_folder(entry)] = reason
                    else:
                        yield entry
        except OSError as error:
            self.bad[folder] = error.strerror or type(error).__name__

    def _status(self, path: str) -> os.stat_result | None:
        try:
            return os.stat(path)  # noqa: PTH116
        except OSError as error:
            self.bad[path] = error.strerror or type(error).__name__
            return None

    def _refuse(self, path: str, reason: str, *, matters: bool) -> bool:
        """Note a link that is not followed: a fault where images would be missing."""
        (self.bad if matters or is_picture(Path(path).name) else self.ignored)[path] = reason
        return False


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether there is a folder, or a link to one. A link that leads in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_picture(name: str) -> bool:
    """Return whether a file counts as an image by its ending; hidden files never do."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def find_pictures(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Find all images below a folder that a user has named.

    Returns:
        The images, sorted, and why a path that looks like one cannot be used.
    """
    walk = Walk(folder)
    found = sorted(Path(path) for path, _ in walk.pictures(str(folder)))
    return found, walk.bad


def folder_stamp(status: os.stat_result) -> list[int]:
    """Return `[mtime_ns, ctime_ns, inode]` of a folder.

    tar and touch set the first back, but not the second; the third tells folders apart that were renamed.
    """
    return [status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _why_passed_over(entry: os.DirEntry[str]) -> str | None:
    if entry.name.startswith("."):
        return HIDDEN
    return SYSTEM if entry.name.lower() in SYSTEM_FOLDERS and is_folder(entry) else None


def _why_no_picture(status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file") + ", not a file"
    return None if status.st_size else "an empty file"
