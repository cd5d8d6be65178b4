"""The plan: everything that growing a model will do, as frozen data without a weight in it.

It has a recipe for each stored tensor, an edit for each node that carries sizes, and the maps of the graph's
inputs and outputs. It is written as versioned JSON, so that the same plan can grow another store that holds the
same tensors (a checkpoint, optimizer moments).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.plan.maps import (
    Axis,
    AxisIndex,
    Kept,
    Maps,
    SourceMap,
    axis_from_json,
    axis_to_json,
    grown_size,
    index_axis,
    source_size,
)
from hyperclone_onnx.plan.strategies import Strategy

VERSION = 1
METADATA_KEY = "hyperclone_onnx.plan"


@dataclass(frozen=True)
class Recipe:
    """How one grown tensor is made from one source tensor.

    `axes[a]` lists the factors of axis a, outermost first. `shared` names the (axis, factor) pairs whose repeats
    divide the weight among them; every other repeat copies it. `scale` multiplies the result. With `bits`, the
    stored tensor holds numbers of so many bits packed in bytes, and `axes` are those of the numbers.
    """

    source: str
    axes: tuple[tuple[Axis, ...], ...]
    shared: tuple[tuple[int, int], ...] = ()
    scale: float = 1.0
    bits: int | None = None

    @property
    def grows(self) -> bool:
        """Whether any axis is another than the source's."""
        return any(not isinstance(factor, Kept) for axis in self.axes for factor in axis)

    def index(self, maps: Maps) -> tuple[AxisIndex, ...]:
        """What every index of each grown axis refers to."""
        shared = set(self.shared)
        return tuple(
            index_axis([(factor, (a, f) in shared) for f, factor in enumerate(axis)], maps)
            for a, axis in enumerate(self.axes)
        )

    def source_shape(self, maps: Maps) -> tuple[int, ...]:
        """The shape of the tensor that it grows."""
        return tuple(math.prod(source_size(factor, maps) for factor in axis) for axis in self.axes)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain data."""
        data: dict[str, Any] = {
            "source": self.source,
            "axes": [[axis_to_json(factor) for factor in axis] for axis in self.axes],
        }
        if self.shared:
            data["shared"] = [list(pair) for pair in self.shared]
        if self.scale != 1.0:
            data["scale"] = self.scale
        if self.bits is not None:
            data["bits"] = self.bits
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_json`."""
        return Recipe(
            data["source"],
            tuple(tuple(axis_from_json(factor) for factor in axis) for axis in data["axes"]),
            tuple((axis, factor) for axis, factor in data.get("shared", ())),
            data.get("scale", 1.0),
            data.get("bits"),
        )


@dataclass(frozen=True)
class Feed:
    """An initializer input of a node that reads a tensor of its own: (node, input) takes tensor `tensor`."""

    node: str
    input: int
    tensor: str


@dataclass(frozen=True)
class SetAttribute:
    """Set an attribute of a node; None removes it."""

    node: str
    name: str
    value: int | float | tuple[int, ...] | None


@dataclass(frozen=True)
class SetInput:
    """Replace an integer input of a node by a literal (`shape` is its shape, () for a scalar)."""

    node: str
    input: int
    values: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ResizeVector:
    """Change elements of a vector of sizes that the graph computes: an input, or an output, of a node.

    Element i becomes `literals[i]`, or, where that is None, itself times `factors[i]` (numerator, denominator). An
    element that is `keep` when the model runs stays so: it is no size (-1 in a Reshape, 1 in an Expand).
    """

    node: str
    slot: int
    output: bool
    literals: tuple[int | None, ...]
    factors: tuple[tuple[int, int], ...]
    keep: int | None = None


@dataclass(frozen=True)
class ScaleInput:
    """Multiply a node's input, along some axes, by (number of repeats of each index) ** -power."""

    node: str
    input: int
    axes: tuple[tuple[int, tuple[Axis, ...]], ...]
    """(axis counted from the last, -1 being the last; the factors of that axis)"""
    power: float


@dataclass(frozen=True)
class DivideOutput:
    """Divide a node's integer output, a sum of equal repeats, by their number."""

    node: str
    output: int
    divisor: int


@dataclass(frozen=True)
class TakeBranch:
    """Put the nodes of one branch in the place of an If whose condition is known: the other branch never runs."""

    node: str
    branch: str


@dataclass(frozen=True)
class GatherOutput:
    """Repeat a node's output along an axis that the node itself can only make in the source's size."""

    node: str
    output: int
    axis: int
    factors: tuple[Axis, ...]


Edit = SetAttribute | SetInput | ResizeVector | ScaleInput | DivideOutput | TakeBranch | GatherOutput
_EDITS = {
    kind.__name__: kind
    for kind in (SetAttribute, SetInput, ResizeVector, ScaleInput, DivideOutput, TakeBranch, GatherOutput)
}


