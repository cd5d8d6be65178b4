"""What must change in a copied layer so that it adds nothing to its stream (LLaMA Pro, arXiv 2401.02415).

A layer adds to the stream at an Add: y = x + f(x). f is zero if its last stored factor is zero: the weights and the
bias of its last projection, or the gain of the norm behind it. Everything before that factor stays as it is, so the
gradient of the factor is not zero and the layer learns from the first step.

In a post-norm model a norm stands behind the Add, on the stream itself: y = norm(x + f(x)). A norm of what is
normalised already changes nothing but by its epsilon. So the norm in front of the copy gets the gain 1 and the bias 0,
and so do the norms in the copy except the last one. That one has the gain and the bias which the norm in front of the
copy had. With v for the variance in front of the first of these norms, the result differs by about
epsilon / 2 * (1 / v - 1), relatively.

The proof follows the graph: `_same` shows that a value is the stream as it entered, `_zero` that a value is zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import MOVES_ELEMENTS, bodies_of, describe, is_initializer
from hyperclone_onnx.layers.stacks import Stack

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


NORMS = frozenset(["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"])
"""Operators that, with the gain 1 and the bias 0, change nothing in what is normalised already."""

GAIN, BIAS = 1, 2
"""The places of the gain and the bias among the inputs of a norm."""

LARGEST_EPSILON = 1e-5
"""The largest epsilon of norms on the stream with which a copied layer counts as one that adds nothing."""


@dataclass(frozen=True)
class Identity:
    """What must change in a copied layer so that it adds nothing."""

    zero: Zeroed = _NOTHING
    """The stored tensors that must be zero."""
    norms: tuple[ir.Node, ...] = ()
    """The norms on the stream that must have the gain 1 and the bias 0."""
    last: tuple[ir.Node, ...] = ()
    """The norms from which a post-norm layer's values leave. In the layer in front of the copy they must have the gain
    1 and the bias 0."""
    epsilon: float = 0.0
    """The largest epsilon of these norms; 0 where there are none."""


@dataclass
class _Path:
    """The way of a stream through a layer, as far as it was followed back from the layer's end."""

    inside: frozenset[ir.Node]
    norms: list[ir.Node] = field(default_factory=list)
    """The norms on the stream, the last one first."""
    values: list[ir.Value] = field(default_factory=list)
    """The values on the way, the last one first."""
    moves: list[ir.Node] = field(default_factory=list)
    """The nodes that give the stream another shape, the last one first."""


class _NotShown(Exception):
    """It could not be shown; the text says at which node."""


def identity_block(stack: Stack, number: int) -> Identity:
    """What must change in a copy of a unit so that what leaves it is what entered it.

    Args:
        stack: the stack of layers.
        number: the number of the unit. The copy stands behind it.

    Raises:
        Refused: it could not be found. The text names the node.
    """
    unit = stack.units[number]
    tensors = _NOTHING
    norms: list[ir.Node] = []
    last: list[ir.Node] = []
    for position, (enters, leaves) in enumerate(zip(unit.enters, unit.leaves, strict=True)):
        try:
            if enters is None or leaves is None:
                raise _NotShown("the layer has no single end")
            path = _Path(frozenset(unit.nodes))
            tensors |= _same(leaves, enters, path)
            if path.moves and not (_moved_back(path) or _same_shape(enters, leaves)):
                raise _NotShown(f"{leaves.name!r} has the numbers of the stream, and perhaps another shape")
            if path.norms:
                _check_norms(path.norms, leaves)
                _check_readers(stack, number, position)
                last.append(path.norms[0])
                norms += path.norms[1:]
        except _NotShown as problem:
            raise Refused(
                f"a copied layer of {stack.name!r} cannot be made to add nothing: {problem}. "
                "Copies that change what the model computes are possible: --depth interpose --allow-change"
            ) from problem
    return Identity(tensors, tuple(norms), tuple(last), max(map(_epsilon, [*norms, *last]), default=0.0))


