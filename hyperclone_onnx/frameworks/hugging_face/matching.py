"""Match checkpoint tensors with initializers by their content, never by a name alone.

Two tensors with equal content, up to a transposition, have equal moments. So we first compare moments, and then the
elements of the tensors that remain. The same search finds tensors that differ by an added constant (a gain stored
minus one) or by a multiplied constant (a folded scale).

A tensor may be a part of another one. The norms of its lines (slices along one axis) then appear among the norms of
the larger tensor's lines. Names only choose among candidates of equal content.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray, values
from hyperclone_onnx.frameworks.hugging_face.layout import Layout, Piece, squeezed, squeezed_shape
from hyperclone_onnx.frameworks.hugging_face.sources import Source

Array = npt.NDArray[Any]

OFFSETS = (1.0, -1.0)
"""Constants that models add to a stored gain."""

CLOSE = 1e-5
"""The largest difference, relative to the largest element, of two tensors of which neither is nearer to a third one."""

LOOSE = 1e-4
"""The largest difference of two moments, relative to the largest element, at which the elements are compared."""


@dataclass
class Matches:
    """The result of matching."""

    layouts: dict[str, list[Layout]] = field(default_factory=dict)
    """For each checkpoint tensor every layout that fits its content, the likeliest first."""
    unused: list[str] = field(default_factory=list)
    """Initializers that match no checkpoint tensor and no part of one."""


@dataclass(frozen=True)
class _Fit:
    """A layout that fits a tensor's content up to rounding, and the largest absolute difference that remains."""

    layout: Layout
    error: float


@dataclass(frozen=True)
class _Moments:
    """Numbers that do not change when elements are reordered; `power` is the sum of squares."""

    size: int
    mean: float
    power: float
    low: float
    """The smallest element."""
    high: float
    """The largest element."""

    @property
    def largest(self) -> float:
        """The largest absolute value."""
        return max(abs(self.low), abs(self.high))

    @property
    def constant(self) -> bool:
        """Whether all elements are the same number."""
        return self.low == self.high

    def slack_of_power(self, tolerance: float) -> float:
        """How far the power of a tensor may be from this one if each of its elements is off by `tolerance`."""
        rounding = 2 * tolerance * float(np.sqrt(self.size * self.power)) + self.size * tolerance**2
        return LOOSE * (self.power + 1e-30) + rounding


def match(
    sources: Mapping[str, Source],
    tensors: Mapping[str, Array | StoredArray],
    order: Sequence[str],
    shared: Callable[[str], int] = lambda _: 1,
) -> Matches:
    """Match checkpoint tensors with initializers.

    Args:
        sources: the initializers as the source has them.
        tensors: the checkpoint's tensors, in the model's order.
        order: the initializers' names, in the order in which the graph uses them.
        shared: the number of repeats among which an initializer's weight is divided. Of equal initializers we prefer
            the one that growth only copies, because a table for lookups must not be divided.
    """
    matched: dict[str, list[_Fit]] = defaultdict(list)
    moments = _AllMoments(sources, tensors)
    _match_whole(sources, tensors, moments, matched, ((1.0, 0.0),))
    used = {piece.initializer for fits in matched.values() for fit in fits for piece in fit.layout.pieces}
    rest = {name: array for name, array in tensors.items() if name not in matched}
    free = {name: source for name, source in sources.items() if name not in used}
    _match_whole(free, rest, moments, matched, tuple((1.0, offset) for offset in OFFSETS))
    _match_scaled(free, rest, moments, matched)
    rest = {name: array for name, array in rest.items() if name not in matched}
    _match_parts(sources, rest, moments, matched)
    rest = {name: array for name, array in rest.items() if name not in matched}
    _match_joined(free, rest, moments, matched)
    chosen = _nearest(matched, moments)
    result = Matches({name: _ordered(name, chosen[name], shared) for name in tensors if name in chosen})
    _in_order(result, order)
    used = {piece.initializer for layouts in result.layouts.values() for layout in layouts for piece in layout.pieces}
    result.unused = [name for name in sources if name not in used]
    return result


# -- whole tensors ----------------------------------------------------------------------------------------------


class _AllMoments:
    """The moments of all initializers and of all tensors. Each of them is read once for its moments."""

    def __init__(self, sources: Mapping[str, Source], tensors: Mapping[str, Array | StoredArray]) -> None:
        self.sources = sources
        self.tensors = tensors
        self._of_sources: dict[str, _Moments] = {}
        self._of_tensors: dict[str, _Moments] = {}

    def source(self, name: str) -> _Moments:
        """The moments of an initializer."""
        if name not in self._of_sources:
            self._of_sources[name] = _moments(self.sources[name].array)
        return self._of_sources[name]

    def tensor(self, name: str) -> _Moments:
        """The moments of a checkpoint's tensor."""
        if name not in self._of_tensors:
            self._of_tensors[name] = _moments(values(self.tensors[name]))
        return self._of_tensors[name]


