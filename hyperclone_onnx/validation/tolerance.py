"""How far two equal models may be apart: what rounding explains, and how that figure is made up."""

from __future__ import annotations

import math

import onnx_ir as ir

from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.validation.tensor_check import TensorReport

SAFETY = 8.0
"""How many times the residue of the shared weights may show in an output."""

WALKS = 4.0
"""How many standard deviations of a random walk of rounding errors are still taken for rounding."""

DOUBLE_TOLERANCE = 1e-12
"""A right graph agrees to this in float64, in every strategy and factor."""

HALVES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def tolerance_of(
    dimensions: Dimensions, plan: Plan | None, tensors: TensorReport | None, dtype: ir.DataType | None = None
) -> tuple[float, str]:
    """The relative error that rounding explains when running in `dtype` (the model's own), and how it is made up.

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

    A type that weights are merely stored in shows in the residue of their shares instead.
    """
    types = {total.node.outputs[0].dtype for total in dimensions.sums}
    for dtype in (*HALVES, ir.DataType.FLOAT):
        if dtype in types:
            return dtype
    return ir.DataType.DOUBLE if ir.DataType.DOUBLE in types else ir.DataType.FLOAT
