"""The table of `handoff --list`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from hyperclone_onnx.reports.tables import Table


def print_weights(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a table, and the counts of parameters."""
    table = Table(box=None, pad_edge=False)
    for heading in ("role", "initializer", "shape", "why"):
        table.add_column(heading, overflow="fold")
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["role"]] += math.prod(row["shape"])
        shape = " x ".join(map(str, row["shape"])) or "single"
        table.add_row(row["role"], row["initializer"], shape, row["reason"] or "no floating tensor, or a single number")
    console.print(table)
    console.print(f"parameters: {counts['trainable']:,} trained, {counts['frozen']:,} frozen")
