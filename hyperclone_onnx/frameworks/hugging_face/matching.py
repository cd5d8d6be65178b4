"""Which initializer is which checkpoint tensor: by content, never by a name alone.

Tensors of equal content, up to a transposition, are found by their moments and then compared element by element; so
are tensors that differ by a constant that was added (a gain stored less one) or multiplied (a folded scale). A tensor
that is a part of another is found by the norms of its lines. Names only choose among candidates of equal content.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperclone_onnx.frameworks.hugging_face.layout import Layout, Piece, squeezed
from hyperclone_onnx.frameworks.hugging_face.sources import Source

Array = npt.NDArray[Any]

OFFSETS = (1.0, -1.0)
"""Constants that models add to a stored gain."""

LOOSE = 1e-4
"""How near two moments must be, relative to the largest element, for the tensors to be compared."""


@dataclass
class Matches:
    """For each checkpoint tensor every layout that fits its content, the likeliest first."""

    layouts: dict[str, list[Layout]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    """Initializers that are no checkpoint tensor, nor a part of one."""


@dataclass(frozen=True)
class _Moments:
    size: int
    mean: float
    power: float
    largest: float


def match(
    sources: Mapping[str, Source],
    tensors: Mapping[str, Array],
    order: Sequence[str],
    shared: Callable[[str], int] = lambda _: 1,
) -> Matches:
    """Match checkpoint tensors with initializers.

    Args:
        sources: the initializers as the source has them.
        tensors: the checkpoint's tensors, in the model's order.
        order: the initializers' names, in the order in which the graph uses them.
        shared: by how many an initializer's repeats are divided. Of equal tensors the one that is only copied comes
            first: a table that is looked up cannot be a divided one.
    """
    found: dict[str, list[Layout]] = defaultdict(list)
    _match_whole(sources, tensors, found, ((1.0, 0.0),))
    used = {piece.initializer for each in found.values() for layout in each for piece in layout.pieces}
    rest = {name: array for name, array in tensors.items() if name not in found}
    free = {name: source for name, source in sources.items() if name not in used}
    _match_whole(free, rest, found, tuple((1.0, offset) for offset in OFFSETS))
    _match_scaled(free, rest, found)
    rest = {name: array for name, array in rest.items() if name not in found}
    _match_parts(sources, rest, found)
    rest = {name: array for name, array in rest.items() if name not in found}
    _match_joined(free, rest, found)
    result = Matches({name: _ordered(name, found[name], shared) for name in tensors if name in found})
    _in_order(result, order)
    used = {piece.initializer for each in result.layouts.values() for layout in each for piece in layout.pieces}
    result.unused = [name for name in sources if name not in used]
    return result


# -- whole tensors ----------------------------------------------------------------------------------------------


def _match_whole(
    sources: Mapping[str, Source],
    tensors: Mapping[str, Array],
    found: dict[str, list[Layout]],
    affine: Sequence[tuple[float, float]],
) -> None:
    by_size: dict[int, list[tuple[str, _Moments]]] = defaultdict(list)
    for name, source in sources.items():
        by_size[source.array.size].append((name, _moments(source.array)))
    for name, array in tensors.items():
        moments = _moments(array)
        for initializer, theirs in by_size.get(array.size, ()):
            for scale, offset in affine:
                if abs(theirs.mean * scale + offset - moments.mean) > LOOSE * (moments.largest + abs(offset)):
                    continue
                if not offset and abs(theirs.power - moments.power) > LOOSE * (moments.power + 1e-30):
                    continue
                source = sources[initializer]
                layout = _whole(source, initializer, array, scale, offset)
                if layout is not None:
                    found[name].append(layout)
                    break


def _match_scaled(sources: Mapping[str, Source], tensors: Mapping[str, Array], found: dict[str, list[Layout]]) -> None:
    """A scale that the exporter folded into a weight."""
    for name, array in tensors.items():
        if name in found or array.size < 2:
            continue
        moments = _moments(array)
        for initializer, source in sources.items():
            if source.array.size != array.size or not moments.power:
                continue
            theirs = _moments(source.array)
            scale = float(np.sqrt(moments.power / theirs.power)) if theirs.power else 0.0
            if not scale or abs(theirs.mean * scale - moments.mean) > LOOSE * moments.largest:
                continue
            layout = _whole(source, initializer, array, scale, 0.0)
            if layout is not None:
                found[name].append(layout)


def _moments(array: Array) -> _Moments:
    flat = array.reshape(-1)
    if not flat.size:
        return _Moments(0, 0.0, 0.0, 0.0)
    mean = float(flat.mean(dtype=np.float64))
    power = float(np.vdot(flat, flat)) if flat.dtype == np.float64 else _power(flat)
    return _Moments(flat.size, mean, power, max(abs(float(flat.max())), abs(float(flat.min()))))


def _power(flat: Array) -> float:
    total = 0.0
    for start in range(0, flat.size, 1 << 20):
        part = flat[start : start + (1 << 20)].astype(np.float64)
        total += float(np.dot(part, part))
    return total


def _whole(source: Source, initializer: str, array: Array, scale: float, offset: float) -> Layout | None:
    """The order of the initializer's axes in which it is the checkpoint's tensor, some of them perhaps merged."""
    theirs, ours = squeezed(source.array), squeezed(array)
    if not ours.ndim <= theirs.ndim <= 5:
        return None
    for permutation in itertools.permutations(range(theirs.ndim)):
        shape = [theirs.shape[axis] for axis in permutation]
        merged = _merging(shape, ours.shape)
        if merged is None:
            continue
        if _equal(theirs.transpose(permutation).reshape(ours.shape), ours, source.tolerance, scale, offset):
            piece = Piece(initializer, permutation, None, scale, offset)
            return Layout((piece,), array.shape, 0, merged if max(merged, default=1) > 1 else None)
    return None


def _merging(fine: Sequence[int], coarse: Sequence[int]) -> tuple[int, ...] | None:
    """How many axes of the fine shape, in order, make each axis of the coarse one."""
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


def _equal(theirs: Array, ours: Array, tolerance: float, scale: float = 1.0, offset: float = 0.0) -> bool:
    """Whether `theirs * scale + offset` is `ours`, to rounding; a corner is looked at before the whole."""
    exact = scale == 1.0 and not offset
    slack = tolerance * abs(scale) + (
        0.0 if exact else 1e-6 * float(np.abs(ours).max(initial=0.0)) + 2e-7 * abs(offset)
    )
    corner = tuple(slice(0, 4) for _ in ours.shape)
    for window in (corner, ...):
        a, b = np.asarray(theirs[window]), np.asarray(ours[window])
        if not exact:
            a = a * np.float64(scale) + offset
        if not (np.abs(a - b) <= slack).all():
            return False
    return True


# -- parts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A small tensor is `big[start:stop]` along `axis` of the big one, with the small one's axes permuted."""

    axis: int
    start: int
    permutation: tuple[int, ...]
    """Of the small tensor's axes: its order in the big one."""


