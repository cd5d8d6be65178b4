"""Finds which values of a student belong to which values of its teacher, for distillation.

The plan that a shrunk or grown file carries says it. What each layer of the student reads is paired with what the same
layer of the teacher reads, and what stands behind the last layer with what stands there in the teacher. So each part of
the student learns to read what it reads in the teacher, also where layers between were left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis, analyse
from hyperclone_onnx.errors import BadModel, BadRequest, Refused
from hyperclone_onnx.graphs import MOVES_OR_CASTS
from hyperclone_onnx.layers.stacks import Stack
from hyperclone_onnx.plan.maps import fills_of, index_axis, presented
from hyperclone_onnx.plan.plans import Plan, TransformStep
from hyperclone_onnx.planning.activations import ValueAxes, activations
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.reading import loading
from hyperclone_onnx.rewriting.rewriting import check_fits
from hyperclone_onnx.rewriting.source_record import steps_undone
from hyperclone_onnx.shrinking.selection import SELECTED_KEY
from hyperclone_onnx.transforms.layers import stacks_of
from hyperclone_onnx.transforms.source import source_of
from hyperclone_onnx.validation.outputs import logits_outputs

LINEAR = MOVES_OR_CASTS | {"Neg", "Gather", "Mul", "Div", "Add", "Sub", "Concat"}
"""Operators that pass a factor of an operand on."""

Side = Literal["student", "teacher"]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Channels:
    """Which channels of one side belong to the channels of the other side, along one axis.

    Channel ``places[k]`` of the other side is channel ``index[k]`` of this side, times ``factors[k]``.
    """

    of: Side
    index: tuple[int, ...]
    factors: tuple[float, ...] = ()
    """Empty where all are 1."""
    places: tuple[int, ...] = ()
    """Empty for all channels of the other side in their order. Those that are no copies are left out."""


@dataclass(frozen=True)
class Pair:
    """A value of the student and the value of the teacher that it is compared with, by their names in the graphs."""

    student: str
    teacher: str
    axis: int = -1
    channels: Channels | None = None
    """The channels along the axis. None where both have the same."""


@dataclass(frozen=True)
class Pairing:
    """What is compared of a student and its teacher."""

    logits: tuple[Pair, ...] = ()
    """Outputs that number classes."""
    hidden: tuple[Pair, ...] = ()
    """Values inside the graphs: what layers read, and what stands behind the last one."""
    notes: tuple[str, ...] = ()
    """Why no hidden values, or not all, are compared."""

    def names(self, side: Side) -> tuple[str, ...]:
        """The names of the hidden values of one side, each once."""
        return tuple(dict.fromkeys(getattr(pair, side) for pair in self.hidden))

    def to_json(self) -> dict[str, Any]:
        """The pairing as plain data. Channels that several pairs have in common are written once."""
        known: dict[Channels, int] = {}
        hidden = [
            {
                "student": pair.student,
                "teacher": pair.teacher,
                "axis": pair.axis,
                "channels": None if pair.channels is None else known.setdefault(pair.channels, len(known)),
            }
            for pair in self.hidden
        ]
        return {
            "logits": [{"student": pair.student, "teacher": pair.teacher} for pair in self.logits],
            "hidden": hidden,
            "channels": [
                {"of": one.of, "index": list(one.index), "factors": list(one.factors), "places": list(one.places)}
                for one in known
            ],
            "notes": list(self.notes),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Pairing:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, IndexError: the data is no pairing.
        """
        channels = [
            Channels(one["of"], *(tuple(one[name]) for name in ("index", "factors", "places")))
            for one in data["channels"]
        ]
        hidden = tuple(
            Pair(
                one["student"],
                one["teacher"],
                one["axis"],
                None if one["channels"] is None else channels[one["channels"]],
            )
            for one in data["hidden"]
        )
        return Pairing(tuple(Pair(**one) for one in data["logits"]), hidden, tuple(data["notes"]))


