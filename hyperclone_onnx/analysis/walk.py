"""From a graph to dimensions: one walk, in which each operator's rule relates the axes of its operands.

Each use of an initializer has axes of its own: exporters merge equal tensors (all-ones norms, a tied
embedding), and sharing storage must not tie dimensions together. An operator without a rule, or one whose rule
cannot tell, pins every axis it touches.
"""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from hyperclone_onnx.algebra import shape_values as known
from hyperclone_onnx.algebra.dims import ONE, Dim, Product, Space, Term
from hyperclone_onnx.algebra.shape_values import Known
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.errors import HypercloneError, Refused

Axes = tuple[Term, ...]
Use = tuple[ir.Node, int]
"""One use of an initializer: the node and the input's position."""


class Fact(enum.Enum):
    """What was seen to happen to an axis; roles are read off these."""

    CONTRACTED_WITH_WEIGHT = "contracted with a weight"
    CONTRACTED_WITH_ACTIVATION = "contracted between two activations"
    BATCHED = "batch axis of a contraction between two activations"
    VALUE_AXIS = "free axis of a contraction between two activations"
    WEIGHT_OUTPUT = "output axis of a weight"
    NORMALISED = "normalised"
    INDEXED = "indexed by values"
    EMBEDDING = "width of an embedding table"
    EXPANDED = "made by repetition"
    SOFTMAX = "axis of a softmax"
    SPATIAL = "numbers places, which a window moves along"
    CHOSEN = "numbers what is chosen from"
    GROUPED = "numbers groups of channels that are convolved or normalised apart"
    STATE = "carried from step to step by a recurrence"


@dataclass(frozen=True)
class Sum:
    """Operand axes that one operator multiplies and sums over, all of them the same `term`.

    `power` is 1 where the sum enters linearly, 0.5 where it enters squared (ReduceL2). Quantised operators sum
    `integers`; any one of the inputs `scales` multiplies what comes out, the inputs `biases` (in units of that
    scale) included.
    """

    node: ir.Node
    term: Term
    sites: tuple[tuple[int, int], ...]
    power: float = 1.0
    integers: bool = False
    scales: tuple[int, ...] = ()
    biases: tuple[int, ...] = ()


@dataclass(frozen=True)
class Uniform:
    """An axis over which `node` averages: it must repeat every index equally often."""

    node: ir.Node
    term: Term


@dataclass
class Dimensions:
    """What the walk found: the axes of every value, and all that later stages need to know of them."""

    model: ir.Model
    space: Space
    axes: dict[ir.Value, Axes | None] = field(default_factory=dict)
    use_axes: dict[Use, Axes] = field(default_factory=dict)
    known: dict[ir.Value, Known] = field(default_factory=dict)
    constants: set[ir.Value] = field(default_factory=set)
    picked: set[ir.Value] = field(default_factory=set)
    """Values that hold weights picked from stored tensors, such as the experts that a token is sent to."""
    sums: list[Sum] = field(default_factory=list)
    uniform: list[Uniform] = field(default_factory=list)
    facts: dict[Fact, list[tuple[Term, ir.Node]]] = field(default_factory=lambda: defaultdict(list))
    index_tables: list[tuple[ir.Value, Term]] = field(default_factory=list)
    sequences: dict[ir.Value, tuple[Axes, ...]] = field(default_factory=dict)
    """The axes of each element of a sequence of tensors, where their number is known."""
    lost: dict[ir.Value, tuple[str, str]] = field(default_factory=dict)
    """Why the rank of a value is not known, and the node to blame."""
    packed: dict[Use, int] = field(default_factory=dict)
    """The uses that hold several numbers in a byte, with the bits of each number."""
    unruled: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    idle: set[ir.Node] = field(default_factory=set)
    """The nodes of branches that never run, which the grown graph has no more."""
    walked: list[ir.Node] = field(default_factory=list)
    """Every node that was related, those of subgraphs that a rule walks into included, in order."""

    def axes_of(self, node: ir.Node, index: int) -> Axes | None:
        """The axes of a node's input, None where its rank is unknown."""
        value = node.inputs[index]
        if value is None:
            return None
        if is_initializer(value):
            return self.use_axes.get((node, index))
        return self.axes.get(value)

    def is_weight(self, value: ir.Value | None) -> bool:
        """Whether a value is stored, or picked from what is stored by indices."""
        return value in self.constants or value in self.picked

    def initializer_uses(self) -> Iterator[tuple[ir.Value, Use, Axes]]:
        """Every use of an initializer by a node of the main graph, in graph order."""
        for use, axes in self.use_axes.items():
            value = use[0].inputs[use[1]]
            assert value is not None
            yield value, use, axes


