"""Measures how far the clones of each tensor have parted: what is left when a tensor is collapsed and grown again.

The residue of a tensor W' is |W' - grow(collapse(W'))| / |W'|. Right after growth it is rounding, whatever the
strategy. After training it is the part of the tensor that a collapsed model loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.origins import Drawn, Joined
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.system.parallel import share_out, workers_for
from hyperclone_onnx.tensors.assembled import DrawnTensor, JoinedTensor
from hyperclone_onnx.tensors.collapsed import CollapsedTensor, part_of
from hyperclone_onnx.tensors.grown_tensor import GrownTensor
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows

ROUNDING = 8.0
"""A residue of at most this many units of the tensor's type is rounding."""


@dataclass(frozen=True)
class Residue:
    """The residue of one tensor."""

    name: str
    """The name of the grown tensor."""
    elements: int
    residue: float
    rounding: float
    """The largest residue that rounding explains."""

    @property
    def is_tied(self) -> bool:
        """Whether all clones are still as growth made them."""
        return self.residue <= self.rounding


def residues(grown: ir.Model, plan: Plan, workers: int | None = None) -> list[Residue]:
    """The residue of each floating-point tensor that growth changed, in the order of the plan.

    Args:
        grown: the grown model.
        plan: its plan.
        workers: the number of processes (see `parallel.workers_for`).
    """
    names = [name for name in plan.tensors if _has_residue(grown, plan, name)]
    sizes = {name: _tensor(grown, name).nbytes for name in names}
    measured: dict[str, Residue] = {}

    def measurer() -> Callable[[str], Residue]:
        scratch = Scratch()
        return lambda name: _residue(grown, plan, name, scratch)

    def done(residue: Residue) -> None:
        measured[residue.name] = residue

    largest_first = sorted(names, key=lambda name: -sizes[name])
    share_out(measurer, largest_first, workers_for(sum(sizes.values()), workers), done)
    return [measured[name] for name in names]


def together(several: Iterable[Residue]) -> tuple[Residue, ...]:
    """The residues with one for each tensor: of a tensor that has two, the root of the sum of their squares."""
    by_name: dict[str, Residue] = {}
    for residue in several:
        known = by_name.get(residue.name)
        if known is not None:
            residue = replace(residue, residue=math.hypot(known.residue, residue.residue))
        by_name[residue.name] = residue
    return tuple(by_name.values())


def overall(several: Iterable[Residue]) -> float:
    """The root mean square of residues, each tensor counted by its elements."""
    several = list(several)
    elements = sum(residue.elements for residue in several)
    return math.sqrt(sum(residue.residue**2 * residue.elements for residue in several) / elements) if elements else 0.0


def _tensor(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def _has_residue(grown: ir.Model, plan: Plan, name: str) -> bool:
    value = grown.graph.initializers.get(name)
    recipe = plan.tensors[name]
    if value is None or value.const_value is None or recipe.bits is not None:
        return False
    tensor = value.const_value
    if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8 or tensor.size == 0:
        return False
    if tuple(tensor.shape.numpy()) != tuple(index.grown for index in recipe.index(plan.maps)):
        return False
    return plan.strategy_of(name).law.adds_up and not (isinstance(recipe.origin, Joined) and recipe.origin.stacked)


def source_again(stored: ir.TensorProtocol, plan: Plan, name: str) -> ir.TensorProtocol:
    """The tensor that a recipe grows, computed back from the grown one."""
    recipe, strategy = plan.tensors[name], plan.strategy_of(name)
    if isinstance(recipe.origin, Drawn):
        return DrawnTensor(recipe.origin)
    if isinstance(recipe.origin, Joined):
        shape = recipe.source_shape(plan.maps)
        joined, count = recipe.origin, len(recipe.origin.sources)
        sizes = [shape[joined.axis] // count] * count
        parts = [
            CollapsedTensor(stored, recipe, plan.maps, strategy, part_of(joined, number, sizes)).as_lazy(source)
            for number, source in enumerate(joined.sources)
        ]
        return JoinedTensor(joined, parts)
    return CollapsedTensor(stored, recipe, plan.maps, strategy).as_lazy(name)


def _residue(grown: ir.Model, plan: Plan, name: str, scratch: Scratch) -> Residue:
    stored, recipe = _tensor(grown, name), plan.tensors[name]
    made = GrownTensor(source_again(stored, plan, name), recipe, plan.maps, plan.strategy_of(name))
    kind = np.dtype(stored.dtype.numpy())
    file = StoredRows(stored, 1, stored.nbytes)
    error = power = 0.0
    for piece in made.pieces():
        for array, offsets in piece(scratch):
            want = array.reshape(-1).astype(np.float64)
            for offset in offsets:
                got = file.read_bytes(offset, array.size * kind.itemsize, scratch, "got").view(kind)
                numbers = got.astype(np.float64)
                numbers[~np.isfinite(numbers)] = 0.0
                with np.errstate(invalid="ignore"):
                    apart = numbers - np.where(np.isfinite(want), want, 0.0)
                error += float(apart @ apart)
                power += float(numbers @ numbers)
    residue = math.sqrt(error / power) if power else (math.inf if error else 0.0)
    return Residue(name, stored.size, residue, ROUNDING * eps_of(stored.dtype))
