"""The plan: everything that growth will do to a model, as frozen data that contains no weights.

It has the transforms of the source graph, a recipe for each tensor that changes, an edit for each node that carries
sizes, and the maps of the graph's inputs and outputs. Its format is versioned JSON. So the same plan can also grow
other data with the same tensors, such as a checkpoint or the moments of an optimizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hyperclone_onnx.errors import BadModel, BadRequest
from hyperclone_onnx.plan.edits import Edit, WeighAverage, edit_from_json
from hyperclone_onnx.plan.maps import Axis, Fill, SourceMap, axis_from_json, axis_to_json, grown_size, names_in
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy

VERSION = 1
METADATA_KEY = "hyperclone_onnx.plan"

_NUMBERED = re.compile(r"\.\d+\Z")
"""The suffix of a constant's name in case that another value had that name."""


@dataclass(frozen=True)
class Feed:
    """An input of a node that reads another tensor than in the source: `tensor` instead of the shared one."""

    node: str
    input: int
    tensor: str


@dataclass(frozen=True)
class Interface:
    """The axes of a graph input or output; None for an axis whose size is known only when the model runs."""

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
class TransformStep:
    """A transform of the source graph that is applied before growth: its name and options (see `transforms`)."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The step as plain data."""
        return {"transform": self.name, **self.options}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TransformStep:
        """The inverse of `to_json`."""
        return TransformStep(data["transform"], {name: value for name, value in data.items() if name != "transform"})


