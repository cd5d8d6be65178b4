"""Decide from the structure of the graph which stored tensors are trainable.

A stored floating tensor is trainable if the graph combines it with an *activation*. Activations are:

* the floating inputs of the graph;
* rows that are looked up in a table;
* products of a stored matrix and a run-time value, if they sum over more than one element;
* every value that depends on an activation.

A run-time value is a value that does not depend on stored tensors alone: counts and bytes that are cast to float, time
steps, positions, a OneHot.

Rotary frequencies are not trainable: the graph multiplies them with positions and sums nothing. Rotary tables, masks,
running statistics and single numbers are not trainable either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import BadRequest
from hyperclone_onnx.graphs import MOVES_OR_CASTS, bodies_of, is_initializer

LAYOUT = MOVES_OR_CASTS | frozenset("Concat Cos Expand Neg Sin Slice Split Tile".split())
"""Operators that only change the layout of a tensor, or compute the sine or cosine of its angles."""

MASKED = -1e4
"""A stored tensor with elements this low is a mask."""

STATISTICS = {"BatchNormalization": (3, 4)}
"""Inputs that training measures (running statistics) but does not learn."""

ANGLES = {"RotaryEmbedding": (1, 2, 3), "GroupQueryAttention": (7, 8)}
"""Inputs that are rotary tables."""

SCALES = {"Codes": (1,), "DequantizeLinear": (1,), "QuantizeLinear": (1,)}
"""Inputs that are measured before training and say what a code means."""

FIRST_STATES = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}
"""Inputs that are states before the first step."""

PARAMETERS = frozenset(
    """
    BatchNormalization GRU GroupNormalization InstanceNormalization LSTM LayerNormalization RMSNormalization RNN
    SimplifiedLayerNormalization
    """.split()
)
"""Operators whose stored inputs are parameters. Their first input may be any run-time value."""

Role = Literal["trainable", "frozen", "constant"]
"""What training does with a stored tensor. It leaves a frozen tensor as it is only because the user says so."""

MERGED = "one value everywhere, and used in several places"
"""The reason for not training a tensor that an exporter may have merged from several ones."""

Reasons = dict[str, tuple[Role, str]]


def roles(model: ir.Model, *, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> Reasons:
    """The role of each floating tensor of a model, and the reason. Single numbers without axes have no role.

    Args:
        model: a normalised model.
        freeze: globs of the initializers that training must leave unchanged.
        train: globs of the initializers to train, whatever the structure says. It is stronger than `freeze`. A single
            number is trained only if its full name is given.

    Raises:
        BadRequest: a glob matches no tensor.
    """
    return overridden(structural_roles(model, train), freeze, train)


def structural_roles(model: ir.Model, numbers: Sequence[str] = ()) -> Reasons:
    """The roles by structure alone. A single number without axes has a role only if `numbers` names it."""
    reasons = _Structure(model).roles()
    for name, value in model.graph.initializers.items():
        if name in numbers and name not in reasons and _is_floating(value):
            reasons[name] = ("constant", "a single number")
    return reasons


def merged(model: ir.Model) -> list[str]:
    """The tensors that an exporter may have merged from several equal parameters: gains of ones, for example.

    Args:
        model: a normalised model.
    """
    return [name for name, (_, reason) in structural_roles(model).items() if reason == MERGED]


def overridden(reasons: Reasons, freeze: Sequence[str], train: Sequence[str]) -> Reasons:
    """Roles with the globs `freeze` and `train` applied, as `roles` describes them."""
    reasons = dict(reasons)
    _must_match([*freeze, *train], reasons)
    for name in reasons:
        if matches(name, train):
            reasons[name] = ("trainable", "matches a glob of `train`")
        elif reasons[name][0] == "trainable" and matches(name, freeze):
            reasons[name] = ("frozen", "matches a glob of `freeze`")
    return reasons


def trainable(model: ir.Model, *, freeze: Sequence[str] = (), train: Sequence[str] = ()) -> list[str]:
    """The names of a model's trainable tensors, in the file's order."""
    return [name for name, (role, _) in roles(model, freeze=freeze, train=train).items() if role == "trainable"]


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a name fits any of some globs."""
    return any(fnmatchcase(name, glob) for glob in globs)


def _must_match(globs: Iterable[str], names: Iterable[str]) -> None:
    known = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in known):
            raise BadRequest(f"{glob!r} matches no floating tensor of this model; `handoff --list` shows their names")


