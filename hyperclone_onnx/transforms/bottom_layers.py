"""Leaves only the first layers of a stack in a graph: what stands behind the stack reads the last of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as passes

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.graphs import is_initializer
from hyperclone_onnx.layers.stacks import Stack
from hyperclone_onnx.transforms.deepening import Place, deepen
from hyperclone_onnx.transforms.layers import stacks_of


@dataclass(frozen=True)
class Parts:
    """The names of the stored tensors of a stack of layers.

    Args:
        layers: those of each unit, from the first to the last. A tensor that several layers share is none of them.
        period: the number of layers in a unit.
        behind: those that are read behind the stack: the last norm, the head.
    """

    layers: tuple[frozenset[str], ...]
    period: int
    behind: frozenset[str]


def parts_of(model: ir.Model, name: str | None = None) -> Parts:
    """The stored tensors of the layers of a normalised graph. Fused norms in it are taken apart.

    Args:
        model: the graph.
        name: the name of the stack, where the graph has several.

    Raises:
        BadRequest: the graph has no such stack, or it has several and none is named.
    """
    stack = _stack(model, name)
    return Parts(
        tuple(frozenset(value.name or "" for value in unit.stored) for unit in stack.units),
        stack.period,
        frozenset(_behind(stack)),
    )


def keep_bottom(model: ir.Model, number: int, name: str | None = None) -> ir.Model:
    """Take all but the first layers out of a normalised graph, which is changed.

    Args:
        model: the graph.
        number: how many units of the stack stay.
        name: the name of the stack, where the graph has several.

    Raises:
        BadRequest: the graph has no such stack, or something else reads a layer that is taken out.
    """
    stack = _stack(model, name)
    gone = {node for unit in stack.units[number:] for node in unit.nodes}
    deepen(model.graph, stack, [Place(unit) for unit in range(number)])
    passes.RemoveUnusedNodesPass()(model)
    left = [node for node in model.graph if node in gone]
    if left:
        raise BadRequest(
            f"layer {number * stack.period} cannot be taken out: what stands behind the layers reads a value inside it "
            f"({left[-1].op_type} {left[-1].name!r})"
        )
    return model


def _stack(model: ir.Model, name: str | None) -> Stack:
    stacks = {stack.name: stack for stack in stacks_of(model)}
    if not stacks:
        raise BadRequest("no layers were found in this graph: no part of it is repeated node by node")
    if name is None and len(stacks) > 1:
        raise BadRequest(f"the graph has several stacks of layers: {', '.join(stacks)}. Name one of them")
    if name is not None and name not in stacks:
        raise BadRequest(f"the graph has no stack of layers {name!r}. It has {', '.join(stacks)}")
    return stacks[name] if name is not None else next(iter(stacks.values()))


def _behind(stack: Stack) -> Iterator[str]:
    """The names of the stored tensors that nodes behind the stack read, also through nodes that only lay them out."""
    inside = {node for unit in stack.units for node in unit.nodes}
    reached: set[ir.Node] = set()
    waiting = [use.node for value in stack.units[-1].leaves if value is not None for use in value.uses()]
    while waiting:
        node = waiting.pop()
        if node not in inside and node not in reached:
            reached.add(node)
            waiting += [use.node for value in node.outputs for use in value.uses()]
    seen: set[ir.Value] = set()
    values = [value for node in reached for value in node.inputs]
    while values:
        value = values.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if is_initializer(value):
            yield value.name or ""
        producer = value.producer()
        if producer is not None and producer not in reached and _is_stored_alone(value):
            values += producer.inputs


def _is_stored_alone(value: ir.Value) -> bool:
    """Whether a value is computed from stored tensors alone."""
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop()
        if current.is_graph_input() and not is_initializer(current):
            return False
        producer = current.producer()
        for needed in producer.inputs if producer is not None else ():
            if needed is not None and needed not in seen:
                seen.add(needed)
                waiting.append(needed)
    return True
