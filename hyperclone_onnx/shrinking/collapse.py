"""Undoes a growth: makes the small model again from a grown one, by the plan that the grown file carries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, BadRequest, Refused
from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.origins import Joined
from hyperclone_onnx.plan.plans import Feed, Plan
from hyperclone_onnx.planning.provenance import provenance
from hyperclone_onnx.rewriting.rewriting import check_fits
from hyperclone_onnx.rewriting.source_record import SourceRecord, is_declared, record_source, steps_kept
from hyperclone_onnx.shrinking.residue import ROUNDING, Residue
from hyperclone_onnx.tensors.collapsed import CollapsedTensor, part_of
from hyperclone_onnx.tensors.expert_parts import Stacking
from hyperclone_onnx.transforms.source import source_of

CLOSE = 1e-6
"""Two tensors that differ by less than this, relatively, were one tensor and have not parted."""


@dataclass(frozen=True)
class Collapsed:
    """A small model whose tensors are computed when they are read."""

    model: ir.Model
    apart: tuple[str, ...] = ()
    """Tensors that were one in the source, and that training made different: they stay several."""


def record_of(path: Path, grown: ir.Model, plan: Plan, source: Path | None) -> SourceRecord:
    """The graph of the source of a grown file: the one that the file carries, or that of another file.

    Args:
        path: the grown file.
        grown: the model in it.
        plan: its plan.
        source: a file with the source's graph. Its weights are not used.

    Raises:
        BadRequest: there is no record and no file, or the file is another model.
        BadModel: the record, or the file, cannot be read.
    """
    if source is None:
        try:
            record = SourceRecord.carried_by(grown.metadata_props)
        except BadModel as problem:
            raise BadModel(f"{path}: its metadata holds {problem}") from problem
        if record is None:
            raise BadRequest(
                f"{path}: it does not carry the graph of its source (an earlier release wrote it, or a tool dropped "
                "its metadata): give the small model with --source; its graph is used, and not its weights"
            )
        return record
    transformed = source_of(source, plan.transforms).model
    try:
        check_fits(plan, transformed)
    except BadRequest as problem:
        raise BadRequest(f"--source {source}: {problem}") from problem
    if plan.source and plan.source.get("graph") != provenance(transformed, {})["graph"]:
        raise BadRequest(f"--source {source}: {path} was grown from another graph than this one")
    kept = steps_kept(plan.transforms)
    base = transformed if kept == plan.transforms else source_of(source, kept).model
    record = record_source(base, transformed, plan, grown)
    if record is None:
        raise Refused(f"{path}: it lacks a large tensor of {source}, so that its growth cannot be undone")
    return record


def collapse(path: Path, grown: ir.Model, plan: Plan, record: SourceRecord) -> Collapsed:
    """The small model of a grown one.

    Args:
        path: the grown file, for messages.
        grown: the model in it.
        plan: its plan.
        record: the graph of its source.

    Raises:
        Refused: the shares of a tensor do not add up to the source's, so that they cannot be added again.
        BadModel: a tensor is missing, or has another shape than the plan says.
    """
    for name in plan.tensors:
        law = plan.strategy_of(name).law
        if not law.adds_up:
            raise Refused(f"{path}: the strategy {law.name!r} of {name!r} does not keep sums: it cannot be undone")
    model = record.model.clone()
    apart: dict[str, ir.TensorProtocol] = {}
    for name, value in list(model.graph.initializers.items()):
        if name in record.stacks:
            value.const_value = MergedTensor(name, value.const_value, _ways_back(path, grown, plan, record, name))
            continue
        if name not in record.tensors:
            if is_declared(value.const_value):
                raise BadModel(f"{path}: its record of the source names {name!r}, and no tensor that it is made of")
            continue
        first, *others = [_tensor_back(path, grown, plan, name, made) for made in record.tensors[name]]
        declared = value.const_value
        if declared is not None and tuple(declared.shape.numpy()) != tuple(first.shape.numpy()):
            raise BadModel(
                f"{path}: {name!r} would have the shape {tuple(first.shape.numpy())}, and "
                f"{tuple(declared.shape.numpy())} in the source: the file was not grown by this plan"
            )
        value.const_value = first
        for made, other in zip(record.tensors[name][1:], others, strict=True):
            if _differ(first, other):
                apart[made] = other
    _keep_apart(model.graph, record.feeds, apart)
    return Collapsed(model, tuple(apart))


class MergedTensor(ir.LazyTensor):
    """A dense tensor that became experts: the mean of what each of its stacks, and each copy in a stack, is.

    Args:
        name: its name.
        declared: its type and shape.
        ways: the tensors that were made of it, as in the source's widths, and how; None for one that is as it was.
    """

    def __init__(
        self,
        name: str,
        declared: ir.TensorProtocol | None,
        ways: Sequence[tuple[str, ir.TensorProtocol, Stacking | None]],
    ) -> None:
        assert declared is not None
        self.ways = tuple(ways)
        self.dims = tuple(map(int, declared.shape.numpy()))
        super().__init__(self._mean, dtype=declared.dtype, shape=ir.Shape(self.dims), name=name)

    def _mean(self) -> ir.TensorProtocol:
        total = np.zeros(math.prod(self.dims))
        for _, tensor, stacking in self.ways:
            array = tensor.numpy()
            total += array.astype(np.float64).reshape(-1) if stacking is None else stacking.undone(array)
        mean = (total / len(self.ways)).reshape(self.dims)
        return ir.Tensor(mean.astype(self.dtype.numpy()), dtype=self.dtype, name=self.name)

    def residues(self) -> Iterator[Residue]:
        """How far the experts of each stack have parted."""
        dense = self.numpy()
        for name, tensor, stacking in self.ways:
            array = np.asarray(tensor.numpy()).astype(np.float64).reshape(-1)
            again = dense.astype(np.float64).reshape(-1) if stacking is None else stacking.done(dense)
            power, apart = float(array @ array), float((array - again) @ (array - again))
            residue = math.sqrt(apart / power) if power else (math.inf if apart else 0.0)
            yield Residue(name, array.size, residue, ROUNDING * eps_of(self.dtype))


def _ways_back(
    path: Path, grown: ir.Model, plan: Plan, record: SourceRecord, name: str
) -> list[tuple[str, ir.TensorProtocol, Stacking | None]]:
    """The tensors that were made of a dense tensor of experts, as in the source's widths, and how each was made."""
    ways: list[tuple[str, ir.TensorProtocol, Stacking | None]] = []
    declared = record.model.graph.initializers[name].const_value
    assert declared is not None
    size = declared.size
    for stack in record.stacks[name]:
        tensor = _tensor_back(path, grown, plan, stack.tensor, stack.grown)
        if tensor.size != size * stack.stacking.copies:
            raise BadModel(f"{path}: {stack.grown!r} has {tensor.size} elements, which do not fit those of {name!r}")
        ways.append((stack.grown, tensor, stack.stacking))
    for made in record.tensors.get(name, ()):
        tensor = _tensor_back(path, grown, plan, name, made)
        if tensor.size != size:
            raise BadModel(f"{path}: {made!r} has {tensor.size} elements, and {name!r} has {size} in the source")
        ways.append((made, tensor, None))
    return ways