def pair(student: PathLike, teacher: PathLike) -> Pairing:
    """Pair the outputs of a student and its teacher, and their hidden values if one was made of the other.

    Args:
        student: path of the model that is trained.
        teacher: path of the model that it learns from.

    Raises:
        BadModel: a file is not a readable, complete ONNX model.
        BadRequest: the two have nothing in common that could be compared.
        Refused: a model cannot be analysed.
    """
    files = Path(student), Path(teacher)
    logits = _logits(*map(analyse, files))
    relation = _relation(*files)
    if relation is None:
        hidden: tuple[Pair, ...] = ()
        notes: tuple[str, ...] = (
            "neither file carries a plan by which one of the two was made of the other: only outputs are compared",
        )
    else:
        hidden, notes = _hidden(relation)
    if not logits and not hidden:
        raise BadRequest(
            f"{teacher} is no teacher of {student}: they have no output that numbers the same classes, and neither "
            "carries a plan by which one was made of the other"
        )
    return Pairing(logits, hidden, notes)


def _logits(student: Analysis, teacher: Analysis) -> tuple[Pair, ...]:
    """The outputs that number as many classes in both: of the same name, or the only one of each."""
    own, other = _classes(student), _classes(teacher)
    if len(own) == len(other) == 1 and set(own.values()) == set(other.values()):
        return (Pair(next(iter(own)), next(iter(other))),)
    return tuple(Pair(name, name) for name, size in own.items() if other.get(name) == size)


def _classes(analysis: Analysis) -> dict[str, int]:
    """The outputs that number classes, with how many they number. States that the model reads again are left out."""
    graph, dimensions = analysis.model.graph, analysis.dimensions

    def form(value: ir.Value) -> tuple[int, int | None]:
        axes = dimensions.axes.get(value) or ()
        return len(axes), dimensions.space.static(axes[-1]) if axes else None

    read = {form(value) for value in graph.inputs if value.dtype is not None and value.dtype.is_floating_point()}
    names = logits_outputs(dimensions)
    return {
        value.name: form(value)[1] or 0
        for value in graph.outputs
        if value.name and value.name in names and form(value) not in read
    }


# -- which one was made of the other ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Relation:
    """A file that was made of another one by a plan, and which of the two is the student."""

    plan: Plan
    source: Path
    made: Path
    steps: tuple[TransformStep, ...]
    """The transforms between the source's file and the graph that the plan is for."""
    source_side: Side

    @property
    def plan_picks(self) -> bool:
        """Whether the plan keeps some of the source's channels, each as it is."""
        return all(dim.map.picks for dim in self.plan.dims.values())


def _relation(student: Path, teacher: Path) -> _Relation | None:
    metadata = [loading.load(file).metadata_props for file in (student, teacher)]
    selected = metadata[0].get(SELECTED_KEY)
    candidates: list[tuple[Plan | None, Path, Path, Side]] = [
        (Plan.loads(selected) if selected else None, teacher, student, "teacher"),
        (Plan.carried_by(metadata[1]), student, teacher, "student"),
        (Plan.carried_by(metadata[0]), teacher, student, "teacher"),
    ]
    for plan, source, made, side in candidates:
        if plan is None:
            continue
        for steps in dict.fromkeys((len(plan.transforms), len(steps_undone(plan.transforms)))):
            used = plan.transforms[len(plan.transforms) - steps :]
            if _fits(plan, source, used):
                return _Relation(plan, source, made, used, side)
    return None


def _fits(plan: Plan, source: Path, steps: Sequence[TransformStep]) -> bool:
    """Whether a file has the graph that a plan is for."""
    try:
        model = source_of(source, steps).model
        check_fits(plan, model)
    except (BadModel, BadRequest, Refused):
        return False
    return not plan.source or plan.source.get("graph") == provenance(model, {})["graph"]


# -- hidden values ----------------------------------------------------------------------------------------


