"""Normal noise that any window of a tensor can be drawn of by itself, at about the speed of memory.

Counter-based: a number is a function of the seed, the tensor, the repeat and its place alone, so that it does not
matter who draws which part, in which order, with how many workers. 64 bits at a time come from SplitMix64's mixing
function (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014) of key + place * golden
ratio; each 16 of them choose one of 65,536 quantiles of the normal law. The law is thus normal in 65,536 steps of
equal weight, with nothing beyond 4.3 standard deviations; only integers and one table decide, on every machine alike.
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
LANES = 4
"""Draws out of one word."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_MASK = (1 << 64) - 1
_table_lock = threading.Lock()


def key_of(tensor: str, seed: int, repeat: int) -> int:
    """The 64 bits from which one repeat's noise on one tensor comes."""
    text = f"{tensor}\0{seed}\0{repeat}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@lru_cache(maxsize=1)
def _quantiles() -> npt.NDArray[np.float32]:
    """The normal quantiles at (i + 1/2) / 65,536, scaled to a variance of exactly one."""
    inverse = NormalDist().inv_cdf
    exact = [inverse(0.5 + (i + 0.5) / LEVELS) for i in range(LEVELS // 2)]
    upper = np.array(exact) / math.sqrt(math.fsum(each * each for each in exact) / len(exact))
    return np.concatenate([-upper[::-1], upper]).astype(np.float32)


def quantiles() -> npt.NDArray[np.float32]:
    """The table of quantiles, made on first use."""
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
    """Normal numbers for a window of a table of `width` columns.

    Args:
        key: from `key_of`.
        width: the columns of the whole table; places are numbered row by row.
        rows: the first row, and how many.
        columns: the first column, and how many.
        scratch: holds the working arrays.
        table: the quantiles to choose from, scaled; `quantiles` by default, of standard deviation one.
        name: the working array that the numbers are in.

    Returns:
        shape (rows, columns), of the table's type; a view of a working array, valid until the next call with its name.
    """
    (top, height), (left, breadth) = rows, columns
    table = quantiles() if table is None else table
    stride = -(-width // LANES)
    first, last = left // LANES, -(-(left + breadth) // LANES)
    words = last - first
    state = scratch.array("noise.words", (height, words), np.uint64)
    other = scratch.array("noise.other", (height, words), np.uint64)
    start = (key + (top * stride + first) * _GOLDEN) & _MASK
    down = np.arange(height, dtype=np.uint64) * np.uint64(stride * _GOLDEN & _MASK)
    across = np.arange(words, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(start)
    np.add(down[:, None], across[None, :], out=state)
    for shift, factor in zip((30, 27), _MIX, strict=True):
        np.right_shift(state, np.uint64(shift), out=other)
        np.bitwise_xor(state, other, out=state)
        np.multiply(state, factor, out=state)
    np.right_shift(state, np.uint64(31), out=other)
    np.bitwise_xor(state, other, out=state)
    lanes = state.astype("<u8", copy=False).view("<u2").reshape(height, words * LANES)
    places = scratch.array("noise.places", lanes.shape, np.intp)
    np.copyto(places, lanes)
    drawn = scratch.array(name, lanes.shape, table.dtype)
    np.take(table, places, out=drawn, mode="clip")
    skip = left - first * LANES
    return drawn[:, skip : skip + breadth]
