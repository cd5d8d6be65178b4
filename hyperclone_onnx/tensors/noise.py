"""Normal noise of which any window can be drawn by itself, at about the speed of memory.

The generator is counter-based: a number depends only on the seed, the name of the tensor, the number of the repeat and
its place in the tensor. So the noise is the same in whatever order, in whatever parts and with however many workers it
is drawn.

SplitMix64's mixing function (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014) turns
key + place * golden ratio into 64 bits. Each 16 of these bits choose one of 65,536 quantiles of the normal
distribution. So the noise has 65,536 different values, all equally probable, and none beyond 4.3 standard deviations.
It is computed from integers and one table, and is therefore the same on every machine.
"""

from __future__ import annotations

import hashlib
import math
import threading
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.tensors.scratch import Scratch

Array = npt.NDArray[Any]
LEVELS = 1 << 16
"""The number of quantiles in the table."""
LANES = 4
"""The numbers that are drawn from one word of 64 bits."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_MASK = (1 << 64) - 1
_table_lock = threading.Lock()


def key_of(tensor: str, seed: int, repeat: int) -> int:
    """The key of 64 bits that decides the noise of one repeat of one tensor."""
    text = f"{tensor}\0{seed}\0{repeat}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@lru_cache(maxsize=1)
def _quantiles() -> npt.NDArray[np.float32]:
    """The quantiles of the normal distribution at (i + 1/2) / 65,536, scaled so that their variance is one."""
    inverse = NormalDist().inv_cdf
    exact = [inverse(0.5 + (i + 0.5) / LEVELS) for i in range(LEVELS // 2)]
    upper = np.array(exact) / math.sqrt(math.fsum(quantile * quantile for quantile in exact) / len(exact))
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)


def quantiles() -> npt.NDArray[np.float32]:
    """The table of quantiles, shape (LEVELS,), in ascending order. The first call computes it."""
    with _table_lock:
        return _quantiles()


def draw(
    key: int,
    width: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    scratch: Scratch,
    table: Array | None = None,
    name: str = "noise.drawn",
) -> Array:
    """Draw normal numbers for a window of a matrix that has `width` columns.

    Args:
        key: the key of the noise, from `key_of`.
        width: the number of columns of the whole matrix. Places are numbered row by row.
        rows: the first row of the window, and the number of its rows.
        columns: the first column of the window, and the number of its columns.
        scratch: holds the working arrays.
        table: the quantiles to choose from, already scaled. By default `quantiles()`, with standard deviation one.
        name: the name of the working array that receives the numbers.

    Returns:
        An array of shape (number of rows, number of columns) and of the type of `table`. It is a view of a working
        array, valid until that array's name is used again.
    """
    (top, height), (left, breadth) = rows, columns
    table = quantiles() if table is None else table
    stride = -(-width // LANES)
    first, last = left // LANES, -(-(left + breadth) // LANES)
    words = last - first
    state = scratch.array("noise.words", (height, words), np.uint64)
    shifted = scratch.array("noise.other", (height, words), np.uint64)
    start = (key + (top * stride + first) * _GOLDEN) & _MASK
    down = np.arange(height, dtype=np.uint64) * np.uint64(stride * _GOLDEN & _MASK)
    across = np.arange(words, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(start)
    np.add(down[:, None], across[None, :], out=state)
    for shift, factor in zip((30, 27), _MIX, strict=True):
        np.right_shift(state, np.uint64(shift), out=shifted)
        np.bitwise_xor(state, shifted, out=state)
        np.multiply(state, factor, out=state)
    np.right_shift(state, np.uint64(31), out=shifted)
    np.bitwise_xor(state, shifted, out=state)
    lanes = state.astype("<u8", copy=False).view("<u2").reshape(height, words * LANES)
    places = scratch.array("noise.places", lanes.shape, np.intp)
    np.copyto(places, lanes)
    drawn = scratch.array(name, lanes.shape, table.dtype)
    np.take(table, places, out=drawn, mode="clip")
    skip = left - first * LANES
    return drawn[:, skip : skip + breadth]
