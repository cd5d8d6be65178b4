"""Signs and short texts that several pages use."""

from __future__ import annotations

from collections.abc import Sequence

TIMES = "\N{MULTIPLICATION SIGN}"

NO_NUMBER = "\N{EN DASH}"
"""A cell without a number."""


def shape_text(shape: Sequence[int]) -> str:
    """The shape of a tensor.

    >>> shape_text((2, 3)).replace(TIMES, "x"), shape_text(())
    ('2 x 3', 'single')
    """
    return f" {TIMES} ".join(map(str, shape)) or "single"


def sentence(text: str) -> str:
    """The text with a capital at the beginning and a full stop at the end.

    >>> sentence("all layers differ")
    'All layers differ.'
    """
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') or not text else '.'}"
