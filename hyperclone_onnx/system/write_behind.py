"""Large files leave the page cache while they are written: the disk begins at once, and the memory is used again.

Without this the system collects gigabytes of written pages before it begins to write. It takes the memory for them
from other programs, or has to clear it first, and then makes every writer wait. So a thread asks the system to write
each stretch soon after it was made, and to drop its pages from memory some time later. Pages that are not on the disk
by then stay. Whether this is faster depends on the disk and on the memory: docs/benchmarks.md has figures for both.

Where the system holds all that is written, nobody has to wait, and sending it only costs time: see `most_unwritten`.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

from hyperclone_onnx.system.memory import free_memory
from hyperclone_onnx.system.page_cache import BATCH, Stretch, Stretches, forget

WINDOW = 256 << 20
"""A stretch is forgotten when this many bytes were sent to the disk after it."""

_SETTINGS = Path("/proc/sys/vm")


def most_unwritten() -> int:
    """The bytes of written pages that the system holds before writers have to wait for the disk; 0 if it does not say.

    See dirty_bytes and dirty_ratio in the documentation of Linux (admin-guide/sysctl/vm).
    """
    with suppress(OSError, ValueError):
        in_bytes, percent = (int((_SETTINGS / name).read_text()) for name in ("dirty_bytes", "dirty_ratio"))
        return in_bytes or (free_memory() or 0) * percent // 100
    return 0


class WriteBehind:
    """Sends written stretches to the disk, and forgets them, in a thread of its own that ends with the block.

    Args:
        size: the bytes that will be written. For less than the window there is no thread and nothing is sent.
        keep: whether the pages stay in memory, because the file is read next.
    """

    def __init__(self, size: int, *, keep: bool = False) -> None:
        self._keep = keep
        self._stretches = Stretches()
        self._changed = threading.Condition()
        self._waiting: deque[list[Stretch]] = deque()
        self._ended = False
        self._left = threading.Event()
        self._thread: threading.Thread | None = None
        if size > WINDOW and hasattr(os, "posix_fadvise"):
            self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> WriteBehind:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until the thread uses no file any more. The rest of the stretches is left to the system."""
        if self._thread is None:
            return
        with self._changed:
            self._ended = True
            self._changed.notify()
        interrupted: BaseException | None = None
        while not self._left.is_set():  # Thread.join, interrupted by a signal, believes that the thread has ended
            try:
                self._left.wait()
            except BaseException as problem:
                interrupted = problem
        if interrupted is not None:
            raise interrupted

    def wrote(self, descriptor: int, begin: int, size: int) -> None:
        """Report that some bytes were written; from one thread at a time."""
        batch = self._stretches.add(descriptor, begin, size) if self._thread is not None else []
        if batch:
            with self._changed:
                self._waiting.append(batch)
                self._changed.notify()

    def _work(self) -> None:
        try:
            self._send()
        finally:
            self._left.set()

    def _send(self) -> None:
        sent: deque[list[Stretch]] = deque()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._waiting)
                if self._ended:
                    return
                batch = self._waiting.popleft()
            forget(batch)
            sent.append(batch)
            if len(sent) * BATCH > WINDOW:
                oldest = sent.popleft()
                if not self._keep:
                    forget(oldest)
