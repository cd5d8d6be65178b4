"""Stretches of files that the system's page cache does not need to keep.

`posix_fadvise` with POSIX_FADV_DONTNEED starts writing the pages that are not on the disk yet, and drops the other ones
(see its manual page). On a system without it nothing happens.
"""

from __future__ import annotations

import os
from contextlib import suppress

BATCH = 8 << 20
"""The system is told when stretches of this many bytes are gathered."""

Stretch = tuple[int, int, int]
"""A file's descriptor, and the bytes [begin, end)."""


class Stretches:
    """Gathers stretches of files until they are worth a system call; for one thread at a time."""

    def __init__(self) -> None:
        self._gathered: list[Stretch] = []
        self._bytes = 0

    def add(self, descriptor: int, begin: int, size: int) -> list[Stretch]:
        """Add a stretch. When they are many, returns all of them, neighbours joined, and begins anew."""
        self._gathered.append((descriptor, begin, begin + size))
        self._bytes += size
        if self._bytes < BATCH:
            return []
        gathered, self._gathered, self._bytes = self._gathered, [], 0
        return joined(gathered)


def joined(stretches: list[Stretch]) -> list[Stretch]:
    """The same bytes in as few stretches as possible.

    >>> joined([(3, 4, 8), (3, 0, 4), (3, 9, 12)])
    [(3, 0, 8), (3, 9, 12)]
    """
    whole: list[Stretch] = []
    for descriptor, begin, end in sorted(stretches):
        if whole and whole[-1][0] == descriptor and whole[-1][2] >= begin:
            whole[-1] = (descriptor, whole[-1][1], max(end, whole[-1][2]))
        else:
            whole.append((descriptor, begin, end))
    return whole


def forget(stretches: list[Stretch]) -> None:
    """Start writing the pages of these stretches that are not on the disk, and drop the other pages from memory."""
    if not hasattr(os, "posix_fadvise"):
        return
    for descriptor, begin, end in stretches:
        with suppress(OSError):  # it is only advice
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)
