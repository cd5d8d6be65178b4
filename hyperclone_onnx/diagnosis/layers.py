"""Assigns tensors and values to layers. Layers serve only the display: nothing else depends on them.

The layer of a tensor is the first number in its name (``model.layers.3.mlp.weight``), if names with the same prefix
have all numbers from 0. If the names have no such numbers, the numbered dimensions of the plan are used, because every
layer has its own dimension (``ffn.3``). Other tensors and values belong to the layer of the graph in which their node
lies, or which it follows.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from hyperclone_onnx.plan.maps import names_in
from hyperclone_onnx.plan.plans import Plan

BEFORE, AFTER = "before the layers", "after the layers"
WHOLE = "the model"
"""The name of the only layer, where no layers can be recognised."""

_NUMBERED = re.compile(r"(?P<prefix>[^0-9]*?)[._/](?P<index>\d+)(?P<rest>[._/].*)?$")
_INNERMOST = re.compile(r"[A-Za-z_]*$")

_Label = tuple[str, int]
_Spans = dict[str, tuple[int, int]]


@dataclass
class Layers:
    """The layer of each tensor, and of each value."""

    names: list[str]
    """The layers, in order."""
    tensors: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)

    def of_value(self, name: str) -> str:
        """The layer of a value.

        A value that was moved out of a body has its old name behind the name of the node and a dot.
        """
        rest = name
        while rest:
            if rest in self.values:
                return self.values[rest]
            rest = rest.partition(".")[2]
        return self.names[0]


def find_layers(model: ir.Model, plan: Plan) -> Layers:
    """Recognise the layers of a grown graph."""
    nodes = list(_nodes(model.graph))
    places = _places(nodes, plan)
    stored = model.graph.initializers
    nonempty = [name for name in plan.tensors if name in stored and 0 not in stored[name].shape]  # type: ignore[operator]
    labellings = (_by_names(nonempty, True), _by_names(nonempty, False), _by_dimensions(plan))
    numbered, spans = next(
        (result for labels in labellings if (result := _disjoint_layers(labels, places))[0]), ({}, {})
    )
    if not spans:
        layer_of_value = {value.name or "": WHOLE for node in nodes for value in node.outputs}
        return Layers([WHOLE], dict.fromkeys(plan.tensors, WHOLE), layer_of_value)
    ordered = sorted(spans, key=lambda label: spans[label])
    starts = {spans[label][0]: label for label in ordered}
    last = spans[ordered[-1]][1]
    layers = Layers([BEFORE, *ordered, AFTER])
    layer_at: list[str] = []
    label = BEFORE
    for place, node in enumerate(nodes):
        label = starts.get(place, label)
        layer_at.append(AFTER if place > last else label)
        layers.values |= {value.name or "": layer_at[-1] for value in node.outputs}
    for name in plan.tensors:
        layers.tensors[name] = numbered.get(name) or (layer_at[places[name]] if name in places else BEFORE)
    return layers


def _disjoint_layers(labels: Mapping[str, _Label], places: Mapping[str, int]) -> tuple[dict[str, str], _Spans]:
    """The layers of tensors, and the first and last place of each layer in the graph.

    Layers of different prefixes may overlap. Then the prefix that more tensors have is kept.
    """
    spans_of: dict[str, _Spans] = defaultdict(dict)
    for name, (prefix, index) in labels.items():
        if name in places:
            label, place = _text(prefix, index), places[name]
            low, high = spans_of[prefix].get(label, (place, place))
            spans_of[prefix][label] = min(low, place), max(high, place)
    spans: _Spans = {}
    accepted: set[str] = set()
    for prefix, _ in Counter(prefix for prefix, _ in labels.values()).most_common():
        candidates = spans_of[prefix]
        if candidates and _are_disjoint([*candidates.values(), *spans.values()]):
            accepted.add(prefix)
            spans |= candidates
    return {name: _text(*label) for name, label in labels.items() if label[0] in accepted}, spans


def _are_disjoint(spans: Iterable[tuple[int, int]]) -> bool:
    ordered = sorted(spans)
    # Two layers may have a place in common: a fused node may end one layer and begin the next.
    return all(before[1] <= after[0] for before, after in itertools.pairwise(ordered))


def _text(prefix: str, index: int) -> str:
    return f"{prefix}.{index}" if prefix else f"layer {index}"


def _by_names(tensors: Iterable[str], merged: bool) -> dict[str, _Label]:
    """Labels by the numbers in names. With `merged`, ``up.0`` and ``down.0`` belong to the same layer."""
    labels: dict[str, _Label] = {}
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        match = _NUMBERED.match(name)
        if match:
            ends = not re.search(r"[./]", match["rest"] or "")
            prefix = _INNERMOST.sub("", match["prefix"]) if ends and merged else match["prefix"]
            labels[name] = prefix, int(match["index"])
            numbers[prefix].add(int(match["index"]))
    complete = {prefix for prefix, used in numbers.items() if len(used) > 1 and used == set(range(len(used)))}
    return {name: label for name, label in labels.items() if label[0] in complete}


def numbered_names(tensors: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The prefix and the number of the layer in each name, for prefixes whose names have all numbers from 0.

    >>> numbered_names(["h.0.up", "h.1.up", "head"])
    {'h.0.up': ('h', 0), 'h.1.up': ('h', 1)}
    """
    return _by_names(tensors, True)


def _by_dimensions(plan: Plan) -> dict[str, _Label]:
    """Labels by the numbered dimensions of tensors, where every layer has a dimension of its own."""
    labels: dict[str, _Label] = {}
    for name, recipe in plan.tensors.items():
        dims = {dim for axis in recipe.axes for factor in axis for dim in names_in(factor)}
        numbers = {int(dim.rpartition(".")[2]) for dim in dims if "." in dim}
        if len(numbers) == 1:
            labels[name] = "", numbers.pop()
    return labels if len(set(labels.values())) > 1 else {}


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes in order. The nodes of a body come before the node that has the body."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _nodes(attribute.as_graph())
        yield node


def _places(nodes: Iterable[ir.Node], plan: Plan) -> dict[str, int]:
    """The position of the first node that reads each grown tensor."""
    places: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value.name in plan.tensors:
                places.setdefault(value.name or "", place)
    return places
