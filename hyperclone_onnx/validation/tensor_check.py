"""Checks every grown tensor: its repeats in the file are added up and compared with the source tensor.

This notices a single weight that is wrong by a part in a thousand, even if it hardly changes an output. A few processes
read both files block by block, so no file is in memory as a whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel
from hyperclone_onnx.graphs import eps_of
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.reading.loading import load
from hyperclone_onnx.system.parallel import share_out, workers_for
from hyperclone_onnx.tensors.assembled import assemble
from hyperclone_onnx.tensors.grown_tensor import GrownTensor
from hyperclone_onnx.tensors.noise_level import power
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.shares import PRECISION, Columns
from hyperclone_onnx.tensors.stored_rows import StoredRows
from hyperclone_onnx.tensors.stretches import Run, runs_of
from hyperclone_onnx.tensors.table import BLOCK, Table
from hyperclone_onnx.writing.streaming import CHUNK, Placed

Array = npt.NDArray[Any]
Compare = Callable[[Scratch], "_Sums"]

ROUNDED_ONCE = 0.51
"""Units of the last place by which rounding moves a number, and a little more: shares are computed in float32."""


@dataclass(frozen=True)
class TensorReport:
    """The differences between the grown tensors and their sources."""

    checked: int = 0
    residue: float = 0.0
    """The root mean square over all tensors of rms(sum of repeats - source) / rms(source). It comes from rounding."""
    worst: str = ""
    worst_error: float = 0.0
    """The largest error, divided by its rounding bound. Above 1 the tensor is wrong."""
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Sums:
    """The differences in one block, or in several."""

    worst: float = 0.0
    """The largest error of a sum of repeats."""
    largest: float = 0.0
    """The largest stored magnitude."""
    error: float = 0.0
    """The sum of squared errors."""
    power: float = 0.0
    """The sum of squared source weights."""
    units: float = 0.0
    """The largest error of a sum of repeats in units of the weight's last place, in types whose shares add up."""
    finite: bool = False
    """Whether all source weights are known to be finite."""

    def joined(self, other: _Sums) -> _Sums:
        """Merge the differences of both."""
        return _Sums(
            max(self.worst, other.worst),
            max(self.largest, other.largest),
            self.error + other.error,
            self.power + other.power,
            max(self.units, other.units),
            self.finite and other.finite,
        )


@dataclass(frozen=True)
class Checked:
    """A tensor, and the differences in all its blocks."""

    name: str
    eps: float
    """The largest error that rounding explains, divided by the largest stored magnitude."""
    shared: bool
    planned: bool
    sums: _Sums
    adds_up: bool = False
    """Whether the shares of a weight add up to it in its own type: the sum is the weight, rounded once."""
    source: str | None = None
    """The source tensor, if all of it was read."""

    @property
    def bound(self) -> float:
        """The largest error that rounding explains."""
        return self.eps * self.sums.largest

    @property
    def excess(self) -> float:
        """The error divided by its bound. A tensor that no recipe changes must be equal to that of the source."""
        if self.adds_up and math.isfinite(self.sums.worst):
            return self.sums.units / ROUNDED_ONCE
        return self.sums.worst / self.bound if self.bound else (math.inf if self.sums.worst else 0.0)

    @property
    def problem(self) -> str:
        """The reason why the tensor is wrong. Empty if it is right."""
        if self.excess <= 1.0:
            return ""
        if not self.planned:
            return "it should be the source's own and differs"
        if self.adds_up and math.isfinite(self.sums.worst):
            return f"the repeats of a weight miss it by {self.sums.units:.1f} units of its last place (rounding: 0.5)"
        return f"the repeats differ from the source by {self.sums.worst:.1e} (rounding: {self.bound:.1e})"

    @property
    def residue(self) -> float:
        """The squared error of the sums of repeats, divided by the squared source weights."""
        if math.isinf(self.sums.worst):
            return math.inf
        return self.sums.error / self.sums.power if self.sums.power else 0.0