@dataclass(frozen=True)
class Plan:
    """The whole plan of one growth.

    Args:
        dims: the dimensions that grow, by name.
        tensors: the recipe of each grown tensor, by the tensor's name.
        feeds: the inputs that read another tensor than in the source.
        edits: the edits of nodes.
        inputs: the graph inputs that grow.
        outputs: the graph outputs that grow.
        strategy: how repeats share a weight.
        keep_interface: whether the graph's inputs and outputs keep the sizes of the source.
        source: the provenance of the plan (see `planning.provenance`).
        transforms: the transforms of the source graph, in order.
        added: the names of the constants that growth puts into the graph. None means that the form of a name decides.
            Rewriting records the names if a tensor of the source has a name of that form.
        strategies: the strategies of those tensors that have another one, by the tensor's name.
        recipe: the recipe file that the plan was made from, as plain data.
        stretched: the values that are stretched in the grown graph: by name and by axis, the power of the stretch of
            each growing dimension of the axis. Values that only repeat the source's elements are left out.
    """

    dims: Mapping[str, GrownDim]
    tensors: Mapping[str, Recipe]
    feeds: tuple[Feed, ...]
    edits: tuple[Edit, ...]
    inputs: tuple[Interface, ...]
    outputs: tuple[Interface, ...]
    strategy: Strategy
    keep_interface: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    transforms: tuple[TransformStep, ...] = ()
    added: tuple[str, ...] | None = None
    strategies: Mapping[str, Strategy] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    stretched: Mapping[str, Mapping[int, Sequence[float | tuple[float, Fill]]]] = field(default_factory=dict)

    def strategy_of(self, tensor: str) -> Strategy:
        """The strategy of a grown tensor."""
        return self.strategies.get(tensor, self.strategy)

    @property
    def preserves(self) -> bool:
        """Whether the grown model computes the same as its source."""
        return all(strategy.law.preserves for strategy in (self.strategy, *self.strategies.values()))

    @property
    def adds_up(self) -> bool:
        """Whether the repeats of every tensor add up to the source."""
        return all(strategy.law.adds_up for strategy in (self.strategy, *self.strategies.values()))

    @property
    def is_even(self) -> bool:
        """Whether all repeats of every weight get the same numbers."""
        return all(strategy.law.is_even for strategy in (self.strategy, *self.strategies.values()))

    @property
    def maps(self) -> dict[str, SourceMap]:
        """The source map of each growing dimension, by name."""
        return {name: dim.map for name, dim in self.dims.items()}

    @property
    def weighed(self) -> dict[str, tuple[str, ...]]:
        """The nodes whose averages are weighed, each with the dimensions that it averages over."""
        return {
            edit.node: tuple(name for _, factors in edit.axes for factor in factors for name in names_in(factor))
            for edit in self.edits
            if isinstance(edit, WeighAverage)
        }

    def brings_in(self, name: str) -> bool:
        """Whether a tensor of the grown model is a constant that growth put into the graph."""
        if self.added is not None:
            return name in self._added_names
        stem = _NUMBERED.sub("", name)
        return (name in self._constants or stem in self._constants) and name not in self.tensors

    @cached_property
    def _added_names(self) -> frozenset[str]:
        return frozenset(self.added or ())

    @cached_property
    def _constants(self) -> frozenset[str]:
        return frozenset(f"{edit.node}.{end}" for edit in self.edits for end in edit.constants)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        data = {
            "version": VERSION,
            "source": dict(self.source),
            "strategy": self.strategy.to_json(),
            "keep_interface": self.keep_interface,
            "dims": {
                name: {"role": dim.role, "size": dim.map.size, **dim.map.to_json()} for name, dim in self.dims.items()
            },
            "inputs": [value.to_json() for value in self.inputs],
            "outputs": [value.to_json() for value in self.outputs],
            "tensors": {name: recipe.to_json() for name, recipe in self.tensors.items()},
            "feeds": [[feed.node, feed.input, feed.tensor] for feed in self.feeds],
            "edits": [edit.to_json() for edit in self.edits],
        }
        if self.transforms:
            data["transforms"] = [step.to_json() for step in self.transforms]
        if self.added is not None:
            data["added"] = list(self.added)
        if self.strategies:
            data["strategies"] = {name: strategy.to_json() for name, strategy in self.strategies.items()}
        if self.recipe:
            data["recipe"] = dict(self.recipe)
        if self.stretched:
            data["stretched"] = {
                name: [[axis, list(powers)] for axis, powers in axes.items()] for name, axes in self.stretched.items()
            }
        return data

    def dumps(self, indent: int | None = None) -> str:
        """The plan as JSON text, compact unless `indent` is given."""
        separators = (",", ":") if indent is None else None
        return json.dumps(self.to_json(), indent=indent, separators=separators)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            BadModel: the data is no plan, or a plan of another version.
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
                edits=tuple(edit_from_json(edit) for edit in data["edits"]),
                inputs=tuple(Interface.from_json(value) for value in data["inputs"]),
                outputs=tuple(Interface.from_json(value) for value in data["outputs"]),
                strategy=Strategy(**data["strategy"]),
                keep_interface=data["keep_interface"],
                source=dict(data["source"]),
                transforms=tuple(TransformStep.from_json(step) for step in data.get("transforms", ())),
                added=None if data.get("added") is None else tuple(map(str, data["added"])),
                strategies={name: Strategy.from_json(entry) for name, entry in data.get("strategies", {}).items()},
                recipe=dict(data.get("recipe", {})),
                stretched={
                    name: {axis: tuple(tuple(p) if isinstance(p, list) else p for p in powers) for axis, powers in axes}
                    for name, axes in data.get("stretched", {}).items()
                },
            )
            maps = plan.maps
            for recipe in plan.tensors.values():
                for factor in (factor for axis in recipe.axes for factor in axis):
                    grown_size(factor, maps)  # raises KeyError for a dimension that the plan does not have
            return plan
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
            raise BadModel(f"a malformed plan: {type(problem).__name__} {problem}") from problem

    @staticmethod
    def loads(text: str) -> Plan:
        """Read a plan from JSON text.

        Raises:
            BadModel: the text is no JSON, or no plan.
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
            BadModel: the file cannot be read, or contains no plan.
        """
        try:
            return Plan.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, BadModel) as problem:
            raise BadModel(f"{path}: not a readable plan ({problem})") from problem

    @staticmethod
    def carried_by(metadata: Mapping[str, str]) -> Plan | None:
        """The plan in the `metadata_props` of a grown model; None where they have none.

        Raises:
            BadModel: the entry is not a plan.
        """
        text = metadata.get(METADATA_KEY)
        return Plan.loads(text) if text else None


def plan_of(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    given: str | os.PathLike[str] | Plan | None,
    *,
    lack: str,
    otherwise: str = "",
) -> Plan:
    """The plan by which a file was grown: the one that the caller gives, or else the one that the file carries.

    Args:
        path: the grown file.
        metadata: the `metadata_props` of the model in it.
        given: a plan, or a file that contains one.
        lack: what cannot be done without a plan, for the error.
        otherwise: what a user can do besides giving a plan, for the error.

    Raises:
        BadRequest: there is neither.
        BadModel: the plan cannot be read.
    """
    if isinstance(given, Plan):
        return given
    if given is not None:
        return Plan.read(given)
    try:
        carried = Plan.carried_by(metadata)
    except BadModel as problem:
        raise BadModel(f"{path}: its metadata holds {problem}") from problem
    if carried is None:
        raise BadRequest(
            f"{path}: it carries no plan, so that {lack}: it was not grown by hyperclone-onnx, or a tool dropped its "
            f"metadata; give the plan that expand --plan-out wrote with --plan{otherwise}"
        )
    return carried
