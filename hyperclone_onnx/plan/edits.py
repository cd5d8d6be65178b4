"""The edits of a plan. An edit changes a node that carries sizes.

The class of an edit defines both its JSON and how it is applied. An edit is applied through an `Editor`, which has the
graph. So this module does not depend on how a graph is stored. The class names are part of the format of plans.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.plan.maps import Axis, Maps, Named, axis_from_json, axis_to_json, index_axis

Array = npt.NDArray[Any]
Operand = Any
"""A value of the graph, in the editor's form."""


@dataclass(frozen=True)
class Step:
    """One node to insert into the way of a value. The value becomes the operand at `position`."""

    op_type: str
    operands: tuple[Operand, ...]
    position: int = 0
    axis: int | None = None


class Editor(Protocol):
    """The operations that an edit can do to the graph. Nodes are given by name, inputs and outputs by slot numbers."""

    maps: Maps

    def set_attribute(self, node: str, name: str, value: Any) -> None:
        """Set an attribute; None removes it."""

    def integers(self, node: str, slot: int, output: bool = False) -> Any:
        """The numpy type of an integer input or output; int64 if it is absent."""

    def is_scalar_output(self, node: str) -> bool:
        """Whether the node's output is one number, like that of Size, and no vector."""

    def constant(self, hint: str, array: Array) -> Operand:
        """Store an array. Its name is `hint`, or begins with it if that name is taken."""

    def factor(self, hint: str, node: str, slot: int, divisors: Array, output: bool = False) -> tuple[str, Operand]:
        """("Mul", the inverses) if the type of the slot represents them exactly, else ("Div", the divisors)."""

    def equal_to(self, node: str, slot: int, output: bool, constant: Operand) -> Operand:
        """A new value that says for each element of an input or output whether it equals the constant's."""

    def value(self, node: str, slot: int, output: bool = False) -> Operand:
        """An input or an output of a node."""

    def replace_input(self, node: str, slot: int, operand: Operand) -> None:
        """Let an input read another value. The input may have been absent."""

    def insert(self, node: str, slot: int, output: bool, steps: Sequence[Step]) -> None:
        """Insert nodes in front of an input, or behind an output."""

    def take_branch(self, node: str, branch: str) -> None:
        """Replace an If by the nodes of one of its branches."""

    def count_once(self, node: str, over: Sequence[int], shares: Mapping[int, Array]) -> None:
        """Let a node that averages count each index by its share. A fused norm is replaced by simple operators."""


class Edit(ABC):
    """A change at one node. A subclass is a frozen dataclass, registered by `edit`."""

    node: str
    comes_last: ClassVar[bool] = False
    """Whether the edit is applied after all edits of other classes."""
    constants: ClassVar[tuple[str, ...]] = ()
    """The ends of the names of floating-point constants that the edit stores: ``scale`` for ``NODE.scale``."""

    @abstractmethod
    def apply(self, editor: Editor) -> None:
        """Change the graph."""

    def to_json(self) -> dict[str, Any]:
        """The edit as plain data: the name of its class, and its fields."""
        return {"edit": type(self).__name__, **self._fields_to_json()}

    def _fields_to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def _fields_from_json(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """The fields, with lists turned into tuples."""
        return {name: _as_tuple(value) for name, value in data.items()}


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(part) for part in value) if isinstance(value, list) else value


_kinds: dict[str, type[Edit]] = {}


def edit(kind: type[Edit]) -> type[Edit]:
    """Register a class of edits by its name.

    Raises:
        ValueError: a class of that name is registered already.
    """
    if kind.__name__ in _kinds:
        raise ValueError(f"there is an edit {kind.__name__} already")
    _kinds[kind.__name__] = kind
    return kind


def edit_from_json(data: Mapping[str, Any]) -> Edit:
    """The inverse of `Edit.to_json`.

    Raises:
        KeyError: no class of that name is registered.
    """
    kind = _kinds[data["edit"]]
    make: Callable[..., Edit] = kind
    return make(**kind._fields_from_json({name: value for name, value in data.items() if name != "edit"}))


@edit
@dataclass(frozen=True)
class SetAttribute(Edit):
    """Set an attribute of a node; None removes it."""

    node: str
    name: str
    value: int | float | tuple[int, ...] | None

    def apply(self, editor: Editor) -> None:
        """Set the attribute."""
        editor.set_attribute(self.node, self.name, list(self.value) if isinstance(self.value, tuple) else self.value)


@edit
@dataclass(frozen=True)
class SetInput(Edit):
    """Replace an integer input of a node by a literal of the shape `shape`; () is a scalar."""

    node: str
    input: int
    values: tuple[int, ...]
    shape: tuple[int, ...]

    def apply(self, editor: Editor) -> None:
        """Store the literal and let the input read it."""
        array = np.asarray(self.values, dtype=editor.integers(self.node, self.input)).reshape(self.shape)
        editor.replace_input(self.node, self.input, editor.constant(f"{self.node}.sizes", array))


