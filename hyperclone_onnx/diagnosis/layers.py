"""Which layer a tensor or a value belongs to: for display alone, nothing is decided by it.

Names say it (``model.layers.3.mlp.weight``): the first number in a name, where the same prefix has all numbers from 0.
Where names say nothing, the plan's dimensions do, of which every layer has its own (``ffn.3``). What neither tells
belongs to the layer that the node lies in or follows, in the graph's order.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from hyperclone_onnx.diagnosis.value_axes import names_in
from hyperclone_onnx.plan.plans import Plan

BEFORE, AFTER = "before the layers", "after the layers"
WHOLE = "the model"
"""Where no layers can be told apart."""

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
        """The layer of a value; what was taken out of a body has its name there behind that of the node."""
        rest = name
        while rest:
            if rest in self.values:
                return self.values[rest]
            rest = rest.partition(".")[2]
        return self.names[0]


def find_layers(model: ir.Model, plan: Plan) -> Layers:
    """Tell the layers of a grown graph apart."""
    nodes = list(_nodes(model.graph))
    places = _places(nodes, plan)
    stored = model.graph.initializers
    filled = [name for name in plan.tensors if name in stored and 0 not in stored[name].shape]  # type: ignore[operator]
    ways = (_by_names(filled, True), _by_names(filled, False), _by_dimensions(plan))
    numbered, spans = next((found for way in ways if (found := _apart(way, places))[0]), ({}, {}))
    if not spans:
        made = {value.name or "": WHOLE for node in nodes for value in node.outputs}
        return Layers([WHOLE], dict.fromkeys(plan.tensors, WHOLE), made)
    ordered = sorted(spans, key=lambda label: spans[label])
    starts = {spans[each][0]: each for each in ordered}
    last = spans[ordered[-1]][1]
    layers = Layers([BEFORE, *ordered, AFTER])
    at: list[str] = []
    label = BEFORE
    for place, node in enumerate(nodes):
        label = starts.get(place, label)
        at.append(AFTER if place > last else label)
        layers.values |= {value.name or "": at[-1] for value in node.outputs}
    for name in plan.tensors:
        layers.tensors[name] = numbered.get(name) or (at[places[name]] if name in places else BEFORE)
    return layers


def _apart(found: Mapping[str, _Label], places: Mapping[str, int]) -> tuple[dict[str, str], _Spans]:
    """The labels of tensors, and where each begins and ends; of kinds that overlap, the more frequent stays."""
    kinds: dict[str, _Spans] = defaultdict(dict)
    for name, (prefix, index) in found.items():
        if name in places:
            label, place = _text(prefix, index), places[name]
            low, high = kinds[prefix].get(label, (place, place))
            kinds[prefix][label] = min(low, place), max(high, place)
    spans: _Spans = {}
    chosen: set[str] = set()
    for prefix, _ in Counter(prefix for prefix, _ in found.values()).most_common():
        own = kinds[prefix]
        if own and _disjoint([*own.values(), *spans.values()]):
            chosen.add(prefix)
            spans |= own
    return {name: _text(*label) for name, label in found.items() if label[0] in chosen}, spans


def _disjoint(spans: Iterable[tuple[int, int]]) -> bool:
    ordered = sorted(spans)
    # A fused node may hold what ends one layer and what begins the next.
    return all(before[1] <= after[0] for before, after in itertools.pairwise(ordered))


def _text(prefix: str, index: int) -> str:
    return f"{prefix}.{index}" if prefix else f"layer {index}"


def _by_names(tensors: Iterable[str], merged: bool) -> dict[str, _Label]:
    """By the numbers in names; `merged`, names that end in a number (``up.0``, ``down.0``) count the same layers."""
    found: dict[str, _Label] = {}
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        match = _NUMBERED.match(name)
        if match:
            ends = not re.search(r"[./]", match["rest"] or "")
            prefix = _INNERMOST.sub("", match["prefix"]) if ends and merged else match["prefix"]
            found[name] = prefix, int(match["index"])
            numbers[prefix].add(int(match["index"]))
    layered = {prefix for prefix, seen in numbers.items() if len(seen) > 1 and seen == set(range(len(seen)))}
    return {name: label for name, label in found.items() if label[0] in layered}


def _by_dimensions(plan: Plan) -> dict[str, _Label]:
    """By the dimensions that are numbered, each layer having its own."""
    found: dict[str, _Label] = {}
    for name, recipe in plan.tensors.items():
        dims = {dim for axis in recipe.axes for factor in axis for dim in names_in(factor)}
        numbers = {int(dim.rpartition(".")[2]) for dim in dims if "." in dim}
        if len(numbers) == 1:
            found[name] = "", numbers.pop()
    return found if len(set(found.values())) > 1 else {}


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes in order, those of bodies before the node that has them."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _nodes(attribute.as_graph())
        yield node


def _places(nodes: Iterable[ir.Node], plan: Plan) -> dict[str, int]:
    """The position of the first node that reads each grown tensor."""
    found: dict[str, int] = {}
    for place, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and value.name in plan.tensors:
                found.setdefault(value.name or "", place)
    return found
