"""Random models of one node, and the check that op(grow(x)) is grow(op(x)), in double precision."""

from __future__ import annotations

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
from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.analysis.roles import name_dimensions
from hyperclone_onnx.analysis.walk import infer
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.plan.maps import SourceMap
from hyperclone_onnx.plan.strategies import STRATEGIES, Strategy
from hyperclone_onnx.planning.making import make_plan
from hyperclone_onnx.planning.request import Growth
from hyperclone_onnx.reading.normalise import normalise
from hyperclone_onnx.rewriting.rewriting import rewrite
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.validation.inputs import cases as feeds
from rule_rows.references import REFERENCES

assert hyperclone_onnx.rules  # importing it registers the rules

Array = np.ndarray[Any, Any]
OPSETS = (13, 17, 18, 21, 23)
MICROSOFT = "com.microsoft"
PREVIEW = "ai.onnx.preview"


@dataclass
class Model:
    """A random model under construction, and expectations about its axes.

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
    kinds: dict[str, int] = field(default_factory=dict)
    """The element types of outputs that ONNX's own inference does not know."""
    expected: dict[str, str] = field(default_factory=dict)
    uses: list[tuple[int, str]] = field(default_factory=list)
    equal: bool = False
    """Whether the operator averages, so that unequal repeats are refused."""
    tolerance: float = 2e-7
    """The tolerance: noise and attributes have single precision."""
    runtime: bool = False
    """Whether to run in ONNX Runtime, because the reference does not have the operator."""
    domain: str = ""
    """The domain of the operator, if one row serves several operators."""
    kind: int | None = None
    """The type of outputs for which shape inference gives no type, if they are not floating-point."""

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
        """A graph input or a stored tensor (random, unless given), from a shape or an array."""
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
        self,
        op_type: str,
        *inputs: str,
        outputs: int = 1,
        want: str = "",
        inner: bool = False,
        kind: Any = None,
        **attributes: Any,
    ) -> Any:
        names = [f"{op_type.lower()}{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=f"n{len(self.nodes)}", **attributes))
        if not inner:
            self.outputs += names
        if kind is not None:
            self.kinds[names[0]] = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
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
        others = dict.fromkeys((MICROSOFT, PREVIEW, *(node.domain for node in self.nodes if node.domain)))
        imports = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in others)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        typed = onnx.shape_inference.infer_shapes(model)
        for info in typed.graph.output:
            if not info.type.HasField("tensor_type"):
                usual = self.kind or (TensorProto.FLOAT if self.runtime else TensorProto.DOUBLE)
                info.type.tensor_type.elem_type = self.kinds.get(info.name, usual)
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
                session = ReferenceEvaluator(model, new_ops=REFERENCES)
            return dict(zip(self.outputs, session.run(None, values), strict=True))


Build = Callable[..., Any]
"""A row takes the model, and the operator if it serves several operators."""
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
    """The plan and the grown model. None if nothing can grow."""
    named = name_dimensions(dimensions)
    maps: dict[Dim, tuple[str, SourceMap]] = {}
    for dimension in named:
        if dimension.dim.growable and dimension.size > 0 and (everything or m.coin(0.6)):
            maps[dimension.dim] = (dimension.name, random_map(m, dimension.size))
    tied = [dimension for dimension in named if dimension.dim.tied is not None and dimension.dim.growable]
    if any(dimension.dim in maps for dimension in tied):
        times = m.size(2, 3)
        maps |= {dimension.dim: (dimension.name, SourceMap(dimension.size, repeat=times)) for dimension in tied}
    if not maps:
        return None
    try:
        plan = make_plan(Growth(dimensions, named, maps), strategy)
    except Refused:
        assert m.equal, "refused though nothing averages"
        maps = {e.dim: (e.name, SourceMap(e.size, repeat=2)) for e in named if e.dim.growable and e.size > 0}
        plan = make_plan(Growth(dimensions, named, maps), strategy)
    return plan, rewrite(dimensions.model, plan)


def random_model(key: tuple[str, str], build: Build, seed: int) -> Model:
    """The model of a row, for one seed."""
    rng = np.random.default_rng([zlib.crc32(f"{key}{build.__name__}".encode()), seed])
    m = Model(rng, int(rng.choice(OPSETS)), domain=key[0])
    build(*(m, key[1])[: build.__code__.co_argcount])
    return m


def check(key: tuple[str, str], build: Build, seed: int) -> bool:
    """Build one model, grow it and compare. Returns whether anything could grow."""
    m = random_model(key, build, seed)
    source = m.proto()
    assert f'"{key[1]}"' in str(source.graph)
    expected = m.run(source, m.inputs)
    dimensions = infer(normalise(ir.from_proto(source)))
    assert not dimensions.without_rule
    check_expected(m, dimensions)
    strategy = Strategy(STRATEGIES[seed % len(STRATEGIES)], seed=seed)
    plan_and_model = grow(m, dimensions, strategy, everything=seed % 2 == 0)
    if plan_and_model is None:
        return False
    plan, model = plan_and_model
    grown = ir.to_proto(model)
    actual = m.run(grown, feeds.grown(m.inputs, plan.inputs, plan.maps))
    expected = feeds.grown(expected, plan.outputs, plan.maps)
    for name, value in expected.items():
        shape = np.shape(actual[name])
        assert shape == np.shape(value), f"{name}: {shape}, not {np.shape(value)}"
        if np.asarray(value).dtype.kind == "f":
            np.testing.assert_allclose(actual[name], value, rtol=m.tolerance, atol=m.tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
    return True


def letters(shape: Sequence[int]) -> str:
    return "".join("p" if n == 1 else "g" for n in shape)


def activation(m: Model, shape: Sequence[int], want: str = "", **kinds: Any) -> str:
    """A computed value: some rules pin the axes of a graph input."""
    x = m.operand(tuple(shape), stored=False, **kinds)
    return str(m.node("Identity", x, inner=True, want=want))


def indices(m: Model, shape: Sequence[int], limit: int, want: str = "", stored: bool | None = None) -> str:
    return m.operand(m.rng.integers(-limit, limit, tuple(shape)), want, stored=stored)


def narrow(m: Model, tolerance: float = 3e-5) -> None:
    """Run in ONNX Runtime, in single precision."""
    m.runtime, m.tolerance = True, tolerance
    for store in (m.inputs, m.stored):
        store.update({k: v.astype(np.float32) for k, v in store.items() if v.dtype == np.float64})
