"""Sharing work on many tensors out among copies of this process.

Threads would not be faster: numpy releases the interpreter's lock for microseconds at a time, so that two threads which
compute mostly wait for one another (docs/benchmarks.md).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from hyperclone_onnx.errors import CannotWrite
from hyperclone_onnx.system import isolation
from hyperclone_onnx.system.isolation import BrokenDown, Isolated
from hyperclone_onnx.system.signals import deferred_signals

SMALL = 64 << 20
"""By default this process alone works on fewer bytes than this: to make a copy of it takes 10 ms."""

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")


def workers_for(size: int, wanted: int | None = None) -> int:
    """The number of processes for work on so many bytes: `wanted`, or by default the number of cores, at most four.

    It is one, this process, where there is little work, and where processes cannot be copied.
    """
    if not isolation.POSSIBLE:
        return 1
    if wanted is not None:
        return max(1, wanted)
    return min(4, _cores()) if size >= SMALL else 1


def _cores() -> int:
    with suppress(AttributeError, OSError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_out(
    make: Callable[[], Callable[[Argument], Answer]],
    arguments: Sequence[Argument],
    workers: int,
    done: Callable[[Answer], None],
) -> None:
    """Call a function on every argument, in several processes.

    Args:
        make: makes the function, in each process. The function's arguments and answers are pickled.
        arguments: are given out in order; a process gets the next one when it has answered.
        workers: the number of processes, see `workers_for`. With one, this process does the work.
        done: called in this process with every answer, in the order in which they come.

    Raises:
        CannotWrite: a copy has ended, or none can be made.
        Exception: the first exception that the function raises; all copies are ended then.
    """
    if workers < 2:
        function = make()
        for argument in arguments:
            done(function(argument))
        return
    from multiprocessing.connection import wait

    waiting = iter(arguments)
    copies: list[Isolated] = []
    busy: set[Isolated] = set()
    try:
        for argument in itertools.islice(waiting, workers):
            with deferred_signals():  # Python would ignore an exception that a signal raises within a fork
                copies.append(Isolated(make))
            copies[-1].ask(argument)
            busy.add(copies[-1])
        while busy:
            readable = wait([copy.fileno() for copy in busy])
            for ready in [copy for copy in busy if copy.fileno() in readable]:
                done(ready.answer())
                busy.discard(ready)
                for argument in itertools.islice(waiting, 1):
                    ready.ask(argument)
                    busy.add(ready)
    except BrokenDown as problem:
        raise CannotWrite(
            f"a copy of this process was lost: {problem}; is memory short? --workers 1 makes none"
        ) from problem
    finally:
        for copy in copies:
            copy.end()