class _Structure:
    """A graph, and for each of its activations the inputs and stored tensors that it depends on."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.nodes = list(model.graph.all_nodes())
        self.fixed = _fixed_values(model.graph)
        self.sources: dict[ir.Value, frozenset[ir.Value]] = {}
        """For each activation, the floating inputs and the stored tensors that it depends on."""
        self.angles: frozenset[ir.Value] = frozenset()
        # Which tables hold angles is known only after the first pass; the second pass then leaves them out.
        self._follow()
        self.angles = frozenset(table for table in self._tables() if self._is_angles(table))
        self._follow()

    def roles(self) -> Reasons:
        reasons: Reasons = {}
        for name, value in self.model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            if tensor.size == 1:
                if len(tensor.shape):
                    reasons[name] = ("constant", "a single number")
                continue
            reasons[name] = self._role(value)
        return reasons

    def _role(self, value: ir.Value) -> tuple[Role, str]:
        if value in self.angles:
            return "constant", "rotary angles: looked up by position and multiplied"
        uses = list(self._readers(value))
        if any(index in STATISTICS.get(node.op_type, ()) for node, index in uses):
            return "constant", "running statistics"
        if any(index in ANGLES.get(node.op_type, ()) for node, index in uses):
            return "constant", "rotary angles"
        if any(use.idx in SCALES.get(use.node.op_type, ()) for use in value.uses()):
            return "constant", "a scale of codes"
        starts = value.uses() and all(use.idx in FIRST_STATES.get(use.node.op_type, ()) for use in value.uses())
        if starts and value.const_value is not None and not np.any(value.const_value.numpy()):
            return "constant", "the zeros that a recurrence begins with"
        lookup = next((node for node, index in uses if _is_lookup(node, index)), None)
        combination = next((node for node, _ in uses if self._reads_activation(node) or self._contracts(node)), None)
        if lookup is None and combination is None:
            return "constant", "meets no activation"
        tensor = value.const_value
        assert tensor is not None
        if self._is_pruning_mask(value, tensor):
            return "constant", "zeros and ones that another weight is multiplied by"
        if lookup is None and self._is_position_bias(value):
            return "constant", "a bias of positions, cut to the lengths and added to scores"
        if len(uses) > 1 and _is_one_value(tensor):
            return "constant", MERGED
        if combination is not None and combination.op_type in ("Add", "Where", "Min") and _lowest(tensor) <= MASKED:
            return "constant", "a mask"
        if lookup is not None:
            return "trainable", f"looked up by {lookup.op_type} (node {lookup.name!r})"
        assert combination is not None
        return "trainable", f"meets activations in {combination.op_type} (node {combination.name!r})"

    def _is_position_bias(self, value: ir.Value) -> bool:
        """Whether a tensor is sliced to sizes known only at run time, and then only added to the input of a softmax."""
        cut = any(
            use.node.op_type == "Slice" and not all(v is None or is_initializer(v) for v in use.node.inputs)
            for form in self._laid_out(value)
            for use in form.uses()
        )
        return cut and all(node.op_type == "Add" and _reaches_softmax(node) for node, _ in self._readers(value))

    # -- dependencies of activations ------------------------------------------------------------------------

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
            # A state that begins as a constant may become an activation in the first turn, so we go twice.
            for _ in range(2 if node.op_type in ("Loop", "Scan") else 1):
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
        """Give the inputs of a body the sources of the node's inputs and, for states, of the body's own outputs."""
        carried = node.inputs if node.op_type == "Scan" else (None, None, *node.inputs[2:])
        before = body.outputs if node.op_type == "Scan" else (None, *body.outputs)
        for i, value in enumerate(body.inputs):
            origins = [values[i] for values in (carried, before) if i < len(values)]
            sources = [self.sources[origin] for origin in origins if origin is not None and origin in self.sources]
            if sources and value.dtype is not None and value.dtype.is_floating_point():
                self.sources[value] = frozenset().union(*sources)

    def _tables(self) -> set[ir.Value]:
        """The stored floating tables that the graph looks rows up in."""
        origins = (_origin(node.inputs[0]) for node in self.nodes if _is_lookup(node, 0) and node.inputs[0] is not None)
        return {table for table in origins if table is not None and _is_floating(table)}

    def _is_angles(self, table: ir.Value) -> bool:
        """Whether the rows that are looked up in a table only multiply activations of other sources."""
        readers = [node for node, index in self._readers(table, through_lookups=True)]
        return bool(readers) and all(
            node.op_type == "Mul"
            and any(self.sources.get(v, frozenset()) - {table} for v in node.inputs if v)
            and not self._is_scaled(node, table)
            for node in readers
        )

    def _is_scaled(self, node: ir.Node, table: ir.Value) -> bool:
        """Whether a product depends on the table and on no other activation."""
        return all(self.sources.get(v, frozenset()) <= {table} for v in node.inputs if v is not None)

    def _reads_activation(self, node: ir.Node) -> bool:
        return any(value is not None and value in self.sources for value in node.inputs)

    def _contracts(self, node: ir.Node) -> bool:
        """Whether a node multiplies a stored matrix with a run-time value. Its other stored input is then a bias."""
        return any(self._is_contracted(node, index) for index in range(len(node.inputs)))

    def _is_contracted(self, node: ir.Node, index: int) -> bool:
        """Whether an input is a stored matrix in a product with a run-time value that sums, or one of `PARAMETERS`."""
        value = node.inputs[index]
        if value is None or value not in self.fixed or value.dtype is None or not value.dtype.is_floating_point():
            return False
        if node.op_type in PARAMETERS:
            return index > 0 and self._is_run_time(node.inputs[0])
        others = [other for at, other in enumerate(node.inputs[:2]) if at != index]
        return index < 2 and any(map(self._is_run_time, others)) and _summed_over(node, index) > 1

    def _is_run_time(self, value: ir.Value | None) -> bool:
        """Whether a value is floating (or of unknown type) and does not depend on stored tensors alone."""
        if value is None or value in self.fixed:
            return False
        # ONNX's type inference does not know operators of other domains, so their results have no type here.
        return (value.dtype is None or value.dtype.is_floating_point()) and not _is_cut(value)

    def _is_pruning_mask(self, value: ir.Value, tensor: ir.TensorProtocol) -> bool:
        """Whether a tensor holds zeros and ones, and the graph only multiplies it with other stored tensors."""
        products = [use.node for form in self._layouts(value) for use in form.uses() if use.node.op_type != "Cast"]
        if not products or not all(node.op_type == "Mul" and self._is_product_of_stored(node) for node in products):
            return False
        return set(np.unique(np.asarray(tensor.numpy()).astype(np.float32)).tolist()) == {0.0, 1.0}

    def _layouts(self, value: ir.Value) -> list[ir.Value]:
        """The value, and all copies of it in another layout or type."""
        forms = [value]
        for form in forms:
            forms += [use.node.outputs[0] for use in form.uses() if use.node.op_type in MOVES_OR_CASTS]
        return forms

    def _is_product_of_stored(self, node: ir.Node) -> bool:
        return all(value in self.fixed for value in node.inputs) and not all(
            value is not None and value.const_value is not None and value.const_value.size == 1 for value in node.inputs
        )

    def _laid_out(self, value: ir.Value, through_lookups: bool = False) -> list[ir.Value]:
        """A stored tensor, its copies in another layout, and the values computed from it and other stored tensors."""
        forms = [value]
        for form in forms:
            for use in form.uses():
                if self._is_passage(use.node) or (through_lookups and _is_lookup(use.node, use.idx)):
                    forms += [output for output in use.node.outputs if output not in forms]
        return forms

    def _readers(self, value: ir.Value, through_lookups: bool = False) -> Iterator[tuple[ir.Node, int]]:
        """The nodes that combine a stored tensor with another value or look up rows in it, and the input's index."""
        forms = self._laid_out(value, through_lookups)
        for form in forms:
            yield from ((use.node, use.idx) for use in form.uses() if use.node.outputs[0] not in forms)

    def _is_passage(self, node: ir.Node) -> bool:
        """Whether a node only changes the layout of a stored tensor, or computes from stored tensors alone."""
        if _is_lookup(node, 0):
            return False
        if all(value is None or _is_made_of_stored(value) or _is_cut(value) for value in node.inputs):
            return True
        floats = [
            value for value in node.inputs if value is not None and value.dtype and value.dtype.is_floating_point()
        ]
        return node.op_type in LAYOUT and (len(floats) == 1 or not self._reads_activation(node))