def _hidden(relation: _Relation) -> tuple[tuple[Pair, ...], tuple[str, ...]]:
    analysis = analyse(relation.source, relation.steps)
    axes_of = activations(analysis.dimensions, relation.plan)
    known = {value.name: value for value in analysis.dimensions.axes if value.name}
    in_source = _values_of(relation.source)
    in_made = _values_of(relation.made)
    pairs: dict[Pair, None] = {}
    outputs = {} if relation.plan.keep_interface else {value.name: value.axes for value in relation.plan.outputs}
    unnamed = unclear = 0
    for made, source in _beside(relation):
        value = known.get(made)
        if value is None or made not in in_made or source not in in_source:
            unnamed += 1
            continue
        if value.dtype is None or not value.dtype.is_floating_point():
            continue
        if value.is_graph_output():  # it has the order and the scale that users of the model see
            place = _channels(outputs.get(made, ()), relation, outside=True)
        else:
            place = _channels(axes_of.get(made, ()), relation)
        if place is None or (not relation.plan_picks and _may_be_scaled(value, analysis)):
            unclear += 1
            continue
        student, teacher = (made, source) if relation.source_side == "teacher" else (source, made)
        pairs[Pair(student, teacher, *place)] = None
    notes = []
    if not pairs and not unnamed and not unclear:
        notes.append("no layers were found in both graphs: no hidden values are compared")
    if unnamed:
        notes.append(f"{unnamed} hidden values have no name in one of the files, and are not compared")
    if unclear:
        notes.append(
            f"{unclear} hidden values may be scaled, or have channels of several dimensions, and are not compared"
        )
    return tuple(pairs), tuple(notes)


def _values_of(file: Path) -> set[str]:
    """The names of the computed values of a file."""
    return {value.name for node in source_of(file).model.graph for value in node.outputs if value.name}


def _beside(relation: _Relation) -> Iterator[tuple[str, str]]:
    """The stream in the file that was made and in its source: (name there, name here), from the first layer on."""
    sources = {
        entry["name"]: list(entry["sources"])
        for step in relation.steps
        if step.name == "layers"
        for entry in step.options["stacks"]
    }
    made = stacks_of(source_of(relation.source, relation.steps).model)
    before = {stack.name: stack for stack in stacks_of(source_of(relation.source).model)}
    for stack in made:
        other = before.get(stack.name)
        if other is None:
            continue
        origins = sources.get(stack.name, list(range(len(stack.units))))
        if len(origins) != len(stack.units) or max(origins) >= len(other.units):
            continue
        yield from _streams(stack, other, origins)


def _streams(made: Stack, source: Stack, origins: Sequence[int]) -> Iterator[tuple[str, str]]:
    rows: list[tuple[Sequence[ir.Value | None], Sequence[ir.Value | None]]] = []
    for place, origin in enumerate(origins):
        if origin not in origins[:place]:
            rows.append((made.units[place].enters, source.units[origin].enters))
    rows.append((made.units[-1].leaves, source.units[-1].leaves))
    for values, others in rows:
        for value, other in zip(values, others, strict=False):
            if value is not None and other is not None and value.name and other.name:
                yield value.name, other.name


def _may_be_scaled(value: ir.Value, analysis: Analysis) -> bool:
    """Whether growth may have divided a value so that a sum behind it stays: one node reads it, on the way to a sum."""
    sums = {summation.node for summation in analysis.dimensions.sums}
    while not value.is_graph_output() and len(value.uses()) == 1:
        (node,) = value.consumers()
        if node in sums:
            return True
        if node.op_type not in LINEAR or node.domain:
            return False
        value = node.outputs[0]
    return False


def _channels(axes: ValueAxes, relation: _Relation, *, outside: bool = False) -> tuple[int, Channels | None] | None:
    """The axis that grows or shrinks, and its channels, also of an output. None where they cannot be told."""
    growing = [(number, factors) for number, factors in enumerate(axes) if factors is not None]
    if not growing:
        return -1, None
    ((number, factors),) = growing[:1]
    if outside:
        source = presented(factors, relation.plan.maps)
        return number - len(axes), Channels(relation.source_side, tuple(source.tolist()))
    filled = any(map(fills_of, factors))
    if len(growing) > 1 or (filled and len(factors) > 1):
        return None
    index = index_axis([(factor, False) for factor in factors], relation.plan.maps)
    copies = np.arange(index.grown)
    if filled:  # the last source index stands for what is no copy
        copies = np.flatnonzero(index.source < index.source_size - 1)
    stretch = () if index.stretch is None else tuple(index.stretch[copies].tolist())
    places = tuple(copies.tolist()) if filled else ()
    return number - len(axes), Channels(relation.source_side, tuple(index.source[copies].tolist()), stretch, places)