def _check_norms(norms: list[ir.Node], leaves: ir.Value) -> None:
    """Check that norms on the stream, the last one first, change nothing in what one of them has normalised."""
    first = norms[0]
    if leaves.producer() is not first:
        raise _NotShown(f"the norm {describe(first)} stands on the stream, and not at the end of the layer")
    for norm in norms:
        if norm.op_type != first.op_type or _axis(norm) != _axis(first):
            raise _NotShown(f"the norms {describe(first)} and {describe(norm)} on the stream are of two kinds")
        if _epsilon(norm) > LARGEST_EPSILON:
            raise _NotShown(
                f"the norm {describe(norm)} stands behind the sum, on the stream itself (post-norm), and its epsilon "
                f"of {_epsilon(norm):g} changes what is normalised already by more than {LARGEST_EPSILON:g}"
            )
        for place in (GAIN, BIAS):
            value = norm.inputs[place] if place < len(norm.inputs) else None
            if value is not None and not (is_initializer(value) and value.const_value is not None):
                raise _NotShown(f"the norm {describe(norm)} on the stream has a gain or bias that is computed")


def _check_readers(stack: Stack, number: int, position: int) -> None:
    """Check that the end of a post-norm unit is read by what stands behind the copy alone.

    The copy gives these readers the value that they had. Others would see the value without its gain and bias.
    """
    value = stack.units[number].leaves[position]
    assert value is not None
    is_last = number + 1 == len(stack.units)
    following = set() if is_last else set(stack.units[number + 1].nodes)
    others = [] if is_last else [use.node for use in value.uses() if use.node not in following]
    ends = [unit.leaves[position] for unit in stack.units] if is_last else [value]
    if others or all(end is not None and end.is_graph_output() for end in ends):
        where = describe(others[0]) if others else "an output of the graph"
        raise _NotShown(
            f"{where} reads the end of a layer of a post-norm model, and would see it without the gain and the bias of "
            "the norm; layers at the end may be possible: --layers-at end"
        )


def _moved_back(path: _Path) -> bool:
    """Whether the last node that changes the stream's shape gives it that of a value in front of all such nodes.

    One of the sizes may be any: with as many elements, it is right if all others are.
    """
    last = path.moves[0]
    given = last.inputs[1] if last.op_type == "Reshape" else None
    shape = None if given is None else given.producer()
    if shape is None:
        return False
    place = path.values.index(path.moves[-1].outputs[0])
    before = path.values[place + 1 :]
    if shape.op_type == "Shape":
        return _is_whole(shape) and shape.inputs[0] in before
    sizes = list(shape.inputs) if shape.op_type == "Concat" else []
    right = sum(_is_size_of(size, number, before) for number, size in enumerate(sizes))
    rank = before[-1].shape
    return bool(sizes) and right >= len(sizes) - 1 and (rank is None or len(rank) == len(sizes))


def _is_whole(shape: ir.Node) -> bool:
    """Whether a Shape gives all sizes."""
    return all(name == "start" and attribute.as_int() == 0 for name, attribute in shape.attributes.items())


def _is_size_of(size: ir.Value | None, axis: int, values: list[ir.Value]) -> bool:
    """Whether a size is that of one of some values along an axis: Gather(Shape(value), axis), unsqueezed."""
    node = None if size is None else size.producer()
    while node is not None and node.op_type in ("Cast", "Identity", "Squeeze", "Unsqueeze"):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "Gather" or None in node.inputs:
        return False
    shape, number = node.inputs[0], node.inputs[1]
    assert shape is not None and number is not None
    made = shape.producer()
    if made is None or made.op_type != "Shape" or not _is_whole(made) or number.const_value is None:
        return False
    return number.const_value.size == 1 and int(number.const_value.numpy().item()) == axis and made.inputs[0] in values


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    """Whether two values with as many elements have the same shape, as far as all sizes but one show it."""
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return False
    pairs = list(zip(one.shape.dims, other.shape.dims, strict=True))
    return sum(not _same_size(a, b) for a, b in pairs) <= 1 and not any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs
    )


def _same_size(one: object, other: object) -> bool:
    return one == other and (isinstance(one, int) or getattr(one, "value", None) is not None)


def _axis(norm: ir.Node) -> int:
    return int(norm.attributes["axis"].as_int()) if "axis" in norm.attributes else -1


def _epsilon(norm: ir.Node) -> float:
    return float(norm.attributes["epsilon"].as_float()) if "epsilon" in norm.attributes else 1e-5


