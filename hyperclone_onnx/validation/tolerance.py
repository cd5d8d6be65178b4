"""Computes how much two equal models may differ by rounding, and explains the figure."""

from __future__ import annotations

import math

import onnx_ir as ir

from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.validation.tensor_check import TensorReport

SAFETY = 8.0
"""The allowed difference of an output, divided by the residue of the shared weights."""

WALKS = 4.0
"""The number of standard deviations of a random walk of rounding errors that count as rounding."""

DOUBLE_TOLERANCE = 1e-12
"""A right graph agrees to this in float64, with every strategy and factor."""

HALVES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def tolerance_of(
    dimensions: Dimensions, plan: Plan | None, tensors: TensorReport | None, dtype: ir.DataType | None = None
) -> tuple[float, str]:
    """The relative error that rounding explains if the model runs in `dtype`, and a text that explains it.

    Each contraction of length K rounds like a random walk of K steps. All contractions of a model together leave about
    eps * sqrt(sum of K), of which `WALKS` are allowed. The grown weights differ from exact shares by their residue.
    """
    dtype = dtype or computed_type(dimensions)
    eps = eps_of(dtype)
    growth = max([1.0, *(dim.map.grown / dim.map.size for dim in (plan.dims.values() if plan else ()))])
    lengths = [(dimensions.space.static(total.term) or 64) * growth for total in dimensions.sums if total.power == 1.0]
    rounding = WALKS * eps * math.sqrt(max(sum(lengths), 64.0))
    residue = tensors.residue * math.sqrt(len(dimensions.sums) or 1) if tensors is not None else 0.0
    text = f"{WALKS:.0f} x {dtype.name.lower()} eps {eps:.1e} x sqrt({sum(lengths):.0f} summands)"
    if tensors is not None:
        text += f" + {SAFETY:.0f} x residue {residue:.1e}"
    return rounding + SAFETY * residue, text


def computed_type(dimensions: Dimensions) -> ir.DataType:
    """The coarsest floating-point type that a contraction of the model computes in.

    Types in which weights are only stored do not count: the residue of their shares covers these.
    """
    types = {total.node.outputs[0].dtype for total in dimensions.sums}
    for dtype in (*HALVES, ir.DataType.FLOAT):
        if dtype in types:
            return dtype
    return ir.DataType.DOUBLE if ir.DataType.DOUBLE in types else ir.DataType.FLOAT
