"""Working arrays that are used again, because fresh memory from the system costs more time than the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PAGE = 4096
"""Working arrays begin at multiples of this number of bytes, so that a file receives whole pages from whole pages."""


class Scratch:
    """Named working arrays of one thread. An array is valid until its name is used again."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def array(self, name: str, shape: Sequence[int], dtype: Any) -> Array:
        """A working array with undefined content, of the given shape and numpy type."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        held = self._held.get(name)
        if held is None or held.size < size:
            room = np.empty(size + PAGE, dtype=np.uint8)
            begin = -room.ctypes.data % PAGE
            held = self._held[name] = room[begin : begin + size]
        array: Array = held[:size].view(kind).reshape(shape)
        return array
