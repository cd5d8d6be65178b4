"""What `handoff --list` shows: each stored tensor, what it is for, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.frameworks.compiled_model import PathLike, compile_model
from hyperclone_onnx.frameworks.compiling.program import Weight

EXPECTED = 0.9
"""A model of which less than this share of its floating-point numbers is trained is worth a warning."""


@dataclass(frozen=True)
class Listing:
    """The stored tensors of a model, a row of plain data for each, and what there is to warn of."""

    rows: list[dict[str, Any]]
    warning: str | None


def list_weights(model: PathLike, *, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> Listing:
    """List each stored tensor that a framework would hold: those that are trained come first.

    Raises:
        BadModel, BadRequest, Refused: see `compile_model`.
        MissingExtra: neither extra is installed.
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
    """A warning where nothing is trained, or much less than the model stores; None where all is well.

    Tensors that the user asked to freeze count as trained: they are no surprise.
    """
    floating = [weight for weight in stored if ir.DataType(weight.element_type).is_floating_point()]
    total = sum(math.prod(weight.shape) for weight in floating)
    left_out = [weight for weight in floating if weight.role == "constant"]
    constant = sum(math.prod(weight.shape) for weight in left_out)
    way_out = "`handoff --list` shows the reason for each tensor, and --train GLOB trains it"
    if not any(weight.role != "constant" for weight in floating):
        return f"nothing is trained: none of the stored tensors is a parameter; {way_out}"
    if total - constant >= EXPECTED * total:
        return None
    largest = max(left_out, key=lambda weight: math.prod(weight.shape))
    return (
        f"only {(total - constant) / total:.0%} of the {total:,} stored floating-point numbers are trained. "
        f"The largest tensor that is not is {largest.initializer!r} ({largest.reason}); {way_out}"
    )
