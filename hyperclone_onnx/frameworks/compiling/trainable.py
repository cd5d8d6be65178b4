"""Which stored tensors are parameters, decided by structure.

A stored floating tensor is trainable when it combines with *activations*. These are the floating inputs of the graph,
rows that are looked up in a table, products of a stored matrix and a run-time value that sum over more than one
element, and all that depends on one of these. A run-time value is any that is not made of stored tensors alone: counts
and bytes that are cast to float, time steps, positions, a OneHot.

So rotary frequencies stay out: they are multiplied with positions, and nothing is summed. Rotary tables, masks, running
statistics and single numbers are no parameters either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.frameworks.compiling.program import Role
from hyperclone_onnx.graphs import MOVES_OR_CASTS, bodies_of, is_initializer

LAYOUT = MOVES_OR_CASTS | frozenset("Concat Cos Expand Neg Sin Slice Split Tile".split())
"""Operators whose result is still the tensor itself, laid out anew (or the angles that it holds)."""

MASKED = -1e4
"""A stored tensor with elements this low is a mask."""

STATISTICS = {"BatchNormalization": (3, 4)}
"""Inputs that are gathered while training, not trained."""

ANGLES = {"RotaryEmbedding": (1, 2, 3), "GroupQueryAttention": (7, 8)}
"""Inputs that are rotary tables."""

PARAMETERS = frozenset(
    """
    BatchNormalization GRU GroupNormalization InstanceNormalization LSTM LayerNormalization RMSNormalization RNN
    SimplifiedLayerNormalization
    """.split()
)
"""Operators that have parameters of their own, whatever run-time value is their first input."""

Reasons = dict[str, tuple[Role, str]]


def roles(model: ir.Model, *, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> Reasons:
    """The role of each floating tensor of a model, and why; single numbers and whole numbers are left out.

    Args:
        model: a normalised model.
        freeze: globs of initializer names that are not to be trained.
        train: globs of initializer names that are, whatever the structure says; stronger than `freeze`. A single
            number is meant by its full name only.

    Raises:
        BadRequest: a glob matches no tensor.
    """
    return overridden(structural_roles(model, train), freeze, train)


def structural_roles(model: ir.Model, numbers: Sequence[str] = ()) -> Reasons:
    """The roles by structure alone; single numbers that are named in full count as tensors."""
    found = _Structure(model).roles()
    for name, value in model.graph.initializers.items():
        if name in numbers and name not in found and _is_floating(value):
            found[name] = ("constant", "a single number")
    return found


def overridden(found: Reasons, freeze: Sequence[str], train: Sequence[str]) -> Reasons:
    """Roles with the globs of `roles` applied."""
    found = dict(found)
    _must_match([*freeze, *train], found)
    for name in found:
        if _matches(name, train):
            found[name] = ("trainable", "asked to be trained")
        elif found[name][0] == "trainable" and _matches(name, freeze):
            found[name] = ("frozen", "asked to be frozen")
    return found


def trainable(model: ir.Model, *, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> list[str]:
    """The names of a model's trainable tensors, in the file's order."""
    return [name for name, (role, _) in roles(model, freeze=freeze, train=train).items() if role == "trainable"]


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _must_match(globs: Iterable[str], names: Iterable[str]) -> None:
    known = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            raise BadRequest(f"{glob!r} matches no floating tensor of this model; `handoff --list` shows their names")


class _Structure:
    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.nodes = list(model.graph.all_nodes())
        self.fixed = _fixed_values(model.graph)
        self.sources: dict[ir.Value, frozenset[ir.Value]] = {}
        """For each activation, the floating inputs and the stored tensors that it depends on."""
        self.angles: frozenset[ir.Value] = frozenset()
        self._follow()
        self.angles = frozenset(table for table in self._tables() if self._is_angles(table))
        self._follow()

    def roles(self) -> Reasons:
        found: Reasons = {}
        for name, value in self.model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            if tensor.size == 1:
                if len(tensor.shape):
                    found[name] = ("constant", "a single number")
                continue
            found[name] = self._role(value)
        return found

    def _role(self, value: ir.Value) -> tuple[Role, str]:
        if value in self.angles:
            return "constant", "rotary angles: looked up by position and multiplied"
        uses = list(self._readers(value))
        if any(index in STATISTICS.get(node.op_type, ()) for node, index in uses):
            return "constant", "running statistics"
        if any(index in ANGLES.get(node.op_type, ()) for node, index in uses):
            return "constant", "rotary angles"
        looked_up = next((node for node, index in uses if _is_lookup(node, index)), None)
        met = next((node for node, _ in uses if self._meets_activation(node) or self._contracts(node)), None)
        if looked_up is None and met is None:
            return "constant", "meets no activation"
        tensor = value.const_value
        assert tensor is not None
        if self._is_pruning_mask(value, tensor):
            return "constant", "zeros and ones that another weight is multiplied by"
        if looked_up is None and self._is_position_bias(value):
            return "constant", "a bias of positions, cut to the lengths and added to scores"
        if len(uses) > 1 and _is_one_value(tensor):
            return "constant", "one value everywhere, and used in several places"
        if met is not None and met.op_type in ("Add", "Where", "Min") and _lowest(tensor) <= MASKED:
            return "constant", "a mask"
        if looked_up is not None:
            return "trainable", f"looked up by {looked_up.op_type} (node {looked_up.name!r})"
        assert met is not None
        return "trainable", f"meets activations in {met.op_type} (node {met.name!r})"

    def _is_position_bias(self, value: ir.Value) -> bool:
        """Whether a tensor is cut to sizes known only when running, and then only added to a softmax's operand."""
        cut = any(
            use.node.op_type == "Slice" and not all(v is None or is_initializer(v) for v in use.node.inputs)
            for each in self._laid_out(value)
            for use in each.uses()
        )
        return cut and all(node.op_type == "Add" and _reaches_softmax(node) for node, _ in self._readers(value))

    # -- what depends on what -------------------------------------------------------------------------------

    def _follow(self) -> None:
        self.sources = {
            value: frozenset([value])
            for value in self.model.graph.inputs
            if value.dtype is not None and value.dtype.is_floating_point()
        }
        self._follow_graph(self.model.graph)

    def _follow_graph(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.op_type in ("Shape", "Size"):
                continue
            for _ in range(2 if node.op_type in ("Loop", "Scan") else 1):  # a state may become an activation in a turn
                for inner in bodies_of(node):
                    self._enter(node, inner)
                    self._follow_graph(inner)
            reached = [self.sources[v] for v in node.inputs if v is not None and v in self.sources]
            reached += [self.sources[v] for inner in bodies_of(node) for v in inner.outputs if v in self.sources]
            for index, value in enumerate(node.inputs):
                stored = _origin(value) if value is not None and _is_lookup(node, index) else None
                if stored is not None and stored not in self.angles and _is_floating(stored):
                    reached.append(frozenset([stored]))
                elif value is not None and self._is_contracted(node, index):
                    reached.append(frozenset([_origin(value) or value]))
            if reached:
                for output in node.outputs:
                    self.sources[output] = frozenset().union(*reached)

    def _enter(self, node: ir.Node, body: ir.Graph) -> None:
        """What a body is given: what its node is, and for states what it gave itself before."""
        carried = node.inputs if node.op_type == "Scan" else (None, None, *node.inputs[2:])
        before = body.outputs if node.op_type == "Scan" else (None, *body.outputs)
        for i, value in enumerate(body.inputs):
            given = [each[i] for each in (carried, before) if i < len(each)]
            found = [self.sources[each] for each in given if each is not None and each in self.sources]
            if found and value.dtype is not None and value.dtype.is_floating_point():
                self.sources[value] = frozenset().union(*found)

    def _tables(self) -> set[ir.Value]:
        origins = (_origin(node.inputs[0]) for node in self.nodes if _is_lookup(node, 0) and node.inputs[0] is not None)
        return {each for each in origins if each is not None and _is_floating(each)}

    def _is_angles(self, table: ir.Value) -> bool:
        """Whether all that is done with what is looked up is to multiply other activations."""
        readers = [node for node, index in self._readers(table, through_lookups=True)]
        return bool(readers) and all(
            node.op_type == "Mul"
            and any(self.sources.get(v, frozenset()) - {table} for v in node.inputs if v)
            and not self._is_scaled(node, table)
            for node in readers
        )

    def _is_scaled(self, node: ir.Node, table: ir.Value) -> bool:
        """Whether a product is of nothing but the table and numbers."""
        return all(self.sources.get(v, frozenset()) <= {table} for v in node.inputs if v is not None)

    def _meets_activation(self, node: ir.Node) -> bool:
        return any(value is not None and value in self.sources for value in node.inputs)

    def _contracts(self, node: ir.Node) -> bool:
        """Whether a node multiplies a stored matrix with a run-time value; then it adds a bias to their product."""
        return any(self._is_contracted(node, index) for index in range(len(node.inputs)))

    def _is_contracted(self, node: ir.Node, index: int) -> bool:
        """Whether an input is a matrix of stored numbers, and is multiplied with a run-time value and summed."""
        value = node.inputs[index]
        if value is None or value not in self.fixed or value.dtype is None or not value.dtype.is_floating_point():
            return False
        if node.op_type in PARAMETERS:
            return index > 0 and self._is_run_time(node.inputs[0])
        others = [other for at, other in enumerate(node.inputs[:2]) if at != index]
        return index < 2 and any(map(self._is_run_time, others)) and _summed_over(node, index) > 1

    def _is_run_time(self, value: ir.Value | None) -> bool:
        """Whether a value is floating, as far as is known, and not made of stored tensors alone."""
        if value is None or value in self.fixed:
            return False
        # ONNX's type inference knows no operators of other domains: their results have no type here.
        return (value.dtype is None or value.dtype.is_floating_point()) and not _is_cut(value)

    def _is_pruning_mask(self, value: ir.Value, tensor: ir.TensorProtocol) -> bool:
        """Whether a tensor holds zeros and ones, and is only multiplied with other stored tensors."""
        products = [use.node for form in self._layouts(value) for use in form.uses() if use.node.op_type != "Cast"]
        if not products or not all(node.op_type == "Mul" and self._is_product_of_stored(node) for node in products):
            return False
        return set(np.unique(np.asarray(tensor.numpy()).astype(np.float32)).tolist()) == {0.0, 1.0}

    def _layouts(self, value: ir.Value) -> list[ir.Value]:
        forms = [value]
        for form in forms:
            forms += [use.node.outputs[0] for use in form.uses() if use.node.op_type in MOVES_OR_CASTS]
        return forms

    def _is_product_of_stored(self, node: ir.Node) -> bool:
        return all(value in self.fixed for value in node.inputs) and not all(
            value is not None and value.const_value is not None and value.const_value.size == 1 for value in node.inputs
        )

    def _laid_out(self, value: ir.Value, through_lookups: bool = False) -> list[ir.Value]:
        """A stored tensor, and what is only that tensor laid out anew or made of stored tensors alone."""
        found = [value]
        for each in found:
            for use in each.uses():
                if self._is_passage(use.node) or (through_lookups and _is_lookup(use.node, use.idx)):
                    found += [output for output in use.node.outputs if output not in found]
        return found

    def _readers(self, value: ir.Value, through_lookups: bool = False) -> Iterator[tuple[ir.Node, int]]:
        """The nodes that combine a stored tensor with something, or look it up, and at which input."""
        forms = self._laid_out(value, through_lookups)
        for each in forms:
            yield from ((use.node, use.idx) for use in each.uses() if use.node.outputs[0] not in forms)

    def _is_passage(self, node: ir.Node) -> bool:
        if _is_lookup(node, 0):
            return False
        if all(value is None or _is_made_of_stored(value) or _is_cut(value) for value in node.inputs):
            return True
        floats = [
            value for value in node.inputs if value is not None and value.dtype and value.dtype.is_floating_point()
        ]
        return node.op_type in LAYOUT and (len(floats) == 1 or not self._meets_activation(node))


def _fixed_values(graph: ir.Graph) -> set[ir.Value | None]:
    """The values that are made of stored tensors alone."""
    fixed: set[ir.Value | None] = {None, *graph.initializers.values()}
    for node in graph.all_nodes():
        if all(value in fixed for value in node.inputs) and not any(True for _ in bodies_of(node)):
            fixed.update(node.outputs)
    return fixed


def _summed_over(node: ir.Node, index: int) -> int:
    """How many products of a stored operand's elements a contraction adds up; 0 for any other operator."""
    value = node.inputs[index]
    shape = None if value is None or value.shape is None else value.shape.dims
    if not shape:
        return 0
    match node.op_type:
        case "MatMul" | "Linear":
            sizes = [shape[-1] if index == 0 or len(shape) == 1 else shape[-2]]
        case "FusedMatMul" | "Gemm":
            turned = node.attributes.get("transA" if index == 0 else "transB")
            last = (index == 0) != (turned is not None and bool(turned.as_int()))
            sizes = [shape[-1] if last or len(shape) == 1 else shape[-2]]
        case "Conv" | "FusedConv" | "NhwcFusedConv" | "NhwcConv":
            sizes = list(shape[1:])
        case "ConvTranspose":
            sizes = [shape[0], *shape[2:]]
        case "Einsum":
            sizes = _summed_in_einsum(node, index, shape)
        case _:
            return 0
    return math.prod(size if isinstance(size, int) else 0 for size in sizes)


def _summed_in_einsum(node: ir.Node, index: int, shape: Sequence[int | ir.SymbolicDim]) -> list[int | ir.SymbolicDim]:
    left, arrow, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or len(terms) != 2 or len(terms[index]) != len(shape):
        return [0]
    both = set(terms[0]) & set(terms[1])
    return [size for letter, size in zip(terms[index], shape, strict=True) if letter in both - set(right)] or [0]


def _is_made_of_stored(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is None:
        return is_initializer(value)
    return all(each is None or _is_made_of_stored(each) for each in producer.inputs)


def _is_cut(value: ir.Value) -> bool:
    """Whether a floating value is made of stored floats alone, laid out by sizes known only when running."""
    producer = value.producer()
    if producer is None or value.dtype is None or not value.dtype.is_floating_point():
        return False
    given = [each for each in producer.inputs if each is not None]
    floats = [each for each in given if each.dtype is not None and each.dtype.is_floating_point()]
    return (
        bool(floats)
        and (producer.op_type in LAYOUT or all(each in floats or _is_made_of_stored(each) for each in given))
        and all(_is_made_of_stored(each) or _is_cut(each) for each in floats)
    )


def _is_lookup(node: ir.Node, index: int) -> bool:
    """Whether an input is a table that this node looks rows up in, by indices that are not stored."""
    if node.op_type == "EmbedLayerNormalization":
        return index in (2, 3, 4)
    if index != 0 or node.op_type not in ("Gather", "GatherElements", "GatherND") or node.domain:
        return False
    return node.inputs[1] is not None and not _is_made_of_stored(node.inputs[1])


def _origin(value: ir.Value) -> ir.Value | None:
    """The stored tensor that a value is, laid out anew."""
    while not is_initializer(value):
        producer = value.producer()
        if producer is None or producer.op_type not in LAYOUT or producer.inputs[0] is None:
            return None
        value = producer.inputs[0]
    return value


def _reaches_softmax(node: ir.Node) -> bool:
    uses = node.outputs[0].uses()
    return bool(uses) and all(
        use.node.op_type == "Softmax" or (use.node.op_type in ("Add", "Where") and _reaches_softmax(use.node))
        for use in uses
    )


def _is_one_value(tensor: ir.TensorProtocol) -> bool:
    array = np.asarray(tensor.numpy())
    return bool((array == array.ravel()[0]).all())


def _is_floating(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype.is_floating_point()


def _lowest(tensor: ir.TensorProtocol) -> float:
    return float(np.asarray(tensor.numpy()).astype(np.float32).min())