class TensorCheck:
    """Compares the tensors of a grown file with those of the source, one by one, in any order and in any process.

    Args:
        source: the source.
        grown: the grown model.
        plan: the plan. Tensors that it does not name must be unchanged.
        forget: remove the grown file from the page cache while it is read. It is kept if the model is run next.

    Raises:
        BadModel: a tensor that the plan names is missing.
    """

    def __init__(self, source: ir.Model, grown: ir.Model, plan: Plan, *, forget: bool) -> None:
        self._source, self.grown, self._plan, self._forget = source, grown, plan, forget
        unplanned = [
            name
            for name, value in source.graph.initializers.items()
            if name not in plan.tensors and name in grown.graph.initializers and value.const_value is not None
        ]
        self.sizes = {name: _stored(grown, name).nbytes for name in (*plan.tensors, *unplanned)}
        """The bytes of each tensor to compare."""

    def checked(self, name: str, scratch: Scratch) -> Checked:
        """Compare one tensor.

        Raises:
            BadModel: a tensor of the source is missing, or a file cannot be read.
        """
        return _check(self._source, self.grown, self._plan, name, scratch, self._forget)

    def report(self, checked: Iterable[Checked]) -> TensorReport:
        """The report of all tensors."""
        place = {name: index for index, name in enumerate(self.sizes)}
        return _report(sorted(checked, key=lambda tensor: place[tensor.name]))


def check_tensors(
    source: ir.Model, grown: ir.Model, plan: Plan, workers: int | None = None, *, forget: bool = True
) -> TensorReport:
    """Add up the repeats of every grown tensor and compare with the source. Other tensors must be unchanged.

    Args:
        source: the source.
        grown: the grown model.
        plan: the plan.
        workers: the number of processes (see `parallel.workers_for`).
        forget: see `TensorCheck`.

    Raises:
        BadModel: a tensor that the plan names is missing, or a file cannot be read.
    """
    check = TensorCheck(source, grown, plan, forget=forget)
    checked: list[Checked] = []

    def checker() -> Callable[[str], Checked]:
        scratch = Scratch()
        return lambda name: check.checked(name, scratch)

    largest_first = sorted(check.sizes, key=lambda name: -check.sizes[name])
    share_out(checker, largest_first, workers_for(sum(check.sizes.values()), workers), checked.append)
    return check.report(checked)


class CheckOfWritten:
    """Compares each tensor of a file with the source as soon as it is written.

    Its bytes are then still in the cache, and the disk goes on writing meanwhile. They are read from the file, at the
    place that the written model states.

    Args:
        source: the source.
        plan: the plan.
        path: the model file. Its tensors must lie in files beside it.
    """

    def __init__(self, source: ir.Model, plan: Plan, path: Path) -> None:
        self._source, self._plan, self._path = source, plan, path
        self._check: TensorCheck | None = None
        self.finite: frozenset[str] = frozenset()
        """The tensors of the source that are known to have finite numbers only, once there is a report."""

    @property
    def grown(self) -> ir.Model:
        """The model in the file."""
        return load(self._path) if self._check is None else self._check.grown

    def begin(self) -> Callable[[Placed, Scratch], Checked | None]:
        """Read the model file. Returns a function that compares a written tensor, if there is one to compare.

        Raises:
            BadModel: see `TensorCheck`.
        """
        check = self._check = TensorCheck(self._source, load(self._path), self._plan, forget=False)
        names = _names_by_place(check)

        def written(placed: Placed, scratch: Scratch) -> Checked | None:
            name = names.get((placed.file.name, placed.offset))
            return None if name is None else check.checked(name, scratch)

        return written

    def report(self, answers: Iterable[Checked | None]) -> TensorReport | None:
        """The report of all tensors, from the answers of the function. None if it was not asked for.

        Raises:
            BadModel: see `TensorCheck.checked`.
        """
        if self._check is None:
            return None
        checked = {tensor.name: tensor for tensor in answers if tensor is not None}
        scratch = Scratch()
        rest = [self._check.checked(name, scratch) for name in self._check.sizes if name not in checked]
        every = (*checked.values(), *rest)
        self.finite = frozenset(tensor.source for tensor in every if tensor.source is not None and tensor.sums.finite)
        return self._check.report(every)


