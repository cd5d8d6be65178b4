"""What `handoff --list` shows: each stored tensor, what it is for, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.frameworks.handoff import PathLike, read


def weights(model: PathLike, *, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for each stored tensor that a framework would hold, as plain data.

    Raises:
        BadModel, BadRequest, Refused: see `handoff.read`.
        MissingExtra: neither extra is installed.
    """
    program = read(model, freeze=freeze, train=train).program
    return [
        {
            "initializer": each.initializer,
            "path": each.path,
            "role": each.role,
            "type": ir.DataType(each.element_type).name.lower(),
            "shape": list(each.shape),
            "reason": each.reason,
        }
        for each in sorted(program.weights, key=lambda each: (each.role != "trainable", each.role))
    ]


def print_weights(console: Any, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a table, and the counts of parameters."""
    from hyperclone_onnx.reports.tables import Table

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
