"""The report of `handoff --list`: which stored tensors are trained, and why others are not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from hyperclone_onnx.reports.tables import Table


def print_weights(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as a table, and the numbers of trained and frozen parameters.

    Args:
        console: where to print.
        rows: for each initializer its ``role``, name (``initializer``), ``shape`` and ``reason``.
    """
    table = Table(box=None, pad_edge=False)
    for heading in ("role", "initializer", "shape", "why"):
        table.add_column(heading, overflow="fold")
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["role"]] += math.prod(row["shape"])
        shape = " x ".join(map(str, row["shape"])) or "single"
        table.add_row(row["role"], row["initializer"], shape, row["reason"] or "not floating, or a single number")
    console.print(table)
    console.print(f"parameters: {counts['trainable']:,} trained, {counts['frozen']:,} frozen")
