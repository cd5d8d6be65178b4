"""Which layer a tensor or a value belongs to: for display alone, nothing is decided by it.

Names say it (``model.layers.3.mlp.weight``): the first number in a name, where the same prefix has all numbers from 0.
Where names say nothing, the plan's dimensions do, of which every layer has its own (``ffn.3``). What neither tells
belongs to the layer that the node lies in or follows, in the graph's order.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from hyperclone_onnx.diagnosis.value_axes import names_in
from hyperclone_onnx.plan import Plan

BEFORE, AFTER = "before the layers", "after the layers"
WHOLE = "the model"
"""Where no layers can be told apart."""

_NUMBERED = re.compile(r"(?P<prefix>[^0-9]*?)[._/](?P<index>\d+)(?P<rest>[._/].*)?$")
_INNERMOST = re.compile(r"[A-Za-z_]*$")


@dataclass
class Layers:
    """The layer of each tensor, and of each node."""

    names: list[str]
    """The layers, in order."""
    tensors: dict[str, str] = field(default_factory=dict)
    nodes: dict[ir.Node, str] = field(default_factory=dict)


def find_layers(model: ir.Model, plan: Plan) -> Layers:
    """Tell the layers of a grown graph apart."""
    places = _places(model, plan)
    numbered, spans = _apart(_by_names(plan.tensors), places)
    if not numbered:
        numbered, spans = _apart(_by_dimensions(plan), places)
    ordered = sorted(spans, key=lambda label: spans[label])
    layers = Layers([])
    if not ordered:
        layers.names = [WHOLE]
        layers.tensors = dict.fromkeys(plan.tensors, WHOLE)
        layers.nodes = dict.fromkeys(model.graph, WHOLE)
        return layers
    layers.names = [BEFORE, *ordered, AFTER]
    last = spans[ordered[-1]][1]
    label = BEFORE
    starts = {spans[each][0]: each for each in ordered}
    at: list[str] = []
    for place, node in enumerate(model.graph):
        label = starts.get(place, label)
        at.append(AFTER if place > last else label)
        layers.nodes[node] = at[-1]
    for name in plan.tensors:
        found = places.get(name)
        layers.tensors[name] = numbered.get(name) or (at[found[0]] if found else BEFORE)
    return layers


_Label = tuple[str, int]
_Spans = dict[str, tuple[int, int]]


def _apart(found: Mapping[str, _Label], places: Mapping[str, list[int]]) -> tuple[dict[str, str], _Spans]:
    """The labels of tensors, and where each begins and ends; of kinds that overlap, the more frequent stays."""
    kinds: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for name, (prefix, index) in found.items():
        for place in places.get(name, ()):
            label = _text(prefix, index)
            low, high = kinds[prefix].get(label, (place, place))
            kinds[prefix][label] = min(low, place), max(high, place)
    counts = Counter(prefix for prefix, _ in found.values())
    spans: _Spans = {}
    chosen: set[str] = set()
    for prefix, _ in counts.most_common():
        own = kinds[prefix]
        if own and not any(low <= end and start <= high for low, high in own.values() for start, end in spans.values()):
            chosen.add(prefix)
            spans |= own
    return {name: _text(*label) for name, label in found.items() if label[0] in chosen}, spans


def _text(prefix: str, index: int) -> str:
    return f"{prefix}.{index}" if prefix else f"layer {index}"


def _by_names(tensors: Iterable[str]) -> dict[str, _Label]:
    found: dict[str, tuple[str, int]] = {}
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        match = _NUMBERED.match(name)
        if match:
            # A number at the end counts layers of one kind of tensor: all kinds together are the layers.
            prefix = match["prefix"] if match["rest"] else _INNERMOST.sub("", match["prefix"])
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


def _places(model: ir.Model, plan: Plan) -> Mapping[str, list[int]]:
    """The positions of the nodes that read each grown tensor, bodies counted where they stand."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, node in enumerate(model.graph):
        for value in _read_by(node):
            if value.name in plan.tensors:
                found[value.name or ""].append(place)
    return found


def _read_by(node: ir.Node) -> Iterable[ir.Value]:
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
        graphs += attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else []
        for graph in graphs:
            for inner in graph:
                yield from _read_by(inner)
