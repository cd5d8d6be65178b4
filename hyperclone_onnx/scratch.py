"""Working arrays that are used again: asking the system for fresh pages costs more than the arithmetic on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Scratch:
    """Named working arrays of one thread. An array is valid until its name is asked for again."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def array(self, name: str, shape: Sequence[int], dtype: Any) -> Array:
        """An array of undefined content."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, dtype=np.uint8)
        array: Array = held[:size].view(kind).reshape(shape)
        return array