def _names_by_place(check: TensorCheck) -> dict[tuple[str, int], str]:
    """The tensors to compare by (file, offset), without those that share bytes with others.

    A tensor that is written later could change their bytes again. They are compared at the end.
    """
    places = sorted(
        (Path(tensor.path).name, tensor.offset or 0, tensor.nbytes, name)
        for name, value in check.grown.graph.initializers.items()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    )
    alone: dict[tuple[str, int], str] = {}
    last, end = ("", 0), 0
    for file, offset, size, name in places:
        end = end if file == last[0] else 0
        if offset < end:
            alone.pop(last, None)
        elif name in check.sizes:
            alone[file, offset] = name
        last, end = (file, offset), max(end, offset + size)
    return alone


def _report(checked: list[Checked]) -> TensorReport:
    planned = [tensor for tensor in checked if tensor.planned]
    residues = [tensor.residue for tensor in planned if tensor.shared]
    worst = max(planned, key=lambda tensor: tensor.excess, default=None)
    return TensorReport(
        len(checked),
        math.sqrt(sum(residues) / len(residues)) if residues else 0.0,
        worst.name if worst is not None and worst.excess else "",
        worst.excess if worst is not None else 0.0,
        tuple(f"{tensor.name}: {tensor.problem}" for tensor in checked if tensor.problem),
    )


def _check(source: ir.Model, grown: ir.Model, plan: Plan, name: str, scratch: Scratch, forget: bool) -> Checked:
    stored, recipe = _stored(grown, name), plan.tensors.get(name)
    if recipe is None:
        compared = _identical(_stored(source, name), stored)
        return Checked(name, 0.0, shared=False, planned=False, sums=_added_up(compared, scratch))
    for needed in recipe.sources:
        _stored(source, needed)
    made = GrownTensor(assemble(recipe.origin, source), recipe, plan.maps, plan.strategy_of(name))
    if tuple(stored.shape.numpy()) != made.stored_shape or stored.dtype != made.dtype:
        return Checked(name, 0.0, made.is_shared, planned=True, sums=_Sums(worst=math.inf))
    if not made.is_shared and not recipe.is_stretched:
        return Checked(name, 0.0, shared=False, planned=True, sums=_added_up(_copies(made, stored, forget), scratch))
    table = _exact_table(made)
    most = [int(axis.count.max()) if axis.grown else 1 for axis in table.axes]
    # A stretch is rounded to the type, and so are its product with the weight and that with the recipe's scale.
    stretched = sum(axis.stretch is not None for axis in table.axes)
    bound = (max(math.prod(most), 1) + 2 * stretched) * eps_of(made.dtype)
    compared = _sums_of_repeats(table, stored, made.dtype, forget)
    sums = _added_up(compared, scratch)
    whole = isinstance(recipe.origin, str) and not any(source_map.picks for source_map in plan.maps.values())
    source_name = str(recipe.origin) if whole else None
    return Checked(name, bound, True, True, sums, adds_up=made.dtype in PRECISION, source=source_name)


def _added_up(compared: Iterator[Compare], scratch: Scratch) -> _Sums:
    total = _Sums(finite=True)
    for compare in compared:
        total = total.joined(compare(scratch))
    return total


def _stored(model: ir.Model, name: str) -> ir.TensorProtocol:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise BadModel(f"the model has no tensor {name!r}, which the plan names: it was not grown by this plan")
    return value.const_value


# -- tensors that no plan changes -------------------------------------------------------------------------


