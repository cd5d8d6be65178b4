"""Puts copies of layers into a graph, and numbers all names as an export of the deeper model would.

A copy has nodes, stored tensors and inputs (its cache) of its own. Its tensors are read from the same bytes of the
source's file. What several layers read, such as a mask, the copy reads too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from hyperclone_onnx.graphs import FreshNames, bodies_of
from hyperclone_onnx.layers.numbering import numbered
from hyperclone_onnx.layers.stacks import Stack, Unit
from hyperclone_onnx.plan.origins import Drawn
from hyperclone_onnx.tensors.assembled import DrawnTensor
from hyperclone_onnx.transforms.identity_blocks import BIAS, GAIN, Identity
from hyperclone_onnx.transforms.interface import ORIGINAL, Placed, remember, remember_place


@dataclass(frozen=True)
class Place:
    """A layer of the deeper model."""

    source: int
    """The number of the unit that it is, or that it is a copy of."""
    identity: Identity | None = None
    """What changes in an identity copy; None for other layers."""


@dataclass
class _Layer:
    """The parts of a layer of the deeper model, aligned with those of all others."""

    nodes: list[ir.Node]
    stored: list[ir.Value]
    inputs: list[ir.Value]
    leaves: list[ir.Value | None]
    is_copy: bool
    own: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)
    """Tensors of this layer alone, and the shared ones that other layers read in their place."""
    is_new: set[ir.Value] = field(default_factory=set)
    """The stored tensors that are not those of a layer of the source."""


def deepen(graph: ir.Graph, stack: Stack, places: Sequence[Place]) -> None:
    """Change a graph so that a stack has the given layers.

    Args:
        graph: the graph, which is changed.
        stack: one of its stacks.
        places: the layers from the first to the last. First occurrences of units are in order. A unit that does not
            occur is removed.
    """
    remember(graph)
    names, outputs = _Names(stack), _outputs_of_layers(stack)
    before = {node: tuple(node.inputs) for unit in stack.units for node in unit.nodes}
    own = {node for unit in stack.units for node in unit.nodes}
    layers: list[_Layer] = []
    leaves = list(stack.units[0].enters)
    changed: list[ir.Value] = []
    seen: set[int] = set()
    for place in places:
        unit = stack.units[place.source]
        if place.source in seen:
            layers.append(_copy(graph, unit, place, leaves, before))
            last = _last_node(graph, layers[-2])
            graph.insert_after(last, layers[-1].nodes)
        else:
            seen.add(place.source)
            _enter(unit, leaves)
            layers.append(_Layer(list(unit.nodes), list(unit.stored), list(unit.inputs), list(unit.leaves), False))
        if place.identity is not None and place.identity.last:
            changed += _hand_on_norms(graph, stack, layers[-2], layers[-1], place)
        leaves = layers[-1].leaves
    own = _with_bodies(own.union(*(layer.nodes for layer in layers)))
    _leave(graph, stack.units[-1], leaves, own, outputs)
    for value in changed:
        value.meta[ORIGINAL] = None
    of_layers = {layer.nodes[node].outputs[index] for layer in layers for node, index in outputs}
    kept = {value for value in graph.outputs if value not in of_layers}
    _add_inputs(graph, stack, layers, places)
    _add_outputs(graph, stack, layers, places, outputs)
    _remove(graph, [unit for number, unit in enumerate(stack.units) if number not in seen])
    names.apply(graph, layers, places, kept)
    _remember_places(stack, layers, places)
    graph.sort()


def _copy(
    graph: ir.Graph,
    unit: Unit,
    place: Place,
    enters: Sequence[ir.Value | None],
    before: dict[ir.Node, tuple[ir.Value | None, ...]],
) -> _Layer:
    zeroed = frozenset() if place.identity is None else place.identity.zero
    to: dict[ir.Value, ir.Value] = {}
    for value, new in zip(unit.enters, enters, strict=True):
        if value is not None and new is not None:
            to[value] = new
    for value in (*unit.stored, *sorted(zeroed - set(unit.stored), key=lambda value: value.name or "")):
        to[value] = _new_value(value)
        to[value].meta[ORIGINAL] = value.meta[ORIGINAL]
        assert value.const_value is not None
        to[value].const_value = _filled(value, 0.0) if value in zeroed else copy_of(value.const_value)
    for value in unit.inputs:
        to[value] = _new_value(value)
        to[value].meta[ORIGINAL] = None
    nodes: dict[ir.Node, ir.Node] = {}
    for node in sorted(unit.nodes, key=_order(graph)):
        inputs = [None if value is None else to.get(value, value) for value in before[node]]
        new_node = ir.Node(
            node.domain, node.op_type, inputs, _attributes(graph, node, to), num_outputs=len(node.outputs)
        )
        for value, result in zip(node.outputs, new_node.outputs, strict=True):
            result.type, result.shape = value.type, None if value.shape is None else value.shape.copy()
            result.meta[ORIGINAL] = None
            to[value] = result
        nodes[node] = new_node
    layer = _Layer(
        [nodes[node] for node in unit.nodes],
        [to[value] for value in unit.stored],
        [to[value] for value in unit.inputs],
        [None if value is None else to[value] for value in unit.leaves],
        True,
        [(to[value], value) for value in zeroed - set(unit.stored)],
    )
    layer.is_new = {*layer.stored, *(own for own, _ in layer.own)}
    for node in () if place.identity is None else place.identity.norms:
        _make_plain(graph, layer, nodes[node])
    return layer


def _attributes(graph: ir.Graph, node: ir.Node, to: Mapping[ir.Value, ir.Value]) -> list[ir.Attr]:
    """The attributes of a copy of a node. Its bodies read what the copy reads, and have names of their own."""
    attributes = list(node.attributes.values())
    if not any(True for _ in bodies_of(node)):
        return attributes
    return [
        ir.AttrGraph(attribute.name, _copied_body(graph, attribute.as_graph(), to))
        if attribute.type == ir.AttributeType.GRAPH
        else attribute
        for attribute in attributes
    ]


def _copied_body(graph: ir.Graph, body: ir.Graph, to: Mapping[ir.Value, ir.Value]) -> ir.Graph:
    copy = body.clone(allow_outer_scope_values=True)
    fresh = FreshNames(graph)
    inner = list(ir.traversal.RecursiveGraphIterator(copy))
    for node in inner:
        node.name = fresh.node(node.name or "")
        for place, value in enumerate(node.inputs):
            if value is not None and value in to:
                node.replace_input_with(place, to[value])
        for value in node.outputs:
            if value.name:
                value.name = fresh.value(value.name)
    for some in {id(node.graph): node.graph for node in inner}.values():
        assert isinstance(some, ir.Graph)
        for value in some.inputs:
            value.name = fresh.value(value.name or "")
        some.outputs[:] = [to.get(value, value) for value in some.outputs]
    return copy


def _with_bodies(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """Nodes, and those in their bodies."""
    inside = set(nodes)
    for node in list(inside):
        for body in bodies_of(node):
            inside.update(ir.traversal.RecursiveGraphIterator(body))
    return inside


def _make_plain(graph: ir.Graph, layer: _Layer, norm: ir.Node) -> None:
    """Give a norm of a layer the gain 1 and the bias 0, as stored tensors of its own."""
    for place, number in ((GAIN, 1.0), (BIAS, 0.0)):
        before = norm.inputs[place] if place < len(norm.inputs) else None
        if before is None:
            continue
        value = _new_value(before)
        value.meta[ORIGINAL] = before.meta[ORIGINAL]
        value.const_value = _filled(before, number)
        norm.replace_input_with(place, value)
        layer.is_new.add(value)
        if before in layer.stored and not before.uses():
            layer.stored[layer.stored.index(before)] = value
            layer.is_new.discard(before)
            if _is_registered(graph, before):
                graph.initializers.pop(before.name or "")
        else:
            layer.own.append((value, before))


def _is_registered(graph: ir.Graph, value: ir.Value) -> bool:
    return graph.initializers.get(value.name or "") is value


def _hand_on_norms(graph: ir.Graph, stack: Stack, front: _Layer, copy: _Layer, place: Place) -> list[ir.Value]:
    """Make the last norms of the layer in front of a copy plain. Those of the copy have the source's gain and bias.

    Returns:
        The values that are no longer those of the source.
    """
    assert place.identity is not None
    changed: list[ir.Value] = []
    unit = stack.units[place.source]
    for norm in place.identity.last:
        position = unit.nodes.index(norm)
        kept = {value for value in copy.nodes[position].inputs[GAIN:] if value is not None}
        copy.is_new -= kept
        _make_plain(graph, front, front.nodes[position])
        changed += front.nodes[position].outputs
    return changed


def _remember_places(stack: Stack, layers: Sequence[_Layer], places: Sequence[Place]) -> None:
    for number, (layer, which) in enumerate(zip(layers, places, strict=True)):
        for value, source in [*zip(layer.stored, stack.units[which.source].stored, strict=True), *layer.own]:
            is_new = value in layer.is_new
            adds_nothing = is_new and (which.identity is not None or not layer.is_copy)
            name = source.meta[ORIGINAL]
            remember_place(value, source, Placed(name, stack.name, number, which.source, is_new, adds_nothing))


def _order(graph: ir.Graph) -> Callable[[ir.Node], int]:
    place = {node: number for number, node in enumerate(graph)}
    return lambda node: place[node]


def _last_node(graph: ir.Graph, layer: _Layer) -> ir.Node:
    return max(layer.nodes, key=_order(graph))


def _new_value(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=None if value.shape is None else value.shape.copy())


def copy_of(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Another tensor with the same numbers, which are not read before they are needed."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
            base_dir=tensor.base_dir,
        )
    if isinstance(tensor, DrawnTensor):
        return DrawnTensor(tensor.drawn)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(lambda: tensor, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _filled(value: ir.Value, number: float) -> DrawnTensor:
    tensor = value.const_value
    assert tensor is not None
    shape = tuple(map(int, tensor.shape.numpy()))
    return DrawnTensor(Drawn(value.name or "", shape, tensor.dtype.name, "constant", number))


def _enter(unit: Unit, leaves: Sequence[ir.Value | None]) -> None:
    """Let the nodes of a unit read what leaves the layer before it."""
    inside = _with_bodies(unit.nodes)
    for old, new in zip(unit.enters, leaves, strict=True):
        if old is None or new is None or old is new:
            continue
        for use in list(old.uses()):
            if use.node in inside:
                use.node.replace_input_with(use.idx, new)


def _leave(
    graph: ir.Graph,
    unit: Unit,
    leaves: Sequence[ir.Value | None],
    inside: set[ir.Node],
    outputs: Sequence[tuple[int, int]],
) -> None:
    """Let everything behind the stack read what leaves its last layer."""
    numbered_outputs = {unit.nodes[node].outputs[index] for node, index in outputs}
    for old, new in zip(unit.leaves, leaves, strict=True):
        if old is None or new is None or old is new:
            continue
        for use in list(old.uses()):
            if use.node not in inside:
                use.node.replace_input_with(use.idx, new)
        if old.is_graph_output() and old not in numbered_outputs:
            for position, value in enumerate(graph.outputs):
                if value is old:
                    graph.outputs[position] = new
            new.meta[ORIGINAL] = old.meta.pop(ORIGINAL)
            new.name, old.name = old.name, None
            new.shape, new.type = old.shape, old.type


def _remove(graph: ir.Graph, units: Sequence[Unit]) -> None:
    """Remove layers that nothing reads any more, with their tensors, inputs and outputs."""
    nodes = {node for unit in units for node in unit.nodes}
    own = {value for node in nodes for value in node.outputs}
    graph.outputs[:] = [value for value in graph.outputs if value not in own]
    graph.remove(list(nodes), safe=True)
    for unit in units:
        for value in unit.stored:
            if not value.uses() and _is_registered(graph, value):
                graph.initializers.pop(value.name or "")
        graph.inputs[:] = [value for value in graph.inputs if value not in unit.inputs or value.uses()]


def _outputs_of_layers(stack: Stack) -> list[tuple[int, int]]:
    """The outputs of the graph that each layer has: (number of the node, number of its output)."""
    first = stack.units[0].nodes if stack.aligned is None else stack.units[0].nodes[: stack.aligned[0]]
    return [
        (number, index)
        for number, node in enumerate(first)
        for index in range(len(node.outputs))
        if all(
            index < len(unit.nodes[number].outputs) and unit.nodes[number].outputs[index].is_graph_output()
            for unit in stack.units
        )
    ]


# -- names and order --------------------------------------------------------------------------------------

Named = ir.Value | ir.Node


class _Names:
    """The names of everything that matches in the layers of a stack, as they are in the source."""

    def __init__(self, stack: Stack) -> None:
        self.aligned = stack.aligned
        units = [_named(unit.nodes, unit.stored, unit.inputs, self.aligned) for unit in stack.units]
        self.old = [[thing.name or "" for thing in matched] for matched, _ in units]
        self.rest = [[thing.name or "" for thing in others] for _, others in units]
        self.step = stack.period

    def apply(self, graph: ir.Graph, layers: Sequence[_Layer], places: Sequence[Place], kept: set[ir.Value]) -> None:
        """Name the layers of the deeper model. The values in `kept` keep their names."""
        things = [_named(layer.nodes, layer.stored, layer.inputs, self.aligned) for layer in layers]
        numbered_names: list[tuple[Named, str]] = []
        others: list[tuple[Named, str]] = []
        forms: dict[tuple[str, int], None] = {}
        for column in range(len(self.old[0])):
            names = [unit[column] for unit in self.old]
            form = numbered(names)
            if form is not None and form.step == self.step:
                forms[form.before, form.base] = None
            for position, (layer, place) in enumerate(zip(layers, places, strict=True)):
                thing, name = things[position][0][column], names[place.source]
                if thing in kept or not name:
                    continue
                if form is not None and form.step == self.step:
                    numbered_names.append((thing, form.name(position)))
                elif layer.is_copy or thing.name is None:
                    others.append((thing, name))
        for position, (layer, place) in enumerate(zip(layers, places, strict=True)):
            for thing, name in zip(things[position][1], self.rest[place.source], strict=True):
                renamed = _renumbered(name, forms, place.source * self.step, position * self.step)
                if thing in kept or not name:
                    continue
                if renamed is not None:
                    numbered_names.append((thing, renamed))
                elif layer.is_copy or thing.name is None:
                    others.append((thing, name))
        others += [(own, shared.name or "") for layer in layers for own, shared in layer.own]
        _give_names(graph, [*numbered_names, *others])
        for layer in layers:
            for value in dict.fromkeys((*layer.stored, *(own for own, _ in layer.own))):
                if _is_registered(graph, value):
                    continue
                if isinstance(value.const_value, DrawnTensor):
                    drawn = replace(value.const_value.drawn, name=value.name or "")
                    value.const_value = DrawnTensor(drawn)
                graph.register_initializer(value)


def _give_names(graph: ir.Graph, renamed: Sequence[tuple[Named, str]]) -> None:
    """Give things names. Where a name is taken, a number is added: what comes first keeps it."""
    for number, (thing, _) in enumerate(renamed):
        thing.name = f"\0{number}"
    fresh = FreshNames(graph)
    for thing, name in renamed:
        thing.name = fresh.value(name) if isinstance(thing, ir.Value) else fresh.node(name)


def _renumbered(name: str, forms: Iterable[tuple[str, int]], source: int, position: int) -> str | None:
    """The name of what other layers do not have, with the number of its layer; None if its name has no such number.

    Args:
        name: its name in the source.
        forms: what is before the number in names that all layers have, and that number in the first layer.
        source: the number of the source's layer, from 0.
        position: that of the deeper model's.
    """
    for before, base in forms:
        number = f"{before}{base + source}"
        if name.startswith(number) and not name[len(number) :][:1].isdigit():
            return f"{before}{base + position}{name[len(number) :]}"
    return None


def _named(
    nodes: Sequence[ir.Node],
    stored: Sequence[ir.Value],
    inputs: Sequence[ir.Value],
    aligned: tuple[int, int, int] | None,
) -> tuple[list[Named], list[Named]]:
    """Everything in a layer that has a name: what matches in all layers, and the rest."""
    whole = (len(nodes), len(stored), len(inputs))
    of_nodes, of_stored, of_inputs = aligned or whole

    def outputs(some: Sequence[ir.Node]) -> list[ir.Value]:
        return [value for node in some for value in node.outputs]

    matched: list[Named] = [*stored[:of_stored], *inputs[:of_inputs], *nodes[:of_nodes], *outputs(nodes[:of_nodes])]
    rest: list[Named] = [*stored[of_stored:], *inputs[of_inputs:], *nodes[of_nodes:], *outputs(nodes[of_nodes:])]
    return matched, rest


def _add_inputs(graph: ir.Graph, stack: Stack, layers: Sequence[_Layer], places: Sequence[Place]) -> None:
    count = None if stack.aligned is None else stack.aligned[2]
    columns = [list(unit.inputs[:count]) for unit in stack.units]
    order = _interleaved(list(graph.inputs), columns, [layer.inputs[:count] for layer in layers], places)
    if count is not None:
        for layer, place in zip(layers, places, strict=True):
            for value, source in zip(layer.inputs[count:], stack.units[place.source].inputs[count:], strict=True):
                if layer.is_copy:
                    order.insert(order.index(source) + 1, value)
    graph.inputs[:] = order


def _add_outputs(
    graph: ir.Graph,
    stack: Stack,
    layers: Sequence[_Layer],
    places: Sequence[Place],
    outputs: Sequence[tuple[int, int]],
) -> None:
    columns = [[unit.nodes[node].outputs[index] for node, index in outputs] for unit in stack.units]
    new = [[layer.nodes[node].outputs[index] for node, index in outputs] for layer in layers]
    for layer, values in zip(layers, new, strict=True):
        for value in values if layer.is_copy else ():
            value.meta[ORIGINAL] = None
    graph.outputs[:] = _interleaved(list(graph.outputs), columns, new, places)
    if stack.aligned is not None:
        _add_other_outputs(graph, stack, layers, places)


def _add_other_outputs(graph: ir.Graph, stack: Stack, layers: Sequence[_Layer], places: Sequence[Place]) -> None:
    """Add the outputs of copied layers that not all layers have, behind those that they are copies of."""
    assert stack.aligned is not None
    order = list(graph.outputs)
    for layer, place in zip(layers, places, strict=True):
        unit = stack.units[place.source]
        ends = {value for value in unit.leaves if value is not None}
        for number in range(stack.aligned[0], len(unit.nodes)) if layer.is_copy else ():
            for value, source in zip(layer.nodes[number].outputs, unit.nodes[number].outputs, strict=True):
                if source.is_graph_output() and source not in ends:
                    value.meta[ORIGINAL] = None
                    order.insert(order.index(source) + 1, value)
    graph.outputs[:] = order


def _interleaved(
    old: list[ir.Value], columns: list[list[ir.Value]], new: list[list[ir.Value]], places: Sequence[Place]
) -> list[ir.Value]:
    """Inputs or outputs in the order of an export of the deeper model.

    Exporters go through the layers one by one, or through all layers for each kind of input. Where an order is neither
    of the two, copies follow what they are copies of.
    """
    if not columns or not columns[0]:
        return old
    where = {value: number for number, value in enumerate(old)}
    rows = [sorted(where[value] for value in unit) for unit in columns]
    kinds = [[where[unit[kind]] for unit in columns] for kind in range(len(columns[0]))]
    ours = sorted(place for row in rows for place in row)
    by_layers = [place for row in rows for place in row] == ours
    by_kinds = (
        all(kind == sorted(kind) for kind in kinds) and [place for kind in sorted(kinds) for place in kind] == ours
    )
    if by_layers:
        kind_order = sorted(range(len(kinds)), key=lambda kind: kinds[kind][0])
        result = [layer[kind] for layer in new for kind in kind_order]
    elif by_kinds:
        result = [layer[kind] for kind in sorted(range(len(kinds)), key=lambda kind: kinds[kind]) for layer in new]
    else:
        follow: dict[ir.Value, list[ir.Value]] = {}
        for layer, place in zip(new, places, strict=True):
            for value, source in zip(layer, columns[place.source], strict=True):
                follow.setdefault(source, []).append(value)
        return [result for value in old for result in follow.get(value, [value])]
    inside = {value for unit in columns for value in unit}
    first = ours[0]
    return [
        *(value for value in old[:first] if value not in inside),
        *result,
        *(value for value in old[first:] if value not in inside),
    ]
