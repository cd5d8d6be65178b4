"""How a long piece of work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Notify = Callable[[str], None]
"""Called with the name of each stage as it begins."""

Progress = Callable[[int, int], None]
"""Called with the number of bytes that are written, and the number of all bytes."""


def ignore_stage(_stage: str) -> None:
    """A `Notify` for callers who do not want to know."""
