"""Finds the mixtures of experts of a graph: what chooses, and the stored tensors that have an axis of experts.

A mixture is found by its choice: TopK of scores that a stored weight makes, or ONNX Runtime's operator. The axis that
is searched numbers the experts. Every node that meets this axis must treat all experts alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Dim
from hyperclone_onnx.analysis.analysing import Analysis
from hyperclone_onnx.graphs import MICROSOFT, MOVES_OR_CASTS, describe, is_initializer
from hyperclone_onnx.rules.dimensions import Axes, Dimensions
from hyperclone_onnx.rules.elementwise import BROADCASTING, FIRST_OPERAND_SHAPES, UNARY

_ALIKE = frozenset(
    """
    ConstantOfShape Gather GatherElements Gemm MatMul ReduceSum ScatterElements Shape Softmax Split Squeeze TopK
    Transpose Unsqueeze
    """.split()
) | frozenset([*UNARY, *BROADCASTING, *FIRST_OPERAND_SHAPES])
"""Operators of the default domain that treat all experts alike, and take the number of them from their inputs."""

_OF_RUNTIME = frozenset(["FastGelu", "Gelu", "QuickGelu"])


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Args:
        choice: the first output of the node that chooses.
        experts: the number of experts.
        chosen: how many are chosen for a token.
        tensors: the stored tensors with an axis of experts, each with the number of that axis.
    """

    choice: str
    experts: int
    chosen: int
    tensors: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """The mixture as plain data."""
        return {
            "choice": self.choice,
            "experts": self.experts,
            "chosen": self.chosen,
            "tensors": [list(pair) for pair in self.tensors],
        }


class _Not(Exception):
    """A choice is none of experts that can be multiplied; the text says why."""


@dataclass(frozen=True)
class Mixtures:
    """The mixtures of a graph.

    Args:
        mixtures: the mixtures, in the order of the graph.
        refused: why other choices are no mixtures whose experts can be multiplied, by node.
    """

    mixtures: tuple[Mixture, ...]
    refused: dict[str, str] = field(default_factory=dict)


def find_mixtures(analysis: Analysis) -> Mixtures:
    """The mixtures of an analysed graph."""
    search = _Search(analysis.dimensions)
    mixtures: list[Mixture] = []
    refused: dict[str, str] = {}
    for node in analysis.dimensions.walked:
        try:
            if node.op_type == "TopK" and not node.domain and search.is_choice(node):
                mixtures.append(search.mixture(node))
            elif node.domain == MICROSOFT and node.op_type == "MoE":
                mixtures.append(search.operator(node))
        except _Not as problem:
            refused[describe(node)] = str(problem)
    return Mixtures(tuple(mixtures), refused)


