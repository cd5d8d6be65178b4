"""The view of one node that the rule of its operator gets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from hyperclone_onnx.algebra import shape_values
from hyperclone_onnx.algebra.dims import ONE, Term
from hyperclone_onnx.algebra.shape_values import Known
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.graphs import describe, is_initializer
from hyperclone_onnx.rules.dimensions import Axes, Dimensions, Fact, Sum, Uniform

Walker = Callable[[Dimensions, ir.Graph], None]
"""Relates the nodes of a body, after the values that it reads from outside."""


class CannotTell(Exception):
    """Raised inside a rule when it cannot relate this node's axes; the walk then pins them.

    `place` is the node that causes this, if it is another one.
    """

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(reason)
        self.place = place


class Malformed(Refused):
    """Raised inside a rule for a node that the specification of its operator does not allow.

    The methods of `Op` raise it. Any other exception in a rule is a defect of the rule, and is reported as one.
    """


class Op:
    """One node as its rule sees it. The rule reads axes and known elements of inputs, and sets axes of outputs."""

    def __init__(self, dimensions: Dimensions, node: ir.Node, opset: int, walker: Walker) -> None:
        self.dimensions = dimensions
        self._walker = walker
        self.space = dimensions.space
        self.node = node
        self.opset = opset

    def malformed(self, reason: str) -> Malformed:
        """The error for a node that the specification of its operator does not allow."""
        return Malformed(f"{describe(self.node)} does not fit the specification of its operator ({reason})")

    # -- operands -----------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """The number of inputs, including optional ones that are absent."""
        return len(self.node.inputs)

    def has(self, index: int) -> bool:
        """Whether an optional input is given."""
        return index < self.count and self.node.inputs[index] is not None

    def value(self, index: int) -> ir.Value:
        """The input value itself.

        Raises:
            CannotTell: the input is absent.
        """
        value = self.node.inputs[index] if index < self.count else None
        if value is None:
            raise CannotTell(f"input {index} is missing")
        return value

    def axes(self, index: int, rank: int | None = None, least: int = 0) -> Axes:
        """The axes of an input.

        Args:
            index: the position of the input.
            rank: the number of axes that the specification demands, if it demands one.
            least: the smallest number of axes that it allows.

        Raises:
            CannotTell: the rank of the input is unknown.
            Malformed: the input has another number of axes.
        """
        value = self.value(index)
        axes = self.dimensions.axes_of(self.node, index)
        if axes is None:
            raise CannotTell(*self.dimensions.unknown_ranks.get(value, ("an operand of unknown rank", "")))
        if len(axes) < least or (rank is not None and len(axes) != rank):
            allowed = f"{rank}" if rank is not None else f"at least {least}"
            raise self.malformed(f"input {index} has {len(axes)} axes, and must have {allowed}")
        return axes

    def axis_of(self, index: int, axis: int) -> Term:
        """One axis of an input, counted from the front, or from the back where it is negative.

        Raises:
            CannotTell: the input's rank is unknown.
            Malformed: the input has no such axis.
        """
        return self.axes(index, least=axis + 1 if axis >= 0 else -axis)[axis]

    def rank(self, index: int) -> int:
        """The number of axes of an input."""
        return len(self.axes(index))

    def known(self, index: int) -> Known | None:
        """The known elements of a small integer input."""
        return self.dimensions.known.get(self.value(index)) if self.has(index) else None

    def ints(self, index: int) -> list[int] | None:
        """The elements of an input as integers. None if one of them is not known."""
        return shape_values.static_values(self.known(index))

    def element(self, index: int) -> Size | None:
        """The element of an integer input that must have exactly one. None if it is not known.

        Raises:
            Malformed: the input has no element, or several.
        """
        elements = self.known(index)
        if elements is None:
            return None
        if elements.size != 1:
            raise self.malformed(f"input {index} has {elements.size} elements, and must have one")
        element: Size | None = elements.ravel()[0]
        return element

    def is_constant(self, index: int) -> bool:
        """Whether an input is computed from initializers alone."""
        return self.value(index) in self.dimensions.constants

    def is_weight(self, index: int) -> bool:
        """Whether an input is computed from stored tensors only, or picked from them by indices (a token's experts)."""
        return self.dimensions.is_weight(self.value(index))

    def picked(self) -> None:
        """State that the first output holds whole weights that are picked from a stored tensor."""
        self.dimensions.picked.add(self.node.outputs[0])

    # -- attributes ---------------------------------------------------------------------------------------

    def has_attribute(self, name: str) -> bool:
        """Whether an attribute is given."""
        return name in self.node.attributes

    def _attribute(self, name: str, kind: ir.AttributeType) -> ir.Attr | None:
        """An attribute, None where it is absent.

        Raises:
            Malformed: it has a value of another kind.
        """
        attribute = self.node.attributes.get(name)
        if attribute is not None and attribute.type != kind:
            raise self.malformed(f"attribute {name} is of type {attribute.type.name}, not {kind.name}")
        return attribute

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer attribute.

        Raises:
            CannotTell: it is absent and has no default.
            Malformed: it is not an integer.
        """
        attribute = self._attribute(name, ir.AttributeType.INT)
        if attribute is None:
            if default is None:
                raise CannotTell(f"attribute {name} is missing")
            return default
        return attribute.as_int()

    def positive(self, name: str, default: int | None = None) -> int:
        """An integer attribute that counts or measures something: 1 or more.

        Raises:
            CannotTell: it is absent and has no default.
            Malformed: it is not an integer, or is below 1.
        """
        number = self.integer(name, default)
        if number < 1:
            raise self.malformed(f"attribute {name} is {number}, and must be at least 1")
        return number

    def number(self, name: str) -> float | None:
        """A float attribute, None where it is absent."""
        attribute = self._attribute(name, ir.AttributeType.FLOAT)
        return None if attribute is None else attribute.as_float()

    def numbers(self, name: str) -> list[float] | None:
        """A list of floats, None where it is absent."""
        attribute = self._attribute(name, ir.AttributeType.FLOATS)
        return None if attribute is None else list(attribute.as_floats())

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        attribute = self._attribute(name, ir.AttributeType.STRING)
        return default if attribute is None else attribute.as_string()

    def tensor(self, name: str) -> ir.TensorProtocol | None:
        """A tensor attribute, None where it is absent."""
        attribute = self._attribute(name, ir.AttributeType.TENSOR)
        return None if attribute is None else attribute.as_tensor()

    def body(self, name: str) -> ir.Graph:
        """A graph attribute.

        Raises:
            Malformed: it is absent, or is not a graph.
        """
        attribute = self._attribute(name, ir.AttributeType.GRAPH)
        if attribute is None:
            raise self.malformed(f"it has no {name}")
        return attribute.as_graph()

    def int_list(self, name: str, index: int | None, length: int | None = None) -> list[int] | None:
        """A list that is an attribute in old opsets and input `index` in new ones. None if it is absent.

        Raises:
            CannotTell: it is an input whose elements are not known.
            Malformed: it is not a list of integers, or its length is not `length`.
        """
        attribute = self._attribute(name, ir.AttributeType.INTS)
        values: list[int] | None
        if attribute is not None:
            values = list(attribute.as_ints())
        elif index is None or not self.has(index):
            return None
        else:
            self.parameter(index)
            values = self.ints(index)
        if values is None:
            raise CannotTell(f"{name} is computed at run time")
        if length is not None and len(values) != length:
            raise self.malformed(f"{name} has {len(values)} elements, and must have {length}")
        return values

    def parameter(self, index: int) -> None:
        """State that the elements of an input are parameters of the operator. The axes of the input keep their size."""
        if self.has(index):
            for term in self.dimensions.axes_of(self.node, index) or ():
                self.pin(term, "its elements are parameters of an operator")

    # -- terms --------------------------------------------------------------------------------------------

    def size(self, term: Term) -> Size:
        """The length of an axis, in the source model."""
        return self.space.size(term)

    def static(self, term: Term) -> int | None:
        """The length of an axis as an integer. None if it is symbolic."""
        return self.space.static(term)

    def dim(self, size: int | Size | None) -> Term:
        """A new dimension. None means an unknown size.

        Raises:
            CannotTell: the size is negative.
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

    def unify_axes(self, one: Axes, other: Axes) -> None:
        """State that the axes of two values are the same, one by one.

        Raises:
            Malformed: one of them has more axes.
        """
        if len(one) != len(other):
            raise self.malformed(f"{len(one)} axes where there must be {len(other)}")
        for left, right in zip(one, other, strict=True):
            self.unify(left, right)

    def pin(self, term: Term, reason: str) -> None:
        """State that an axis must keep its size."""
        self.space.pin(term, reason)

    def merge(self, terms: Iterable[Term]) -> Term:
        """The axis that aligned axes broadcast to.

        Axes of size 1 stretch. If a symbolic axis is broadcast with a static one, it may be 1 at run time. So we do
        not unify the two, and pin them.
        """
        wide = [term for term in terms if not self.is_one(term)]
        if not wide:
            return ONE
        static = [term for term in wide if self.static(term) is not None]
        if static and len(static) < len(wide):
            for term in wide:
                name = self.size(term).lone_symbol
                if name is not None:
                    self.dimensions.stretched[name].update(size for t in static if (size := self.static(t)) is not None)
                self.pin(term, "it is broadcast with an axis whose size is not known before running")
                self.space.relate(self.size(static[0]), self.size(term), stretch=True)
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
        """The number of an axis, counted from the front. A negative number counts from the back.

        Raises:
            Malformed: there is no such axis.
        """
        if not -rank <= axis < rank:
            raise self.malformed(f"axis {axis} of a value of rank {rank}")
        return axis % rank

    def walk(self, *bodies: ir.Graph) -> None:
        """Relate the nodes of bodies whose inputs have their axes."""
        place = self.space.place
        for body in bodies:
            self._walker(self.dimensions, body)
        self.space.place = place

    # -- results ------------------------------------------------------------------------------------------

    def out(self, axes: Sequence[Term], elements: Known | None = None, index: int = 0) -> None:
        """Set the axes of an output, and what is known of its elements."""
        if index >= len(self.node.outputs):
            return
        value = self.node.outputs[index]
        if elements is not None and elements.size <= shape_values.LIMIT and elements.ndim == len(axes):
            self.dimensions.known[value] = elements
            # The number of elements may give a length that the axes do not.
            axes = [self.dim(n) if self.static(t) is None else t for t, n in zip(axes, elements.shape, strict=True)]
        self.dimensions.axes[value] = tuple(axes)

    def out_unknown(self, index: int) -> None:
        """State that the rank of an output is not known."""
        if index < len(self.node.outputs):
            self.dimensions.axes[self.node.outputs[index]] = None

    def fact(self, kind: Fact, term: Term) -> None:
        """Record what happens to an axis here."""
        self.dimensions.facts[kind].append((term, self.node))

    def is_averaged(self, term: Term) -> bool:
        """Whether a node before this one averages over a part of an axis, so that its parts must grow alike."""
        atoms = set(self.space.atoms(term))
        return any(not atoms.isdisjoint(self.space.atoms(mean.term)) for mean in self.dimensions.uniform)

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
        output_only: bool = False,
    ) -> None:
        """State that this node multiplies and sums over the axes at these (input, axis) sites, which are one axis.

        Also record whether a weight takes part, or activations only. `Sum` explains the other arguments.
        """
        terms = [self.axis_of(index, axis) for index, axis in sites]
        sites = tuple((index, self.axis(axis, self.rank(index))) for index, axis in sites)
        for term in terms[1:]:
            self.unify(terms[0], term)
        for index, _ in sites if not integers else ():
            dtype = self.value(index).dtype
            if dtype is not None and not dtype.is_floating_point() and not scales:
                self.pin(terms[0], "it is summed in integers, which cannot be divided into shares")
        given = (tuple(index for index in slots if self.has(index)) for slots in (scales, biases))
        own_scales, own_biases = given
        self.dimensions.sums.append(
            Sum(self.node, terms[0], sites, power, integers, own_scales, own_biases, output_only)
        )
        if len(sites) > 1:
            weighted = any(self.is_weight(index) for index, _ in sites)
            kind = Fact.CONTRACTED_WITH_WEIGHT if weighted else Fact.CONTRACTED_WITH_ACTIVATION
            self.fact(kind, terms[0])

    def packed(self, index: int, axes: Axes, bits: int) -> None:
        """State that the bytes of an input hold numbers of `bits` bits. Each row is padded to whole bytes.

        `axes` are those of the numbers. The input must be stored, because growth packs the numbers again.

        Raises:
            CannotTell: the input is computed.
        """
        if not is_initializer(self.value(index)):
            raise CannotTell("packed numbers that are computed, not stored")
        self.dimensions.use_axes[self.node, index] = tuple(axes)
        self.dimensions.packed[self.node, index] = bits

    def declared(self, output: ir.Value) -> list[Size | None] | None:
        """The shape that the file declares for an output. None if it declares none."""
        return declared_shape(output)


def declared_shape(value: ir.Value) -> list[Size | None] | None:
    """The shape a file declares for a value: integers, symbols and simple expressions of symbols."""
    if value.shape is None:
        return None
    sizes: list[Size | None] = []
    for dim in value.shape.dims:
        if isinstance(dim, int):
            sizes.append(Size.of(dim) if dim >= 0 else None)  # some files write -1 for an unknown size
        else:
            sizes.append(parse_size(dim.value) if dim.value else None)
    return sizes


_SIMPLE = re.compile(r"[A-Za-z_][\w.]*|\d+|[+*]")


def parse_size(text: str) -> Size:
    """A symbolic dimension as a polynomial if it is a sum of products. Otherwise a symbol with this name.

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
