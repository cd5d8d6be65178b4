"""The record of its source that a grown model carries: the source's graph without weights, and where its weights are.

`shrinking` makes the small model again from it. The plan alone is not enough: an edit states the new attribute and
not the old one, and a norm that was written out does not say what it was.
"""

from __future__ import annotations

import base64
import binascii
import bz2
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.plan.plans import Feed, Plan, TransformStep
from hyperclone_onnx.reading.defaults import put_defaults_back
from hyperclone_onnx.tensors.expert_parts import Stacking
from hyperclone_onnx.transforms.experts import expert_tensors
from hyperclone_onnx.transforms.interface import name_in_file, places_of

METADATA_KEY = "hyperclone_onnx.source"

_ELSEWHERE = "hyperclone_onnx.elsewhere"
"""The key in the recorded graph under which the places of its weights are written."""

_PLACEHOLDER = "-"
"""The file name in a recorded tensor whose numbers are in the grown model."""

LARGEST_CARRIED = 1 << 20
"""The most bytes of a tensor that the record contains because the grown model does not have it (sizes, mostly)."""


@dataclass(frozen=True)
class Stack:
    """A tensor of experts that was made of a dense one: its name before growth, its name after, and how it was made."""

    tensor: str
    grown: str
    stacking: Stacking

    def to_json(self) -> list[Any]:
        """The stack as plain data."""
        how = self.stacking
        return [self.tensor, self.grown, how.copies, how.parts, how.run, how.scale]

    @staticmethod
    def from_json(data: Sequence[Any]) -> Stack:
        """The inverse of `to_json`."""
        return Stack(str(data[0]), str(data[1]), Stacking(*data[2:]))


@dataclass(frozen=True)
class SourceRecord:
    """The graph of a source, and the tensors of the grown model that were made of its own.

    Args:
        model: the source, normalised. A tensor that the grown model has is only declared: `is_declared` tells.
        tensors: for each declared tensor, the names of the grown tensors that were made of it. The first one is read
            where the source's tensor is read, unless `feeds` says otherwise.
        feeds: the inputs of nodes of the source that read another one of these.
        stacks: for each declared tensor that became experts, the tensors of these.
    """

    model: ir.Model
    tensors: Mapping[str, tuple[str, ...]]
    feeds: tuple[Feed, ...] = ()
    stacks: Mapping[str, tuple[Stack, ...]] = field(default_factory=dict)

    def dumps(self) -> str:
        """The record as text: a compressed protobuf message, in base 64.

        bzip2 makes the same bytes on every machine, which zlib does not: a grown file is the same everywhere.
        """
        model = self.model.clone()
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            if name in self.tensors or name in self.stacks:
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(
                    _PLACEHOLDER, None, None, tensor.dtype, shape=shape, name=name, base_dir=""
                )
            elif isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
        elsewhere: dict[str, Any] = {
            "tensors": {name: list(names) for name, names in self.tensors.items() if names != (name,)},
            "feeds": [[feed.node, feed.input, feed.tensor] for feed in self.feeds],
        }
        if self.stacks:
            elsewhere["stacks"] = {name: [one.to_json() for one in stacks] for name, stacks in self.stacks.items()}
            elsewhere["gone"] = [name for name in self.stacks if name not in self.tensors]
        model.metadata_props[_ELSEWHERE] = json.dumps(elsewhere, separators=(",", ":"))
        message: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return base64.b64encode(bz2.compress(message)).decode("ascii")

    @staticmethod
    def loads(text: str) -> SourceRecord:
        """The inverse of `dumps`.

        Raises:
            BadModel: the text is no record.
        """
        try:
            message = bz2.decompress(base64.b64decode(text, validate=True))
            model = ir.from_proto(onnx.ModelProto.FromString(message))
            elsewhere = json.loads(model.metadata_props.pop(_ELSEWHERE))
            others = {str(name): tuple(map(str, names)) for name, names in elsewhere["tensors"].items()}
            declared = [name for name, value in model.graph.initializers.items() if is_declared(value.const_value)]
            gone = set(elsewhere.get("gone", ()))
            tensors = {name: others.get(name, (name,)) for name in declared if name not in gone}
            stacks = {
                str(name): tuple(map(Stack.from_json, entries)) for name, entries in elsewhere.get("stacks", {}).items()
            }
            return SourceRecord(model, tensors, tuple(Feed(*feed) for feed in elsewhere["feeds"]), stacks)
        except (binascii.Error, OSError, KeyError, TypeError, ValueError, AttributeError) as problem:
            raise BadModel(f"a malformed record of its source: {type(problem).__name__} {problem}") from problem
        except Exception as problem:  # protobuf has an error class of its own
            raise BadModel(f"a malformed record of its source: {problem}") from problem

    @staticmethod
    def carried_by(metadata: Mapping[str, str]) -> SourceRecord | None:
        """The record in the `metadata_props` of a grown model; None where they have none.

        Raises:
            BadModel: the entry is no record.
        """
        text = metadata.get(METADATA_KEY)
        return SourceRecord.loads(text) if text else None