def is_initializer(value: ir.Value) -> bool:
    """Whether the value is stored in the model rather than computed or fed."""
    return value.const_value is not None and value.producer() is None


def describe(node: ir.Node) -> str:
    """How a node is named in messages: ``MatMul '/layer.0/q_proj'``."""
    domain = f"{node.domain}." if node.domain else ""
    return f"{domain}{node.op_type} {node.name!r}" if node.name else f"{domain}{node.op_type}"


class CannotTell(Exception):
    """Raised inside a rule when it cannot relate this node's axes; the engine then pins them.

    `place` is the node to blame, where it is not this one.
    """

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(reason)
        self.place = place


class Op:
    """One node as its rule sees it: operands' axes and known elements in, output axes out."""

    def __init__(self, dimensions: Dimensions, node: ir.Node, opset: int) -> None:
        self.dimensions = dimensions
        self.space = dimensions.space
        self.node = node
        self.opset = opset

    # -- operands -----------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """The number of input slots, absent optional ones included."""
        return len(self.node.inputs)

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < self.count and self.node.inputs[index] is not None

    def value(self, index: int) -> ir.Value:
        """The input value itself."""
        value = self.node.inputs[index] if index < self.count else None
        if value is None:
            raise CannotTell(f"input {index} is missing")
        return value

    def axes(self, index: int) -> Axes:
        """The axes of an input.

        Raises:
            CannotTell: its rank is unknown.
        """
        value = self.value(index)
        axes = self.dimensions.axes_of(self.node, index)
        if axes is None:
            raise CannotTell(*self.dimensions.lost.get(value, ("an operand of unknown rank", "")))
        return axes

    def rank(self, index: int) -> int:
        """The number of axes of an input."""
        return len(self.axes(index))

    def known(self, index: int) -> Known | None:
        """The known elements of a small integer input."""
        return self.dimensions.known.get(self.value(index)) if self.has(index) else None

    def ints(self, index: int) -> list[int] | None:
        """The elements of an input as integers, None unless all are known."""
        return known.static_values(self.known(index))

    def is_constant(self, index: int) -> bool:
        """Whether an input is computed from initializers alone."""
        return self.value(index) in self.dimensions.constants

    def is_weight(self, index: int) -> bool:
        """Whether an input is stored, or picked from what is stored by indices (the experts of a token)."""
        return self.dimensions.is_weight(self.value(index))

    def picked(self) -> None:
        """State that the first output holds whole weights, picked from a stored tensor."""
        self.dimensions.picked.add(self.node.outputs[0])

    # -- attributes ---------------------------------------------------------------------------------------

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer attribute.

        Raises:
            CannotTell: it is absent and has no default.
        """
        attribute = self.node.attributes.get(name)
        if attribute is None:
            if default is None:
                raise CannotTell(f"attribute {name} is missing")
            return default
        return attribute.as_int()

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.as_string()

    def int_list(self, name: str, index: int | None) -> list[int] | None:
        """A list that is an attribute in old opsets and input `index` in new ones; None when absent.

        Raises:
            CannotTell: it is an input whose elements are not known.
        """
        attribute = self.node.attributes.get(name)
        if attribute is not None:
            return list(attribute.as_ints())
        if index is None or not self.has(index):
            return None
        self.parameter(index)
        values = self.ints(index)
        if values is None:
            raise CannotTell(f"{name} computed at run time")
        return values

    def parameter(self, index: int) -> None:
        """State that an input's elements are parameters of the operator: its own axes keep their size."""
        if self.has(index):
            for term in self.dimensions.axes_of(self.node, index) or ():
                self.pin(term, "its elements are parameters of an operator")

    # -- terms --------------------------------------------------------------------------------------------

    def size(self, term: Term) -> Size:
        """The length of an axis, in the source model."""
        return self.space.size(term)

    def static(self, term: Term) -> int | None:
        """The length of an axis as an integer, None when symbolic."""
        return self.space.static(term)

    def dim(self, size: int | Size | None) -> Term:
        """A new dimension; of unknown size for None.

        Raises:
            CannotTell: there is no such size.
        """
        if size is not None and Size.of(size).static_or(0) < 0:
            raise CannotTell(f"an axis of size {size}")
        return self.space.unknown() if size is None else self.space.dim(size)

    def pinned_dim(self, size: int | Size | None, reason: str) -> Term:
        """A new dimension that keeps its size."""
        term = self.dim(size)
        self.space.pin(term, reason)
        return term

    def is_one(self, term: Term) -> bool:
        """Whether an axis has the literal size 1 (and may be stretched by broadcasting)."""
        return self.static(term) == 1

    def unify(self, left: Term, right: Term) -> None:
        """State that two axes are the same."""
        self.space.unify(left, right)

    def pin(self, term: Term, reason: str) -> None:
        """State that an axis must keep its size."""
        self.space.pin(term, reason)

    def merge(self, terms: Iterable[Term]) -> Term:
        """The axis that aligned axes broadcast to.

        Size-1 axes stretch. A symbolic axis that meets a static one may be 1 at run time, so the two are not
        unified: the static one is pinned.
        """
        wide = [term for term in terms if not self.is_one(term)]
        if not wide:
            return ONE
        static = [term for term in wide if self.static(term) is not None]
        if static and len(static) < len(wide):
            for term in wide:
                self.pin(term, "meets an axis whose size is not known before running")
        same = static or wide
        for term in same[1:]:
            self.unify(same[0], term)
        return same[0]

    def broadcast(self, operands: Sequence[Axes]) -> Axes:
        """The axes that operands broadcast to, aligned at the right (ONNX multidirectional broadcasting)."""
        rank = max((len(axes) for axes in operands), default=0)
        aligned = [(ONE,) * (rank - len(axes)) + tuple(axes) for axes in operands]
        return tuple(self.merge(column) for column in zip(*aligned, strict=True))

    def axis(self, axis: int, rank: int) -> int:
        """A possibly negative axis as an index from the front.

        Raises:
            ValueError: there is no such axis, which no specification allows.
        """
        if not -rank <= axis < rank:
            raise ValueError(f"axis {axis} of a value of rank {rank}")
        return axis % rank

    def walk(self, *bodies: ir.Graph) -> None:
        """Relate the nodes of bodies whose inputs have their axes."""
        place = self.space.place
        for body in bodies:
            walk(self.dimensions, body)
        self.space.place = place

    # -- results ------------------------------------------------------------------------------------------

    def out(self, axes: Sequence[Term], elements: Known | None = None, index: int = 0) -> None:
        """Set the axes of an output, and what is known of its elements."""
        if index >= len(self.node.outputs):
            return
        value = self.node.outputs[index]
        if elements is not None and elements.size <= known.LIMIT and elements.ndim == len(axes):
            self.dimensions.known[value] = elements
            # The elements tell a length that the axes may not.
            axes = [self.dim(n) if self.static(t) is None else t for t, n in zip(axes, elements.shape, strict=True)]
        self.dimensions.axes[value] = tuple(axes)

    def fact(self, kind: Fact, term: Term) -> None:
        """Record what happens to an axis here."""
        self.dimensions.facts[kind].append((term, self.node))

    def uniform(self, term: Term) -> None:
        """State that this node averages over an axis."""
        self.fact(Fact.NORMALISED, term)
        self.dimensions.uniform.append(Uniform(self.node, term))

    def sum_over(
        self,
        *sites: tuple[int, int],
        power: float = 1.0,
        integers: bool = False,
        scales: tuple[int, ...] = (),
        biases: tuple[int, ...] = (),
    ) -> None:
        """State that this node multiplies and sums over these (input, axis) sites, which are one axis.

        It also records who takes part: a weight, or activations only. See `Sum` for the rest.
        """
        terms = [self.axes(index)[axis] for index, axis in sites]
        sites = tuple((index, self.axis(axis, self.rank(index))) for index, axis in sites)
        for term in terms[1:]:
            self.unify(terms[0], term)
        for index, _ in sites if not integers else ():
            dtype = self.value(index).dtype
            if dtype is not None and not dtype.is_floating_point() and not scales:
                self.pin(terms[0], "summed in integers, which no share divides")
        given = (tuple(index for index in slots if self.has(index)) for slots in (scales, biases))
        self.dimensions.sums.append(Sum(self.node, terms[0], sites, power, integers, *given))
        if len(sites) > 1:
            weighted = any(self.is_weight(index) for index, _ in sites)
            kind = Fact.CONTRACTED_WITH_WEIGHT if weighted else Fact.CONTRACTED_WITH_ACTIVATION
            self.fact(kind, terms[0])

    def packed(self, index: int, axes: Axes, bits: int) -> None:
        """State that an input holds numbers of `bits` bits in bytes, its last axis padded row by row to whole bytes.

        `axes` are those of the numbers. Only a stored input can be packed again.

        Raises:
            CannotTell: it is computed.
        """
        if not is_initializer(self.value(index)):
            raise CannotTell("packed numbers that are computed")
        self.dimensions.use_axes[self.node, index] = tuple(axes)
        self.dimensions.packed[self.node, index] = bits

    def declared(self, output: ir.Value) -> list[Size | None] | None:
        """The shape that the file declares for an output, None when it declares none."""
        return declared_shape(output)