def _match_parts(sources: Mapping[str, Source], tensors: Mapping[str, Array], found: dict[str, list[Layout]]) -> None:
    """Checkpoint tensors that are a part of one initializer: queries, keys and values that were joined."""
    bigger = _Lines({name: squeezed(each.array) for name, each in sources.items() if not constant(each.array)})
    for name, array in tensors.items():
        ours = squeezed(array)
        if constant(ours):  # of one number any tensor of that number is made
            continue
        for initializer, part in bigger.holding(ours, lambda each: sources[each].tolerance):
            inverse = tuple(int(axis) for axis in np.argsort(part.permutation))
            window = (part.axis, part.start, part.start + ours.shape[part.permutation[part.axis]])
            found[name].append(Layout((Piece(initializer, inverse, window),), array.shape))


def _match_joined(sources: Mapping[str, Source], tensors: Mapping[str, Array], found: dict[str, list[Layout]]) -> None:
    """Checkpoint tensors that an exporter cut into several initializers."""
    bigger = _Lines({name: squeezed(array) for name, array in tensors.items() if not constant(array)})
    parts: dict[tuple[str, int], list[tuple[int, int, Piece]]] = defaultdict(list)
    for initializer, source in sources.items():
        theirs = squeezed(source.array)
        if constant(theirs):
            continue
        for name, part in bigger.holding(theirs, lambda _, source=source: source.tolerance):
            stop = part.start + theirs.shape[part.permutation[part.axis]]
            parts[name, part.axis].append((part.start, stop, Piece(initializer, part.permutation)))
    for (name, axis), pieces in parts.items():
        reached, chosen = 0, []
        for start, stop, piece in sorted(pieces, key=lambda each: each[:2]):
            if start == reached:
                chosen.append(piece)
                reached = stop
        if reached == squeezed(tensors[name]).shape[axis]:
            found[name].append(Layout(tuple(chosen), tensors[name].shape, axis))


