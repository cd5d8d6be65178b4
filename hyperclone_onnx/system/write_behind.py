"""Large files leave the page cache as they are written: the disk begins at once, and the memory is used again.

Left to itself the system collects gigabytes of written pages before it begins to write, then makes every writer wait,
and by then has given the files memory that others had, or that it first had to clear. So each stretch is sent to the
disk soon after it was written, by a thread that waits in the writers' place, and is forgotten when it has had time to
arrive. A disk that cannot follow costs nothing: what has not arrived is not forgotten, and stays with the system.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from hyperclone_onnx.system.page_cache import BATCH, Stretch, Stretches, forget

WINDOW = 256 << 20
"""So many bytes may be on their way before the first of them are forgotten."""


class WriteBehind:
    """Sends what is written to the disk, and forgets it, in a thread of its own that ends with the block.

    Args:
        size: the bytes that will be written; for less than the window there is nothing to do.
    """

    def __init__(self, size: int) -> None:
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
        """What is still to do is the system's own business. Afterwards the files may be closed."""
        if self._thread is None:
            return
        with self._changed:
            self._ended = True
            self._changed.notify()
        interrupted: BaseException | None = None
        while not self._left.is_set():  # Thread.join takes a thread for ended when a signal interrupts it (bpo-45274)
            try:
                self._left.wait()
            except BaseException as problem:
                interrupted = problem
        if interrupted is not None:
            raise interrupted

    def wrote(self, descriptor: int, begin: int, size: int) -> None:
        """Say that some bytes were written; not in several threads at once."""
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
                forget(sent.popleft())
