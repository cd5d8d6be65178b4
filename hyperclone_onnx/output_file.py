"""A file that several threads write at places of their own, past the system's page cache where the disk decides anyway.

What goes through the cache costs the processor a page taken and a copy for every page written, and beyond a share of
the memory the system makes the writer wait for the disk all the same. So what is too large for that share goes to the
disk directly (O_DIRECT), as long as the disk keeps up; everything else, and everything where that is not possible, goes
through the cache. The bytes are the same.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.memory import free_memory
from hyperclone_onnx.positioned import BINARY, write_at
from hyperclone_onnx.scratch import PAGE, Scratch

Bytes = npt.NDArray[np.uint8]

CACHED_SHARE = 5
"""The system lets a writer wait when this part of the free memory is yet to be written (vm.dirty_ratio: 20 %)."""

SECTOR = 512
"""What is written directly begins at a multiple of this in memory; in the file it is whole pages."""

SHORT = 1 << 16
"""Fewer bytes than this are not worth a call to the disk."""

TRIAL = 1 << 28
"""After so many bytes the disk is judged."""

SLOW = 5e8
"""Bytes a second: a disk that takes fewer is better written behind, by the system."""

EDGES = 1 << 20
"""Bytes that do not fill pages are collected until there are so many: writing them stops the others."""

_UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}


def straight(size: int) -> bool:
    """Whether files of so many bytes in all should go to the disk directly."""
    free = free_memory()
    return free is not None and size > free // CACHED_SHARE


class OutputFile:
    """A file to be written, with space for all of it.

    Args:
        path: the file; one that exists is emptied.
        size: its bytes; they are taken at once, so that a full disk is told before anything is written.
        direct: write past the page cache, where the system can.
        writers: the number of threads that write.

    Raises:
        OSError: it cannot be made, or there is too little space.
    """

    def __init__(self, path: Path, size: int, *, direct: bool = False, writers: int = 1) -> None:
        self._cached = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
        self._direct: int | None = None
        self._keeps_up = True
        self._writers = writers
        self._edges: list[tuple[int, bytes]] = []
        self._collected = 0
        self._written, self._seconds = 0, 0.0
        self._lock = threading.Lock()
        try:
            _reserve(self._cached, size)
            if direct and hasattr(os, "O_DIRECT"):
                self._direct = _opened_directly(path)
        except BaseException:
            self.close()
            raise

    @property
    def is_direct(self) -> bool:
        """Whether what is written from now on goes past the page cache."""
        return self._direct is not None and self._keeps_up

    def write(self, data: Bytes, offset: int, scratch: Scratch) -> None:
        """Write bytes at an offset; no two writes overlap.

        Raises:
            OSError: they cannot be written.
        """
        direct = self._direct
        if direct is None or not self._keeps_up:
            write_at(self._cached, data.data, offset)
            return
        head = min(-offset % PAGE, data.size)
        end = head + (data.size - head) // PAGE * PAGE
        if end - head < SHORT:
            self._write_later([(offset, data)])
            return
        pages = data[head:end]
        if pages.ctypes.data % SECTOR:
            aligned = scratch.array("aligned", pages.shape, np.uint8)
            np.copyto(aligned, pages)
            pages = aligned
        self._write_pages(direct, pages, offset + head)
        self._write_later([(offset, data[:head]), (offset + end, data[end:])])

    def finish(self) -> None:
        """Write what was held back.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            edges, self._edges, self._collected = self._edges, [], 0
        for offset, data in edges:
            write_at(self._cached, memoryview(data), offset)

    def close(self) -> None:
        """Give the descriptors back."""
        direct, self._direct = self._direct, None
        os.close(self._cached)
        if direct is not None:
            os.close(direct)

    def _write_pages(self, direct: int, pages: Bytes, offset: int) -> None:
        """Write whole pages directly, or through the cache from then on if the disk cannot or is slow."""
        begin = time.perf_counter()
        try:
            write_at(direct, pages.data, offset)
        except OSError as problem:
            if problem.errno not in _UNSUPPORTED:
                raise
            self._keeps_up = False
            write_at(self._cached, pages.data, offset)
            return
        seconds = time.perf_counter() - begin
        with self._lock:
            self._written += pages.size
            self._seconds += seconds / self._writers
            slow = TRIAL < self._written < SLOW * self._seconds
        if slow:
            self._keeps_up = False

    def _write_later(self, edges: list[tuple[int, Bytes]]) -> None:
        with self._lock:
            self._edges += [(offset, data.tobytes()) for offset, data in edges if data.size]
            self._collected += sum(data.size for _, data in edges)
            full = self._collected > EDGES
        if full:
            self.finish()


def _opened_directly(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | BINARY)
    except OSError as problem:
        if problem.errno in _UNSUPPORTED:
            return None
        raise


def _reserve(descriptor: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as problem:
            if problem.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                raise
    os.ftruncate(descriptor, size)
