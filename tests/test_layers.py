"""Finding layers: stacks of nodes that are alike, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import build_model, normal

from hyperclone_onnx.layers.stacks import Stack, find_stacks
from hyperclone_onnx.layers.unfusing import unfuse
from hyperclone_onnx.reading.normalise import normalise
from models import zoo_store

Counts = dict[str, int]


def stacks_of(model: onnx.ModelProto | ir.Model) -> list[Stack]:
    graph = normalise(model if isinstance(model, ir.Model) else ir.from_proto(model)).graph
    unfuse(graph)
    return find_stacks(graph)


def counts(stacks: Iterable[Stack]) -> Counts:
    return {stack.name: stack.layers for stack in stacks}


# -- the zoo ----------------------------------------------------------------------------------------------

TWO = {"layers": 2}
STACKS: dict[str, Counts] = {
    "bart": {"encoder": 2, "decoder": 2},
    "whisper": {"encoder": 2, "decoder": 2},
    "convnext": {"stack0": 2, "stack1": 2},
}
"""The stacks of families that have other than one stack of two layers."""

IN_BRANCHES = "the layers are in the branches of an If"
WITHOUT = {
    "albert.fused": "attention is one node in one of its layers and several in the other, and all layers share weights",
    "bart_merged.cached": IN_BRANCHES,
    "deberta.torchscript": "its layers are not alike node by node, and no segment of them is",
    "flan_t5_merged.cached": IN_BRANCHES,
    "jamba": "its two layers have nothing in common: a state space and attention, dense and of experts",
    "resnet": "each stage has one block of its own shape",
    "t5_merged": IN_BRANCHES,
}
"""The graphs without layers that can be told, and why: by name, or by family."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if index % 2 else [])
        for index, name in enumerate(name for name in zoo_store.names() if not name.endswith(".collide"))
    ],
)
def test_the_layers_of_the_zoo(name: str) -> None:
    family = name.split(".")[0]
    expected = {} if name in WITHOUT or family in WITHOUT else STACKS.get(family, TWO)
    stacks = stacks_of(ir.load(zoo_store.path_of(name)))
    assert counts(stacks) == expected
    for unit in (unit for stack in stacks for unit in stack.units):
        assert len(unit.nodes) == len(set(unit.nodes)) > 5
        assert len(unit.stored) == len(set(unit.stored))
        assert len(unit.inputs) == len(set(unit.inputs))


def test_nearly_all_graphs_of_the_zoo_have_layers() -> None:
    names = zoo_store.names()
    without = [name for name in names if name in WITHOUT or name.split(".")[0] in WITHOUT]
    assert len(without) < 0.06 * len(names)


def test_layers_of_other_nodes_have_a_part_in_common() -> None:
    """What all layers have comes first, in one order; the rest of a layer is its own."""
    (stack,) = stacks_of(ir.load(zoo_store.path_of("deepseek_v3.built")))
    assert stack.aligned is not None
    nodes, stored, inputs = stack.aligned
    dense, experts = stack.units
    assert len(dense.nodes) < len(experts.nodes) and min(nodes, stored, inputs) > 0
    for of_dense, of_experts in zip(dense.stored[:stored], experts.stored[:stored], strict=True):
        assert str(of_dense.name).replace(".0.", ".1.") == of_experts.name
    assert set(dense.nodes).isdisjoint(experts.nodes) and set(dense.stored).isdisjoint(experts.stored)


# -- structure --------------------------------------------------------------------------------------------


