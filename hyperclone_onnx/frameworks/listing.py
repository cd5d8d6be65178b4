"""The rows of `handoff --list`: each stored tensor, its role, and the reason for that role."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.frameworks.compiled_model import PathLike, compile_model
from hyperclone_onnx.frameworks.compiling.program import Weight

EXPECTED = 0.9
"""We warn if a smaller share of the model's stored floating-point numbers is trained."""


@dataclass(frozen=True)
class Listing:
    """The stored tensors of a model, one row of plain data for each, and a warning if little of it is trained."""

    rows: list[dict[str, Any]]
    warning: str | None


def list_weights(model: PathLike, *, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> Listing:
    """List the stored tensors that a framework would load. Trained tensors come first.

    Args:
        model: path of the ONNX file.
        freeze: globs of initializer names; the matching tensors are not trained.
        train: globs of initializer names; the matching tensors are trained.

    Raises:
        BadModel, BadRequest, Refused: see `compile_model`.
        MissingExtra: neither the extra for PyTorch nor the one for JAX is installed.
    """
    stored = compile_model(model, freeze=freeze, train=train).program.weights
    rows = [
        {
            "initializer": weight.initializer,
            "path": weight.path,
            "role": weight.role,
            "type": ir.DataType(weight.element_type).name.lower(),
            "shape": list(weight.shape),
            "reason": weight.reason,
        }
        for weight in sorted(stored, key=lambda weight: (weight.role != "trainable", weight.role))
    ]
    return Listing(rows, little_trained(stored))


def little_trained(stored: Iterable[Weight]) -> str | None:
    """Return a warning if no tensor is trained, or if less than the share `EXPECTED` is; else None.

    Tensors that the user froze count as trained: the user knows about them.
    """
    floating = [weight for weight in stored if ir.DataType(weight.element_type).is_floating_point()]
    total = sum(math.prod(weight.shape) for weight in floating)
    constants = [weight for weight in floating if weight.role == "constant"]
    untrained = sum(math.prod(weight.shape) for weight in constants)
    advice = "`handoff --list` shows the reason for each tensor, and --train GLOB trains it"
    if not any(weight.role != "constant" for weight in floating):
        return f"nothing is trained: none of the stored tensors is a parameter; {advice}"
    if total - untrained >= EXPECTED * total:
        return None
    largest = max(constants, key=lambda weight: math.prod(weight.shape))
    return (
        f"only {(total - untrained) / total:.0%} of the {total:,} stored floating-point numbers are trained. "
        f"The largest tensor that is not is {largest.initializer!r} ({largest.reason}); {advice}"
    )
