"""Where the command begins.

From its first line on Ctrl-C ends the command with one line on stderr, also during the half second in which Python
imports what the command needs.
"""

from __future__ import annotations

import gc
import os
import signal

from hyperclone_onnx.errors import INTERRUPTED, INTERRUPTED_EXIT_CODE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType


def main(name: str | None = None) -> None:
    """Run the command; `name` is what its messages call it."""
    stopping = listen()
    from hyperclone_onnx.system.lazy_modules import defer

    defer()
    from hyperclone_onnx.commands.main import main as command

    try:
        command(prog_name=name)
    finally:
        # As Python ends, it gives these signals their default action back, which kills: a command that has written its
        # result would then end with the exit code of a failure.
        for number in stopping:
            signal.signal(number, signal.SIG_IGN)
        # Python would first look for garbage among the million objects of a large graph.
        gc.freeze()


def listen() -> list[signal.Signals]:
    """Let the signals that stop a command end this process at once; returns those signals.

    A signal that the process was started to ignore (as nohup does) stays ignored.
    """
    known = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    stopping = [number for number in known if number is not None and signal.getsignal(number) != signal.SIG_IGN]
    for number in stopping:
        signal.signal(number, _leave)
    return stopping


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End at once: an import may catch an exception, or turn it into another one."""
    try:
        os.write(2, f"error: {INTERRUPTED}\n".encode())
    finally:
        os._exit(INTERRUPTED_EXIT_CODE)
