"""Large numbers as people write them: 125M, 1.5B, 3e11."""

from __future__ import annotations

import re

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def number(text: str) -> float | None:
    """The positive number that a text stands for; None if it is none.

    >>> number("125M"), number("1.5B"), number("3e11"), number("57,344"), number("many")
    (125000000.0, 1500000000.0, 300000000000.0, 57344.0, None)
    """
    match = re.fullmatch(r"([0-9][0-9_,]*\.?[0-9]*(?:e\+?[0-9]{1,2})?)([kmbgt]?)", text.strip().lower())
    if match is None:
        return None
    value = float(re.sub("[_,]", "", match[1])) * UNITS[match[2]]
    return value if value > 0.0 else None


def written(value: float) -> str:
    """A number with three digits and a unit.

    >>> written(57_344), written(1.536e6), written(2.5e13), written(7.0), written(1.2e19)
    ('57.3 k', '1.54 M', '25 T', '7', '1.2e+19')
    """
    if value == float("inf"):
        return "never"
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= 1e16:
            break
        if value >= size:
            return f"{value / size:.3g}{unit}" if value < 999.5 * size else f"{value / size:.0f}{unit}"
    return f"{value:.3g}" if value < 999.5 or value >= 1e16 else f"{value:.0f}"