def _identical(one: ir.TensorProtocol, other: ir.TensorProtocol) -> Iterator[Compare]:
    if one.dtype != other.dtype or one.shape != other.shape:
        yield lambda _: _Sums(worst=math.inf)
    elif one.dtype == ir.DataType.STRING:
        same = np.array_equal(one.numpy(), other.numpy())
        yield lambda _: _Sums(worst=0.0 if same else math.inf)
    else:
        sides = [StoredRows(tensor, 1, tensor.nbytes) for tensor in (one, other)]
        for start in range(0, one.nbytes, CHUNK):
            yield partial(_same_bytes, sides, start, min(CHUNK, one.nbytes - start))


def _same_bytes(sides: list[StoredRows], start: int, count: int, scratch: Scratch) -> _Sums:
    one, other = (side.read_bytes(start, count, scratch, f"side.{i}") for i, side in enumerate(sides))
    return _Sums(worst=0.0 if np.array_equal(one, other) else math.inf)


# -- copies -----------------------------------------------------------------------------------------------


def _copies(made: GrownTensor, stored: ir.TensorProtocol, forget: bool) -> Iterator[Compare]:
    """Make every piece again, and compare it with the file in each of its places."""
    file = StoredRows(stored, 1, stored.nbytes, forget=forget)
    for piece in made.pieces():
        yield partial(_same_piece, piece, file, made.dtype)


def _same_piece(piece: Any, file: StoredRows, dtype: ir.DataType, scratch: Scratch) -> _Sums:
    worst = 0.0
    for array, offsets in piece(scratch):
        want = array.reshape(-1).view(np.uint8)
        for offset in offsets:
            got = file.read_bytes(offset, want.size, scratch, "got")
            if not np.array_equal(got, want):
                worst = max(worst, _difference(got, want, dtype))
    return _Sums(worst)


def _difference(got: Array, want: Array, dtype: ir.DataType) -> float:
    """The largest difference of two byte strings, read as numbers. Infinite if they are no floats, or not finite."""
    if not dtype.is_floating_point() or dtype.bitwidth < 8:
        return math.inf
    a, b = (np.frombuffer(array.tobytes(), dtype=dtype.numpy()).astype(np.float64) for array in (got, want))
    differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    return float(np.nan_to_num(np.abs(a - b)[differ], nan=math.inf, posinf=math.inf).max(initial=0.0))


# -- shares -----------------------------------------------------------------------------------------------


def _exact_table(made: GrownTensor) -> Table:
    """The table of a tensor, with the source values in double precision."""
    return Table(made.source, made.recipe, made.maps, Strategy("symmetric"), ir.DataType.DOUBLE)


