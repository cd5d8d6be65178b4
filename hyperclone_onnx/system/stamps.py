"""Stamps of files: a file that is replaced or changed gets another one."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[int, int, int]
"""Inode, bytes, and nanoseconds of the last change."""


def stamp(path: Path) -> Stamp:
    """The stamp of a file.

    Raises:
        OSError: there is no file, or it cannot be looked at.
    """
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
