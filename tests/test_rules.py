"""Each operator's rule against random models of one node: op(grow(x)) must be grow(op(x)), in double precision."""

from __future__ import annotations

import itertools
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
    tolerance: float = 2e-7
    """Noise and attributes are single precision."""
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
            return np.asarray(self.rng.random(tuple(shape)) < 0.5)
        if kind.kind in "iu":
            return self.rng.integers(1, 7, tuple(shape)).astype(kind)
        return np.asarray(self.rng.uniform(0.1, 0.9, tuple(shape)), dtype=kind)

    # -- building -----------------------------------------------------------------------------------------

    def operand(self, value: Any, want: str = "", stored: bool | None = None, kind: Any = np.float64) -> str:
        """A graph input or a stored tensor (either, unless told), from a shape or an array."""
        array = self.values(value, kind) if isinstance(value, tuple) else np.asarray(value)
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


Build = Callable[..., Any]
"""It takes the model, and the operator where one row serves several."""
ROWS: list[Any] = []
COVERED: set[tuple[str, str]] = set()


def row(*ops: str, domain: str = "", seeds: int = 8) -> Callable[[Build], Build]:
    """Register a row for some operators, built from several seeds."""

    def register(build: Build) -> Build:
        for op in ops:
            name = f"{domain + '.' if domain else ''}{op}-{build.__name__.strip('_')}"
            ROWS.append(pytest.param((domain, op), build, seeds, id=name))
            COVERED.add((domain, op))
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
    build(*(m, key[1])[: build.__code__.co_argcount])
    source = m.proto()
    assert f'"{key[1]}"' in str(source.graph)
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
BITWISE = ("BitwiseNot", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
INTEGER = dict.fromkeys((*BITWISE, "Mod"), np.int64)
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "Cast": {"to": TensorProto.FLOAT},
    "Elu": {"alpha": 0.7},
    "LeakyRelu": {"alpha": 0.2},
    "Shrink": {"lambd": 0.4, "bias": 0.1},
    "ThresholdedRelu": {"alpha": 0.4},
    "BitShift": {"direction": "LEFT"},
}
NEEDS_OPSET = {"Mish": 18, "Gelu": 20, "Swish": 24, "HardSwish": 14, "CastLike": 15}
NEEDS_OPSET |= dict.fromkeys(BITWISE, 18)


def letters(shape: Sequence[int]) -> str:
    return "".join("p" if n == 1 else "g" for n in shape)


@row(*elementwise.UNARY, seeds=3)
def unary(m: Model, op: str) -> None:
    m.opset = max(m.opset, NEEDS_OPSET.get(op, 0))
    kind = LOGICAL.get(op) or INTEGER.get(op) or np.float64
    shape = m.shape(1, 4)
    x = m.values(shape, kind) + (1 if op == "Acosh" else 0)
    m.node(op, m.operand(x, letters(shape), stored=False), want=letters(shape), **ATTRIBUTES.get(op, {}))


@row(*elementwise.BROADCASTING, seeds=6)
def broadcasting(m: Model, op: str) -> None:
    kind = LOGICAL.get(op) or INTEGER.get(op) or (np.uint8 if op == "BitShift" else np.float64)
    m.opset = max(m.opset, NEEDS_OPSET.get(op, 0))
    whole = m.shape()
    count = m.size(1, 4) if op in ("Max", "Mean", "Min", "Sum") else 3 if op == "Where" else 2
    shapes = [m.stretched(whole) for _ in range(count)]
    # The reference adds in place, so its first operand has the whole shape.
    shapes[0 if op in ("Mean", "PRelu") else m.size(0, count - 1)] = whole
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


@row("Cast", seeds=2)
def cast_to_bool(m: Model) -> None:
    """7 becomes true, and true becomes 1."""
    truth = m.node("Cast", m.ints([7]), to=TensorProto.BOOL, inner=True)
    m.node("Expand", m.operand((3, 1), stored=False), m.node("Cast", truth, to=TensorProto.INT64, inner=True))


@row("Mod", seeds=4)
def fmod(m: Model) -> None:
    """-7 fmod 4 is -3, which its negative turns into a length."""
    rest = m.node("Mod", m.ints([-7]), m.ints([4]), fmod=1, inner=True)
    m.node("Expand", m.operand((2, 1), stored=False), m.node("Neg", rest, inner=True))


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
    k, h, d = m.size(3), m.size(), m.size()
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
            parts = [m.operand((i, h), stored=True) for i in (k - 1, 1)]
            w = m.node("Sub", m.node("Concat", *parts, axis=0, inner=True), m.operand((k, h), stored=True), inner=True)
    m.node("MatMul", x, w, want="gg")