class _Lines:
    """Tensors by the norms of their lines: where another tensor might lie in one."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays
        self.norms: dict[tuple[str, int], Array] = {}
        self.by_shape: dict[tuple[int, ...], list[tuple[str, int]]] = defaultdict(list)
        for name, array in arrays.items():
            for axis in range(array.ndim):
                across = tuple(size for other, size in enumerate(array.shape) if other != axis)
                self.by_shape[tuple(sorted(across))].append((name, axis))

    def _norms(self, name: str, axis: int) -> Array:
        if (name, axis) not in self.norms:
            self.norms[name, axis] = _norms(self.arrays[name], axis)
        return self.norms[name, axis]

    def holding(self, small: Array, tolerance: Any) -> Iterable[tuple[str, _Part]]:
        """The tensors of which `small` is a proper part along one axis, and where it lies."""
        for cut in range(small.ndim):
            across = tuple(sorted(size for axis, size in enumerate(small.shape) if axis != cut))
            own = _norms(small, cut)
            for name, axis in self.by_shape.get(across, ()):
                big = self.arrays[name]
                if big.shape[axis] <= small.shape[cut] or big.ndim != small.ndim:
                    continue
                part = self._place(small, cut, own, name, axis, tolerance(name))
                if part is not None:
                    yield name, part

    def _place(self, small: Array, cut: int, own: Array, name: str, axis: int, tolerance: float) -> _Part | None:
        big, norms = self.arrays[name], self._norms(name, axis)
        slack = LOOSE * (float(own.max(initial=0.0)) + 1e-30)
        starts = np.flatnonzero(np.abs(norms[: len(norms) - len(own) + 1] - own[0]) <= slack)
        for start in starts.tolist():
            if not (np.abs(norms[start : start + len(own)] - own) <= slack).all():
                continue
            others = [other for other in range(small.ndim) if other != cut]
            for order in itertools.permutations(others):
                permutation = (*order[:axis], cut, *order[axis:])
                window = (slice(None),) * axis + (slice(start, start + len(own)),)
                there = big[window]
                if small.transpose(permutation).shape == there.shape and _equal(
                    small.transpose(permutation), there, tolerance
                ):
                    return _Part(axis, int(start), permutation)
        return None


def _norms(array: Array, axis: int) -> Array:
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64)))


def constant(array: Array) -> bool:
    """Whether a tensor is one number all over."""
    return not array.size or bool((array == array.reshape(-1)[0]).all())


# -- choosing ---------------------------------------------------------------------------------------------------


def _ordered(name: str, layouts: list[Layout], shared: Callable[[str], int]) -> list[Layout]:
    """The likeliest first: few pieces, then the name that ends alike, then what is only copied."""

    def rank(each: Layout) -> tuple[int, int, int]:
        first = each.pieces[0].initializer
        return len(each.pieces), -_alike(name, first), shared(first)

    return sorted(layouts, key=rank)


def _alike(a: str, b: str) -> int:
    """How many parts two dotted names share at their ends."""
    pairs = zip(reversed(a.split(".")), reversed(b.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _in_order(matches: Matches, order: Sequence[str]) -> None:
    """Where names tell nothing, equal tensors are matched in the order in which both sides use them."""
    place = {name: number for number, name in enumerate(order)}
    groups: dict[frozenset[str], list[str]] = defaultdict(list)
    for name, layouts in matches.layouts.items():
        candidates = frozenset(each.pieces[0].initializer for each in layouts)
        if len(candidates) > 1 and not any(_alike(name, each) for each in candidates):
            groups[candidates].append(name)
    for names, members in groups.items():
        ranked = sorted(names, key=lambda each: place.get(each, len(place)))
        if len(ranked) != len(members):
            continue
        for name, wanted in zip(members, ranked, strict=True):
            matches.layouts[name].sort(key=lambda each, wanted=wanted: each.pieces[0].initializer != wanted)  # type: ignore[misc]
