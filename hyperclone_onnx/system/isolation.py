"""Work that may end its process, done in a copy of this one: ONNX's inference and ONNX Runtime abort on some graphs."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hyperclone_onnx.errors import first_line
from hyperclone_onnx.system.signals import STOPPING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

POSSIBLE = hasattr(os, "fork")
"""Whether a process can be copied here."""

_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h


class BrokenDown(Exception):
    """The copy was ended, or did not answer; the text says how."""


class Isolated:
    """A function that a copy of this process makes and runs, for as long as this object lives.

    A signal that stops the command stops it too, at once, while a C++ library in this process would let no signal
    through before it returns.

    Args:
        make: makes the function, in the copy. What that takes and gives is pickled.
        patience: seconds that each answer may take; without end by default.

    Raises:
        BrokenDown: the copy was ended by `make`, or `make` does not come to an end.
        Exception: whatever `make` raises.
    """

    def __init__(self, make: Callable[[], Callable[[Any], Any]], patience: float | None = None) -> None:
        from multiprocessing.connection import Pipe

        self._patience, self._broken = patience, ""
        self._own, theirs = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other threads: the copy does not need them
            child = os.fork()
        if child == 0:
            try:
                self._own.close()
                _serve(theirs, make)
            finally:
                os._exit(1)
        theirs.close()
        self._end = weakref.finalize(self, _end, os.getpid(), child, self._own)
        self.answer()

    def __call__(self, argument: Any) -> Any:
        """What the function makes of an argument.

        Raises:
            BrokenDown: the copy was ended, now or by an earlier call, or does not answer.
            Exception: whatever the function raises.
        """
        self.ask(argument)
        return self.answer()

    def ask(self, argument: Any) -> None:
        """Give an argument to the function; `answer` waits for what it makes of it.

        Raises:
            BrokenDown: the copy was ended by an earlier call.
        """
        if self._broken:
            raise BrokenDown(self._broken)
        with suppress(ConnectionError):  # who reads no more has left an answer, or has ended
            self._own.send(argument)

    def answer(self) -> Any:
        """Wait for what the function makes of the argument last asked; raises what a call does."""
        try:
            if not self._own.poll(self._patience):
                self._broken = f"it does not come to an end within {self._patience:.0f} s"
                raise BrokenDown(self._broken)
            problem, answer = self._own.recv()
        except (EOFError, ConnectionError):
            self._broken = f"it ended by {self._end()}"
            raise BrokenDown(self._broken) from None
        except BaseException:
            self._broken = self._broken or "it was ended"
            self._end()
            raise
        if problem is not None:
            raise problem
        return answer

    def end(self) -> None:
        """End the copy, whatever it is doing."""
        self._broken = self._broken or "it was ended"
        self._end()

    def fileno(self) -> int:
        """What can be read from when there is an answer."""
        return self._own.fileno()


def _end(owner: int, child: int, pipe: Connection) -> str:
    """End a copy, unless it has ended; returns by which signal it did."""
    if os.getpid() != owner:  # another copy, which only knows of this one
        return ""
    pipe.close()
    done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return (
        signal.Signals(os.WTERMSIG(status)).name
        if os.WIFSIGNALED(status)
        else f"exit {os.waitstatus_to_exitcode(status)}"
    )


def _serve(pipe: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """What the copy does: answer until nobody asks."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # the first process ends this one
    if sys.platform == "linux":  # also where it is killed
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    # A user learns of a crash here from the first process, in one line: neither a library's last words nor Python's
    # traceback of every thread is to be seen. Python may write the latter to a copy of stderr, as pytest asks it to.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    faulthandler.disable()
    try:
        function = make()
    except Exception as problem:
        _reply(pipe, (problem, None))
        os._exit(0)
    _reply(pipe, (None, None))
    while True:
        try:
            argument = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            reply = (None, function(argument))
        except Exception as problem:
            _reply(pipe, (problem, None))
        else:
            _reply(pipe, reply)


def _reply(pipe: Connection, reply: tuple[Exception | None, Any]) -> None:
    try:
        pipe.send(reply)
    except OSError:
        os._exit(0)  # nobody asks any more
    except Exception as problem:
        pipe.send((RuntimeError(f"no answer can be given ({first_line(reply[0] or problem)})"), None))