@row("MatMul", seeds=6)
def matmul_of_a_rounded_weight(m: Model) -> None:
    w = m.operand(np.arange(1.0, 13).reshape(3, 4), stored=True)
    rounded = m.node("Cast", w, to=TensorProto.INT64, inner=True)
    m.node("MatMul", m.operand((2, 3), stored=False), m.node("Cast", rounded, to=TensorProto.DOUBLE, inner=True))


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
    if m.coin(0.3) and m.stored[c].ndim:
        m.node("Add", m.operand((n, k), stored=False), c)
    if m.coin():
        left = m.node("Transpose", m.node("Neg", left, inner=True), inner=True)
        n, k = k, n
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
    m.opset = m.pick(14, 15, 21)
    c = m.size()
    shape = (m.size(), c, *m.shape(0, 2))
    m.node("BatchNormalization", activation(m, shape), *(m.operand((c,), "g") for _ in range(4)), want="g" * len(shape))


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
    m.node(
        "InstanceNormalization",
        activation(m, shape),
        m.operand((c,), "g"),
        m.operand((c,), "g"),
        want=".g..."[: len(shape)],
    )


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
    x = activation(m, (2, m.size(), 4, 4), kind=np.float32)
    m.node("MaxPool", x, outputs=2, kernel_shape=(2, 2))


@row("GlobalAveragePool", "GlobalMaxPool", seeds=10)
def global_pool(m: Model, op: str) -> None:
    m.equal = op == "GlobalAveragePool"
    shape = (m.size(), m.size(), *m.shape(1, 2))
    m.runtime, m.tolerance = True, 1e-6
    m.node(op, activation(m, shape, kind=np.float32), want="gg" + "p" * (len(shape) - 2))


@row("Resize", seeds=16)
def resize(m: Model) -> None:
    shape = (m.size(), m.size(), 3, 4)
    want = "ggpp"
    attributes: dict[str, Any] = {"mode": m.pick("nearest", "linear"), "coordinate_transformation_mode": "asymmetric"}
    if m.opset >= 18 and m.coin():
        attributes["axes"] = m.pick([2, 3], [-2, -1], [3])
        want = "gg.p"
    x = activation(m, shape, want)
    count = len(attributes.get("axes", shape))
    if m.coin():
        inputs = [x, "", m.operand(np.array([1, 1, 2, 2], np.float32)[-count:], stored=True)]
    else:
        inputs = [x, "", "", m.ints([*shape[:2], 6, 8][-count:])]
    narrow(m)
    m.node("Resize", *inputs, want=want, **attributes)


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
    m.equal, m.opset, m.tolerance = True, m.pick(18, 21), 1e-4
    groups, c = m.size(1, 3), m.size(1, 3)
    length = groups * c if m.opset >= 21 else groups
    shape = (m.size(), groups * c, *m.shape(1, 2))
    scale, bias = m.operand((length,)), m.operand((length,))
    m.node(
        "GroupNormalization", activation(m, shape), scale, bias, num_groups=groups, want=".." + "." * (len(shape) - 2)
    )


@row("MeanVarianceNormalization", seeds=8)
def mean_variance_norm(m: Model) -> None:
    m.equal = True
    attributes: dict[str, Any] = {"axes": m.pick([1], [0, -1], [2, 3])} if m.coin() else {}
    m.tolerance = 5e-3
    x = activation(m, tuple(m.size() for _ in range(4)), kind=np.float32)
    m.node("MeanVarianceNormalization", x, want="gggg", **attributes)


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


# -- layout -----------------------------------------------------------------------------------------------------


@row("Transpose")
def transpose(m: Model) -> None:
    shape = m.shape(0, 4)
    attributes: dict[str, Any] = {"perm": m.rng.permutation(len(shape)).tolist()} if shape and m.coin() else {}
    m.node("Transpose", m.operand(shape, stored=False), want="g" * len(shape), **attributes)


@row("Reshape", seeds=60)
def reshape(m: Model) -> None:
    """Split, join and re-associate axes, written with 0, -1 or in full."""
    factors = [m.size(1, 4) for _ in range(m.size(2, 5))]

    def grouped() -> list[int]:
        cuts = sorted({0, len(factors), *m.rng.integers(0, len(factors) + 1, 2).tolist()})
        return [int(np.prod(factors[a:b])) for a, b in itertools.pairwise(cuts)]

    before, after = grouped(), grouped()
    asked = list(after)
    if m.coin():
        asked[m.size(0, len(asked) - 1)] = -1
    for i, n in enumerate(asked):
        if n != -1 and i < len(before) and before[i] == n and m.coin():
            asked[i] = 0
    attributes = {"allowzero": m.size(0, 1) if 0 not in asked else 0} if m.opset >= 14 and m.coin() else {}
    m.node("Reshape", m.operand(tuple(before), stored=False), m.ints(asked, stored=True), **attributes)


@row("Reshape", seeds=6)
def reshape_to_heads(m: Model) -> None:
    h, d, n = m.size(), m.size(), m.size()
    x = m.operand((n, h * d), "gg", stored=False)
    y = m.node("Reshape", x, m.ints([n, h, d] if m.coin() else [0, -1, d]), want="ggg")
    m.node("Reshape", m.node("Transpose", y, perm=[1, 0, 2], want="ggg"), m.ints([h, -1]), want="gg")


