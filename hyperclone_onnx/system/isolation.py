"""Running a function in a copy of this process: ONNX's inference and ONNX Runtime abort on some graphs.

The copy is a fork. So it has the graph and the plan already: nothing large is pickled, and it is there in 10 ms.
"""

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
    """The copy has ended, or does not answer; the text says how."""


class Isolated:
    """A function that a copy of this process makes and runs, for as long as this object lives.

    A signal that stops the command ends the copy at once. In this process a C++ library would not let the signal
    through until it returns.

    Args:
        make: makes the function, in the copy. The function's arguments and results are pickled.
        patience: the seconds that an answer may take; by default it may take for ever.

    Raises:
        BrokenDown: the copy ended while it ran `make`, or `make` does not come to an end.
        Exception: whatever `make` raises.
    """

    def __init__(self, make: Callable[[], Callable[[Any], Any]], patience: float | None = None) -> None:
        from multiprocessing.connection import Pipe

        self._patience, self._broken = patience, ""
        self._own, theirs = Pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that other threads are not copied: the copy does not need them
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
            BrokenDown: the copy has ended, now or in an earlier call, or does not answer.
            Exception: whatever the function raises.
        """
        self.ask(argument)
        return self.answer()

    def ask(self, argument: Any) -> None:
        """Give an argument to the function; `answer` then waits for the result.

        Raises:
            BrokenDown: the copy has ended in an earlier call.
        """
        if self._broken:
            raise BrokenDown(self._broken)
        with suppress(ConnectionError):  # the copy has ended: `answer` says so
            self._own.send(argument)

    def answer(self) -> Any:
        """Wait for the function's result; raises what a call raises."""
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
        """A descriptor that becomes readable when there is an answer."""
        return self._own.fileno()


def _end(owner: int, child: int, pipe: Connection) -> str:
    """End a copy, unless it has ended; returns by which signal, or with which exit code, it did."""
    if os.getpid() != owner:  # this process is itself a copy: the one to end is not its child
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
    """The work of the copy: answer until nobody asks any more."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # the first process hears them, and ends this one
    if sys.platform == "linux":  # if the first process is killed, the system ends this one
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
