"""Packs numbers of a few bits into bytes: the first number takes the lowest bits, and each row fills whole bytes.

ONNX Runtime's operators of block-quantised weights store zero points in this way (com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def packed_width(width: int, bits: int) -> int:
    """The number of bytes that a row of `width` numbers takes."""
    return -(-width * bits // 8)


def unpack(packed: npt.NDArray[Any], shape: Sequence[int], bits: int) -> Bytes:
    """Unpack numbers that are packed along their last axis.

    Args:
        packed: the bytes of the rows, in any shape.
        shape: the shape of the numbers.
        bits: the number of bits of a number, at most 8.

    Returns:
        One number to a byte, of shape `shape`.

    >>> unpack(np.array([0x21, 0x03], np.uint8), (1, 3), 4).tolist()
    [[1, 2, 3]]
    """
    *rows, width = shape
    flat = np.ascontiguousarray(packed).view(np.uint8).reshape(-1, packed_width(width, bits))
    digits = np.unpackbits(flat, axis=1, bitorder="little")[:, : width * bits].reshape(-1, width, bits)
    return np.packbits(digits, axis=2, bitorder="little").reshape(*rows, width)


def pack(numbers: npt.NDArray[Any], bits: int) -> Bytes:
    """Pack numbers along their last axis: the inverse of `unpack`.

    Returns:
        Bytes of shape (*rows, packed_width(width, bits)), where `numbers` has shape (*rows, width).

    >>> [hex(n) for n in pack(np.array([[1, 2, 3]], np.uint8), 4).ravel()]
    ['0x21', '0x3']
    """
    *rows, width = numbers.shape
    flat = np.ascontiguousarray(numbers, dtype=np.uint8).reshape(-1, width, 1)
    digits = np.unpackbits(flat, axis=2, bitorder="little")[:, :, :bits].reshape(-1, width * bits)
    return np.packbits(digits, axis=1, bitorder="little").reshape(*rows, packed_width(width, bits))
