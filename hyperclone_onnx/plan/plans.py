"""The plan: everything that growing a model will do, as frozen data without a weight in it.

It has the transforms of the source graph, a recipe for each tensor that changes, an edit for each node that carries
sizes, and the maps of the graph's inputs and outputs. It is written as versioned JSON. So the same plan can grow
another store that holds the same tensors (a checkpoint, optimizer moments).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.plan.edits import Edit, ScaleInput, edit_from_json
from hyperclone_onnx.plan.maps import Axis, SourceMap, axis_from_json, axis_to_json, grown_size
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import Strategy

VERSION = 1
METADATA_KEY = "hyperclone_onnx.plan"

_NUMBERED = re.compile(r"(\.\d+)?")
"""What follows the name of a constant where that name was taken."""


@dataclass(frozen=True)
class Feed:
    """An initializer input of a node that reads a tensor of its own: (node, input) takes tensor `tensor`."""

    node: str
    input: int
    tensor: str


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
class TransformStep:
    """A transform of the source graph, by its name and options (see `transforms`), that comes before any growth."""

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
    """All of one growth.

    `tensors` maps the name of each grown tensor to its recipe. `feeds` says which inputs read another tensor than in
    the source. `added` names the constants that growth put into the graph. It is None where their names tell them:
    rewriting records them in the grown model where a tensor of the source has a name of that form.
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

    @property
    def maps(self) -> dict[str, SourceMap]:
        """The source map of each growing dimension, by name."""
        return {name: dim.map for name, dim in self.dims.items()}

    def brings_in(self, name: str) -> bool:
        """Whether a tensor of the grown model is a constant that growth put in: the source has none such."""
        if self.added is not None:
            return name in self.added
        nodes = {edit.node for edit in self.edits if isinstance(edit, ScaleInput)}
        node, is_scale, number = name.rpartition(".scale")
        return bool(is_scale) and node in nodes and name not in self.tensors and _NUMBERED.fullmatch(number) is not None

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
        return data

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
                edits=tuple(edit_from_json(edit) for edit in data["edits"]),
                inputs=tuple(Interface.from_json(value) for value in data["inputs"]),
                outputs=tuple(Interface.from_json(value) for value in data["outputs"]),
                strategy=Strategy(**data["strategy"]),
                keep_interface=data["keep_interface"],
                source=dict(data["source"]),
                transforms=tuple(TransformStep.from_json(step) for step in data.get("transforms", ())),
                added=None if data.get("added") is None else tuple(map(str, data["added"])),
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