def is_declared(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a tensor of a record is only declared: its numbers are in the grown model."""
    return isinstance(tensor, ir.ExternalTensor) and tensor.location == _PLACEHOLDER


UNDONE = ("layers", "experts")
"""The transforms that the way back undoes. Others belong to the small model, such as separated tensors."""


def steps_kept(steps: Iterable[TransformStep]) -> tuple[TransformStep, ...]:
    """The transforms of a source that stay when a growth is undone: all up to the last one that is not undone."""
    kept = list(steps)
    while kept and kept[-1].name in UNDONE:
        kept.pop()
    return tuple(kept)


def steps_undone(steps: Iterable[TransformStep]) -> tuple[TransformStep, ...]:
    """The transforms of a source that are undone with the growth."""
    steps = tuple(steps)
    return steps[len(steps_kept(steps)) :]


def record_source(base: ir.Model, transformed: ir.Model, plan: Plan, grown: ir.Model) -> SourceRecord | None:
    """The record of a source.

    Args:
        base: the source, normalised, after the transforms that stay. It is not changed.
        transformed: the same after all transforms: what the plan grows.
        plan: the plan.
        grown: the grown model; its tensors are not read.

    Returns:
        The record. None if the grown model lacks a large tensor of the source.
    """
    copy = base.clone()
    put_defaults_back(copy)
    made_of = _made_of(transformed, plan, grown)
    names: dict[str, tuple[str, ...]] = {}
    places = places_of(transformed.graph)
    for tensor in transformed.graph.initializers:
        placed = places.get(tensor)
        if placed is None or not placed.is_new:
            source = tensor if placed is None else placed.source
            if made_of.get(tensor):
                names.setdefault(source, made_of[tensor])
    names = {name: names[name] for name in base.graph.initializers if name in names}
    stacks = _stacks(transformed, made_of)
    for name, value in copy.graph.initializers.items():
        if (
            name not in names
            and name not in stacks
            and value.const_value is not None
            and value.const_value.nbytes > LARGEST_CARRIED
        ):
            return None
    return SourceRecord(copy, names, tuple(_feeds_in(base, transformed, plan.feeds)), stacks)


def _stacks(transformed: ir.Model, made_of: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[Stack, ...]]:
    """For each tensor of the source that became experts, the tensors of these. New layers are left out."""
    stacks: dict[str, list[Stack]] = {}
    for name, made in expert_tensors(transformed.graph).items():
        if made.stacking is None or not made_of.get(name) or (made.place is not None and made.place.is_new):
            continue
        source = made.sources[0] if made.place is None else made.place.source
        stacks.setdefault(source, []).append(Stack(name, made_of[name][0], made.stacking))
    return {name: tuple(members) for name, members in stacks.items()}


def _made_of(transformed: ir.Model, plan: Plan, grown: ir.Model) -> dict[str, tuple[str, ...]]:
    """For each tensor of the transformed source, the tensors of the grown model that were made of it."""
    present = grown.graph.initializers
    own: dict[str, list[str]] = {}
    joined: dict[str, list[str]] = {}
    for name in transformed.graph.initializers:
        if name not in plan.tensors and name in present:
            own[name] = [name]
    for name, recipe in plan.tensors.items():
        for number, source in enumerate(recipe.sources):
            whole = isinstance(recipe.origin, str) or name == source or number == 0
            names = (own if whole else joined).setdefault(source, [])
            names.insert(0, name) if name == source else names.append(name)
    return {name: tuple(own.get(name) or joined[name][:1]) for name in {**own, **joined}}


def _feeds_in(base: ir.Model, transformed: ir.Model, feeds: Iterable[Feed]) -> Iterable[Feed]:
    """The feeds of a plan at the nodes of the source's file, for those nodes that it has."""
    feeds = list(feeds)
    if not feeds:
        return
    if base is transformed:
        yield from feeds
        return
    made_by = {value.name: node for node in base.graph.all_nodes() for value in node.outputs}
    nodes = {node.name: node for node in transformed.graph.all_nodes()}
    for feed in feeds:
        node = nodes[feed.node]
        known = [made_by[name] for name in map(name_in_file, node.outputs) if name in made_by]
        if known:
            yield Feed(known[0].name or "", feed.input, feed.tensor)
