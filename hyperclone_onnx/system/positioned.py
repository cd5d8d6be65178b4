"""Reading and writing at an offset of a file, from any thread.

Where the system has no such call (Windows) one thread at a time moves the file's position.
"""

from __future__ import annotations

import os
import threading

BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags with which every file is opened."""

PIECE = 1 << 15
"""The most bytes that are written with one call; pieces end at multiples of it.

Linux fills its page cache with blocks of memory as large as a call's bytes. Up to this size it has free blocks at hand
that were used before. Larger ones it cuts from memory that was free for long, which a virtual machine may first have
to get from its host: then writing takes up to five times as long (docs/benchmarks.md).
"""

_one_at_a_time = threading.Lock()


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill memory with the bytes from an offset on; returns how many there were."""
    done = 0
    while done < len(into):
        got = _read_some(descriptor, into[done:], offset + done)
        if not got:
            break
        done += got
    return done


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of the bytes at an offset."""
    done, size, write = 0, len(data), getattr(os, "pwrite", _write_some)
    while done < size:
        place = offset + done
        done += write(descriptor, data[done : done + PIECE - place % PIECE], place)


def _read_some(descriptor: int, into: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], offset)
    with _one_at_a_time:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, min(len(into), 1 << 24))
    into[: len(data)] = data
    return len(data)


def _write_some(descriptor: int, data: memoryview, offset: int) -> int:
    with _one_at_a_time:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)