def _match_whole(
    sources: Mapping[str, Source],
    tensors: Mapping[str, Array | StoredArray],
    moments_of: _AllMoments,
    fits_of: dict[str, list[_Fit]],
    affine: Sequence[tuple[float, float]],
) -> None:
    """Tensors that are a whole initializer, times a scale, plus an offset; `affine` lists the pairs to try."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for name, source in sources.items():
        by_size[source.size].append(name)
    for name, array in tensors.items():
        moments = moments_of.tensor(name)
        for initializer in by_size.get(array.size, ()):
            source_moments = moments_of.source(initializer)
            for scale, offset in affine:
                source = sources[initializer]
                slack = LOOSE * (moments.largest + abs(offset)) + source.tolerance * abs(scale)
                if abs(source_moments.mean * scale + offset - moments.mean) > slack:
                    continue
                if not offset and abs(source_moments.power - moments.power) > moments.slack_of_power(source.tolerance):
                    continue
                fit = _whole(source, initializer, array, scale, offset)
                if fit is not None:
                    fits_of[name].append(fit)
                    break


def _match_scaled(
    sources: Mapping[str, Source],
    tensors: Mapping[str, Array | StoredArray],
    moments_of: _AllMoments,
    fits_of: dict[str, list[_Fit]],
) -> None:
    """Tensors that are a whole initializer times some scale, which the exporter folded into the weight."""
    for name, array in tensors.items():
        if name in fits_of or array.size < 2:
            continue
        moments = moments_of.tensor(name)
        for initializer, source in sources.items():
            if source.size != array.size or not moments.power:
                continue
            source_moments = moments_of.source(initializer)
            scale = float(np.sqrt(moments.power / source_moments.power)) if source_moments.power else 0.0
            slack = LOOSE * moments.largest + source.tolerance * scale
            if not scale or abs(source_moments.mean * scale - moments.mean) > slack:
                continue
            fit = _whole(source, initializer, array, scale, 0.0)
            if fit is not None:
                fits_of[name].append(fit)


def _moments(array: Array) -> _Moments:
    flat = array.reshape(-1)
    if not flat.size:
        return _Moments(0, 0.0, 0.0, 0.0, 0.0)
    mean = float(flat.mean(dtype=np.float64))
    power = float(np.vdot(flat, flat)) if flat.dtype == np.float64 else _power(flat)
    return _Moments(flat.size, mean, power, float(flat.min()), float(flat.max()))


def _power(flat: Array) -> float:
    """The sum of squares in float64, in blocks, so that no wide copy of the whole tensor is in memory."""
    total = 0.0
    for start in range(0, flat.size, 1 << 20):
        part = flat[start : start + (1 << 20)].astype(np.float64)
        total += float(np.dot(part, part))
    return total


def _whole(source: Source, initializer: str, array: Array | StoredArray, scale: float, offset: float) -> _Fit | None:
    """The layout that makes the checkpoint's tensor from the whole initializer; None where there is none.

    It permutes the initializer's axes, and may merge neighbours into one axis.
    """
    from_file, wanted = squeezed(source.array), squeezed(values(array))
    if not wanted.ndim <= from_file.ndim <= 5:
        return None
    for permutation in itertools.permutations(range(from_file.ndim)):
        shape = [from_file.shape[axis] for axis in permutation]
        merged = _merging(shape, wanted.shape)
        if merged is None:
            continue
        view = from_file.transpose(permutation).reshape(wanted.shape)
        error = _difference(view, wanted, source.tolerance, scale, offset)
        if error is not None:
            piece = Piece(initializer, permutation, None, scale, offset)
            return _Fit(Layout((piece,), array.shape, 0, merged if max(merged, default=1) > 1 else None), error)
    return None


def _merging(fine: Sequence[int], coarse: Sequence[int]) -> tuple[int, ...] | None:
    """How many consecutive axes of the fine shape form each axis of the coarse one; None where they do not fit."""
    rest, counts = list(fine), []
    for size in coarse:
        count, product = 0, 1
        while product < size and rest:
            product *= rest.pop(0)
            count += 1
        if product != size:
            return None
        counts.append(count)
    return None if rest else tuple(counts)


def _difference(theirs: Array, ours: Array, tolerance: float, scale: float = 1.0, offset: float = 0.0) -> float | None:
    """The largest difference of `theirs * scale + offset` and `ours`; None where rounding does not explain it.

    We compare a corner first: it rejects most candidates at little cost.
    """
    exact = scale == 1.0 and not offset
    slack = tolerance * abs(scale) + (
        0.0 if exact else 1e-6 * float(np.abs(ours).max(initial=0.0)) + 2e-7 * abs(offset)
    )
    corner = tuple(slice(0, 4) for _ in ours.shape)
    for window in (corner, ...):
        a, b = np.asarray(theirs[window]), np.asarray(ours[window])
        if not exact:
            a = a * np.float64(scale) + offset
        error = float(np.abs(a - b).max(initial=0.0))
        if not error <= slack:
            return None
    return error


# -- parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Where a small tensor lies in a big one: ``big[start:stop]`` along `axis` equals the small tensor, permuted."""

    axis: int
    start: int
    permutation: tuple[int, ...]
    """The order of the small tensor's axes in the big one."""
    error: float
    """The largest absolute difference of the two."""