def _sums_of_repeats(table: Table, stored: ir.TensorProtocol, dtype: ir.DataType, forget: bool) -> Iterator[Compare]:
    """Compare block by block the rows of the source with the sums of their repeats."""
    columns = Columns(table.columns)
    kind, bits = np.dtype(dtype.numpy()), PRECISION.get(dtype)
    file = StoredRows(stored, table.rows.grown, columns.grown * kind.itemsize, forget=forget)
    step = max(1, BLOCK // 2 // max(1, columns.size))
    repeats: dict[int, list[Run]] = defaultdict(list)
    for run in runs_of(table.rows):
        for part in run.cut(step, run.collapsed):
            repeats[part.collapsed // step].append(part)
    for block, runs in sorted(repeats.items()):
        yield _Block(table, columns, file, kind, bits, block * step, runs).compared


@dataclass(frozen=True)
class _Block:
    """Rows of the source with all their repeats in the file."""

    table: Table
    columns: Columns
    file: StoredRows
    kind: Any
    """The type of the numbers in the file."""
    bits: tuple[int, int, float] | None
    """See `PRECISION`."""
    low: int
    """The first collapsed row."""
    runs: list[Run]

    @property
    def shape(self) -> tuple[int, int]:
        """The number of collapsed rows and columns."""
        return max(run.collapsed + run.length for run in self.runs) - self.low, self.columns.size

    @property
    def _fills(self) -> bool:
        """Whether every run of rows fills all of the block, as it mostly does."""
        return all(run.length == self.shape[0] for run in self.runs)

    def compared(self, scratch: Scratch) -> _Sums:
        """Compare the rows with the sums of their repeats."""
        total, largest = self._total(scratch)
        want = self._want(scratch)
        with np.errstate(invalid="ignore"):
            error = np.subtract(total, want, out=total)  # in place: less must go through the cache
        worst = max(float(error.max(initial=0.0)), -float(error.min(initial=0.0)))
        all_finite = math.isfinite(worst)
        if not all_finite:
            total, _ = self._total(scratch)
            finite = np.isfinite(total) & np.isfinite(want)
            same = (total == want) | (np.isnan(total) & np.isnan(want))
            error, want = total[finite] - want[finite], want[finite]
            worst = float(np.abs(error).max(initial=0.0)) if (finite | same).all() else math.inf
        units = _in_units(error, want, self.bits) if self.bits is not None and worst else 0.0
        return _Sums(worst, largest, power(error) if worst else 0.0, power(want), units, all_finite)

    def _total(self, scratch: Scratch) -> tuple[Array, float]:
        """The sums of the repeats, float64, and the largest finite magnitude in the file."""
        columns = self.columns
        total, largest = scratch.array("total", self.shape, np.float64), 0.0
        # Then nothing must be set to zero first.
        whole = bool(columns.parts) and self._fills
        whole = whole and all(part.taken.whole and len(part.taken.index) == columns.size for part in columns.parts)
        if not whole:
            total[...] = 0.0
        for number, run in enumerate(self.runs):
            got = self.file.read(run.start, run.length, scratch, "got").view(self.kind)
            largest = max(largest, _peak(got))
            rows = slice(run.collapsed - self.low, run.collapsed - self.low + run.length)
            parts = list(columns.parts)
            if whole and not number:
                first, *parts = parts
                np.copyto(total, got[:, first.columns])
            for part in parts:
                taken = part.taken.index
                if part.taken.whole:
                    where = total[rows, int(taken[0]) : int(taken[-1]) + 1]
                    np.add(where, got[:, part.columns], out=where)
                else:
                    total[rows, taken] += got[:, part.columns]
        return total, largest

    def _want(self, scratch: Scratch) -> Array:
        """The source's values, float64. They must not be changed."""
        if self._fills:
            return self.table.values(self.runs[0], self.columns, scratch)
        want = scratch.array("want", self.shape, np.float64)
        known: set[tuple[int, int]] = set()
        for run in self.runs:
            if (run.collapsed, run.length) not in known:
                known.add((run.collapsed, run.length))
                rows = slice(run.collapsed - self.low, run.collapsed - self.low + run.length)
                want[rows] = self.table.values(run, self.columns, scratch)
        return want


def _in_units(error: Array, want: Array, bits: tuple[int, int, float]) -> float:
    """The largest error in units of the last place that a weight has in a coarse type.

    Args:
        error: float64.
        want: the weights, float64, in the shape of `error`.
        bits: see `PRECISION`.
    """
    # Without sign and significand, the bits of a float64 are 2 ** floor(log2 |value|).
    unit = (want.view(np.uint64) & np.uint64(0x7FF0000000000000)).view(np.float64) * 2.0 ** (1 - bits[0])
    return float((np.abs(error) / np.maximum(unit, 2.0 ** bits[1])).max(initial=0.0))


def _peak(stored: Array) -> float:
    """The largest finite magnitude."""
    peak = max(float(stored.max(initial=0)), -float(stored.min(initial=0)))
    if math.isfinite(peak):
        return peak
    finite = stored[np.isfinite(stored)]
    return max(float(finite.max(initial=0)), -float(finite.min(initial=0)))