@edit
@dataclass(frozen=True)
class ResizeVector(Edit):
    """Change elements of a vector of sizes that the graph computes: an input or an output of a node.

    Element i becomes `literals[i]`. If that is None, element i is multiplied by `factors[i]`, (numerator, denominator).
    An element that equals `keep` when the model runs is no size and stays as it is (-1 in a Reshape, 1 in an Expand).
    """

    node: str
    slot: int
    output: bool
    literals: tuple[int | None, ...]
    factors: tuple[tuple[int, int], ...]
    keep: int | None = None

    def _fields_to_json(self) -> dict[str, Any]:
        data = super()._fields_to_json()
        if self.keep is None:
            del data["keep"]
        return data

    def apply(self, editor: Editor) -> None:
        """Insert Where(is literal, literals, Where(vector == keep, vector, vector * numerators / denominators)).

        Parts of this expression that would change nothing are left out.
        """
        scalar = self.output and editor.is_scalar_output(self.node)
        integers = editor.integers(self.node, self.slot, self.output)

        def stored(items: Sequence[int | bool], dtype: Any = integers) -> Operand:
            return editor.constant(f"{self.node}.sizes", np.asarray(items[0] if scalar else items, dtype=dtype))

        steps: list[Step] = []
        for op_type, position in (("Mul", 0), ("Div", 1)):
            numbers = [factor[position] for factor in self.factors]
            if any(number != 1 for number in numbers):
                steps.append(Step(op_type, (stored(numbers),)))
        if self.keep is not None:
            kept = editor.equal_to(self.node, self.slot, self.output, stored([self.keep] * len(self.factors)))
            vector = editor.value(self.node, self.slot, self.output)
            steps.append(Step("Where", (kept, vector), position=2))
        if any(literal is not None for literal in self.literals):
            is_literal = stored([literal is not None for literal in self.literals], np.bool_)
            literals = stored([literal or 0 for literal in self.literals])
            steps.append(Step("Where", (is_literal, literals), position=2))
        editor.insert(self.node, self.slot, self.output, steps)


def divisors_of(factors: Sequence[Axis], power: float, maps: Maps) -> npt.NDArray[np.float64]:
    """The number that divides each index of an axis: (number of repeats) ** power, divided by the axis's stretch.

    Args:
        factors: the factors of the axis, outermost first. Their powers say by which stretch the numbers are multiplied.
        power: the power of the number of repeats.
        maps: the source map of each named dimension.

    Returns:
        shape (grown,). Numbers that differ by rounding alone are equal.
    """
    divisors = reduce(np.multiply.outer, (_divisors(factor, power, maps) for factor in factors)).reshape(-1)
    alike = np.ptp(divisors) <= 1e-14 * abs(divisors[0])
    return np.full_like(divisors, divisors[0]) if alike else divisors


