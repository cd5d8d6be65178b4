"""What `handoff --list` shows: each stored tensor, what it is for, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.frameworks.compiled_model import PathLike, compile_model


def weights(model: PathLike, *, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A row for each stored tensor that a framework would hold, as plain data.

    Raises:
        BadModel, BadRequest, Refused: see `compile_model`.
        MissingExtra: neither extra is installed.
    """
    program = compile_model(model, freeze=freeze, train=train).program
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