def blocks(kinds: str, ending: str = "", names: str = "h.{}.{}") -> onnx.ModelProto:
    """Residual blocks, one for each letter of `kinds`; each letter adds another of the graph's inputs.

    Args:
        kinds: letters of `abc`, e.g. "aabaab".
        ending: nodes behind the blocks, which compute `y` from `x`. By default `y` is `x`.
        names: how weights are named.
    """
    lines: list[str] = ["x0 = Gather (table, ids)"]
    weights: dict[str, tuple[int, ...]] = {"table": (11, 6)}
    for number, kind in enumerate(kinds):
        up, down, gain, shift = (names.format(number, part) for part in ("up", "down", "gain", "shift"))
        weights |= {up: (6, 10), down: (10, 6), gain: (6,), shift: (6,)}
        lines += [
            f'n{number} = LayerNormalization (x{number}, "{gain}", "{shift}")',
            f"m{number} = Add (n{number}, {kind})",
            f'u{number} = MatMul (m{number}, "{up}")',
            f"r{number} = Relu (u{number})",
            f'd{number} = MatMul (r{number}, "{down}")',
            f"x{number + 1} = Add (x{number}, d{number})",
        ]
    lines.append((ending or "y = Identity (x)").replace("(x)", f"(x{len(kinds)})"))
    used = "".join(f", float[n, 6] {kind}" for kind in sorted(set(kinds)))
    body = "\n".join(line.replace('"', "") for line in lines)
    text = f"g (int64[n] ids{used}) => (float[n, 6] y) {{\n{body}\n}}"
    plain = {name: name.replace(".", "_").replace(":", "_") for name in weights}
    for name, other in plain.items():
        text = text.replace(name, other)
    model = build_model(text, {})
    back = {other: name for name, other in plain.items()}
    for node in model.graph.node:
        node.input[:] = [back.get(name, name) for name in node.input]
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in normal(3, weights).items()
    )
    return model


@pytest.mark.parametrize(
    ("kinds", "layers", "period"),
    [
        ("aaa", 3, 1),
        ("aaaaaaa", 7, 1),
        ("abab", 4, 2),
        ("aabaab", 6, 3),
        ("abababab", 8, 2),
        ("aab", 2, 1),
        ("ab", 2, 1),
        ("a", 0, 0),
    ],
)
def test_layers_that_alternate_are_one_unit(kinds: str, layers: int, period: int) -> None:
    """An input that one layer alone reads, as in "ab", is its own, like a cache."""
    stacks = stacks_of(blocks(kinds))
    assert [(stack.layers, stack.period) for stack in stacks] == ([(layers, period)] if layers else [])


def test_layers_are_found_without_their_names() -> None:
    model = blocks("aaaa", names="h.{}.{}")
    for number, tensor in enumerate(model.graph.initializer):
        for node in model.graph.node:
            node.input[:] = [f"t{97 * number % 31}" if name == tensor.name else name for name in node.input]
        tensor.name = f"t{97 * number % 31}"
    (stack,) = stacks_of(model)
    assert stack.layers == 4 and all(len(unit.nodes) == 6 and len(unit.stored) == 4 for unit in stack.units)


def test_a_layer_of_another_shape_ends_the_stack() -> None:
    model = blocks("aaaa")
    for name, shape in (("h.3.up", (6, 12)), ("h.3.down", (12, 6))):
        (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    assert counts(stacks_of(model)) == {"layers": 3}


def test_a_layer_with_another_operator_ends_the_stack() -> None:
    model = blocks("aaaa")
    (node,) = [node for node in model.graph.node if node.output[0] == "r3"]
    node.op_type = "Tanh"
    assert counts(stacks_of(model)) == {"layers": 3}


def test_each_layer_follows_the_one_before_it() -> None:
    (stack,) = stacks_of(blocks("aaaa"))
    for before, after in zip(stack.units, stack.units[1:], strict=False):
        assert before.leaves == after.enters


@pytest.mark.parametrize(("stated", "epsilon"), [("", 1e-12), (" <epsilon = 0.001>", 1e-3)])
def test_a_norm_that_is_taken_apart_keeps_its_epsilon(stated: str, epsilon: float) -> None:
    """ONNX Runtime's fused norms add 1e-12 where they state nothing. A LayerNormalization would add 1e-5."""
    text = f"""
    <ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
    g (float[n, 4] x, float[n, 4] y) => (float[n, 4] z) <float[4] gain = {{1, 1, 1, 1}}> {{
        z = com.microsoft.SkipLayerNormalization{stated}(x, y, gain)
    }}
    """
    graph = ir.from_proto(onnx.parser.parse_model(text)).graph
    unfuse(graph)
    (norm,) = [node for node in graph if node.op_type == "LayerNormalization"]
    assert norm.attributes["epsilon"].as_float() == pytest.approx(epsilon)