def _divisors(factor: Axis, power: float, maps: Maps) -> npt.NDArray[np.float64]:
    if isinstance(factor, Named) and factor.fill is not None:
        # Only the copies count: what stands behind them is zero on one side of the sum.
        source_map = maps[factor.name]
        number = (source_map.grown // source_map.size) ** power / source_map.shrink**factor.power
        return np.full(source_map.grown, number)
    index = index_axis([(factor, True)], maps)
    divisors = index.count.astype(np.float64) ** power
    return divisors if index.stretch is None else divisors / index.stretch


class _AlongAxes(Edit):
    """An edit that has axes, each with its factors."""

    axes: tuple[tuple[int, tuple[Axis, ...]], ...]

    def _fields_to_json(self) -> dict[str, Any]:
        axes = [[axis, [axis_to_json(factor) for factor in factors]] for axis, factors in self.axes]
        return {**super()._fields_to_json(), "axes": axes}

    @classmethod
    def _fields_from_json(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        axes = tuple((axis, tuple(map(axis_from_json, factors))) for axis, factors in data["axes"])
        return {**super()._fields_from_json(data), "axes": axes}


class _Scale(_AlongAxes):
    """The part that `ScaleInput` and `ScaleOutput` have in common: their axes, and the steps that scale along them."""

    power: float

    def _steps(self, editor: Editor, slot: int, output: bool = False) -> list[Step]:
        """The steps; the factors are in the type of the node's input or output `slot`."""
        steps: list[Step] = []
        for axis, factors in self.axes:
            divisors = divisors_of(factors, self.power, editor.maps)
            uniform = bool((divisors == divisors[:1]).all())
            shaped = divisors[0] if uniform else divisors.reshape(-1, *[1] * (-axis - 1))
            op_type, operand = editor.factor(f"{self.node}.scale", self.node, slot, shaped, output)
            steps.append(Step(op_type, (operand,)))
        return steps


@edit
@dataclass(frozen=True)
class ScaleInput(_Scale):
    """Multiply a node's input by (number of repeats of each index) ** -power, along the given axes.

    Where a factor of an axis has a power of its stretch, the input is multiplied by that, too.
    """

    node: str
    input: int
    axes: tuple[tuple[int, tuple[Axis, ...]], ...]
    """(the axis as a negative number, -1 for the last; the factors of that axis)"""
    power: float
    constants: ClassVar[tuple[str, ...]] = ("scale",)

    def apply(self, editor: Editor) -> None:
        """Insert a multiplication, or a division if only the divisors are exact in the type of the input."""
        editor.insert(self.node, self.input, False, self._steps(editor, self.input))


@edit
@dataclass(frozen=True)
class CountFirst(_AlongAxes):
    """Multiply a node's input by 1 at the first repeat of each source index, and by 0 at the other repeats.

    A sum behind it counts each source index once, without any division. So codes that are made of the input stay.
    """

    node: str
    input: int
    axes: tuple[tuple[int, tuple[Axis, ...]], ...]
    """(the axis as a negative number, -1 for the last; the factors of that axis)"""
    constants: ClassVar[tuple[str, ...]] = ("scale",)

    def apply(self, editor: Editor) -> None:
        """Insert the multiplication."""
        steps = []
        for axis, factors in self.axes:
            first = index_axis([(factor, True) for factor in factors], editor.maps).number == 0
            divisors = np.where(first, 1.0, np.inf).reshape(-1, *[1] * (-axis - 1))
            op_type, operand = editor.factor(f"{self.node}.scale", self.node, self.input, divisors)
            steps.append(Step(op_type, (operand,)))
        editor.insert(self.node, self.input, False, steps)


@edit
@dataclass(frozen=True)
class ScaleOutput(_Scale):
    """Multiply a node's output by (number of repeats of each index) ** -power, along the given axes.

    Where a factor of an axis has a power of its stretch, the output is multiplied by that, too.
    """

    node: str
    output: int
    axes: tuple[tuple[int, tuple[Axis, ...]], ...]
    """(the axis as a negative number, -1 for the last; the factors of that axis)"""
    power: float

    def apply(self, editor: Editor) -> None:
        """Insert a multiplication, or a division if only the divisors are exact in the type of the output."""
        editor.insert(self.node, self.output, True, self._steps(editor, self.output, output=True))


@edit
@dataclass(frozen=True)
class WeighAverage(_AlongAxes):
    """Let a node that averages, or divides by a sum, count each source index once, however often it is repeated.

    Each of the k copies of an index counts 1 / k. So the average over the grown axis is that of the source.
    """

    node: str
    over: tuple[int, ...]
    """All axes that the node averages over, as negative numbers."""
    axes: tuple[tuple[int, tuple[Axis, ...]], ...]
    """Those axes whose indices are repeated unequally: (the axis, the factors of that axis)."""
    comes_last: ClassVar[bool] = True  # a fused norm is replaced, so that no later edit could reach it
    constants: ClassVar[tuple[str, ...]] = ("average", "epsilon")

    def apply(self, editor: Editor) -> None:
        """Insert the shares. A fused norm becomes simple operators."""
        shares = {axis: shares_of_copies(factors, editor.maps) for axis, factors in self.axes}
        editor.count_once(self.node, self.over, shares)


def shares_of_copies(factors: Sequence[Axis], maps: Maps) -> npt.NDArray[np.float64]:
    """1 / (the number of repeats) of each index of an axis.

    Args:
        factors: the factors of the axis, outermost first.
        maps: the source map of each named dimension.

    Returns:
        shape (grown,). Their sum is the size of the axis in the source.
    """
    return 1.0 / index_axis([(factor, True) for factor in factors], maps).count


@edit
@dataclass(frozen=True)
class DivideOutput(Edit):
    """Divide a node's integer output, which sums equal repeats, by the number of repeats."""

    node: str
    output: int
    divisor: int

    def apply(self, editor: Editor) -> None:
        """Insert the division."""
        divisor = editor.constant(f"{self.node}.repeats", np.asarray(self.divisor, dtype=np.int32))
        editor.insert(self.node, self.output, True, [Step("Div", (divisor,))])


@edit
@dataclass(frozen=True)
class TakeBranch(Edit):
    """Replace an If whose condition is known by the nodes of the branch that runs."""

    node: str
    branch: str
    comes_last: ClassVar[bool] = True  # until then, the edits of nodes in the branch can still reach them

    def apply(self, editor: Editor) -> None:
        """Move the nodes of the branch."""
        editor.take_branch(self.node, self.branch)


@edit
@dataclass(frozen=True)
class GatherOutput(Edit):
    """Repeat a node's output along an axis that the node itself can only compute in the source's size (Range)."""

    node: str
    output: int
    axis: int
    factors: tuple[Axis, ...]

    def _fields_to_json(self) -> dict[str, Any]:
        return {**super()._fields_to_json(), "factors": [axis_to_json(factor) for factor in self.factors]}

    @classmethod
    def _fields_from_json(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        return {**data, "factors": tuple(map(axis_from_json, data["factors"]))}

    def apply(self, editor: Editor) -> None:
        """Insert the Gather."""
        source = index_axis([(factor, False) for factor in self.factors], editor.maps).source
        index = editor.constant(f"{self.node}.map", source)
        editor.insert(self.node, self.output, True, [Step("Gather", (index,), axis=self.axis)])