@row("Reshape", seeds=6)
def reshape_to_a_computed_shape(m: Model) -> None:
    """The shape is put together from the sizes of another value, with a length known only when running."""
    h, d, length = m.size(), m.size(), m.size()
    x = m.operand((length, h * d), stored=False)
    m.symbols[x] = ("length", h * d)
    m.expected[x] = "pg"
    size = m.node("Gather", m.node("Shape", x, inner=True), m.ints(m.pick([0], [-2])), axis=0, inner=True)
    shape = m.node("Concat", size, m.ints([h]), m.ints([m.pick(d, -1)]), axis=0)
    y = m.node("Reshape", x, shape, want="pgg")
    folded = m.node("Mul", size, m.ints([h]), inner=True)
    flat = m.node("Reshape", y, m.node("Concat", folded, m.ints([d]), axis=0, inner=True), inner=True)
    m.node("Reshape", m.node("Tanh", flat, inner=True), m.ints([-1, h, d]), want="pgg")


@row("Flatten", seeds=10)
def flatten(m: Model) -> None:
    shape = m.shape(1, 4)
    attributes: dict[str, Any] = {"axis": m.size(-len(shape), len(shape))} if m.coin() else {}
    m.node("Flatten", m.operand(shape, stored=False), **attributes)


@row("Squeeze", seeds=10)
def squeeze(m: Model) -> None:
    m.opset = m.pick(11, 13, 21)
    shape = list(m.shape(1, 3))
    for _ in range(m.size(1, 2)):
        shape.insert(m.size(0, len(shape)), 1)
    x = m.operand(tuple(shape), stored=False)
    ones = [i for i, n in enumerate(shape) if n == 1]
    if len(ones) == 1:  # the reference drops one axis after the other
        ones[0] -= m.pick(0, len(shape))
    if m.coin(0.4):
        m.node("Squeeze", x, want="g" * (len(shape) - len(ones)))
    elif m.opset < 13:
        m.node("Squeeze", x, axes=ones)
    else:
        m.node("Squeeze", x, m.ints(ones[:1]))


@row("Unsqueeze", seeds=10)
def unsqueeze(m: Model) -> None:
    m.opset = m.pick(11, 13, 21)
    shape = m.shape(0, 3)
    rank = len(shape) + m.size(1, 2)
    axes = sorted(m.rng.permutation(rank)[: rank - len(shape)].tolist())
    if len(axes) == 1:  # the reference inserts one axis after the other
        axes[0] -= m.pick(0, rank)
    x = m.operand(shape, stored=False)
    if m.opset < 13:
        m.node("Unsqueeze", x, axes=axes)
    else:
        m.node("Unsqueeze", x, m.ints(axes))


@row("Expand", seeds=16)
def expand(m: Model) -> None:
    whole = m.shape()
    asked = m.stretched(whole)
    x = m.operand(m.stretched(whole), stored=False)
    shape = np.broadcast_shapes(asked, m.inputs[x].shape)
    if not asked:
        asked = (1,)
    m.node("Expand", x, m.ints(asked), want=letters(shape) if len(shape) else "p")


@row("Tile", seeds=10)
def tile(m: Model) -> None:
    shape = m.shape(1, 3)
    m.node("Tile", m.operand(shape, stored=False), m.ints([m.size(1, 3) for _ in shape]), want="g" * len(shape))


@row("Concat", seeds=10)
def concat(m: Model) -> None:
    shape = list(m.shape(1, 3))
    axis = m.size(0, len(shape) - 1)
    parts = []
    for i in range(m.size(1, 3)):
        shape[axis] = m.size(1, 4) if i else m.size()
        parts.append(m.operand(tuple(shape), stored=None if i else False))
    m.node("Concat", *parts, axis=axis - m.pick(0, len(shape)), want="g" * len(shape))


@row("Concat")
def concat_of_one_value_with_itself(m: Model) -> None:
    x = m.operand((m.size(), m.size()), "gg", stored=False)
    m.node("Concat", x, x, axis=1, want="gg")


@row("Concat", seeds=6)
def cut_where_joined(m: Model) -> None:
    """What was joined at some boundaries is split at others."""
    a, b, c = m.size(), m.size(), m.size()
    joined = m.node("Concat", m.operand((3, a + b)), m.operand((3, c), stored=False), axis=1)
    m.opset = max(m.opset, 13)
    m.node("Split", joined, m.ints([a, b + c]), outputs=2, axis=1)


@row("Split", seeds=24)
def split(m: Model) -> None:
    m.opset = m.pick(11, 13, 18, 21)
    shape = list(m.shape(1, 3))
    axis = m.size(0, len(shape) - 1)
    sizes = [m.size(1, 4) for _ in range(m.size(2, 3))]
    equal = m.coin(0.4)
    if equal:
        sizes = [sizes[0]] * len(sizes)
    attributes: dict[str, Any] = {"axis": axis - m.pick(0, len(shape))} if axis or m.coin() else {}
    shape[axis] = sum(sizes)
    inputs: list[str] = []
    if equal and m.coin(0.7):
        if m.opset >= 18:
            attributes["num_outputs"] = len(sizes)
    elif m.opset < 13:
        attributes["split"] = sizes
    else:
        inputs = [m.ints(sizes)]
    want = "".join("." if i == axis and 1 in sizes else "g" for i in range(len(shape)))
    m.node("Split", m.operand(tuple(shape), want, stored=False), *inputs, outputs=len(sizes), **attributes)


@row("Split", seeds=6)
def split_with_a_shorter_end(m: Model) -> None:
    m.opset = m.pick(18, 21)
    total, count = m.pick((7, 3), (5, 2), (8, 3), (7, 4))
    m.node("Split", m.operand((2, total), "gg", stored=False), outputs=count, axis=1, num_outputs=count)