def _match_parts(
    sources: Mapping[str, Source],
    tensors: Mapping[str, Array | StoredArray],
    moments: _AllMoments,
    fits_of: dict[str, list[_Fit]],
) -> None:
    """Checkpoint tensors that are a part of one initializer, such as queries, keys and values that were joined."""
    # A constant tensor would match any other tensor with that number.
    varied = {name: array for name, array in tensors.items() if not moments.tensor(name).constant}
    if not varied:
        return
    bigger = _Lines({name: source.stored for name, source in sources.items() if not moments.source(name).constant})
    for name, array in varied.items():
        part_array = squeezed(values(array))
        for initializer, part in bigger.holding(part_array, lambda big_name: sources[big_name].tolerance):
            inverse = tuple(int(axis) for axis in np.argsort(part.permutation))
            window = (part.axis, part.start, part.start + part_array.shape[part.permutation[part.axis]])
            fits_of[name].append(_Fit(Layout((Piece(initializer, inverse, window),), array.shape), part.error))


def _match_joined(
    sources: Mapping[str, Source],
    tensors: Mapping[str, Array | StoredArray],
    moments: _AllMoments,
    fits_of: dict[str, list[_Fit]],
) -> None:
    """Checkpoint tensors that an exporter cut into several initializers."""
    bigger = _Lines({name: array for name, array in tensors.items() if not moments.tensor(name).constant})
    if not bigger.arrays:
        return
    parts: dict[tuple[str, int], list[tuple[int, int, Piece]]] = defaultdict(list)
    for initializer, source in sources.items():
        if moments.source(initializer).constant:
            continue
        part_array = squeezed(source.array)
        for name, part in bigger.holding(part_array, lambda _, source=source: source.tolerance):
            stop = part.start + part_array.shape[part.permutation[part.axis]]
            parts[name, part.axis].append((part.start, stop, Piece(initializer, part.permutation)))
    for (name, axis), pieces in parts.items():
        reached, chosen = 0, []
        for start, stop, piece in sorted(pieces, key=lambda stretch: stretch[:2]):
            if start == reached:
                chosen.append(piece)
                reached = stop
        if reached == squeezed(values(tensors[name])).shape[axis]:
            fits_of[name].append(_Fit(Layout(tuple(chosen), tensors[name].shape, axis), 0.0))


