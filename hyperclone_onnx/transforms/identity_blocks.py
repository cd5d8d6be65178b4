"""The stored tensors that must be zero so that a copied layer adds nothing to its stream (LLaMA Pro, arXiv 2401.02415).

A layer adds to the stream at an Add: y = x + f(x). f is zero if its last stored factor is zero: the weights and the
bias of its last projection, or the gain of the norm behind it. Everything before that factor stays as it is, so the
gradient of the factor is not zero and the layer learns from the first step.

The proof follows the graph: `_same` shows that a value is the stream as it entered, `_zero` that a value is zero.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import describe, is_initializer
from hyperclone_onnx.layers.stacks import Stack, Unit

Zeroed = frozenset[ir.Value]
_NOTHING: Zeroed = frozenset()

_ZERO_AT_ZERO = frozenset(
    """
    Abs AveragePool Cast Celu Ceil DepthToSpace Dropout Elu Erf Expand FastGelu Flatten Floor Gather GatherElements Gelu
    GlobalAveragePool HardSwish Identity LeakyRelu Mish Neg QuickGelu ReduceMean ReduceSum Relu Reshape Round Selu Sign
    Sin Slice Softsign SpaceToDepth Split Sqrt Squeeze Swish Tanh Tile Transpose Unsqueeze
    """.split()
)
"""Operators whose result is zero if their first input is."""

_FACTORS = frozenset(["MatMul", "Mul", "FusedMatMul", "MatMulInteger"])
"""Operators whose result is zero if one of their first two inputs is."""

_ALL_OF = {
    "Add": (0, 1),
    "BatchNormalization": (1, 2),
    "BiasGelu": (0, 1),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "DequantizeLinear": (1,),
    "Div": (0,),
    "Gemm": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "MatMulNBits": (2, 5),
    "MoE": (4, 5),
    "QMoE": (6, 7),
    "RMSNormalization": (1,),
    "ScatterElements": (0, 2),
    "ScatterND": (0, 2),
    "SimplifiedLayerNormalization": (1,),
    "Sub": (0, 1),
    "Where": (1, 2),
}
"""Operators whose result is zero if these inputs are, as far as the node has them: stored factors before others."""

_VARIADIC = frozenset(["Concat", "Sum"])
"""Operators whose result is zero if all inputs are."""


class _NotShown(Exception):
    """It could not be shown; the text says at which node."""


def zeroed(stack: Stack, unit: Unit) -> Zeroed:
    """The stored tensors of a unit that must be zero so that what leaves it is what entered it.

    Raises:
        Refused: no tensors could be found with which this is so. The text names the node.
    """
    inside = frozenset(unit.nodes)
    tensors = _NOTHING
    for enters, leaves in zip(unit.enters, unit.leaves, strict=True):
        try:
            if enters is None or leaves is None:
                raise _NotShown("the layer has no single end")
            tensors |= _same(leaves, enters, inside)
        except _NotShown as problem:
            raise Refused(
                f"a copied layer of {stack.name!r} cannot be made to add nothing: {problem}. "
                "Copies that change what the model computes are possible: --depth interpose --allow-change"
            ) from problem
    return tensors


def _same(value: ir.Value, stream: ir.Value, inside: frozenset[ir.Node]) -> Zeroed:
    """Zeros with which a value is the stream as it entered."""
    if value is stream:
        return _NOTHING
    node = value.producer()
    if node is None or node not in inside:
        raise _NotShown(f"{value.name!r} does not come from the stream")
    if node.op_type == "Add" and len(node.inputs) == 2:
        return _either(node, [(0, 1), (1, 0)], stream, inside)
    if node.op_type == "Sub":
        return _either(node, [(0, 1)], stream, inside)
    narrower = value.dtype is None or stream.dtype is None or value.dtype.bitwidth < stream.dtype.bitwidth
    if node.op_type in ("Identity", "Dropout") or (node.op_type == "Cast" and not narrower):
        return _same(_input(node, 0), stream, inside)
    if "Norm" in node.op_type:
        raise _NotShown(f"the norm {describe(node)} stands behind the sum, on the stream itself (post-norm)")
    raise _NotShown(f"{describe(node)} changes the stream itself")


def _either(node: ir.Node, ways: list[tuple[int, int]], stream: ir.Value, inside: frozenset[ir.Node]) -> Zeroed:
    problems: list[_NotShown] = []
    for kept, added in ways:
        try:
            tensors = _same(_input(node, kept), stream, inside)
        except _NotShown as problem:
            problems.append(problem)
            continue
        return tensors | _zero(_input(node, added), inside)
    raise max(problems, key=lambda problem: "stream itself" in str(problem))


def _zero(value: ir.Value, inside: frozenset[ir.Node]) -> Zeroed:
    """Zeros with which a value is zero."""
    if is_initializer(value):
        return _zero_stored(value)
    node = value.producer()
    if node is None or node not in inside:
        raise _NotShown(f"{value.name!r} is added to the stream, and comes from outside the layer")
    kind = node.op_type
    if kind in _FACTORS:
        return _zero_factor(node, inside)
    if kind in _ZERO_AT_ZERO:
        return _zero(_input(node, 0), inside)
    if kind == "ConstantOfShape" and not _fills(node):
        return _NOTHING
    if kind in _VARIADIC or kind in _ALL_OF:
        places = range(len(node.inputs)) if kind in _VARIADIC else _ALL_OF[kind]
        tensors = _NOTHING
        for place in places:
            if place < len(node.inputs) and node.inputs[place] is not None:
                tensors |= _zero(_input(node, place), inside)
        return tensors
    raise _NotShown(f"{describe(node)} has no factor that could be zero")


def _zero_factor(node: ir.Node, inside: frozenset[ir.Node]) -> Zeroed:
    """Zeros with which one of two factors is zero: a stored one, if there is one."""
    problem = _NotShown(f"{describe(node)} has no factor that could be zero")
    for value in sorted((_input(node, 0), _input(node, 1)), key=lambda value: not _is_weight(value)):
        try:
            return _zero(value, inside)
        except _NotShown as other:
            problem = other
    raise problem


def _is_weight(value: ir.Value) -> bool:
    """Whether a value is a stored tensor, as it is or in another layout."""
    while not is_initializer(value):
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"):
            return False
        value = _input(node, 0)
    return True


def _zero_stored(value: ir.Value) -> Zeroed:
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype.is_floating_point() and tensor.size > 1:
        return frozenset([value])
    if tensor.size == 1 and not np.any(tensor.numpy()):
        return _NOTHING
    raise _NotShown(f"{value.name!r} is one number, which is no weight")


def _fills(node: ir.Node) -> bool:
    """Whether a ConstantOfShape gives anything but zeros."""
    given = node.attributes.get("value")
    return given is not None and bool(np.any(given.as_tensor().numpy()))


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None:
        raise _NotShown(f"{describe(node)} has no input {place}")
    return value