@row("Slice", seeds=40)
def slice_(m: Model) -> None:
    m.opset = m.pick(9, 11, 13, 21)
    m.runtime = m.opset == 9
    m.tolerance = 1e-6
    shape = m.shape(1, 3)
    axes = m.rng.permutation(len(shape))[: m.size(1, len(shape))].tolist()
    all_axes = axes == list(range(len(shape))) and m.coin()
    starts, ends, steps = [], [], []
    for axis in axes:
        n = shape[axis]
        step = 1 if m.opset == 9 else m.pick(1, 1, 1, 2, 3, -1, -2)
        start = m.size(0, n - 1)
        end = m.size(start + 1, n)
        if step < 0:
            start, end = end - 1, (start - 1 if start else -n - 1)
        else:
            start -= m.pick(0, n)
            end = m.pick(end, end - n if end < n else 2**31 - 1, 2**63 - 1 if end == n else end)
        starts.append(start)
        ends.append(end)
        steps.append(step)
    x = m.operand(shape, stored=False, kind=np.float32 if m.runtime else np.float64)
    if m.opset < 10:
        m.node("Slice", x, starts=starts, ends=ends, **({} if all_axes else {"axes": axes}))
        return
    inputs = [m.ints(starts), m.ints(ends)]
    stepped = steps != [1] * len(steps)
    if not all_axes or stepped:
        inputs.append("" if all_axes else m.ints([a - m.pick(0, len(shape)) for a in axes]))
    if stepped:
        inputs.append(m.ints(steps))
    m.node("Slice", x, *inputs)


@row("Slice", seeds=4)
def halves(m: Model) -> None:
    """The two halves of a rotary embedding swap."""
    d = m.size()
    x = m.operand((m.size(), 2 * d), "gg", stored=False)
    bounds = [m.ints([n]) for n in (0, d, 2**63 - 1, 1)]
    low = m.node("Slice", x, bounds[0], bounds[1], bounds[3], want="gg")
    high = m.node("Slice", x, bounds[1], bounds[2], bounds[3], want="gg")
    m.node("Concat", m.node("Neg", high, inner=True), low, axis=1, want="gg")


@row("Slice", seeds=4)
def pairs(m: Model) -> None:
    """Every second index: the pairs of an interleaved rotary embedding."""
    d = m.size()
    x = m.operand((m.size(), 2 * d), "gg", stored=False)
    for first in (0, 1):
        m.node("Slice", x, m.ints([first]), m.ints([2**31 - 1]), m.ints([1]), m.ints([2]), want="gg")


@row("Pad", seeds=24)
def pad(m: Model) -> None:
    m.opset = m.pick(13, 18, 21)
    shape = tuple(m.size(3, 5) for _ in range(m.size(1, 3)))
    axes = list(range(len(shape)))
    mode = m.pick("", "constant", "edge", "reflect")
    chosen = m.opset >= 18 and m.coin()
    if chosen:
        axes = m.rng.permutation(len(shape))[: m.size(1, len(shape))].tolist()
    low = -1 if mode in ("", "constant") and m.coin(0.3) else 0
    inputs = [m.ints([m.size(low, 2) for _ in range(2 * len(axes))])]
    if mode in ("", "constant") and (m.coin() or chosen):
        inputs.append(m.operand(np.asarray(0.25)))
    elif chosen:
        inputs.append("")
    if chosen:
        inputs.append(m.ints([a - m.pick(0, len(shape)) for a in axes]))
    x = m.operand(shape, stored=False)
    if low < 0:
        narrow(m)
    m.node("Pad", x, *inputs, **({"mode": mode} if mode else {}))


# -- indexing ---------------------------------------------------------------------------------------------------


def indices(m: Model, shape: Sequence[int], limit: int, want: str = "", stored: bool | None = None) -> str:
    return m.operand(m.rng.integers(-limit, limit, tuple(shape)), want, stored=stored)


@row("Gather", seeds=24)
def gather(m: Model) -> None:
    """By values, which pins; the axes of the indices may grow, and so may all other axes."""
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    attributes: dict[str, Any] = {"axis": axis - m.pick(0, len(shape))} if axis or m.coin() else {}
    where = m.shape(0, 2)
    run = m.coin(0.3)
    if run:
        picked = m.rng.integers(0, shape[axis], ())
        index = m.ints(m.pick(np.reshape(picked, ()), np.reshape(picked, (1,)), np.reshape(picked, (1, 1))))
        where = m.stored[index].shape
    else:
        index = indices(m, where, shape[axis], stored=None if np.prod(where) > 2 else False)
    want = "".join(("." if run else "p") if i == axis else "g" for i in range(len(shape)))
    x = m.operand(shape, want)
    if x in m.stored and index in m.stored:
        m.inputs[x] = m.stored.pop(x)
    m.node("Gather", x, index, **attributes)


