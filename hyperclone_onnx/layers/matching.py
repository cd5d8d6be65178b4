"""Are two parts of a graph the same, node by node? Both are walked backwards at once, from their last nodes.

Two values match if both are computed by the same operator, at the same output, from inputs that match; or both are
stored tensors, or inputs of the graph, of one type and shape; or they are one value, which both parts read. Numbers of
weights may differ. Integers may not: they say what an operator does.

Layers may be of several kinds (local and global attention). Then they are alike but for integers, and for values that
come from beside the stream, such as masks and tables of angles: each kind of layer reads its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.graphs import is_initializer
from hyperclone_onnx.layers.streams import is_carried

MOST_INTEGERS = 64
"""The integers of a stored tensor are compared up to this number of elements."""

COMMUTATIVE = frozenset(["Add", "Mul"])
"""Operators whose two operands may stand in either order."""


@dataclass(frozen=True)
class Part:
    """A part of a graph: from the values that enter it to its last node."""

    enters: dict[ir.Value, int]
    """The values that enter, numbered."""
    core: frozenset[ir.Node]
    """The nodes of the stream between."""
    end: ir.Node


@dataclass
class Match:
    """The pairs of a part of the graph (left) and the part that it is compared with (right), in order of discovery."""

    nodes: dict[ir.Node, ir.Node] = field(default_factory=dict)
    stored: dict[ir.Value, ir.Value] = field(default_factory=dict)
    inputs: dict[ir.Value, ir.Value] = field(default_factory=dict)
    enters: dict[int, ir.Value] = field(default_factory=dict)
    """For each value that enters the left part, the value that enters the right part."""
    kinds: dict[ir.Value, ir.Value] = field(default_factory=dict)
    """Values from beside the stream that the two parts read in the same place, and that are not the same."""

    def copy(self) -> Match:
        """The same pairs; more of them can be added without changing these."""
        return Match(dict(self.nodes), dict(self.stored), dict(self.inputs), dict(self.enters), dict(self.kinds))

    def take(self, other: Match) -> None:
        """Have the pairs of another match."""
        self.nodes, self.stored, self.inputs = other.nodes, other.stored, other.inputs
        self.enters, self.kinds = other.enters, other.kinds


def match(left: Part, right: Part, *, loose: bool = False, kinds: bool = False) -> Match | None:
    """Pair two parts of a graph; None if they are not the same.

    Args:
        left: the part that others are compared with.
        right: the part to compare with it.
        loose: whatever stands in the right part where a value enters the left one is taken as entering it. The first
            layer of a graph needs that if the norms before the other layers are fused with the ends of the layers.
        kinds: the parts may be of two kinds.
    """
    pairs = Match()
    if not _walk(left, right, pairs, [(left.end, right.end)], [], loose, kinds):
        return None
    if not left.core <= pairs.nodes.keys():
        return None
    if not loose and not right.core <= set(pairs.nodes.values()):
        return None
    pairs = _with_side_branches(left, right, pairs, loose)
    return pairs if _inputs_are_private(pairs) else None


def _inputs_are_private(pairs: Match) -> bool:
    """Whether inputs of the graph that were paired, such as caches, are read by their own part alone.

    Any node may ask for their sizes.
    """
    sides = (pairs.inputs.keys(), pairs.nodes.keys()), (pairs.inputs.values(), set(pairs.nodes.values()))
    return all(
        use.node in nodes or not any(map(is_carried, use.node.outputs))
        for inputs, nodes in sides
        for value in inputs
        for use in value.uses()
    )


def _walk(
    left: Part,
    right: Part,
    pairs: Match,
    nodes: Iterable[tuple[ir.Node, ir.Node]],
    values: Iterable[tuple[ir.Value | None, ir.Value | None]],
    loose: bool,
    kinds: bool = False,
) -> bool:
    reverse = {b: a for a, b in pairs.nodes.items()}
    pending = list(values)
    for a, b in nodes:
        if not _pair_nodes(a, b, left, right, pairs, reverse, pending, loose, kinds):
            return False
    while pending:
        one, other = pending.pop()
        if one is None or other is None:
            if one is not other:
                return False
            continue
        if one in left.enters:
            number = left.enters[one]
            if not loose and right.enters.get(other) != number:
                return False
            if pairs.enters.setdefault(number, other) is not other:
                return False
            continue
        if other in right.enters:
            return False
        if one is other:
            continue
        if is_initializer(one) and is_initializer(other):
            if not same_stored(one, other, kinds):
                return False
            if pairs.stored.setdefault(one, other) is not other:
                return False
            continue
        made = one.producer(), other.producer()
        if kinds and made[0] not in left.core and made[1] not in right.core and made != (None, None):
            if pairs.kinds.get(one) is other:
                continue
            trial = pairs.copy()
            if _walk(left, right, trial, [], [(one, other)], loose):
                pairs.take(trial)
                reverse = {b: a for a, b in pairs.nodes.items()}
            elif not _same_form(one, other) or pairs.kinds.setdefault(one, other) is not other:
                return False
            continue
        if made == (None, None):
            if not _same_input(one, other) or pairs.inputs.setdefault(one, other) is not other:
                return False
            continue
        if made[0] is None or made[1] is None or one.index() != other.index():
            return False
        if not _pair_nodes(made[0], made[1], left, right, pairs, reverse, pending, loose, kinds):
            return False
    return True


def _pair_nodes(
    a: ir.Node,
    b: ir.Node,
    left: Part,
    right: Part,
    pairs: Match,
    reverse: dict[ir.Node, ir.Node],
    pending: list[tuple[ir.Value | None, ir.Value | None]],
    loose: bool,
    kinds: bool,
) -> bool:
    if a in pairs.nodes:
        return pairs.nodes[a] is b
    if b in reverse or not _same_operator(a, b, kinds):
        return False
    if a is b:
        return False
    if (a in left.core) != (b in right.core) and not loose:
        return False
    pairs.nodes[a], reverse[b] = b, a
    size = max(len(a.inputs), len(b.inputs))
    one, other = _padded(a, size), _padded(b, size)
    if a.op_type in COMMUTATIVE and size == 2:
        tags = [_kind(value, left) for value in one], [_kind(value, right) for value in other]
        if tags[0] != tags[1] and tags[0] == tags[1][::-1]:
            other.reverse()
    pending += zip(one, other, strict=True)
    return True


def _kind(value: ir.Value | None, part: Part) -> object:
    """What tells the operands of a sum apart, in whichever order an exporter wrote them."""
    if value is None or value in part.enters:
        return None if value is None else part.enters[value]
    producer = value.producer()
    return is_initializer(value) if producer is None else producer.op_type


def _padded(node: ir.Node, size: int) -> list[ir.Value | None]:
    return [*node.inputs, *[None] * (size - len(node.inputs))]


def _with_side_branches(left: Part, right: Part, pairs: Match, loose: bool) -> Match:
    """The pairs, and those of nodes that lead from a part to an output of the graph, such as the keys of a cache."""
    place = {node: number for number, node in enumerate(pairs.nodes)}
    for a in sorted(pairs.nodes, key=lambda node: place[node]):
        _follow(a, left, right, pairs, loose)
    return pairs


def _follow(a: ir.Node, left: Part, right: Part, pairs: Match, loose: bool) -> None:
    pending = [] if a is left.end else [a]
    while pending:
        node = pending.pop()
        for one, other in zip(node.outputs, pairs.nodes[node].outputs, strict=False):
            for reader in _side_readers(one, left, pairs):
                taken = set(pairs.nodes.values())
                for candidate in _side_readers(other, right, pairs):
                    if candidate in taken:
                        continue
                    trial = pairs.copy()
                    if _walk(left, right, trial, [(reader, candidate)], [], loose):
                        pairs.take(trial)
                        pending.append(reader)
                        break


def _side_readers(value: ir.Value, part: Part, pairs: Match) -> Iterator[ir.Node]:
    if not is_carried(value):
        return
    for node in dict.fromkeys(use.node for use in value.uses()):
        inside = node in part.core or node in pairs.nodes
        if not inside and node.graph is part.end.graph and any(is_carried(result) for result in node.outputs):
            yield node


# -- what is the same -------------------------------------------------------------------------------------


def same_stored(one: ir.Value, other: ir.Value, kinds: bool = False) -> bool:
    """Whether two stored tensors are of one type and shape and, where they are a few integers, of one value.

    Parts of two kinds may differ in integers.
    """
    a, b = one.const_value, other.const_value
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    is_code = a.dtype.is_integer() and a.dtype.bitwidth <= 8
    if not a.dtype.is_floating_point() and not is_code and a.size <= MOST_INTEGERS and not kinds:
        return bool(np.array_equal(a.numpy(), b.numpy()))
    return True


def _same_input(one: ir.Value, other: ir.Value) -> bool:
    if one.dtype != other.dtype or (one.shape is None) != (other.shape is None):
        return False
    if one.shape is None or other.shape is None:
        return True
    sizes = [[size if isinstance(size, int) else None for size in value.dims] for value in (one.shape, other.shape)]
    return sizes[0] == sizes[1]


def _same_form(one: ir.Value, other: ir.Value) -> bool:
    """Whether two values have one type and as many axes, as far as that is known."""
    known = one.shape is not None and other.shape is not None
    return one.dtype == other.dtype and (not known or len(one.shape or ()) == len(other.shape or ()))


def _same_operator(a: ir.Node, b: ir.Node, kinds: bool = False) -> bool:
    if a.op_type != b.op_type or a.domain != b.domain or a.graph is not b.graph:
        return False
    usual = _USUAL.get(a.op_type, {})
    names = a.attributes.keys() | b.attributes.keys()
    return all(
        _same_attribute(a.attributes.get(name), b.attributes.get(name), usual.get(name))
        or (kinds and all(name in node.attributes and _is_integer(node.attributes[name]) for node in (a, b)))
        for name in names
    )


def _is_integer(attribute: ir.Attr) -> bool:
    return attribute.type == ir.AttributeType.INT


_USUAL: dict[str, dict[str, int]] = {
    "LayerNormalization": {"axis": -1, "stash_type": 1},
    "SimplifiedLayerNormalization": {"axis": -1, "stash_type": 1},
}
"""The values of attributes that exporters write or leave out."""


def _same_attribute(one: ir.Attr | None, other: ir.Attr | None, usual: int | None) -> bool:
    if one is None or other is None:
        present = one or other
        return present is not None and usual is not None and bool(present.value == usual)
    if one.type != other.type:
        return False
    if one.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return False
    if one.type == ir.AttributeType.TENSOR:
        return bool(np.array_equal(one.as_tensor().numpy(), other.as_tensor().numpy()))
    return bool(_plain(one.value) == _plain(other.value))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
