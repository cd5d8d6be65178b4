"""Stored weights that are infinite, or not a number: they grow as they are, and the report says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.scratch import Scratch
from hyperclone_onnx.stored_rows import StoredRows
from hyperclone_onnx.streaming import CHUNK, Job, run


def not_finite(model: ir.Model, workers: int | None = None) -> dict[str, int]:
    """How many elements of each stored tensor are infinite or not a number; tensors without any are left out.

    Read block by block, with a fixed amount of memory.
    """
    counts: dict[tuple[str, int], int] = {}
    run(_jobs(model, counts), workers)
    totals: Counter[str] = Counter()
    for (name, _), found in sorted(counts.items()):
        totals[name] += found
    return dict(totals)


def _jobs(model: ir.Model, counts: dict[tuple[str, int], int]) -> Iterator[Job]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
            continue
        rows = StoredRows(tensor, 1, tensor.nbytes)
        for start in range(0, tensor.nbytes, CHUNK):
            yield partial(_count, counts, name, rows, start, min(CHUNK, tensor.nbytes - start), tensor.dtype.numpy())


def _count(
    counts: dict[tuple[str, int], int],
    name: str,
    rows: StoredRows,
    start: int,
    size: int,
    kind: np.dtype[Any],
    scratch: Scratch,
) -> None:
    numbers = rows.read_bytes(start, size, scratch, "finite").view(kind)
    # A sum is several times faster than a test of each element; one that overflows is told apart then.
    with np.errstate(over="ignore", invalid="ignore"):
        total = numbers.sum(dtype=np.float32 if numbers.dtype.itemsize < 4 else None)
    if not np.isfinite(total):
        found = int(numbers.size - np.isfinite(numbers).sum())
        if found:
            counts[name, start] = found