@row("Gather", seeds=12)
def gather_a_run(m: Model) -> None:
    """Known neighbours are a cut."""
    n = m.size(3, 6)
    first = m.size(0, n - 2)
    last = m.size(first + 2, n)
    run = np.arange(first, last) - m.pick(0, n)
    shape = m.pick((-1,), (1, -1), (-1, 1))
    m.node("Gather", m.operand((m.size(), n), "gg", stored=False), m.ints(run.reshape(shape)), axis=1)


@row("GatherElements", "ScatterElements", "Scatter", seeds=16)
def elements(m: Model, op: str) -> None:
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    where = [m.size(1, n) if m.coin(0.3) and i != axis else n for i, n in enumerate(shape)]
    where[axis] = m.size(1, shape[axis])
    attributes: dict[str, Any] = {"axis": axis - m.pick(0, len(shape))} if axis or m.coin() else {}
    index = np.broadcast_to(
        m.rng.permutation(shape[axis])[: where[axis]].reshape([-1 if i == axis else 1 for i in range(len(shape))]),
        where,
    ).copy()
    want = "".join("p" if i == axis or n != k else "g" for i, (n, k) in enumerate(zip(shape, where, strict=True)))
    operands = [m.operand(shape, want, stored=False), m.operand(index)]
    if op != "GatherElements":
        operands.append(m.operand(tuple(where)))
        if op == "Scatter":
            m.opset = 10
    if op != "ScatterElements" or tuple(where) != shape:
        narrow(m)
    m.node(op, *operands, **attributes)


@row("ScatterElements", "ScatterND", seeds=10)
def scatter_with_a_reduction(m: Model, op: str) -> None:
    m.opset = m.pick(18, 21)
    n, k, d = m.size(), m.size(), m.size()
    x, updates = m.operand((n, d), "p.", stored=False), m.operand((k, d))
    index = m.rng.integers(0, n, (k, 1))
    if op == "ScatterElements":
        index = np.broadcast_to(index, (k, d)).copy()
    m.node(op, x, m.operand(index, stored=False), updates, reduction=m.pick("add", "mul"))


@row("GatherND", seeds=20)
def gather_nd(m: Model) -> None:
    shape = m.shape(1, 4)
    batch = m.size(0, len(shape) - 1)
    depth = m.size(1, len(shape) - batch)
    where = (*shape[:batch], *m.shape(1 if batch == 0 else 0, 2))
    index = np.stack([m.rng.integers(0, n, where) for n in shape[batch : batch + depth]], axis=-1)
    want = "".join("p" if batch <= i < batch + depth else "g" for i in range(len(shape)))
    attributes = {"batch_dims": batch} if batch or m.coin() else {}
    m.node("GatherND", m.operand(shape, want, stored=False), m.operand(index, stored=False), **attributes)


@row("GatherND", seeds=20)
def gather_nd_run(m: Model) -> None:
    n = m.size(3, 6)
    first = m.size(0, n - 2)
    run = np.arange(first, m.size(first + 2, n))
    m.node("GatherND", m.operand((n, m.size()), "gg", stored=False), m.ints(run.reshape(m.pick((-1, 1), (1, -1, 1)))))


@row("ScatterND", seeds=12)
def scatter_nd(m: Model) -> None:
    shape = m.shape(1, 3)
    depth = m.size(1, len(shape))
    every = m.rng.permutation(np.array(list(np.ndindex(*shape[:depth]))))
    index = every[: m.size(1, min(3, len(every)))]
    want = "".join("p" if i < depth else "g" for i in range(len(shape)))
    updates = m.operand((len(index), *shape[depth:]))
    m.node("ScatterND", m.operand(shape, want, stored=False), m.operand(index, stored=m.coin()), updates)


@row("OneHot", seeds=8)
def one_hot(m: Model) -> None:
    where = m.shape(1, 2)
    attributes: dict[str, Any] = {"axis": m.size(-len(where) - 1, len(where))} if m.coin() else {}
    inputs = [indices(m, where, 4, "g" * len(where), stored=False), m.ints(m.pick(4, [4])), m.operand((2,))]
    narrow(m)
    m.node("OneHot", *inputs, **attributes)


@row("TopK", seeds=8)
def top_k(m: Model) -> None:
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    want = "".join("p" if i == axis else "g" for i in range(len(shape)))
    x = m.operand(shape, want, stored=False)
    k = m.ints([m.size(1, 2)])
    m.node("TopK", x, k, outputs=2, want=want, axis=axis - m.pick(0, len(shape)), largest=m.size(0, 1))


@row("CumSum", seeds=8)
def cum_sum(m: Model) -> None:
    shape = m.shape(1, 3)
    axis = m.size(0, len(shape) - 1)
    want = "".join("p" if i == axis else "g" for i in range(len(shape)))
    m.node("CumSum", m.operand(shape, want, stored=False), m.ints(axis - m.pick(0, len(shape))), want=want)


@row("Trilu", seeds=8)
def trilu(m: Model) -> None:
    m.opset = max(m.opset, 14)
    shape = m.shape(2, 4)
    want = "g" * (len(shape) - 2) + "pp"
    diagonal = [m.ints(m.size(-1, 1))] if m.coin() else []
    attributes = {"upper": m.size(0, 1)} if m.coin() else {}
    m.node("Trilu", m.operand(shape, want, stored=False), *diagonal, want=want, **attributes)


