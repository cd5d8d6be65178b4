"""Numbers of a few bits packed in bytes: from the lowest bits on, each row padded to whole bytes.

This is how ONNX Runtime's block-quantised operators store zero points (com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def packed_width(width: int, bits: int) -> int:
    """The bytes that a row of `width` numbers takes."""
    return -(-width * bits // 8)


def unpack(packed: npt.NDArray[Any], shape: Sequence[int], bits: int) -> Bytes:
    """The numbers, of shape `shape`, that are packed along their last axis.

    >>> unpack(np.array([0x21, 0x03], np.uint8), (1, 3), 4).tolist()
    [[1, 2, 3]]
    """
    *rows, width = shape
    flat = np.ascontiguousarray(packed).view(np.uint8).reshape(-1, packed_width(width, bits))
    each_bit = np.unpackbits(flat, axis=1, bitorder="little")[:, : width * bits].reshape(-1, width, bits)
    return np.packbits(each_bit, axis=2, bitorder="little").reshape(*rows, width)


def pack(numbers: npt.NDArray[Any], bits: int) -> Bytes:
    """Numbers packed along their last axis, the inverse of `unpack`.

    >>> [hex(n) for n in pack(np.array([[1, 2, 3]], np.uint8), 4).ravel()]
    ['0x21', '0x3']
    """
    *rows, width = numbers.shape
    flat = np.ascontiguousarray(numbers, dtype=np.uint8).reshape(-1, width, 1)
    each_bit = np.unpackbits(flat, axis=2, bitorder="little")[:, :, :bits].reshape(-1, width * bits)
    return np.packbits(each_bit, axis=1, bitorder="little").reshape(*rows, packed_width(width, bits))
