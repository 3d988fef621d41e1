"""A run's saved config carries its own hash, so that what is lost or changed later is noticed."""

from __future__ import annotations

import hashlib
import re

_HASH_LINE = re.compile(rb"# SHA-256 of the lines below: ([0-9a-f]{64})\n")
_SECTIONS = ("data:", "model:", "optimizer:", "schedule:", "train:", "checkpoint:", "  keep:")


def seal(text: str) -> bytes:
    """Return a config with its hash in front."""
    content = text.encode("utf-8", "surrogateescape")
    return f"# SHA-256 of the lines below: {hashlib.sha256(content).hexdigest()}\n".encode() + content


def sha256_of(content: bytes) -> str:
    """Hash a saved config, without the line that has its hash."""
    return hashlib.sha256(_HASH_LINE.sub(b"", content, count=1) if _HASH_LINE.match(content) else content).hexdigest()


def is_whole(content: bytes) -> bool:
    """Return whether a saved config is as it was written; one without a hash must have all sections to its last key."""
    match = _HASH_LINE.match(content)
    if match is not None:
        return sha256_of(content) == match[1].decode()
    lines = content.decode(errors="replace").splitlines()
    return content.endswith(b"\n") and all(any(line.startswith(start) for line in lines) for start in _SECTIONS)