@row("EyeLike", seeds=3)
def eye_like(m: Model) -> None:
    m.node("EyeLike", m.operand((m.size(), m.size()), "pp", stored=False), want="pp", k=1)


@row("NonZero", seeds=3)
def non_zero(m: Model) -> None:
    shape = m.shape(1, 3)
    m.node("NonZero", m.operand(shape, "p" * len(shape), stored=False, kind=np.bool_))


# -- sizes ------------------------------------------------------------------------------------------------------


@row("Shape", seeds=8)
def shape(m: Model) -> None:
    dims = m.shape(1, 4)
    attributes: dict[str, Any] = {}
    if m.opset >= 15 and m.coin():
        attributes = {"start": m.size(-len(dims), len(dims))}
        if m.coin():
            attributes["end"] = m.size(-len(dims), len(dims) + 1)
    m.node("Shape", m.operand(dims, "g" * len(dims), stored=False), **attributes)


@row("Shape", "Size", seeds=6)
def shape_of_a_symbolic_value(m: Model, op: str) -> None:
    length, n, d = m.size(), m.size(), m.size()
    x = m.operand((length, n * d), "pg", stored=False)
    m.symbols[x] = ("length", n * d)
    folded = m.node("Reshape", x, m.ints([-1, d]), inner=True)
    m.node(op, folded if m.coin() else x)


@row("Size", seeds=4)
def size_(m: Model) -> None:
    dims = m.shape(1, 3)
    m.node("Size", m.operand(dims, "g" * len(dims), stored=False))


@row("Range", seeds=6)
def range_(m: Model) -> None:
    n = m.size()
    bounds = m.pick((0, n, 1), (1, n + 1, 1), (0, 2 * n, 2), (n, 0, -1))
    x = m.node("Range", *(m.ints(b) for b in bounds), inner=m.coin(), want="g")
    m.node("Mul", x, indices(m, (m.size(), n), 9, "gg", stored=False), want="gg")


@row("ConstantOfShape", seeds=6)
def constant_of_shape(m: Model) -> None:
    dims = m.shape(1, 3)
    attributes: dict[str, Any] = {"value": numpy_helper.from_array(np.array([2.5]))} if m.coin(0.7) else {}
    m.declared["constantofshape0_0"] = dims
    m.node("ConstantOfShape", m.ints(dims), want=letters(dims), **attributes)
    if attributes:
        m.node("Add", "constantofshape0_0", m.operand(dims, stored=False))


# -- control flow -----------------------------------------------------------------------------------------------


@row("If", seeds=10)
def if_(m: Model) -> None:
    """The branches read outer values and weights; each has a node that contracts."""
    n, k, p = m.size(), m.size(), m.size()
    x = m.operand((n, k), "gg", stored=False)
    condition = m.operand(np.asarray(m.coin()), stored=m.coin(0.3))
    weights = [m.operand((k, p), stored=True) for _ in range(2)]
    branches = [
        helper.make_graph(
            [
                helper.make_node("MatMul", [x, weights[i]], [f"inner{i}"], name=f"inner{i}"),
                helper.make_node(op, [f"inner{i}"], [f"branch{i}"], name=f"branch{i}"),
            ],
            f"b{i}",
            [],
            [helper.make_tensor_value_info(f"branch{i}", TensorProto.DOUBLE, (n, p))],
        )
        for i, op in enumerate(("Tanh", "Exp"))
    ]
    m.node("If", condition, then_branch=branches[0], else_branch=branches[1], want="gg")


@row("If", seeds=8)
def if_with_weights_of_its_own(m: Model) -> None:
    """A branch stores a weight; another reads a computed outer value."""
    n, k = m.size(), m.size()
    x = m.operand((n, k), "gg", stored=False)
    y = m.node("Tanh", x, inner=True)
    condition = m.operand(np.asarray(m.coin()), stored=False)
    info = [helper.make_tensor_value_info("out", TensorProto.DOUBLE, (n, k))]
    weight = numpy_helper.from_array(m.values((k, k)), "own")
    branches = [
        helper.make_graph([helper.make_node("MatMul", [x, "own"], ["out"], name="a")], "a", [], info, [weight]),
        helper.make_graph([helper.make_node("Mul", [x, y], ["out"], name="b")], "b", [], info),
    ]
    m.node("If", condition, then_branch=branches[0], else_branch=branches[1])


