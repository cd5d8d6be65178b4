"""What tells a file from another one that has its name later."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[int, int, int]
"""Inode, bytes, and nanoseconds of the last change: which file stood there."""


def stamp(path: Path) -> Stamp:
    """What tells one file from another that has its name later."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
