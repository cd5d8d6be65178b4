"""The names that we make are free, whatever names a graph has: none, one for all nodes, or exactly our names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import build_model, normal

from hyperclone_onnx import expand
from hyperclone_onnx.frameworks.compiling.preparation import prepare_model
from hyperclone_onnx.reading.normalise import normalise
from hyperclone_onnx.validation.unrounded import unrounded
from hyperclone_onnx.validation.wide import to_double

GRAPH = """
g (int64[batch, length] ids, float[batch, length, 48] x) => (float[batch, length, 31] logits, float[2] constant) {
  constant = Constant <value = float[2] {1.0, 2.0}> ()
  h = Gather (table, ids)
  s = Add (h, x)
  a = LayerNormalization (s, gain)
  b = LayerNormalization (a, gain)
  codes, scale, zero = DynamicQuantizeLinear (b)
  sum = MatMulInteger (codes, w8, zero)
  more = Add (sum, n)
  real = Cast <to = 1> (more)
  c = Mul (real, scale)
  codes_2, scale_2, zero_2 = DynamicQuantizeLinear (c)
  sum_2 = MatMulInteger (codes_2, w8, zero_2)
  more_2 = Add (sum_2, n)
  real_2 = Cast <to = 1> (more_2)
  d = Mul (real_2, scale_2)
  e = com.microsoft.MatMulNBits <K = 48, N = 48, bits = 4, block_size = 32> (d, blocks, scales)
  f = com.microsoft.MatMulNBits <K = 48, N = 48, bits = 4, block_size = 32> (e, blocks, scales)
  turned = Transpose (table)
  one = MatMul (f, turned)
  other = MatMul (a, turned)
  logits = Add (one, other)
}
"""
PLAIN = """
g (int64[batch, length] ids) => (float[batch, length, 31] logits) {
  h = Gather (table, ids)
  a = LayerNormalization (h, gain)
  u = MatMul (a, up)
  v = MatMul (u, down)
  s = Add (h, v)
  b = LayerNormalization (s, gain)
  turned = Transpose (table)
  one = MatMul (a, turned)
  other = MatMul (b, turned)
  logits = Add (one, other)
}
"""


def model() -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {
        "table": rng.standard_normal((31, 48)).astype(np.float32),
        "gain": np.ones(48, np.float32),
        "w8": rng.integers(-60, 60, (48, 48)).astype(np.int8),
        "n": np.array(3, np.int32),
        "blocks": rng.integers(0, 255, (48, 2, 16)).astype(np.uint8),
        "scales": np.ones((48 * 2,), np.float32),
    }
    proto = build_model(GRAPH, weights, opset=21)
    proto.opset_import.add(domain="com.microsoft", version=1)
    return ir.from_proto(proto)


def without_rounding_in_double(source: ir.Model) -> ir.Model:
    return to_double(unrounded(source))


CHANGES: dict[str, Callable[[ir.Model], ir.Model]] = {
    "normalise": normalise,
    "to_double": to_double,
    "unrounded": unrounded,
    "both": without_rounding_in_double,
}


def parts(source: ir.Model) -> Iterator[ir.Graph]:
    yield source.graph
    yield from source.graph.subgraphs()


def value_names(source: ir.Model) -> list[str | None]:
    return [
        value.name
        for graph in parts(source)
        for value in (*graph.inputs, *graph.initializers.values(), *(o for node in graph for o in node.outputs))
    ]


def node_names(source: ir.Model) -> list[str | None]:
    return [node.name for graph in parts(source) for node in graph]


def assert_unique(names: list[str | None]) -> None:
    assert [name for name, count in Counter(names).items() if count > 1 or not name] == []


def nameless(source: ir.Model) -> ir.Model:
    for node in source.graph:
        node.name = ""
    return source


def all_alike(source: ir.Model) -> ir.Model:
    for node in source.graph:
        node.name = "node"
    return source


@pytest.mark.parametrize("names", [nameless, all_alike])
@pytest.mark.parametrize("change", sorted(CHANGES))
def test_nodes_without_names_of_their_own(names: Callable[[ir.Model], ir.Model], change: str) -> None:
    source = names(model())
    before = Counter(node_names(source))
    changed = CHANGES[change](source.clone())
    assert_unique(value_names(changed))
    assert_unique(list((Counter(node_names(changed)) - before).elements()))
    onnx.checker.check_model(ir.to_proto(changed))


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_names_that_are_taken(change: str) -> None:
    """The graph gets the very names that the change would make, on other values and nodes."""
    source = model()
    first = CHANGES[change](source.clone())
    fresh_values = sorted(set(map(str, value_names(first))) - set(map(str, value_names(source))))
    fresh_nodes = sorted(set(map(str, node_names(first))) - set(map(str, node_names(source))))
    assert fresh_values and fresh_nodes
    for start in range(0, len(fresh_values), 8):
        taken = model()
        inner = [o for node in taken.graph for o in node.outputs if not o.is_graph_output() and o.name != "sum"]
        for value, name in zip(inner, fresh_values[start:], strict=False):
            value.name = name
        for node, name in zip(taken.graph, fresh_nodes[start:], strict=False):
            node.name = name
        changed = CHANGES[change](taken)
        assert_unique(value_names(changed))
        assert_unique([name for name in node_names(changed) if name])
        onnx.checker.check_model(ir.to_proto(changed))


def plain() -> onnx.ModelProto:
    return build_model(PLAIN, normal(0, {"table": (31, 12), "gain": (12,), "up": (12, 20), "down": (20, 12)}))


@pytest.mark.parametrize("names", [nameless, all_alike])
def test_growing_and_handing_over(names: Callable[[ir.Model], ir.Model], tmp_path: Path) -> None:
    ir.save(names(ir.from_proto(plain())), tmp_path / "small.onnx")
    # ONNX Runtime does not load a file in which two nodes have the same name.
    expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, check=names is nameless)
    grown = ir.load(tmp_path / "big.onnx")
    assert_unique(value_names(grown))
    assert_unique(node_names(grown))
    prepared = prepare_model(ir.load(tmp_path / "small.onnx"))
    assert_unique(value_names(prepared))
    assert_unique(node_names(prepared))


def test_a_tensor_of_the_name_that_a_second_form_would_get(tmp_path: Path) -> None:
    """A tied table that grows in two ways becomes two tensors. Here, another value already has the name ``table.1``."""
    proto = plain()
    for node in proto.graph.node:
        node.output[:] = ["table.1" if name == "v" else name for name in node.output]
        node.input[:] = ["table.1" if name == "v" else name for name in node.input]
    onnx.save(proto, tmp_path / "small.onnx")
    done = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, untie=True)
    assert "table.2" in done.plan.tensors and "table.1" not in done.plan.tensors