@row("Constant", seeds=4)
def constant_of_a_branch(m: Model) -> None:
    """All that a branch does is to return a stored tensor."""
    n, k = m.size(), m.size()
    x = m.operand((n, k), "gg", stored=False)
    condition = m.operand(np.asarray(m.coin()), stored=False)
    value = numpy_helper.from_array(m.values((n, k)))
    made = [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Tanh", [x], ["t"], name="t")]
    branches = [
        helper.make_graph([node], "b", [], [helper.make_tensor_value_info(node.output[0], TensorProto.DOUBLE, (n, k))])
        for node in made
    ]
    m.node("If", condition, then_branch=branches[0], else_branch=branches[1], want="gg")


# -- attention --------------------------------------------------------------------------------------------------


def narrow(m: Model, tolerance: float = 3e-5) -> None:
    """Run in ONNX Runtime, in single precision."""
    m.runtime, m.tolerance = True, tolerance
    for store in (m.inputs, m.stored):
        store.update({k: v.astype(np.float32) for k, v in store.items() if v.dtype == np.float64})


@row("Attention", seeds=30)
def attention(m: Model) -> None:
    m.opset, m.equal = 23, True
    b, s, t, kv, group, d, e = 2, m.size(), m.size(), m.size(1, 3), m.size(1, 2), m.size(), m.size()
    heads = kv * group
    four = m.coin()
    q = activation(m, (b, heads, s, d) if four else (b, s, heads * d))
    k = activation(m, (b, kv, t, d) if four else (b, t, kv * d))
    v = activation(m, (b, kv, t, e) if four else (b, t, kv * e))
    attributes: dict[str, Any] = {} if four else {"q_num_heads": heads, "kv_num_heads": kv}
    if m.coin():
        attributes["scale"] = 0.3
    inputs = [q, k, v]
    past = m.coin(0.3)
    total = t + (3 if past else 0)
    if m.coin():
        inputs.append(m.operand(m.pick((s, total), (b, heads, s, total), (1, 1, s, total), (b, 1, s, total))))
    if past:
        inputs += [""] * (4 - len(inputs))
        inputs += [m.operand((b, kv, 3, d), stored=False), m.operand((b, kv, 3, e), stored=False)]
    if m.coin(0.2):
        attributes["softcap"] = 2.0
    narrow(m)
    m.node("Attention", *inputs, outputs=3 if past else 1, **attributes)


@row("Attention", seeds=6)
def causal_attention(m: Model) -> None:
    m.opset, m.equal = 23, True
    s, d = m.size(), m.size()
    q, k, v = (activation(m, (2, 2, n, d), "..p." if n == s else "") for n in (s, s + 1, s + 1))
    narrow(m)
    m.node("Attention", q, k, v, is_causal=1)


def rotary_row(m: Model, domain: str) -> None:
    b, s, h, half = 2, m.size(), m.size(1, 3), m.size(2, 3)
    partial = m.coin(0.3)
    d = 2 * half + (2 if partial else 0)
    four = m.coin()
    x = activation(m, (b, h, s, d) if four else (b, s, h * d))
    attributes: dict[str, Any] = {"interleaved": m.size(0, 1)} if m.coin() else {}
    if partial:
        attributes["rotary_embedding_dim"] = 2 * half
    if not four or partial:
        attributes["num_heads"] = h
    positions = m.coin() or domain != ""
    table = (32, half) if positions else (b, s, half)
    cosines, sines = m.operand(table), m.operand(table)
    narrow(m)
    ids = [m.operand(m.rng.integers(0, 7, (b, s)), stored=False)] if positions else []
    inputs = [x, *ids, cosines, sines] if domain else [x, cosines, sines, *ids]
    m.node("RotaryEmbedding", *inputs, domain=domain, **attributes)


@row("RotaryEmbedding", seeds=16)
def rotary(m: Model) -> None:
    m.opset = 23
    rotary_row(m, "")


@row("RotaryEmbedding", domain=MICROSOFT, seeds=12)
def microsoft_rotary(m: Model) -> None:
    m.opset = 17
    rotary_row(m, MICROSOFT)


@row("MultiHeadAttention", domain=MICROSOFT, seeds=20)
def multi_head_attention(m: Model) -> None:
    multi_head_row(m, four=False)


@row("MultiHeadAttention", domain=MICROSOFT, seeds=8)
def cross_attention(m: Model) -> None:
    multi_head_row(m, four=True)


def multi_head_row(m: Model, four: bool) -> None:
    m.opset, m.equal = 17, True
    b, s, t, h, d, e = 2, m.size(), m.size(), m.size(1, 3), m.size(), m.size()
    q = activation(m, (b, s, h * d))
    k = activation(m, (b, h, t, d) if four else (b, t, h * d))
    v = activation(m, (b, h, t, d) if four else (b, t, h * e))
    inputs = [q, k, v]
    if not four and m.coin():
        inputs.append(m.operand((2 * h * d + h * e,)))
    if m.coin():
        inputs += [""] * (5 - len(inputs))
        inputs.append(m.operand(m.pick((b, h, s, t), (1, 1, s, t), (b, 1, s, t), (1, h, s, t))))
    narrow(m)
    attributes = {"scale": 0.3} if m.coin() else {}
    m.node("MultiHeadAttention", *inputs, domain=MICROSOFT, num_heads=h, **attributes)


@row("GroupQueryAttention", domain=MICROSOFT, seeds=16)
def group_query_attention(m: Model) -> None:
    group_query_row(m, 1, 1)


@row("GroupQueryAttention", domain=MICROSOFT, seeds=6)
def group_query_attention_of_a_batch(m: Model) -> None:
    group_query_row(m, 2, 1)


@row("GroupQueryAttention", domain=MICROSOFT, seeds=6)
def group_query_attention_of_a_prompt(m: Model) -> None:
    group_query_row(m, 1, 3)


def group_query_row(m: Model, b: int, s: int) -> None:
    m.opset, m.equal = 17, True
    kv, group, d = m.size(1, 3), m.size(1, 2), 16
    heads, past = kv * group, 2
    packed = m.coin(0.3)
    if packed:
        inputs = [activation(m, (b, s, (heads + 2 * kv) * d)), "", ""]
    else:
        inputs = [activation(m, (b, s, n * d)) for n in (heads, kv, kv)]
    inputs += [m.operand((b, kv, past, d), stored=False) for _ in range(2)]
    total = s + past
    inputs += [
        m.operand(np.full((b,), total - 1, np.int32), stored=True),
        m.operand(np.asarray(total, np.int32), stored=True),
    ]
    attributes: dict[str, Any] = {}
    if m.coin():
        attributes["do_rotary"] = 1
        inputs += [m.operand((16, d // 2)), m.operand((16, d // 2))]
    narrow(m)
    m.node(
        "GroupQueryAttention",
        *inputs,
        outputs=3,
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv,
        **attributes,
    )


@row("Attention", domain=MICROSOFT, seeds=12)
def packed_attention(m: Model) -> None:
    m.opset, m.equal = 17, True
    b, s, n, h, d, e = 2, m.size(), m.size(), m.size(1, 3), m.size(), m.size()
    named = m.coin()
    if not named:
        e = d
    inputs = [
        activation(m, (b, s, n), "..g"),
        m.operand((n, h * (2 * d + e)), "gg"),
        m.operand((h * (2 * d + e),), "g"),
    ]
    narrow(m)
    attributes: dict[str, Any] = {"qkv_hidden_sizes": [h * d, h * d, h * e]} if named else {}
    m.node("Attention", *inputs, domain=MICROSOFT, num_heads=h, **attributes)


# -- ONNX Runtime's own -----------------------------------------------------------------------------------------


@row("Gelu", "QuickGelu", domain=MICROSOFT, seeds=3)
def microsoft_unary(m: Model, op: str) -> None:
    dims = m.shape()
    x = m.operand(dims, stored=False)
    narrow(m)
    m.node(op, x, domain=MICROSOFT, want=letters(dims))


@row("BiasGelu", "FastGelu", domain=MICROSOFT, seeds=4)
def biased_activation(m: Model, op: str) -> None:
    dims = m.shape()
    inputs = [m.operand(dims, stored=False)]
    if op == "BiasGelu" or m.coin():
        inputs.append(m.operand(dims[-1:]))
    narrow(m)
    m.node(op, *inputs, domain=MICROSOFT, want=letters(dims))


@row("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT, seeds=8)
def skip_layer_norm(m: Model, op: str) -> None:
    m.equal = True
    b, s, n = m.size(), m.size(), m.size()
    inputs = [m.operand((b, s, n), "ggg", stored=False), m.operand(m.pick((b, s, n), (1, s, n), (s, n)))]
    inputs.append(m.operand((n,)))
    if m.coin():
        if op == "SkipLayerNormalization":
            inputs.append(m.operand((n,)))
        inputs.append(m.operand((n,)))
    narrow(m, 3e-4)
    names = [op.lower(), "", "", op.lower() + "_sum"] if m.coin() else [op.lower()]
    m.nodes.append(helper.make_node(op, inputs, names, name="skip", domain=MICROSOFT, epsilon=1e-5))
    m.outputs += [name for name in names if name]


@row("EmbedLayerNormalization", domain=MICROSOFT, seeds=8)
def embed_layer_norm(m: Model) -> None:
    m.equal = True
    b, s, n = m.size(), m.size(), m.size()
    ids = m.operand(m.rng.integers(0, 7, (b, s)).astype(np.int32), stored=False)
    kinds = m.operand(m.rng.integers(0, 2, (b, s)).astype(np.int32), stored=False) if m.coin() else ""
    tables = [m.operand((rows, n), "pg", stored=True) for rows in (7, 6)]
    tables.append(m.operand((2, n), "pg", stored=True) if kinds else "")
    inputs = [ids, kinds, *tables, m.operand((n,), stored=True), m.operand((n,), stored=True)]
    narrow(m, 3e-4)
    m.nodes.append(
        helper.make_node("EmbedLayerNormalization", inputs, ["embedded", "mask"], name="e", domain=MICROSOFT)
    )
    m.outputs.append("embedded")


@row("FusedMatMul", "TransposeMatMul", domain=MICROSOFT, seeds=12)
def fused_matmul(m: Model, op: str) -> None:
    batch = tuple(m.size() for _ in range(m.size(0, 2)))
    n, k, p = m.size(), m.size(), m.size()
    a, b = m.size(0, 1), m.size(0, 1)
    x = m.operand((*batch, k, n) if a else (*batch, n, k))
    w = m.operand((*batch, p, k) if b else (*batch, k, p))
    if x in m.stored and w in m.stored:
        m.inputs[x] = m.stored.pop(x)
    narrow(m)
    m.node(op, x, w, domain=MICROSOFT, transA=a, transB=b, alpha=0.5, want="g" * len(batch) + "gg")


# -- the tests --------------------------------------------------------------------------------------------------


def test_every_rule_has_a_row() -> None:
    assert set(registry.ruled()) == COVERED


@pytest.mark.parametrize("key, build, seeds", ROWS)
def test_grown_operator_computes_the_same(key: tuple[str, str], build: Build, seeds: int) -> None:
    for seed in range(seeds):
        check(key, build, seed)