def _same(value: ir.Value, stream: ir.Value, path: _Path) -> Zeroed:
    """Zeros with which a value is the stream as it entered."""
    inside = path.inside
    path.values.append(value)
    if value is stream:
        return _NOTHING
    node = value.producer()
    if node is None or node not in inside:
        raise _NotShown(f"{value.name!r} does not come from the stream")
    if node.op_type == "Add" and len(node.inputs) == 2:
        return _either(node, [(0, 1), (1, 0)], stream, path)
    if node.op_type == "Sub":
        return _either(node, [(0, 1)], stream, path)
    narrower = value.dtype is None or stream.dtype is None or value.dtype.bitwidth < stream.dtype.bitwidth
    if node.op_type in ("Identity", "Dropout") or (node.op_type == "Cast" and not narrower):
        return _same(_input(node, 0), stream, path)
    if node.op_type in MOVES_ELEMENTS - {"Transpose"} and not node.domain:
        path.moves.append(node)
        return _same(_input(node, 0), stream, path)
    if node.op_type in NORMS:
        path.norms.append(node)
        return _same(_input(node, 0), stream, path)
    if "Norm" in node.op_type:
        raise _NotShown(f"the norm {describe(node)} stands behind the sum, on the stream itself (post-norm)")
    raise _NotShown(f"{describe(node)} changes the stream itself")


def _either(node: ir.Node, ways: list[tuple[int, int]], stream: ir.Value, path: _Path) -> Zeroed:
    """The way of the stream through a sum: the one with the fewest norms, of those that can be shown."""
    problems: list[_NotShown] = []
    shown: list[tuple[Zeroed, _Path]] = []
    for kept, added in ways:
        branch = _Path(path.inside, list(path.norms), list(path.values), list(path.moves))
        try:
            tensors = _same(_input(node, kept), stream, branch) | _zero(_input(node, added), path.inside)
        except _NotShown as problem:
            problems.append(problem)
            continue
        shown.append((tensors, branch))
    if not shown:
        raise max(problems, key=lambda problem: "stream itself" in str(problem))
    tensors, branch = min(shown, key=lambda pair: len(pair[1].norms))
    path.norms, path.values, path.moves = branch.norms, branch.values, branch.moves
    return tensors


def _zero(value: ir.Value, inside: frozenset[ir.Node], known: frozenset[ir.Value] = frozenset()) -> Zeroed:
    """Zeros with which a value is zero, if some values are known to be zero."""
    if value in known:
        return _NOTHING
    if is_initializer(value):
        return _zero_stored(value)
    node = value.producer()
    if node is not None and node.op_type == "ConstantOfShape" and not _fills(node):
        return _NOTHING
    if node is None or node not in inside:
        raise _NotShown(f"{value.name!r} is added to the stream, and comes from outside the layer")
    kind = node.op_type
    if kind in _FACTORS:
        return _zero_factor(node, inside, known)
    if kind in _ZERO_AT_ZERO:
        return _zero(_input(node, 0), inside, known)
    if kind == "Loop":
        return _zero_in_loop(node, value.index() or 0, inside)
    if kind in _VARIADIC or kind in _ALL_OF:
        places = range(len(node.inputs)) if kind in _VARIADIC else _ALL_OF[kind]
        tensors = _NOTHING
        for place in places:
            if place < len(node.inputs) and node.inputs[place] is not None:
                tensors |= _zero(_input(node, place), inside, known)
        return tensors
    raise _NotShown(f"{describe(node)} has no factor that could be zero")


def _zero_factor(node: ir.Node, inside: frozenset[ir.Node], known: frozenset[ir.Value] = frozenset()) -> Zeroed:
    """Zeros with which one of two factors is zero: a stored one, if there is one."""
    problem = _NotShown(f"{describe(node)} has no factor that could be zero")
    for value in sorted((_input(node, 0), _input(node, 1)), key=lambda value: not _is_weight(value)):
        try:
            return _zero(value, inside, known)
        except _NotShown as other:
            problem = other
    raise problem


def _zero_in_loop(node: ir.Node, number: int, inside: frozenset[ir.Node]) -> Zeroed:
    """Zeros with which a value that a Loop carries is zero: it begins so, and each iteration leaves it so."""
    (body,) = bodies_of(node)
    place = 2 + number
    if place >= len(node.inputs):
        raise _NotShown(f"{describe(node)} collects values over its iterations")
    begins = _zero(_input(node, place), inside)
    result = body.outputs[1 + number]
    return begins | _zero(result, inside | frozenset(body), frozenset([body.inputs[place]]))


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