def expert_residues(model: ir.Model) -> list[Residue]:
    """How far the experts of a growth have parted, for a collapsed model: a residue for each tensor of experts."""
    merged = [value.const_value for value in model.graph.initializers.values()]
    return [residue for tensor in merged if isinstance(tensor, MergedTensor) for residue in tensor.residues()]


def _tensor_back(path: Path, grown: ir.Model, plan: Plan, source: str, made: str) -> ir.TensorProtocol:
    """A tensor of the source, computed back from the grown tensor that was made of it."""
    value = grown.graph.initializers.get(made)
    stored = None if value is None else value.const_value
    if stored is None:
        raise BadModel(f"{path}: it has no tensor {made!r}, which the plan names: it was not grown by this plan")
    recipe = plan.tensors.get(made)
    if recipe is None:
        return stored
    shape = tuple(map(int, stored.shape.numpy()))
    try:
        lengths = tuple(index.grown for index in recipe.index(plan.maps))
    except KeyError as problem:
        raise BadModel(f"{path}: a malformed plan: it has no dimension {problem}") from problem
    if recipe.bits is None and shape != lengths:
        raise BadModel(f"{path}: {made!r} has the shape {shape}, and {lengths} in the plan")
    part = None
    if isinstance(recipe.origin, Joined):
        if recipe.origin.stacked:
            raise Refused(f"{path}: {made!r} stacks several tensors of its source: this growth cannot be undone")
        number, count = recipe.origin.sources.index(source), len(recipe.origin.sources)
        size = recipe.source_shape(plan.maps)[recipe.origin.axis]
        part = part_of(recipe.origin, number, [size // count] * count)
    return CollapsedTensor(stored, recipe, plan.maps, plan.strategy_of(made), part).as_lazy(source)


def _differ(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    """Whether two tensors have parted."""
    a, b = (np.asarray(tensor.numpy()) for tensor in (one, other))
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    if not one.dtype.is_floating_point():
        return not np.array_equal(a, b)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    close = max(CLOSE, 4.0 * float(np.finfo(a.dtype).eps) if a.dtype.kind == "f" else 0.02)
    with np.errstate(invalid="ignore"):
        apart = np.linalg.norm((wide_a - wide_b)[np.isfinite(wide_a) & np.isfinite(wide_b)])
    return bool(apart > close * np.linalg.norm(wide_a[np.isfinite(wide_a)]))


def _keep_apart(graph: ir.Graph, feeds: tuple[Feed, ...], apart: dict[str, ir.TensorProtocol]) -> None:
    """Store tensors that have parted, and let the nodes that read them in the grown model read them here."""
    nodes = {node.name: node for node in graph.all_nodes()}
    for feed in feeds:
        if feed.tensor not in apart:
            continue
        if feed.tensor not in graph.initializers:
            tensor = apart[feed.tensor]
            value = ir.Value(
                name=feed.tensor,
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            graph.register_initializer(value)
        nodes[feed.node].replace_input_with(feed.input, graph.initializers[feed.tensor])
