"""Stretches of files that the system's page cache need not keep.

`posix_fadvise` with POSIX_FADV_DONTNEED starts writing what is dirty, and drops what is not (see its manual page); a
system without it goes without.
"""

from __future__ import annotations

import os
from contextlib import suppress

BATCH = 8 << 20
"""Stretches are given away so many bytes at a time."""

Stretch = tuple[int, int, int]
"""A file's descriptor, and the bytes [begin, end)."""


class Stretches:
    """Stretches of files, gathered until they are worth a call; for one thread at a time."""

    def __init__(self) -> None:
        self._found: list[Stretch] = []
        self._bytes = 0

    def add(self, descriptor: int, begin: int, size: int) -> list[Stretch]:
        """Add one; returns all of them, neighbours joined, when they are many, and begins anew."""
        self._found.append((descriptor, begin, begin + size))
        self._bytes += size
        if self._bytes < BATCH:
            return []
        found, self._found, self._bytes = self._found, [], 0
        return joined(found)


def joined(stretches: list[Stretch]) -> list[Stretch]:
    """The same bytes in as few stretches as can be.

    >>> joined([(3, 4, 8), (3, 0, 4), (3, 9, 12)])
    [(3, 0, 8), (3, 9, 12)]
    """
    found: list[Stretch] = []
    for descriptor, begin, end in sorted(stretches):
        if found and found[-1][0] == descriptor and found[-1][2] >= begin:
            found[-1] = (descriptor, found[-1][1], max(end, found[-1][2]))
        else:
            found.append((descriptor, begin, end))
    return found


def forget(stretches: list[Stretch]) -> None:
    """Start writing what is dirty in some stretches, and drop from the page cache what is not."""
    if not hasattr(os, "posix_fadvise"):
        return
    for descriptor, begin, end in stretches:
        with suppress(OSError):  # advice
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)
