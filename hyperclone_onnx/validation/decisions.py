"""Finds values inside a graph that show more than the output that is computed from them.

A Sigmoid, a Tanh or a Softmax before an output makes large differences small. So we also compare its input. An index
that ArgMax or TopK chose, or a rounded number, may differ if the values before it are almost equal. Then we compare the
values before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.graphs import MOVES_OR_CASTS, is_initializer
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.planning.activations import activations
from hyperclone_onnx.rules.dimensions import Dimensions

Array = npt.NDArray[Any]
Kind = Literal["squeezes", "chooses", "rounds", "compares"]

SQUEEZES = frozenset(["Erf", "HardSigmoid", "Sigmoid", "Softmax", "Softsign", "Tanh"])
CHOOSES = frozenset(["ArgMax", "ArgMin", "TopK"])
ROUNDS = frozenset(["Ceil", "Floor", "QuantizeLinear", "Round"])
COMPARES = frozenset(["Greater", "GreaterOrEqual", "Less", "LessOrEqual"])


@dataclass(frozen=True)
class Decision:
    """A node that decides an output, with its inputs and its output that matter."""

    output: str
    """The output of the graph that depends on the node."""
    node: str
    op_type: str
    kind: Kind
    operands: int
    """How many inputs of the node are compared, from the first on."""
    result: int
    """The position of the node's output from which the graph's output comes."""
    axis: int

    @property
    def label(self) -> str:
        """The name of the compared values, for reports."""
        return f"{self.output} before {self.op_type}"


def decisions_of(dimensions: Dimensions) -> tuple[Decision, ...]:
    """The nodes that decide the outputs of a graph. Between them and the outputs are only moves and conversions."""
    return tuple(decision for output in dimensions.model.graph.outputs for decision in _behind(output, output))


def _behind(output: ir.Value, value: ir.Value) -> Iterator[Decision]:
    producer = value.producer()
    for _ in range(_FURTHEST):
        if producer is None or producer.domain or not producer.inputs:
            return
        kind = _kind(producer)
        read = producer.inputs[0]
        if kind is not None and (kind == "squeezes") == _is_floating(output):
            operands = 2 if kind == "compares" else 1
            default = _DEFAULT_AXIS.get(producer.op_type, 0)
            axis = producer.attributes["axis"].as_int() if "axis" in producer.attributes else default
            place = list(producer.outputs).index(value)
            yield Decision(output.name or "", producer.name or "", producer.op_type, kind, operands, place, axis)
            return
        if read is None or producer.op_type not in MOVES_OR_CASTS:
            return
        value, producer = read, read.producer()


_FURTHEST = 8
_DEFAULT_AXIS = {"TopK": -1, "Softmax": -1}


def _kind(node: ir.Node) -> Kind | None:
    if node.op_type in SQUEEZES:
        return "squeezes"
    if node.op_type in CHOOSES:
        return "chooses"
    if node.op_type in COMPARES:
        return "compares"
    read = node.inputs[0]
    from_floats = read is not None and _is_floating(read)
    to_integers = not _is_floating(node.outputs[0])
    if node.op_type in ROUNDS or (node.op_type == "Cast" and from_floats and to_integers):
        return "rounds"
    return None


def _is_floating(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


# -- outputs to compare -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A copy of a model with more outputs. `names` are those of each decision: its inputs, then its output."""

    model: ir.Model
    names: tuple[tuple[str, ...], ...]


def watch(model: ir.Model, decisions: Sequence[Decision]) -> Watched | None:
    """A copy of a model whose outputs include the inputs and outputs of its decisions. None if a node is missing."""
    copy = model.clone()
    by_name = {node.name: node for node in copy.graph}
    names: list[tuple[str, ...]] = []
    for decision in decisions:
        node = by_name.get(decision.node)
        if node is None or node.op_type != decision.op_type:
            return None
        values = [*node.inputs[: decision.operands], node.outputs[decision.result]]
        for value in values:
            if value is None or (is_initializer(value) and value is values[0]):
                return None
            if value not in copy.graph.outputs and not is_initializer(value):
                copy.graph.outputs.append(value)
        names.append(tuple(value.name or "" for value in values if value is not None))
    copy.metadata_props.clear()
    return Watched(copy, tuple(names))


def axes_in_grown(dimensions: Dimensions, plan: Plan | None) -> dict[str, Any]:
    """The axes, in the plan's terms, of each value of the source that grows."""
    return {} if plan is None else activations(dimensions, plan)


# -- differences that rounding explains -------------------------------------------------------------------


def explains(decision: Decision, want: Sequence[Array], got: Sequence[Array], allowed: Array) -> bool:
    """Whether small differences of the inputs explain each difference of a decision's output.

    Args:
        decision: the decision.
        want: its inputs and its output in the source.
        got: the same in the grown model.
        allowed: the tolerance for each element of its first input.
    """
    if any(one.shape != other.shape for one, other in zip(want, got, strict=True)):
        return False
    read, theirs = (np.asarray(side[0], dtype=np.float64) for side in (want, got))
    if not (np.abs(read - theirs) <= allowed).all():
        return False
    result, other = np.asarray(want[-1]), np.asarray(got[-1])
    match decision.kind:
        case "chooses":
            return _chosen_alike(decision, read, result, other, allowed)
        case "compares":
            gap = np.abs(read - np.asarray(want[1], dtype=np.float64))
            return bool((gap[result != other] <= 2.0 * np.broadcast_to(allowed, gap.shape)[result != other]).all())
        case "rounds":
            step = np.abs(np.asarray(result, dtype=np.float64) - np.asarray(other, dtype=np.float64))
            return bool((step <= 1.0).all())
        case _:
            return False


def _chosen_alike(decision: Decision, read: Array, chosen: Array, other: Array, allowed: Array) -> bool:
    """Whether two choices differ only between elements that are equal within the tolerance."""
    axis = decision.axis % read.ndim
    if chosen.ndim == read.ndim - 1:
        chosen, other = np.expand_dims(chosen, axis), np.expand_dims(other, axis)
    if chosen.ndim != read.ndim or chosen.size == 0:
        return chosen.size == 0
    indices = (np.asarray(picked, dtype=np.int64) % read.shape[axis] for picked in (chosen, other))
    one, two = (np.take_along_axis(read, index, axis) for index in indices)
    most = float(np.broadcast_to(allowed, read.shape).max())
    return bool((np.abs(one - two)[chosen != other] <= 2.0 * most).all())