def declared_shape(value: ir.Value) -> list[Size | None] | None:
    """The shape a file declares for a value: integers, symbols and simple expressions of symbols."""
    if value.shape is None:
        return None
    sizes: list[Size | None] = []
    for dim in value.shape.dims:
        if isinstance(dim, int):
            sizes.append(Size.of(dim) if dim >= 0 else None)  # -1 is how some files say that they do not know
        else:
            sizes.append(parse_size(dim.value) if dim.value else None)
    return sizes


_SIMPLE = re.compile(r"[A-Za-z_][\w.]*|\d+|[+*]")


def parse_size(text: str) -> Size:
    """A symbolic dimension as a polynomial, where it is a sum of products; otherwise a symbol of that name.

    >>> str(parse_size("past + sequence"))
    'past + sequence'
    """
    tokens = _SIMPLE.findall(text)
    if "".join(tokens) != text.replace(" ", "") or len(tokens) % 2 == 0:
        return Size.symbol(text)
    total, part = Size.of(0), Size.of(1)
    for position, token in enumerate(tokens):
        if (token in "+*") != (position % 2 == 1):
            return Size.symbol(text)
        if token == "+":
            total, part = total + part, Size.of(1)
        elif token != "*":
            part = part * (int(token) if token.isdigit() else Size.symbol(token))
    return total + part