class _Search:
    def __init__(self, dimensions: Dimensions) -> None:
        self.dimensions, self.space = dimensions, dimensions.space

    def is_choice(self, node: ir.Node) -> bool:
        """Whether a TopK searches scores that a stored weight makes."""
        value = node.inputs[0]
        while value is not None and (producer := value.producer()) is not None:
            if producer.op_type in ("MatMul", "Gemm"):
                return self._stored(producer, 1) is not None
            if producer.op_type not in MOVES_OR_CASTS | {"Add", "Sigmoid", "Softmax"}:
                return False
            value = producer.inputs[0]
        return False

    def mixture(self, node: ir.Node) -> Mixture:
        """The mixture of a TopK."""
        axes = self.dimensions.axes_of(node, 0)
        count = node.inputs[1]
        chosen = None if count is None or count.const_value is None else int(count.const_value.numpy().item())
        expert = self.space.resolve(axes[-1]) if axes else None
        if not isinstance(expert, Dim) or expert.size.static is None or chosen is None:
            raise _Not("the numbers of experts and of chosen ones are not stored")
        experts = frozenset([expert, *self._scattered(node)])
        normalised = False
        tensors: dict[str, int] = {}
        for reader in self.dimensions.walked:
            if not self._meets(reader, experts):
                continue
            known = reader.op_type in (_OF_RUNTIME if reader.domain == MICROSOFT else _ALIKE)
            if reader.domain not in ("", MICROSOFT) or not known:
                raise _Not(f"{describe(reader)} does not treat all experts alike")
            normalised |= reader.op_type == "Softmax"
            self._collect(reader, experts, tensors)
        after = [use.node for use in node.outputs[0].uses()]
        if not normalised and not any(reader.op_type == "Softmax" for reader in after):
            raise _Not("no softmax makes the gates, so copies of an expert would add up to more than it")
        graph = self.dimensions.model.graph
        if not any(len(graph.initializers[name].shape or ()) > 2 for name in tensors if name in graph.initializers):
            raise _Not("the weights of its experts are not stacked in one tensor")
        self._check_uses(tensors)
        return Mixture(node.outputs[0].name or "", expert.size.static, chosen, tuple(tensors.items()))

    def operator(self, node: ir.Node) -> Mixture:
        """The mixture of ONNX Runtime's operator."""
        tensors: dict[str, int] = {}
        scores = node.inputs[1]
        product = None if scores is None else scores.producer()
        weight = None if product is None else product.inputs[1]
        if product is None or product.op_type not in ("MatMul", "Gemm") or weight is None or not is_initializer(weight):
            raise _Not("its scores are no product with a stored weight")
        tensors[weight.name or ""] = 0 if product.op_type == "Gemm" and _flag(product, "transB") else 1
        bias = product.inputs[2] if len(product.inputs) > 2 else None
        if bias is not None:
            tensors[bias.name or ""] = len(bias.shape or ()) - 1
        for value in node.inputs[2:]:
            if value is not None and not is_initializer(value):
                raise _Not("its weights are not stored as they are")
            if value is not None:
                tensors[value.name or ""] = 0
        first = node.inputs[2]
        if first is None or first.const_value is None:
            raise _Not("its weights are not stored as they are")
        self._check_uses(tensors)
        chosen = int(node.attributes["k"].as_int()) if "k" in node.attributes else 1
        return Mixture(
            node.outputs[0].name or "", int(first.const_value.shape.numpy()[0]), chosen, tuple(tensors.items())
        )

    def _scattered(self, choice: ir.Node) -> list[Dim]:
        """The axes along which the gates of the chosen experts are put among zeros: these number the experts too."""
        experts = []
        for use in choice.outputs[1].uses():
            node = use.node
            if node.op_type == "ScatterElements" and use.idx == 1 and "axis" in node.attributes:
                axes = self.dimensions.axes.get(node.outputs[0])
                term = self.space.resolve(axes[node.attributes["axis"].as_int()]) if axes else None
                if isinstance(term, Dim):
                    experts.append(term)
        return experts

    def _has(self, axes: Axes | None, experts: frozenset[Dim]) -> list[int]:
        """The axes that number the experts."""
        places = []
        for place, axis in enumerate(axes or ()):
            if not experts.isdisjoint(self.space.atoms(axis)):
                if self.space.resolve(axis) not in experts:
                    raise _Not("the experts are numbered together with something else, such as groups of them")
                places.append(place)
        return places

    def _meets(self, node: ir.Node, experts: frozenset[Dim]) -> bool:
        inputs = (self.dimensions.axes_of(node, place) for place in range(len(node.inputs)))
        outputs = (self.dimensions.axes.get(value) for value in node.outputs)
        return any(self._has(axes, experts) for axes in (*inputs, *outputs))

    def _collect(self, node: ir.Node, experts: frozenset[Dim], tensors: dict[str, int]) -> None:
        """Note the stored tensors that a node reads along the experts."""
        for place, value in enumerate(node.inputs):
            if value is None or not is_initializer(value):
                continue
            places = self._has(self.dimensions.axes_of(node, place), experts)
            if places and tensors.setdefault(value.name or "", places[0]) != places[0]:
                raise _Not(f"{value.name!r} has two axes of experts")

    def _check_uses(self, tensors: dict[str, int]) -> None:
        """Check that nothing else reads the tensors."""
        for name in tensors:
            value = self.dimensions.model.graph.initializers.get(name)
            if value is not None and len(value.uses()) > 1:
                raise _Not(f"several nodes read {name!r}")

    def _stored(self, node: ir.Node, place: int) -> ir.Value | None:
        value = node.inputs[place] if place < len(node.inputs) else None
        while value is not None and not is_initializer(value):
            producer = value.producer()
            if producer is None or producer.domain or producer.op_type not in MOVES_OR_CASTS:
                return None
            value = producer.inputs[0]
        return value


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())
