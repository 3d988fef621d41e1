"""Messages from our launcher to its ranks about which store to open.

The launcher, which needs no torch, looks whether the images have changed, or decodes them, while its ranks import
torch. They then open what it has approved, without looking again: that takes milliseconds at any number of images.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

from mnist_dist.data.files import DamagedError
from mnist_dist.data.store_files import Store, open_folder
from mnist_dist.errors import WorkerError
from mnist_dist.group import heartbeat, threads
from mnist_dist.group.place import LAUNCHER, GroupFolder

POLL_SECONDS = 0.003


def approve(group: GroupFolder, folder: Path | None, state: str, sha256: str = "", *, cpu_seconds: float = 0.0) -> None:
    """Write, as the launcher, the approval that the ranks wait for.

    Args:
        group: Where they look.
        folder: The store; None: there is none on disk, and each rank gets the images by itself.
        state: How it came about, in words.
        sha256: The identity of its data.
        cpu_seconds: What the launcher has used for it: the ranks must not take it for another program's.
    """
    temporary = group.word.with_suffix(".tmp")
    word = {
        "folder": folder and str(folder.absolute()),
        "state": state,
        "sha256": sha256,
        "cpu_seconds": cpu_seconds,
    }
    temporary.write_text(json.dumps(word), encoding="utf-8")
    temporary.replace(group.word)


def approved(group: GroupFolder) -> Store | None:
    """Open the store that the launcher approves, after waiting for it; None if each rank must find it.

    Raises:
        WorkerError: The launcher is gone.
    """
    if not group.word.exists():
        return None
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))
    while not (text := _read(group)):
        heartbeat.beat()
        time.sleep(POLL_SECONDS)
        if os.getppid() != launcher:  # only where the kernel does not end ranks with their launcher
            raise WorkerError("The launcher of this process has ended.")
    word = json.loads(text)
    threads.count_as_ours(word["cpu_seconds"])
    try:
        store = open_folder(Path(word["folder"])) if word["folder"] else None
    except (DamagedError, OSError):  # removed or replaced in the meantime, as by another launcher
        return None
    return replace(store, state=word["state"]) if store is not None and store.sha256 == word["sha256"] else None


def _read(group: GroupFolder) -> str:
    try:
        return group.word.read_text(encoding="utf-8")
    except FileNotFoundError:  # a later launcher has removed what this one has left
        raise WorkerError("The launcher of this process has ended.") from None
