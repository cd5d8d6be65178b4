"""The errors a user can meet, each with the exit code that it owns."""

from __future__ import annotations

INTERRUPTED = "interrupted; nothing was written"
"""The last line of a command that a signal ended."""

INTERRUPTED_EXIT_CODE = 130
"""Its exit code: 128 and the number of SIGINT, as shells count."""


class HypercloneError(Exception):
    """Base of every error this package raises on purpose. The text is complete: what, where, why, what to do."""

    exit_code = 1


class ModelsDiffer(HypercloneError):
    """The grown model does not compute what its source computes."""

    exit_code = 1


class BadRequest(HypercloneError):
    """The command or the call is wrong: an unknown role, a factor below 1, an output inside the input."""

    exit_code = 2


class CannotWrite(HypercloneError):
    """The output cannot be written: no folder, no permission, no space."""

    exit_code = 2


class Refused(HypercloneError):
    """This model or request cannot grow; the text names the nodes that forbid it."""

    exit_code = 3


class NothingGrows(Refused):
    """No weight of this model may grow: it has none, or none that an activation is contracted with."""


class BadModel(HypercloneError):
    """The input is not a readable, complete ONNX model."""

    exit_code = 4


def printable(text: str) -> str:
    r"""A text with what could steer a terminal, or end a line, written out: names in a model may hold anything.

    >>> printable("weight\x1b[2J")
    'weight\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(problem: object, most: int = 200) -> str:
    """The first line of what an exception says, no longer than `most` characters; its type where it says nothing."""
    lines = str(problem).strip().splitlines()
    return lines[0][:most] if lines else type(problem).__name__
