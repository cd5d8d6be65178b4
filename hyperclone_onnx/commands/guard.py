"""What surrounds every command: errors and signals end it with one line on stderr and an exit code."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import wraps
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any, NoReturn

import click

from hyperclone_onnx.errors import INTERRUPTED, INTERRUPTED_EXIT_CODE, HypercloneError, printable
from hyperclone_onnx.publishing import publication
from hyperclone_onnx.system import runtimes
from hyperclone_onnx.system.signals import STOPPING

DEBUG = "HYPERCLONE_DEBUG"
"""With this environment variable set, an unexpected error is shown with its traceback."""


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Make every error of a command one line on stderr and an exit code.

    An error of our own (`HypercloneError`) has its exit code and a text that is complete. Every other exception is a
    defect of this program: the line says so, and how to report it.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        global _ending
        _begin()
        try:
            if (warning := runtimes.warning(runtimes.runtimes())) is not None:
                click.echo(f"warning: {warning}", err=True)
            result = command(*args, **kwargs)
            _ending = True
            return result
        except HypercloneError as problem:
            _fail(str(problem), problem.exit_code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _fail(INTERRUPTED, INTERRUPTED_EXIT_CODE)
        except BrokenPipeError:
            raise SystemExit(1) from None
        except OSError as problem:
            _raise_in_debug_mode()
            place = f"{problem.filename}: " if problem.filename else ""
            _fail(f"{published('but ')}{place}the system reports an error ({problem.strerror or problem})", 2)
        except (MemoryError, OverflowError):
            _raise_in_debug_mode()
            _fail("this needs more memory than there is: ask for a smaller factor", 3)
        except Exception as problem:
            _raise_in_debug_mode()
            _fail(_defect(problem), 3)

    return run


def published(then: str) -> str:
    """The words that say that OUT is written, for a message that goes on with `then`; no words where it is not."""
    out = publication.finished()
    return "" if out is None else f"{out} is written and complete, {then}"


def _defect(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    reason = f"{type(problem).__name__}: {lines[0] if lines else ''}"
    written = "" if publication.finished() else "; nothing was written"
    return (
        f"{published('but ')}this model met a defect of hyperclone-onnx ({reason}){written}. "
        f"Please report it, with the traceback that {DEBUG}=1 shows"
    )


def _raise_in_debug_mode() -> None:
    """Let the exception that is being handled out, with its traceback, where the user asked for that."""
    if os.environ.get(DEBUG):
        raise


# -- signals ----------------------------------------------------------------------------------------------

_ending = False
"""Whether the command is done, or an error ends it: a signal is then too late."""

_interrupted = False
"""Whether a signal asked the command to stop."""


def _begin() -> None:
    global _ending, _interrupted
    _ending = _interrupted = False
    publication.forget()
    sys.unraisablehook = _unraisable
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, or a shell, asked to ignore it
            signal.signal(number, _stop)


def _fail(message: str, code: int) -> NoReturn:
    global _ending
    _ending = True
    if _interrupted:  # an import or a library may have caught the interrupt and raised an error of its own
        message, code = INTERRUPTED, INTERRUPTED_EXIT_CODE
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    raise SystemExit(code)


class _Interrupt(KeyboardInterrupt):
    """The exception that a signal raises.

    KeyboardInterrupt itself would not do: where it passes through `exec`, as in an import that makes dataclasses,
    CPython ends by SIGINT and ignores the exit code that we ask for.
    """


def _stop(_number: int, frame: FrameType | None) -> None:
    """End the command, unless it ends already or has published its result: that is then reported."""
    global _interrupted
    if not _ending and publication.finished() is None:
        _interrupted = True
        while frame is not None:
            if _loses_exceptions(frame):
                return _interrupt_soon()
            frame = frame.f_back
        raise _Interrupt


def _loses_exceptions(frame: FrameType) -> bool:
    """Whether an exception raised in this frame would be lost or would abort the process.

    The hook below loses it. A C++ module that is being imported aborts.
    """
    return frame.f_code is _unraisable.__code__ or isinstance(frame.f_locals.get("self"), ExtensionFileLoader)


def _unraisable(problem: sys.UnraisableHookArgs) -> None:
    """Interrupt once more where an interrupt was lost, as in a finalizer, which lets no exception out."""
    if issubclass(problem.exc_type, KeyboardInterrupt):
        _interrupt_soon()
    else:
        sys.__unraisablehook__(problem)


def _interrupt_soon() -> None:
    def interrupt() -> None:
        time.sleep(0.001)
        _thread.interrupt_main()

    _thread.start_new_thread(interrupt, ())
