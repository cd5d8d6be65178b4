"""Work on many tensors, shared out among copies of this process.

Threads would not do: numpy lets go of the interpreter for microseconds at a time, so that two threads that compute
mostly wait for one another, and are no faster than one (docs/benchmarks.md).
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
"""Fewer bytes are worked on by this process alone, unless otherwise asked: a copy of it takes 10 ms to make."""

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")


def workers_for(size: int, wanted: int | None = None) -> int:
    """How many processes work on so many bytes: by default one for each of up to four cores, or one where it is little.

    One, which is this process, where processes cannot be copied.
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
    """Call a function on each of some arguments.

    Args:
        make: makes the function, in each process; what that takes and gives is pickled.
        arguments: are given out in order, one at a time to each process.
        workers: how many processes, see `workers_for`; with one it is this one.
        done: is told each answer, in this process, as they come.

    Raises:
        CannotWrite: a copy was ended, or none can be made.
        Exception: the first that the function raises; no copy goes on then.
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
            with deferred_signals():  # an interrupt within a fork goes nowhere
                copies.append(Isolated(make))
            copies[-1].ask(argument)
            busy.add(copies[-1])
        while busy:
            numbers = wait([each.fileno() for each in busy])
            for ready in [each for each in busy if each.fileno() in numbers]:
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
        for each in copies:
            each.end()