def _fixed_values(graph: ir.Graph) -> set[ir.Value | None]:
    """The values that depend on stored tensors alone."""
    fixed: set[ir.Value | None] = {None, *graph.initializers.values()}
    for node in graph.all_nodes():
        if all(value in fixed for value in node.inputs) and not any(True for _ in bodies_of(node)):
            fixed.update(node.outputs)
    return fixed


def _summed_over(node: ir.Node, index: int) -> int:
    """The number of products that a contraction adds up for one element of its result; 0 for any other operator."""
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
    """Whether a value depends on stored tensors alone."""
    producer = value.producer()
    if producer is None:
        return is_initializer(value)
    return all(operand is None or _is_made_of_stored(operand) for operand in producer.inputs)


def _is_cut(value: ir.Value) -> bool:
    """Whether a floating value holds stored floats alone, in a layout whose sizes are known only at run time."""
    producer = value.producer()
    if producer is None or value.dtype is None or not value.dtype.is_floating_point():
        return False
    inputs = [operand for operand in producer.inputs if operand is not None]
    floats = [operand for operand in inputs if operand.dtype is not None and operand.dtype.is_floating_point()]
    return (
        bool(floats)
        and (producer.op_type in LAYOUT or all(operand in floats or _is_made_of_stored(operand) for operand in inputs))
        and all(_is_made_of_stored(operand) or _is_cut(operand) for operand in floats)
    )


def _is_lookup(node: ir.Node, index: int) -> bool:
    """Whether an input is a table in which the node looks up rows. The indices must come from run time."""
    if node.op_type == "EmbedLayerNormalization":
        return index in (2, 3, 4)
    if index != 0 or node.op_type not in ("Gather", "GatherElements", "GatherND") or node.domain:
        return False
    return node.inputs[1] is not None and not _is_made_of_stored(node.inputs[1])


def _origin(value: ir.Value) -> ir.Value | None:
    """The stored tensor whose elements a value holds in another layout; None if there is none."""
    while not is_initializer(value):
        producer = value.producer()
        if producer is None or producer.op_type not in LAYOUT or producer.inputs[0] is None:
            return None
        value = producer.inputs[0]
    return value


def _reaches_softmax(node: ir.Node) -> bool:
    """Whether the result of a node goes only to a softmax, with at most sums and choices (`Where`) between."""
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