class _Lines:
    """An index of tensors that answers which of them contain a given smaller tensor.

    A line is the slice at one index of an axis. The norms of lines do not change when the other axes are permuted.
    """

    def __init__(self, arrays: Mapping[str, Array | StoredArray]) -> None:
        self.arrays = arrays
        self.norms: dict[tuple[str, int], Array] = {}
        self.by_shape: dict[tuple[int, ...], list[tuple[str, int]]] = defaultdict(list)
        for name, array in arrays.items():
            shape = squeezed_shape(array)
            for axis in range(len(shape)):
                across = tuple(size for other, size in enumerate(shape) if other != axis)
                self.by_shape[tuple(sorted(across))].append((name, axis))

    def _norms(self, name: str, axis: int) -> Array:
        if (name, axis) not in self.norms:
            self.norms[name, axis] = _norms(squeezed(values(self.arrays[name])), axis)
        return self.norms[name, axis]

    def holding(self, small: Array, tolerance: Any) -> Iterable[tuple[str, _Part]]:
        """The tensors of which `small` is a proper part along one axis, and where `small` lies in them.

        `tolerance` gives the absolute tolerance for a tensor's name.
        """
        for cut in range(small.ndim):
            across = tuple(sorted(size for axis, size in enumerate(small.shape) if axis != cut))
            small_norms = _norms(small, cut)
            for name, axis in self.by_shape.get(across, ()):
                shape = squeezed_shape(self.arrays[name])
                if shape[axis] <= small.shape[cut] or len(shape) != small.ndim:
                    continue
                part = self._place(small, cut, small_norms, name, axis, tolerance(name))
                if part is not None:
                    yield name, part

    def _place(self, small: Array, cut: int, own: Array, name: str, axis: int, tolerance: float) -> _Part | None:
        """Where `small`, cut along its axis `cut`, lies along `axis` of the tensor `name`; None where it does not.

        `own` holds the norms of the lines of `small`.
        """
        norms = self._norms(name, axis)
        slack = LOOSE * (float(own.max(initial=0.0)) + 1e-30) + tolerance * float(
            np.sqrt(small.size / max(len(own), 1))
        )
        starts = np.flatnonzero(np.abs(norms[: len(norms) - len(own) + 1] - own[0]) <= slack)
        if not len(starts):
            return None
        big = squeezed(values(self.arrays[name]))
        for start in starts.tolist():
            if not (np.abs(norms[start : start + len(own)] - own) <= slack).all():
                continue
            others = [other for other in range(small.ndim) if other != cut]
            for order in itertools.permutations(others):
                permutation = (*order[:axis], cut, *order[axis:])
                window = (slice(None),) * axis + (slice(start, start + len(own)),)
                region = big[window]
                if small.transpose(permutation).shape != region.shape:
                    continue
                error = _difference(small.transpose(permutation), region, tolerance)
                if error is not None:
                    return _Part(axis, int(start), permutation, error)
        return None


def _norms(array: Array, axis: int) -> Array:
    """The Euclidean norm of the slice at each index of an axis."""
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)))


def constant(array: Array) -> bool:
    """Whether all elements of a tensor are the same number."""
    return not array.size or bool((array == array.reshape(-1)[0]).all())


# -- choosing ---------------------------------------------------------------------------------------------------


def _nearest(matched: Mapping[str, list[_Fit]], moments: _AllMoments) -> dict[str, list[Layout]]:
    """The layouts of each tensor, without those whose initializer is another tensor.

    In half precision rounding explains so much that two different gains may both fit one initializer. The initializer
    belongs to the tensor that it fits best.
    """
    near: dict[str, list[bool]] = {}
    homes: dict[str, set[str]] = defaultdict(set)
    for name, fits in matched.items():
        limit = 4 * min(fit.error for fit in fits) + CLOSE * moments.tensor(name).largest
        near[name] = [fit.error <= limit for fit in fits]
        for fit in (fit for fit, close in zip(fits, near[name], strict=True) if close):
            for piece in fit.layout.pieces:
                homes[piece.initializer].add(name)
    return {
        name: [
            fit.layout
            for fit, close in zip(fits, near[name], strict=True)
            if close or not any(homes[piece.initializer] - {name} for piece in fit.layout.pieces)
        ]
        for name, fits in matched.items()
    }


def _ordered(name: str, layouts: list[Layout], shared: Callable[[str], int]) -> list[Layout]:
    """The layouts, the likeliest first.

    We prefer few pieces, then initializers whose name ends as the tensor's does, then those that growth only copies.
    """

    def rank(layout: Layout) -> tuple[int, int, int]:
        first = layout.pieces[0].initializer
        return len(layout.pieces), -_alike(name, first), shared(first)

    return sorted(layouts, key=rank)


def _alike(a: str, b: str) -> int:
    """How many parts at their ends two dotted names have in common."""
    pairs = zip(reversed(a.split(".")), reversed(b.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _in_order(matches: Matches, order: Sequence[str]) -> None:
    """Pair equal tensors in the order in which graph and model use them, where their names have nothing in common."""
    place = {name: number for number, name in enumerate(order)}
    groups: dict[frozenset[str], list[str]] = defaultdict(list)
    for name, layouts in matches.layouts.items():
        candidates = frozenset(layout.pieces[0].initializer for layout in layouts)
        if len(candidates) > 1 and not any(_alike(name, initializer) for initializer in candidates):
            groups[candidates].append(name)
    for names, members in groups.items():
        ranked = sorted(names, key=lambda initializer: place.get(initializer, len(place)))
        if len(ranked) != len(members):
            continue
        for name, wanted in zip(members, ranked, strict=True):
            matches.layouts[name].sort(key=lambda layout, wanted=wanted: layout.pieces[0].initializer != wanted)  # type: ignore[misc]