def infer(model: ir.Model) -> Dimensions:
    """Walk the (normalised) main graph of `model` and find what every axis is made of."""
    dimensions = Dimensions(model, Space())
    _read_inputs(dimensions)
    for value in model.graph.initializers.values():
        dimensions.constants.add(value)
        _read_known(dimensions, value)
    walk(dimensions, model.graph)
    _unify_measured_uses(dimensions)
    dimensions.space.place = ""
    return dimensions


def _unify_measured_uses(dimensions: Dimensions) -> None:
    """A use of a stored tensor of which only the size is read has the axes of another use.

    Optimizers leave such nodes behind (a lookup of which Shape alone reads the result); with axes of their own they
    would need a copy of the tensor that does not grow.
    """
    measured: list[Use] = []
    others: dict[ir.Value, Axes] = {}
    for value, use, axes in dimensions.initializer_uses():
        readers = [reader for output in use[0].outputs for reader in output.uses()]
        if readers and all(reader.node.op_type in ("Shape", "Size") for reader in readers):
            measured.append(use)
        else:
            others.setdefault(value, axes)
    for node, index in measured:
        read = node.inputs[index]
        dimensions.space.place = describe(node)
        if read is not None and read in others:
            for one, other in zip(dimensions.use_axes[node, index], others[read], strict=True):
                dimensions.space.unify(one, other)


