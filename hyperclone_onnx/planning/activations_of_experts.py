"""Tells which function of the hidden units a feed-forward block computes, by computing it.

ONNX Runtime's operator MoE knows a few functions by name. Exporters write each of them in many ways, so we compare
results: the block's function is computed by ONNX's reference implementation, unit by unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.transforms.experts import hidden_function
from hyperclone_onnx.transforms.feed_forward import FeedForward

Array = npt.NDArray[np.float64]

LIMIT = 1e-5
"""The largest difference from a function of this name, relative to the largest result."""


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


PLAIN: Mapping[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}
"""The functions of one value that the operator knows."""


def with_activation(model: ir.Model, block: FeedForward) -> FeedForward:
    """The description of a block, with the operator's name for its function.

    Args:
        model: the graph.
        block: one of its blocks.

    Raises:
        Refused: the operator cannot compute such a block.
    """
    where = f"{block.name} (it ends at {block.gives!r})"
    if block.vectors:
        raise Refused(f"--moe-operator microsoft: {where} has stored numbers among its hidden units, which MoE has not")
    if any(projection.scale != 1.0 for projection in (*block.ups, block.down)):
        raise Refused(f"--moe-operator microsoft: {where} multiplies its products by a number, which MoE does not")
    parts = sum(up.parts for up in block.ups)
    try:
        given = [np.random.default_rng(part).uniform(-6, 6, (1, block.ffn)).astype(np.float32) for part in range(parts)]
        result = _computed(hidden_function(model, block), block, given)
    except Exception as problem:  # the reference implementation may raise any exception
        raise Refused(f"--moe-operator microsoft: the function of {where} cannot be computed ({problem})") from problem
    wide = [array.astype(np.float64) for array in given]
    if parts == 1:
        for name, function in PLAIN.items():
            if _near(result, function(wide[0])):
                return replace(block, activation=name)
    biased = {up.bias is None for up in block.ups}
    for gate in range(2) if parts == 2 and len(biased) == 1 else ():
        if _near(result, PLAIN["silu"](wide[gate]) * wide[1 - gate]):
            return replace(block, activation="swiglu", gate=gate)
    known = ", ".join(PLAIN)
    raise Refused(
        f"--moe-operator microsoft: {where} computes another function of its hidden units than {known} (with tanh), or "
        "SiLU of a gate times another value: leave the option out"
    )


def _computed(function: ir.Model, block: FeedForward, given: list[npt.NDArray[np.float32]]) -> Array:
    from onnx.reference import ReferenceEvaluator

    feeds: dict[str, Any] = {}
    rest = list(given)
    for up, value in zip(block.ups, function.graph.inputs, strict=True):
        feeds[value.name or ""] = np.concatenate([rest.pop(0) for _ in range(up.parts)], axis=-1)
    (result,) = ReferenceEvaluator(ir.to_proto(function)).run(None, feeds)
    return np.asarray(result, dtype=np.float64)


def _near(one: Array, other: Array) -> bool:
    return one.shape == other.shape and bool(np.abs(one - other).max() <= LIMIT * np.abs(other).max())
