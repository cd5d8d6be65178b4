"""Where the command begins. From here on Ctrl-C ends it with one line, also while half a second of imports runs."""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

INTERRUPTED = "interrupted; nothing was written"
EXIT_CODE = 130


def main(name: str | None = None) -> None:
    """Run the command; `name` is what its messages call it."""
    stopping = listen()
    from hyperclone_onnx.system.lazy_modules import defer

    defer()
    from hyperclone_onnx.commands.cli import main as command

    try:
        command(prog_name=name)
    finally:
        # Python, as it ends, puts back what kills: a command that has written its result would end as if it had not.
        for number in stopping:
            signal.signal(number, signal.SIG_IGN)


def listen() -> list[signal.Signals]:
    """From now on the signals that stop a command end this one at once, in one line; returns those that do."""
    found = (getattr(signal, each, None) for each in ("SIGINT", "SIGTERM", "SIGHUP"))
    stopping = [
        each for each in found if each is not None and signal.getsignal(each) != signal.SIG_IGN
    ]  # nohup's stays
    for number in stopping:
        signal.signal(number, _leave)
    return stopping


def _leave(_number: int, _frame: FrameType | None) -> None:
    """End at once: an exception would come out of whatever is being imported, if it came out at all."""
    try:
        os.write(2, f"error: {INTERRUPTED}\n".encode())
    finally:
        os._exit(EXIT_CODE)