def walk(dimensions: Dimensions, graph: ir.Graph) -> None:
    """Relate the nodes of a graph, or of a subgraph whose outer values are related already."""
    from hyperclone_onnx.rules import registry

    opsets = dimensions.model.graph.opset_imports
    for node in graph:
        dimensions.space.place = describe(node)
        dimensions.walked.append(node)
        _read_initializer_uses(dimensions, node)
        if _is_constant(dimensions, node):
            dimensions.constants.update(node.outputs)
        elif node.op_type in _STILL_WEIGHTS and node.inputs and node.inputs[0] in dimensions.picked:
            dimensions.picked.update(node.outputs)
        rule = registry.relation(node.domain, node.op_type)
        op = Op(dimensions, node, opsets.get(node.domain, 1))
        purpose = registry.pin_reason(node.domain, node.op_type)
        try:
            if purpose is not None:
                _pin_node(op, f"{registry.name(node)}: {purpose}", gap=False)
            elif rule is None:
                dimensions.unruled[registry.name(node)].append(node.name or "")
                raise CannotTell(f"{registry.name(node)} has no rule")
            else:
                rule(op)
        except CannotTell as problem:
            dimensions.space.place = problem.place or dimensions.space.place
            _pin_node(op, str(problem))
        except HypercloneError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as problem:
            # A rule may take for granted what its operator's specification asks for.
            reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
            raise Refused(f"{describe(node)} does not fit the specification of its operator ({reason})") from problem
        for value in node.outputs:
            if value not in dimensions.axes:
                _declare_pinned(op, value, "an output no rule describes")


_STILL_WEIGHTS = frozenset(
    "Cast DequantizeLinear Flatten Identity Reshape Slice Split Squeeze Transpose Unsqueeze".split()
)


def _is_constant(dimensions: Dimensions, node: ir.Node) -> bool:
    if not node.inputs or any(True for _ in captured_values(node)):
        return False
    return all(
        value is None or value in dimensions.constants or known.static_values(dimensions.known.get(value)) is not None
        for value in node.inputs
    )


def _read_inputs(dimensions: Dimensions) -> None:
    space = dimensions.space
    named: dict[Size, Term] = {}
    for value in dimensions.model.graph.inputs:
        space.place = f"input {value.name!r}"
        shape = declared_shape(value)
        if shape is None or not isinstance(value.type, ir.TensorType):
            dimensions.axes[value] = None
            continue
        axes: list[Term] = []
        for size in shape:
            if size is None:
                axes.append(space.unknown())
            elif size.static is not None:
                axes.append(space.dim(size))
            else:
                axes.append(named.setdefault(size, space.dim(size)))
        dimensions.axes[value] = tuple(axes)


def _read_known(dimensions: Dimensions, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or tensor.size > known.LIMIT:
        return
    if tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL) or _is_whole_number(tensor):
        dimensions.known[value] = known.known(tensor.numpy())


def _is_whole_number(tensor: ir.TensorProtocol) -> bool:
    single = tensor.size == 1 and tensor.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
    return single and float(tensor.numpy().item()).is_integer()


def _read_initializer_uses(dimensions: Dimensions, node: ir.Node) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and is_initializer(value) and value.const_value is not None:
            sizes = value.const_value.shape.numpy()
            dimensions.use_axes[node, index] = tuple(dimensions.space.dim(size) for size in sizes)


