"""The results of the walk over a graph: the axes of every value, facts about axes, and sums over them."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from hyperclone_onnx.algebra.dims import Space, Term
from hyperclone_onnx.algebra.shape_values import Known
from hyperclone_onnx.graphs import is_initializer

Axes = tuple[Term, ...]
Use = tuple[ir.Node, int]
"""One use of an initializer: the node and the input's position."""


class Fact(enum.Enum):
    """Something that a rule saw happen to an axis. Roles follow from these facts."""

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
    SPATIAL = "numbers places, and a window moves along it"
    CHOSEN = "numbers the choices of a node"
    GROUPED = "numbers groups of channels that are convolved or normalised apart"
    STATE = "carried from step to step by a recurrence"


@dataclass(frozen=True)
class Sum:
    """Operand axes that one operator multiplies and sums over, all of them the same `term`.

    To undo n repeats, an operand is divided by n ** `power`: 1 for a plain sum, 0.5 for a sum of squares (ReduceL2).
    Quantised operators sum `integers`. Each of the inputs `scales` multiplies the result, including the inputs
    `biases`, which are in units of that scale.
    """

    node: ir.Node
    term: Term
    sites: tuple[tuple[int, int], ...]
    power: float = 1.0
    integers: bool = False
    scales: tuple[int, ...] = ()
    biases: tuple[int, ...] = ()
    output_only: bool = False
    """Whether only the output can be scaled. LpNormalization divides its input by the sum, so a scale of it cancels."""


@dataclass(frozen=True)
class Uniform:
    """An axis over which `node` averages. If growth repeats its indices unequally, planning keeps the average right."""

    node: ir.Node
    term: Term


@dataclass
class Dimensions:
    """The results of the walk: the axes of every value, and all that later stages need to know about them."""

    model: ir.Model
    space: Space
    axes: dict[ir.Value, Axes | None] = field(default_factory=dict)
    use_axes: dict[Use, Axes] = field(default_factory=dict)
    known: dict[ir.Value, Known] = field(default_factory=dict)
    constants: set[ir.Value] = field(default_factory=set)
    picked: set[ir.Value] = field(default_factory=set)
    """Values that hold weights picked from stored tensors, such as those of the experts of a token."""
    sums: list[Sum] = field(default_factory=list)
    uniform: list[Uniform] = field(default_factory=list)
    facts: dict[Fact, list[tuple[Term, ir.Node]]] = field(default_factory=lambda: defaultdict(list))
    index_tables: list[tuple[ir.Value, Term]] = field(default_factory=list)
    scanned: dict[ir.Value, tuple[ir.Node, int, int]] = field(default_factory=dict)
    """For each input of a Scan's body that gets slices of a weight: the Scan, its input, and the axis of the slices."""
    expanded_axes: dict[ir.Value, frozenset[int]] = field(default_factory=dict)
    """The axes along which a value was expanded. Along such an axis, all elements are the same."""
    row_tuples: dict[ir.Value, Axes] = field(default_factory=dict)
    """For index tuples that NonZero made from such a value: its expanded last axes. The tuples list whole rows."""
    gates: frozenset[ir.Node] = frozenset()
    """Softmax nodes that run over features. An earlier walk has shown that a norm averages over these features."""
    stretched: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    """For each symbol, the lengths of axes with which it is broadcast. Its value is one of these, or 1."""
    sequences: dict[ir.Value, tuple[Axes, ...]] = field(default_factory=dict)
    """The axes of each element of a sequence of tensors, where their number is known."""
    unknown_ranks: dict[ir.Value, tuple[str, str]] = field(default_factory=dict)
    """The reason why the rank of a value is not known, and the node that causes it."""
    packed: dict[Use, int] = field(default_factory=dict)
    """The uses that hold several numbers in a byte, with the bits of each number."""
    without_rule: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    never_run: set[ir.Node] = field(default_factory=set)
    """The nodes of branches that never run. The grown graph does not have them."""
    unrelated: set[ir.Node] = field(default_factory=set)
    """The nodes whose rules could not relate their axes. All their axes are pinned, and the nodes are not edited."""
    walked: list[ir.Node] = field(default_factory=list)
    """Every node that the walk visited, in order, including nodes in bodies."""

    def axes_of(self, node: ir.Node, index: int) -> Axes | None:
        """The axes of a node's input, None where its rank is unknown."""
        value = node.inputs[index]
        if value is None:
            return None
        if is_initializer(value):
            return self.use_axes.get((node, index))
        return self.axes.get(value)

    def is_weight(self, value: ir.Value | None) -> bool:
        """Whether a value is computed from stored tensors alone, or picked from them by indices."""
        return value in self.constants or value in self.picked

    def initializer_uses(self) -> Iterator[tuple[ir.Value, Use, Axes]]:
        """Every use of an initializer by a node of the main graph, in graph order."""
        for use, axes in self.use_axes.items():
            value = use[0].inputs[use[1]]
            assert value is not None
            yield value, use, axes