@dataclass(frozen=True)
class Interface:
    """The axes of a graph input or output; None for an axis whose size is known only when running."""

    name: str
    axes: tuple[tuple[Axis, ...] | None, ...]

    def to_json(self) -> dict[str, Any]:
        """The interface as plain data."""
        return {"name": self.name, "axes": [None if a is None else [axis_to_json(f) for f in a] for a in self.axes]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Interface:
        """The inverse of `to_json`."""
        axes = (None if a is None else tuple(axis_from_json(f) for f in a) for a in data["axes"])
        return Interface(data["name"], tuple(axes))


@dataclass(frozen=True)
class GrownDim:
    """One dimension that grows: its role and its source map."""

    role: str
    map: SourceMap


@dataclass(frozen=True)
class Plan:
    """All of one growth. `tensors` maps each grown tensor's name to its recipe; `feeds` says who reads it."""

    dims: Mapping[str, GrownDim]
    tensors: Mapping[str, Recipe]
    feeds: tuple[Feed, ...]
    edits: tuple[Edit, ...]
    inputs: tuple[Interface, ...]
    outputs: tuple[Interface, ...]
    strategy: Strategy
    keep_interface: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def maps(self) -> dict[str, SourceMap]:
        """The source map of each growing dimension, by name."""
        return {name: dim.map for name, dim in self.dims.items()}

    def brings_in(self, name: str) -> bool:
        """Whether a tensor of the grown model is a divisor that growth put in: the source has none such."""
        nodes = (edit.node for edit in self.edits if isinstance(edit, ScaleInput))
        return name not in self.tensors and any(name.startswith(f"{node}.scale") for node in nodes)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "version": VERSION,
            "source": dict(self.source),
            "strategy": self.strategy.to_json(),
            "keep_interface": self.keep_interface,
            "dims": {
                name: {"role": dim.role, "size": dim.map.size, **dim.map.to_json()} for name, dim in self.dims.items()
            },
            "inputs": [each.to_json() for each in self.inputs],
            "outputs": [each.to_json() for each in self.outputs],
            "tensors": {name: recipe.to_json() for name, recipe in self.tensors.items()},
            "feeds": [[feed.node, feed.input, feed.tensor] for feed in self.feeds],
            "edits": [_edit_to_json(edit) for edit in self.edits],
        }

    def dumps(self, indent: int | None = None) -> str:
        """The plan as JSON text, compact unless `indent` is given."""
        separators = (",", ":") if indent is None else None
        return json.dumps(self.to_json(), indent=indent, separators=separators)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            BadModel: the data is not a plan of this version.
        """
        if data.get("version") != VERSION:
            raise BadModel(f"a plan of version {data.get('version')!r}; this release reads version {VERSION}")
        try:
            plan = Plan(
                dims={
                    name: GrownDim(dim["role"], SourceMap.from_json(dim["size"], dim))
                    for name, dim in data["dims"].items()
                },
                tensors={name: Recipe.from_json(recipe) for name, recipe in data["tensors"].items()},
                feeds=tuple(Feed(*feed) for feed in data["feeds"]),
                edits=tuple(_edit_from_json(edit) for edit in data["edits"]),
                inputs=tuple(Interface.from_json(each) for each in data["inputs"]),
                outputs=tuple(Interface.from_json(each) for each in data["outputs"]),
                strategy=Strategy(**data["strategy"]),
                keep_interface=data["keep_interface"],
                source=dict(data["source"]),
            )
            maps = plan.maps
            for recipe in plan.tensors.values():
                for factor in (factor for axis in recipe.axes for factor in axis):
                    grown_size(factor, maps)  # a KeyError for a dimension that the plan has not
            return plan
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
            raise BadModel(f"a malformed plan: {type(problem).__name__} {problem}") from problem

    @staticmethod
    def loads(text: str) -> Plan:
        """Read a plan from JSON text.

        Raises:
            BadModel: the text is not JSON, or not a plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as problem:
            raise BadModel(f"a plan that is not JSON: {problem}") from problem
        return Plan.from_json(data if isinstance(data, dict) else {})

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Plan:
        """Read a plan from the file that ``--plan-out`` wrote.

        Raises:
            BadModel: it cannot be read, or holds no plan.
        """
        try:
            return Plan.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, BadModel) as problem:
            raise BadModel(f"{path}: not a readable plan ({problem})") from problem

    @staticmethod
    def carried_by(metadata: Mapping[str, str]) -> Plan | None:
        """The plan that a grown model carries in its `metadata_props`; None where it has none.

        Raises:
            BadModel: what it carries is not a plan.
        """
        text = metadata.get(METADATA_KEY)
        return Plan.loads(text) if text else None


def _edit_to_json(edit: Edit) -> dict[str, Any]:
    data: dict[str, Any] = {"edit": type(edit).__name__}
    for name, value in vars(edit).items():
        if isinstance(edit, ScaleInput) and name == "axes":
            value = [[axis, [axis_to_json(f) for f in factors]] for axis, factors in value]
        elif isinstance(edit, GatherOutput) and name == "factors":
            value = [axis_to_json(f) for f in value]
        elif isinstance(edit, ResizeVector) and name == "keep" and value is None:
            continue
        data[name] = value
    return data


def _edit_from_json(data: Mapping[str, Any]) -> Edit:
    fields = {name: value for name, value in data.items() if name != "edit"}
    kind = _EDITS[data["edit"]]
    if kind is ScaleInput:
        fields["axes"] = tuple((axis, tuple(map(axis_from_json, factors))) for axis, factors in fields["axes"])
    elif kind is GatherOutput:
        fields["factors"] = tuple(map(axis_from_json, fields["factors"]))
    else:
        fields = {
            name: tuple(tuple(x) if isinstance(x, list) else x for x in value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
    return kind(**fields)
