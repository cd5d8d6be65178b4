"""Each operator's rule against random models of one node: op(grow(x)) must be grow(op(x)), in double precision."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import hyperclone_onnx.rules
from hyperclone_onnx import feeds
from hyperclone_onnx.dims import Dim
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.inference import Dimensions, infer
from hyperclone_onnx.maps import SourceMap
from hyperclone_onnx.normalise import normalise
from hyperclone_onnx.planning import make_plan
from hyperclone_onnx.rewrite import rewrite
from hyperclone_onnx.rules import elementwise, registry
from hyperclone_onnx.sizing import Growth, name_dimensions
from hyperclone_onnx.strategies import STRATEGIES, Strategy

assert hyperclone_onnx.rules  # importing it registers the rules

Array = np.ndarray[Any, Any]
OPSETS = (13, 17, 18, 21, 23)
MICROSOFT = "com.microsoft"


@dataclass
class Model:
    """A random model under construction, and what its rule must find of its axes.

    An expectation has one letter for each axis of a value: `g` for one that must be able to grow, `p` for one
    that must keep its size, `.` for either.
    """

    rng: np.random.Generator
    opset: int = 21
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: dict[str, Array] = field(default_factory=dict)
    symbols: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    stored: dict[str, Array] = field(default_factory=dict)
    declared: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    expected: dict[str, str] = field(default_factory=dict)
    uses: list[tuple[int, str]] = field(default_factory=list)
    equal: bool = False
    """Averages: unequal repeats are refused."""
    tolerance: float = 1e-9
    runtime: bool = False
    """Run in ONNX Runtime, for what the reference has not."""

    # -- choices ------------------------------------------------------------------------------------------

    def size(self, low: int = 2, high: int = 5) -> int:
        return int(self.rng.integers(low, high + 1))

    def shape(self, low: int = 1, high: int = 4) -> tuple[int, ...]:
        return tuple(self.size() for _ in range(self.size(low, high)))

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def coin(self, chance: float = 0.5) -> bool:
        return bool(self.rng.random() < chance)

    def stretched(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape that broadcasts to `shape`: some axes 1, some leading ones absent."""
        some = [1 if self.coin(0.3) else n for n in shape]
        return tuple(some[int(self.rng.integers(len(some) + 1)) if self.coin(0.3) else 0 :])

    def values(self, shape: Sequence[int], kind: Any = np.float64) -> Array:
        kind = np.dtype(kind)
        if kind == np.bool_:
            return self.rng.random(tuple(shape)) < 0.5
        if kind.kind in "iu":
            return self.rng.integers(1, 7, tuple(shape)).astype(kind)
        return self.rng.uniform(0.1, 0.9, tuple(shape)).astype(kind)

    # -- building -----------------------------------------------------------------------------------------

    def operand(self, value: Any, want: str = "", stored: bool | None = None, kind: Any = np.float64) -> str:
        """A graph input or a stored tensor (either, unless told), from a shape or an array."""
        array = value if isinstance(value, np.ndarray) else self.values(value, kind)
        name = f"x{len(self.inputs) + len(self.stored)}"
        (self.stored if (self.coin() if stored is None else stored) else self.inputs)[name] = array
        if want:
            self.expected[name] = want
        return name

    def ints(self, values: Any, stored: bool = True) -> str:
        """Integers that are parameters of an operator."""
        return self.operand(np.asarray(values, dtype=np.int64), stored=stored)

    def node(
        self, op_type: str, *inputs: str, outputs: int = 1, want: str = "", inner: bool = False, **attributes: Any
    ) -> Any:
        names = [f"{op_type.lower()}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=f"n{len(self.nodes)}", **attributes))
        if not inner:
            self.outputs += names
        if want:
            self.expected[names[0]] = want
        return names[0] if outputs == 1 else names

    def proto(self) -> onnx.ModelProto:
        infos = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), self.symbols.get(name, array.shape)
            )
            for name, array in self.inputs.items()
        ]
        results = [onnx.ValueInfoProto(name=name) for name in self.outputs]
        graph = helper.make_graph(
            self.nodes, "g", infos, results, [numpy_helper.from_array(a, n) for n, a in self.stored.items()]
        )
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        typed = onnx.shape_inference.infer_shapes(model)
        for info in typed.graph.output:
            if not info.type.HasField("tensor_type"):
                info.type.tensor_type.elem_type = TensorProto.FLOAT if self.runtime else TensorProto.DOUBLE
            if info.name in self.declared:
                info.CopyFrom(
                    helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, self.declared[info.name])
                )
        return typed

    def run(self, model: onnx.ModelProto, values: dict[str, Array]) -> dict[str, Array]:
        with np.errstate(all="ignore"):
            if self.runtime:
                options = ort.SessionOptions()
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                options.log_severity_level = 4
                session: Any = ort.InferenceSession(
                    model.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            else:
                session = ReferenceEvaluator(model)
            return dict(zip(self.outputs, session.run(None, values), strict=True))


Build = Callable[[Model], Any]
ROWS: list[tuple[tuple[str, str], str, Build, int]] = []


def row(*ops: str, domain: str = "", seeds: int = 8) -> Callable[[Build], Build]:
    """Register a row for some operators; it is built from several seeds."""

    def register(build: Build) -> Build:
        for op in ops:
            ROWS.append(((domain, op), f"{op}-{build.__name__}", build, seeds))
        return build

    return register


# -- the harness ------------------------------------------------------------------------------------------------


def random_map(m: Model, size: int) -> SourceMap:
    match m.size(0, 3):
        case 0:
            return SourceMap(size, tile=m.size(2, 3))
        case 1:
            return SourceMap(size, repeat=m.size(2, 3))
        case 2:
            more = m.rng.integers(0, size, m.size(1, 4))
            return SourceMap(size, index=tuple(m.rng.permutation([*range(size), *more]).tolist()))
        case _:
            return SourceMap(size, index=tuple(m.rng.permutation(np.tile(np.arange(size), 2)).tolist()))


def check_expected(m: Model, dimensions: Dimensions) -> None:
    graph = dimensions.model.graph
    named = {v.name: v for v in (*graph.inputs, *(o for node in graph for o in node.outputs))}
    for name, letters in m.expected.items():
        axes = dimensions.axes.get(named[name]) if name in named else None
        if name not in named:
            axes = next((a for v, _, a in dimensions.initializer_uses() if v.name == name), None)
        if axes is None and name in m.stored:  # used inside another tensor only
            continue
        assert axes is not None, f"{name} has no known rank"
        assert len(axes) == len(letters), f"{name} has axes {[str(a) for a in axes]}, not {letters!r}"
        for axis, (term, letter) in enumerate(zip(axes, letters, strict=True)):
            atoms = list(dimensions.space.atoms(term))
            if letter == "g":
                assert any(atom.growable for atom in atoms), f"{name} axis {axis}: {[str(a.pin) for a in atoms]}"
            if letter == "p":
                assert not any(atom.growable for atom in atoms), f"{name} axis {axis} may grow"


def grow(m: Model, dimensions: Dimensions, strategy: Strategy, everything: bool) -> tuple[Any, ir.Model] | None:
    """The plan and the grown model; None when nothing can grow."""
    named = name_dimensions(dimensions)
    maps: dict[Dim, tuple[str, SourceMap]] = {}
    for each in named:
        if each.dim.growable and each.size > 0 and (everything or m.coin(0.6)):
            maps[each.dim] = (each.name, random_map(m, each.size))
    if not maps:
        return None
    try:
        plan = make_plan(Growth(dimensions, named, maps), strategy)
    except Refused:
        assert m.equal, "refused though nothing averages"
        maps = {dim: (name, SourceMap(chosen.size, repeat=2)) for dim, (name, chosen) in maps.items()}
        plan = make_plan(Growth(dimensions, named, maps), strategy)
    return plan, rewrite(dimensions.model, plan)


def check(key: tuple[str, str], build: Build, seed: int) -> bool:
    """Build one model and grow it; whether anything could grow."""
    rng = np.random.default_rng([zlib.crc32(f"{key}{build.__name__}".encode()), seed])
    m = Model(rng, int(rng.choice(OPSETS)))
    build(m) if build.__code__.co_argcount == 1 else build(m, key[1])  # type: ignore[call-arg]
    source = m.proto()
    assert key in {(node.domain, node.op_type) for node in source.graph.node}
    wanted = m.run(source, m.inputs)
    dimensions = infer(normalise(ir.from_proto(source)))
    assert not dimensions.unruled
    check_expected(m, dimensions)
    strategy = Strategy(STRATEGIES[seed % len(STRATEGIES)], seed=seed)
    made = grow(m, dimensions, strategy, everything=seed % 2 == 0)
    if made is None:
        return False
    plan, model = made
    grown = ir.to_proto(model)
    found = m.run(grown, feeds.grown(m.inputs, plan.inputs, plan.maps))
    wanted = feeds.grown(wanted, plan.outputs, plan.maps)
    for name, value in wanted.items():
        shape = np.shape(found[name])
        assert shape == np.shape(value), f"{name}: {shape}, not {np.shape(value)}"
        if np.asarray(value).dtype.kind == "f":
            np.testing.assert_allclose(found[name], value, rtol=m.tolerance, atol=m.tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    return True


# -- elementwise ------------------------------------------------------------------------------------------------

LOGICAL = {"Not": np.bool_, "And": np.bool_, "Or": np.bool_, "Xor": np.bool_}
INTEGER = {name: np.int64 for name in ("BitwiseNot", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Mod")}
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Cast": {"to": TensorProto.FLOAT},
    "Elu": {"alpha": 0.7},
    "LeakyRelu": {"alpha": 0.2},
    "Shrink": {"lambd": 0.4, "bias": 0.1},
    "ThresholdedRelu": {"alpha": 0.4},
    "BitShift": {"direction": "LEFT"},
}
NEEDS_OPSET = {"Mish": 18, "Gelu": 20, "Swish": 24, "HardSwish": 14, "CastLike": 15}
NEEDS_OPSET |= {name: 18 for name in ("BitwiseNot", "BitwiseAnd", "BitwiseOr", "BitwiseXor")}


def letters(shape: Sequence[int]) -> str:
    return "".join("p" if n == 1 else "g" for n in shape)


@row(*elementwise.UNARY, seeds=3)
def unary(m: Model, op: str) -> None:
    m.opset = max(m.opset, NEEDS_OPSET.get(op, 0))
    kind = LOGICAL.get(op) or INTEGER.get(op) or np.float64
    shape = m.shape(0, 4)
    x = m.values(shape, kind) + (1 if op == "Acosh" else 0)
    m.node(op, m.operand(x, letters(shape), stored=False), want=letters(shape), **ATTRIBUTES.get(op, {}))


@row(*elementwise.BROADCASTING, seeds=6)
def broadcasting(m: Model, op: str) -> None:
    kind = LOGICAL.get(op) or INTEGER.get(op) or (np.uint8 if op == "BitShift" else np.float64)
    m.opset = max(m.opset, NEEDS_OPSET.get(op, 0))
    whole = m.shape()
    count = m.size(1, 4) if op in ("Max", "Mean", "Min", "Sum") else 3 if op == "Where" else 2
    shapes = [m.stretched(whole) for _ in range(count)]
    shapes[m.size(0, count - 1) if op != "PRelu" else 0] = whole
    if op in LOGICAL and op != "Where":
        kinds: list[Any] = [np.bool_] * count
    else:
        kinds = [np.bool_ if op == "Where" and i == 0 else kind for i in range(count)]
    operands = [m.operand(shape, kind=k) for shape, k in zip(shapes, kinds, strict=True)]
    if all(name in m.stored for name in operands):
        m.inputs[operands[0]] = m.stored.pop(operands[0])
    m.node(op, *operands, want=letters(whole), **ATTRIBUTES.get(op, {}))


@row("Add", "Mul", "Greater")
def one_value_twice(m: Model, op: str) -> None:
    n = m.size()
    x = m.operand((n, n), "gg", stored=False)
    m.node(op, x, x, want="gg")


@row("Add")
def crossed(m: Model) -> None:
    """x + x.T makes both axes one dimension."""
    n = m.size()
    x = m.operand((n, n), "gg", stored=False)
    m.node("Add", x, m.node("Transpose", x, inner=True), want="gg")


@row("CastLike", seeds=3)
def cast_like(m: Model) -> None:
    m.opset = max(m.opset, 15)
    shape = m.shape()
    m.node("CastLike", m.operand(shape), m.operand((3,), kind=np.float32), want=letters(shape))


@row("Clip")
def clip(m: Model) -> None:
    shape = m.shape()
    x = m.operand(shape, stored=False)
    low, high = (m.operand(np.asarray(v)) if m.coin(0.7) else "" for v in (0.3, 0.6))
    m.node("Clip", x, low, high, want=letters(shape))


@row("Dropout")
def dropout(m: Model) -> None:
    shape = m.shape()
    m.node("Dropout", m.operand(shape, stored=False), outputs=m.size(1, 2))


# -- contractions -----------------------------------------------------------------------------------------------


@row("MatMul", seeds=24)
def matmul(m: Model) -> None:
    batch = tuple(m.size() for _ in range(m.size(0, 2)))
    n, k, p = m.size(), m.size(), m.size()
    if m.coin(0.2):
        a, b, want = (k,), (*batch, k, p), "g" * len(batch) + "g"
    elif m.coin(0.2):
        a, b, want = (*batch, n, k), (k,), "g" * len(batch) + "g"
    else:
        a, b = (*m.stretched(batch), n, k), (*batch, k, p)
        want = "g" * len(batch) + "gg"
    m.node("MatMul", m.operand(a), m.operand(b), want=want)


@row("MatMul", seeds=6)
def matmul_with_itself(m: Model) -> None:
    n = m.size()
    x = m.operand((n, n), stored=False)
    m.node("MatMul", x, x, want="gg")


@row("MatMul", seeds=12)
def matmul_of_moved_weight(m: Model) -> None:
    """The weight lies behind operators that are linear in it."""
    k, h, d = m.size(), m.size(), m.size()
    x = m.operand((m.size(), k), "gg", stored=False)
    match m.size(0, 5):
        case 0:
            w = m.node("Transpose", m.operand((h * d, k), stored=True), inner=True)
        case 1:
            w = m.node("Reshape", m.operand((k, h, d), stored=True), m.ints([k, -1]), inner=True)
        case 2:
            w = m.node("Mul", m.operand((k, h * d), stored=True), m.operand((h * d,), stored=True), inner=True)
        case 3:
            w = m.node("Add", m.operand((k, h * d), stored=True), m.operand((h * d,), stored=True), inner=True)
        case 4:
            parts = [m.operand((k, m.size()), stored=True) for _ in range(2)]
            w = m.node("Concat", *parts, axis=1, inner=True)
        case _:
            parts = [m.operand((i, h), stored=True) for i in ([k - 1, 1] if k > 1 else [k])]
            w = m.node("Sub", m.node("Concat", *parts, axis=0, inner=True), m.operand((k, h), stored=True), inner=True)
    m.node("MatMul", x, w, want="gg")


@row("MatMul", seeds=8)
def matmul_of_shared_weight(m: Model) -> None:
    """One stored tensor, contracted along either axis, and looked at besides."""
    n, k = m.size(), m.size()
    w = m.operand((n, k), stored=True)
    m.node("MatMul", m.operand((m.size(), n), stored=False), w)
    m.node("MatMul", w, m.operand((k, m.size()), stored=False))
    if m.coin():
        m.node("Add", w, m.operand((n, k), stored=False))


@row("MatMul", seeds=8)
def matmul_behind_a_scale(m: Model) -> None:
    """Between activations a stored factor upstream takes the division, if nothing else reads it."""
    n, k, p = m.size(), m.size(), m.size()
    x = m.operand((n, k), stored=False)
    c = m.operand(m.pick((), (k,), (n, 1), (1, 1)), stored=True)
    op = m.pick("Mul", "Div")
    left = m.node(op, *((x, c) if m.coin() else (c, x)), inner=m.coin())
    if m.coin():
        left = m.node("Transpose", m.node("Neg", left, inner=True), inner=True)
        n, k = k, n
    if m.coin(0.3):
        m.node("Add", m.operand((n, k), stored=False), c)
    m.node("MatMul", left, m.operand((k, p), stored=False))


@row("Gemm", seeds=24)
def gemm(m: Model) -> None:
    n, k, p = m.size(), m.size(), m.size()
    trans_a, trans_b = m.size(0, 1), m.size(0, 1)
    attributes: dict[str, Any] = {"alpha": 0.5, "beta": 2.0} if m.coin() else {}
    if trans_a or m.coin():
        attributes["transA"] = trans_a
    if trans_b or m.coin():
        attributes["transB"] = trans_b
    operands = [m.operand((k, n) if trans_a else (n, k)), m.operand((p, k) if trans_b else (k, p))]
    if m.coin():
        operands.append(m.operand(m.pick((p,), (n, p), (1, p), (n, 1), ())))
    m.node("Gemm", *operands, want="gg", **attributes)


EQUATIONS = (
    "ij,jk->ik ij,kj bij,bjk->bik ij,jk,kl->il ij-> ij->i i,j->ij i,i-> ij,ij->j ...ij,...jk->...ik ...i,i->... "
    "bhid,bhjd->bhij bhij,bhjd->bihd abc->cab ij,ik->jk iJ,Jk ii->i ii ij,j->ij i->i bi,oi->bo abc,cd->abd ij,kl->"
).split()


@row("Einsum", seeds=60)
def einsum(m: Model) -> None:
    equation = str(m.rng.choice(EQUATIONS))
    sizes = {letter: 1 if m.coin(0.1) else m.size() for letter in sorted(set(equation) - set(".,->"))}
    dots = m.shape(0, 2)
    words = equation.split("->")[0].split(",")
    shapes = [
        tuple(n for part in re.findall(r"\.\.\.|\w", word) for n in (dots if part == "..." else (sizes[part],)))
        for word in words
    ]
    if len(words) > 1 and words[1].startswith("..."):
        shapes[1] = (*m.stretched(dots), *shapes[1][len(dots) :])
    m.node("Einsum", *(m.operand(shape) for shape in shapes), equation=equation.replace("->", " -> "))


# -- convolution ------------------------------------------------------------------------------------------------


def activation(m: Model, shape: Sequence[int], want: str = "", **kinds: Any) -> str:
    """A computed value: some rules pin the axes of a graph input."""
    x = m.operand(tuple(shape), stored=False, **kinds)
    return str(m.node("Identity", x, inner=True, want=want))


@row("Conv", seeds=24)
def conv(m: Model) -> None:
    space = tuple(m.size(3, 5) for _ in range(m.size(1, 2)))
    group = m.pick(1, 1, 2, 3)
    c, o = m.size(1, 3), m.size(1, 3)
    kernel = tuple(m.size(1, 2) for _ in space)
    attributes: dict[str, Any] = {"group": group} if group > 1 or m.coin() else {}
    if m.coin():
        attributes["kernel_shape"] = kernel
    if m.coin():
        attributes["pads"] = (1,) * (2 * len(space))
    if m.coin():
        attributes["strides"] = (2,) * len(space)
    channels, out = group * c, group * o
    x = activation(m, (m.size(1, 2), channels, *space), "." + letters((channels,)) + "p" * len(space))
    operands = [x, m.operand((out, c, *kernel), letters((out, c)) + "p" * len(space))]
    if m.coin():
        operands.append(m.operand((out,), letters((out,))))
    m.node("Conv", *operands, want="." + letters((out,)) + "p" * len(space), **attributes)


@row("Conv", seeds=4)
def conv_of_an_input(m: Model) -> None:
    x = m.operand((1, 3, 4, 4), "pppp", stored=False)
    m.node("Conv", x, m.operand((4, 3, 2, 2), "gppp"), want="pgpp")


@row("BatchNormalization", seeds=6)
def batch_norm(m: Model) -> None:
    m.opset = m.pick(9, 14, 15, 21)
    c = m.size()
    shape = (m.size(), c, *m.shape(0, 2))
    m.node(
        "BatchNormalization", activation(m, shape), *(m.operand((c,), "g") for _ in range(4)), want="g" * len(shape)
    )


@row("BatchNormalization", seeds=8)
def batch_norm_in_training(m: Model) -> None:
    """Its statistics are averages over the batch and the space."""
    m.opset, m.equal = m.pick(14, 15, 21), True
    c = m.size()
    shape = (m.size(), c, *m.shape(0, 2))
    statistics = [m.operand((c,), "g") for _ in range(4)]
    m.node("BatchNormalization", activation(m, shape), *statistics, outputs=3, training_mode=1)


@row("InstanceNormalization", seeds=12)
def instance_norm(m: Model) -> None:
    m.equal = True
    c = m.size()
    shape = (m.size(), c, *m.shape(1, 2))
    m.node("InstanceNormalization", activation(m, shape), m.operand((c,), "g"), m.operand((c,), "g"), want=".g..."[: len(shape)])


@row("AveragePool", "MaxPool", "LpPool", seeds=8)
def pool(m: Model, op: str) -> None:
    m.opset = m.pick(13, 18) if op != "LpPool" else 18
    space = tuple(m.size(3, 5) for _ in range(m.size(1, 2)))
    x = activation(m, (m.size(), m.size(), *space), "gg" + "p" * len(space))
    attributes: dict[str, Any] = {"kernel_shape": (2,) * len(space)}
    if m.coin():
        attributes["strides"] = (2,) * len(space)
    m.node(op, x, want="gg" + "p" * len(space), **attributes)


@row("MaxPool", seeds=6)
def max_pool_with_indices(m: Model) -> None:
    """Its indices are flat over the whole tensor."""
    m.runtime, m.tolerance, m.opset = True, 1e-5, 12
    x = activation(m, (2, m.size(), 4, 4), "ppp", kind=np.float32) if False else activation(
        m, (2, m.size(), 4, 4), kind=np.float32
    )
    m.node("MaxPool", x, outputs=2, kernel_shape=(2, 2))


@row("GlobalAveragePool", "GlobalMaxPool", seeds=10)
def global_pool(m: Model, op: str) -> None:
    m.equal = op == "GlobalAveragePool"
    shape = (m.size(), m.size(), *m.shape(1, 2))
    m.node(op, activation(m, shape), want="gg" + "p" * (len(shape) - 2))


# -- normalisation ----------------------------------------------------------------------------------------------


@row("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", seeds=12)
def layer_norm(m: Model, op: str) -> None:
    m.equal = True
    m.opset = 23 if op == "RMSNormalization" else m.pick(17, 21)
    shape = m.shape(1, 4)
    axis = m.size(0, len(shape) - 1)
    attributes: dict[str, Any] = {} if axis == len(shape) - 1 and m.coin() else {"axis": axis - m.pick(0, len(shape))}
    kind: Any = np.float64
    if op == "SimplifiedLayerNormalization":
        m.runtime, m.tolerance, kind = True, 1e-4, np.float32
        attributes["epsilon"] = 1e-5
    operands = [m.operand(shape, "g" * len(shape), stored=False, kind=kind), m.operand(shape[axis:], kind=kind)]
    if op == "LayerNormalization" and m.coin():
        operands.append(m.operand(shape[axis:]))
    outputs = m.size(1, 3) if op == "LayerNormalization" else 1
    m.node(op, *operands, outputs=outputs, **attributes)


@row("GroupNormalization", seeds=16)
def group_norm(m: Model) -> None:
    m.equal, m.opset = True, m.pick(18, 21)
    groups, c = m.size(1, 3), m.size(1, 3)
    length = groups * c if m.opset >= 21 else groups
    shape = (m.size(), groups * c, *m.shape(1, 2))
    scale, bias = m.operand((length,)), m.operand((length,))
    m.node("GroupNormalization", activation(m, shape), scale, bias, num_groups=groups, want=".." + "." * (len(shape) - 2))


@row("MeanVarianceNormalization", seeds=8)
def mean_variance_norm(m: Model) -> None:
    m.equal = True
    attributes: dict[str, Any] = {"axes": m.pick([1], [0, -1], [2, 3])} if m.coin() else {}
    m.node("MeanVarianceNormalization", activation(m, tuple(m.size() for _ in range(4))), want="gggg", **attributes)


@row("Softmax", "LogSoftmax", "Hardmax", seeds=8)
def softmax(m: Model, op: str) -> None:
    m.opset = m.pick(11, 13, 21)
    shape = m.shape(2, 4)
    axis = m.size(0, len(shape) - 1)
    given = m.coin(0.7)
    if m.opset < 13:
        first = axis if given else 1
        want = "g" * first + "p" * (len(shape) - first)
        m.runtime, m.tolerance = True, 1e-5
    else:
        first = axis if given else len(shape) - 1
        want = "".join("p" if i == first else "g" for i in range(len(shape)))
    x = m.operand(shape, want, stored=False, kind=np.float32 if m.runtime else np.float64)
    m.node(op, x, want=want, **({"axis": axis - m.pick(0, len(shape) if m.opset >= 11 else 0)} if given else {}))


# -- reductions -------------------------------------------------------------------------------------------------

SUMS = "ReduceSum ReduceL1 ReduceLogSum ReduceL2 ReduceSumSquare".split()


def reduction(m: Model, op: str, want: str, kind: Any = np.float64) -> None:
    shape = m.shape(1, 4)
    axes = sorted(m.rng.permutation(len(shape))[: m.size(1, len(shape))].tolist())
    given = m.coin(0.8)
    attributes: dict[str, Any] = {"keepdims": m.size(0, 1)} if m.coin() else {}
    if not given:
        axes = list(range(len(shape)))
        if (op == "ReduceSum" or m.opset >= 18) and m.coin(0.3):
            attributes["noop_with_empty_axes"] = 1
            axes = []
    signed = [a - m.pick(0, len(shape)) for a in axes]
    letters_ = "".join(want if i in axes else "g" for i in range(len(shape)))
    operands = [m.operand(shape, letters_, stored=False, kind=kind)]
    if given and (op == "ReduceSum" or m.opset >= 18):
        operands.append(m.ints(signed))
    elif given:
        attributes["axes"] = signed
    m.node(op, *operands, **attributes)


@row(*SUMS, "ReduceMax", "ReduceMin", seeds=10)
def reduced(m: Model, op: str) -> None:
    m.opset = m.pick(13, 18, 21)
    reduction(m, op, "g")


@row("ReduceMean", seeds=10)
def averaged(m: Model, op: str) -> None:
    m.equal, m.opset = True, m.pick(13, 18, 21)
    reduction(m, op, "g")


@row("ReduceProd", "ReduceLogSumExp", seeds=8)
def pinned_reduction(m: Model, op: str) -> None:
    m.opset = m.pick(13, 18, 21)
    reduction(m, op, "p")


@row("ReduceSum", "ReduceL1", "ReduceSumSquare", seeds=6)
def reduced_integers(m: Model, op: str) -> None:
    """A share of an integer is no integer."""
    m.opset = m.pick(13, 18, 21)
    reduction(m, op, ".", np.int64)


@row("MatMul", seeds=6)
def matmul_of_integers(m: Model) -> None:
    k = m.size()
    a, b = ((m.size(), k), (k, m.size()))
    m.node("MatMul", m.operand(a, kind=np.int64), m.operand(b, kind=np.int64))


@row("ArgMax", "ArgMin", seeds=8)
def arg_extreme(m: Model, op: str) -> None:
    shape = m.shape(1, 4)
    axis = m.size(0, len(shape) - 1)
    attributes: dict[str, Any] = {"axis": axis - m.pick(0, len(shape))} if axis or m.coin() else {}
    attributes |= {"keepdims": m.size(0, 1)} if m.coin() else {}
    attributes |= {"select_last_index": m.size(0, 1)} if m.coin() else {}
    want = "".join("p" if i == axis else "g" for i in range(len(shape)))
    m.node(op, m.operand(shape, want, stored=False), **attributes)


# -- the tests --------------------------------------------------------------------------------------------------


def test_every_rule_has_a_row() -> None:
    assert {key for key, *_ in ROWS} >= set(registry.ruled())


@pytest.mark.parametrize("key, build, seeds", [pytest.param(k, b, n, id=i) for k, i, b, n in ROWS])
def test_grown_operator_computes_the_same(key: tuple[str, str], build: Build, seeds: int) -> None:
    for seed in range(seeds):
        check(key, build, seed)
