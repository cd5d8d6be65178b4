"""Recognise GELU and SiLU that a model writes as several nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from hyperclone_onnx.frameworks.compiling.fusions.graphs import made_by, number, only, put_in_place, with_number


def fuse_gelu(node: ir.Node) -> bool:
    """x/2 (1 + erf(x / sqrt 2)), or x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in any order of the factors"""
    scale, factors = _factors(node.outputs[0], first=True)
    if len(factors) != 2 or not _near(scale, 0.5):
        return False
    for x, gate in (factors, factors[::-1]):
        inner = _minus_one(gate)
        if inner is None:
            continue
        approximate = "none" if inner.op_type == "Erf" else "tanh"
        matches = _is_erf_of(inner, x) if inner.op_type == "Erf" else _is_tanh_of(inner, x)
        if matches:
            put_in_place(node, ir.node("Gelu", [x], {"approximate": approximate}))
            return True
    return False


def fuse_silu(node: ir.Node) -> bool:
    """x sigmoid(x)"""
    for x, gate in (node.inputs[:2], node.inputs[1::-1]):
        sigmoid = only(gate, "Sigmoid")
        if node.op_type == "Mul" and sigmoid is not None and x is not None and sigmoid.inputs[0] is x:
            put_in_place(node, ir.node("Swish", [x]))
            return True
    return False


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)


def _factors(value: ir.Value, first: bool = False) -> tuple[float, Sequence[ir.Value]]:
    """Split a product into a number and its other factors."""
    node = made_by(value, "Mul", "Div") if first else only(value, "Mul", "Div")
    if node is None:
        return 1.0, [value]
    scaled = with_number(node)
    if scaled is not None:
        scale, factors = _factors(scaled[0])
        return scale * scaled[1], factors
    if node.op_type == "Div" or node.inputs[0] is None or node.inputs[1] is None:
        return 1.0, [value]
    parts = [_factors(factor) for factor in node.inputs if factor is not None]
    return parts[0][0] * parts[1][0], [*parts[0][1], *parts[1][1]]


def _minus_one(gate: ir.Value) -> ir.Node | None:
    """The Erf or Tanh to which a gate adds 1."""
    node = only(gate, "Add")
    if node is None:
        return None
    for constant, function in (node.inputs[:2], node.inputs[1::-1]):
        if number(constant) == 1:
            return only(function, "Erf", "Tanh")
    return None


def _is_erf_of(node: ir.Node, x: ir.Value) -> bool:
    """Whether the input of a node is x / sqrt 2"""
    value = node.inputs[0]
    assert value is not None
    scale, factors = _factors(value)
    return list(factors) == [x] and _near(scale, math.sqrt(0.5))


def _is_tanh_of(node: ir.Node, x: ir.Value) -> bool:
    """Whether the input of a node is sqrt(2 / pi) (x + 0.044715 x^3)"""
    value = node.inputs[0]
    assert value is not None
    scale, factors = _factors(value)
    total = only(factors[0], "Add") if len(factors) == 1 else None
    if total is None or not _near(scale, math.sqrt(2 / math.pi)):
        return False
    for linear, cube in (total.inputs[:2], total.inputs[1::-1]):
        if linear is not x or cube is None:
            continue
        part, powers = _factors(cube)
        if _near(part, 0.044715) and _is_cube(powers, x):
            return True
    return False


def _is_cube(factors: Sequence[ir.Value], x: ir.Value) -> bool:
    if len(factors) == 1:
        power = only(factors[0], "Pow")
        return power is not None and power.inputs[0] is x and number(power.inputs[1]) == 3
    return list(factors) == [x, x, x]
