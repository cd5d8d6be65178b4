"""The numbers of layers in names. A name's number is told by comparing what matches in successive layers.

``h.0.mlp.weight``, ``h.1.mlp.weight``, ``h.2.mlp.weight`` differ in one number, which runs with the layers. Names that
differ in another way (``onnx::MatMul_312``, ``onnx::MatMul_355``) have no number of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Numbered:
    """The names of what matches in the units of a stack.

    >>> Numbered("h.", ".mlp", 0, 1).name(3)
    'h.3.mlp'
    """

    before: str
    after: str
    base: int
    step: int

    def name(self, unit: int) -> str:
        """The name in a unit."""
        return f"{self.before}{self.base + self.step * unit}{self.after}"


def numbered(names: Sequence[str]) -> Numbered | None:
    """The form of names that differ in one number which runs evenly; None for others.

    >>> numbered(["h.0.mlp", "h.1.mlp"])
    Numbered(before='h.', after='.mlp', base=0, step=1)
    >>> numbered(["q", "k"]), numbered(["a.1.b.5", "a.2.b.4"]), numbered(["a.0", "a.1", "a.3"])
    (None, None, None)
    """
    pieces = [_DIGITS.split(name) for name in names]
    if len(names) < 2 or len({tuple(piece[::2]) for piece in pieces}) > 1:
        return None
    numbers = [[int(number) for number in piece[1::2]] for piece in pieces]
    running = [place for place in range(len(numbers[0])) if len({row[place] for row in numbers}) > 1]
    if len(running) != 1:
        return None
    (place,) = running
    column = [row[place] for row in numbers]
    step = column[1] - column[0]
    if step < 1 or any(number != column[0] + step * unit for unit, number in enumerate(column)):
        return None
    parts = pieces[0]
    if any(str(number) != piece[2 * place + 1] for number, piece in zip(column, pieces, strict=True)):
        return None  # 01, 02: another way of writing
    return Numbered("".join(parts[: 2 * place + 1]), "".join(parts[2 * place + 2 :]), column[0], step)


def count_numbered(units: Sequence[Sequence[str]], step: int) -> int:
    """How many of the names that match in all units have a number that grows by `step` from unit to unit.

    >>> count_numbered([["h.0.up", "MatMul_12"], ["h.1.up", "MatMul_57"]], 1)
    1
    """
    forms = map(numbered, zip(*units, strict=True))
    return sum(1 for form in forms if form is not None and form.step == step)
