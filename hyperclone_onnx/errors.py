"""The errors that this package raises on purpose. The class of an error decides the exit code of the command."""

from __future__ import annotations

INTERRUPTED = "interrupted; nothing was written"
"""The last line that a command prints when a signal ends it."""

INTERRUPTED_EXIT_CODE = 130
"""The exit code of such a command: 128 + the number of SIGINT, as in shells."""


class HypercloneError(Exception):
    """The base class of all errors. The text says what is wrong, where and why, and what the user can do."""

    exit_code = 1


class ModelsDiffer(HypercloneError):
    """The grown model does not compute the same as its source."""

    exit_code = 1


class BadRequest(HypercloneError):
    """The command or the call is wrong: an unknown role, a factor below 1, an output inside the input."""

    exit_code = 2


class CannotWrite(HypercloneError):
    """The output cannot be written: no folder, no permission, no space."""

    exit_code = 2


class Refused(HypercloneError):
    """The model cannot grow in the requested way. The text names the nodes that prevent it."""

    exit_code = 3


class NothingGrows(Refused):
    """No weight of the model may grow: it has no weights, or no activation is contracted with one."""


class BadModel(HypercloneError):
    """The input is not a readable, complete ONNX model."""

    exit_code = 4


def printable(text: str) -> str:
    r"""A text in which all characters that are not printable are escaped.

    Names in a model may contain any characters, also those that end a line or control a terminal.

    >>> printable("weight\x1b[2J")
    'weight\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(problem: object, most: int = 200) -> str:
    """The first line of an exception's text, cut to `most` characters; its class name if the text is empty."""
    lines = str(problem).strip().splitlines()
    return lines[0][:most] if lines else type(problem).__name__


def one_line(problem: object, most: int = 300) -> str:
    r"""The text of an exception in one line, cut to `most` characters; its class name if the text is empty.

    >>> one_line("the settings are wrong:\n    96 is no multiple of 7\n")
    'the settings are wrong: 96 is no multiple of 7'
    """
    return " ".join(str(problem).split())[:most] or type(problem).__name__


def in_bytes(count: int) -> str:
    """A number of bytes for people.

    >>> in_bytes(999), in_bytes(13_250_000), in_bytes(2 * 10**9)
    ('999 bytes', '13.2 MB', '2.0 GB')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