def _pin_node(op: Op, reason: str, gap: bool = True) -> None:
    """Pin every axis the node touches, captured values of its subgraphs included."""
    for index, value in enumerate(op.node.inputs):
        axes = op.dimensions.axes_of(op.node, index) if value is not None else None
        elements = op.dimensions.sequences.get(value, ()) if value is not None else ()
        for each in (axes or (), *elements):
            op.space.pin(Product(each), reason, gap)
    for value in captured_values(op.node):
        op.space.pin(Product(op.dimensions.axes.get(value) or ()), reason, gap)
    for output in op.node.outputs:
        _declare_pinned(op, output, reason, gap)


def _declare_pinned(op: Op, value: ir.Value, reason: str, gap: bool = True) -> None:
    shape = declared_shape(value)
    axes = None if shape is None else tuple(op.dim(size) for size in shape)
    if axes is None:
        op.dimensions.lost[value] = (reason, op.space.place)
    op.space.pin(Product(axes or ()), reason, gap)
    op.dimensions.axes[value] = axes


def captured_values(node: ir.Node) -> Iterator[ir.Value]:
    """The values of enclosing graphs that a node's subgraphs read."""
    for attribute in node.attributes.values():
        graphs: Sequence[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = tuple(attribute.as_graphs())
        for graph in graphs:
            inner = list(graph.all_nodes())
            own = {output for each in inner for output in each.outputs} | set(graph.inputs)
            for each in inner:
                yield from (v for v in each.inputs if v is not None and v not in own)
            yield from (v for v in graph.outputs if v is not None and v not in own)


def pin_interface(dimensions: Dimensions) -> None:
    """Pin what the graph's inputs and outputs fix.

    A dimension that only ever leaves (class logits: on an output, read by no contraction), an image's own axes
    (on an input of four or more axes, met by weights only), and an axis mixed with a symbolic size.
    """
    space = dimensions.space
    weighted = _atoms_with(dimensions, Fact.CONTRACTED_WITH_WEIGHT)
    between = _atoms_with(dimensions, Fact.CONTRACTED_WITH_ACTIVATION, Fact.BATCHED, Fact.VALUE_AXIS)
    for value in dimensions.model.graph.outputs:
        space.place = f"output {value.name!r}"
        for axis in dimensions.axes.get(value) or ():
            for atom in space.atoms(axis):
                if atom not in weighted and atom not in between:
                    space.pin(atom, "it only leaves the graph: nothing reads it")
    for value in dimensions.model.graph.inputs:
        space.place = f"input {value.name!r}"
        axes = dimensions.axes.get(value) or ()
        for axis in axes if len(axes) >= 4 else ():
            for atom in space.atoms(axis):
                if atom not in between:
                    space.pin(atom, "its meaning is the input's own")
    for value in (*dimensions.model.graph.inputs, *dimensions.model.graph.outputs):
        space.place = f"input or output {value.name!r}"
        for axis in dimensions.axes.get(value) or ():
            if space.static(axis) is None:
                space.pin(axis, "mixed with a size that is known only when running")
    space.place = ""


def _atoms_with(dimensions: Dimensions, *kinds: Fact) -> set[Dim]:
    return {atom for kind in kinds for term, _ in dimensions.facts[kind] for atom in dimensions.space.atoms(term)}


def atoms_in_order(dimensions: Dimensions) -> list[Dim]:
    """Every unbound static dimension that lies on an axis of some value, in order of appearance."""
    seen: dict[Dim, None] = {}
    every = [axes for axes in (*dimensions.use_axes.values(), *dimensions.axes.values()) if axes]
    for axes in every:
        for axis in axes:
            for atom in dimensions.space.atoms(axis):
                if atom.size.static is not None and dimensions.space.static(atom) != 1:
                    seen.setdefault(atom)
    return list(seen)


__all__ = ["Axes", "CannotTell", "Dimensions", "Fact", "Op", "Refused", "Sum", "Uniform", "infer"]
