"""Sizes as people call them: query heads, key/value heads, the size of a head, the width of the residual stream.

A dimension is what the graph treats as one axis. A size that people name may be several of them: the query heads of
grouped attention are (key/value heads, group), and a rotary head is cut into two halves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from hyperclone_onnx.algebra.dims import Concat, Dim, Product, Space, Term
from hyperclone_onnx.analysis.roles import NamedDim, head_batches
from hyperclone_onnx.rules.dimensions import Dimensions, Fact

WIDTH_ROLES = ("hidden", "ffn", "width")

SIZE_ROLES = ("hidden", "ffn", "heads", "kv_heads", "group", "head_dim", "width")
"""The roles that a size can be requested for."""

WIDTHS = (Fact.CONTRACTED_WITH_WEIGHT, Fact.WEIGHT_OUTPUT, Fact.NORMALISED, Fact.EMBEDDING, Fact.BATCHED)
"""The facts that hold for an axis as a whole, however many factors it has."""

Width = tuple[Dim, ...]
"""The factors of a width, outermost first."""


@dataclass(frozen=True)
class Quantity:
    """A size as people call it.

    Args:
        role: one of `SIZE_ROLES`.
        name: the name of its dimension; of several dimensions, the way in which they make it up.
        segments: the products of dimensions that add up to the size.
    """

    role: str
    name: str
    segments: tuple[Width, ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The dimensions, each once."""
        return tuple(dict.fromkeys(itertools.chain(*self.segments)))

    @property
    def size(self) -> int:
        """The size in the source."""
        return self.size_with({})

    def size_with(self, sizes: Mapping[Dim, int]) -> int:
        """The size if some dimensions had other sizes."""
        return sum(math.prod(sizes.get(dim, dim.size.static_or(0)) for dim in segment) for segment in self.segments)

    def exact_size_with(self, sizes: Mapping[Dim, Fraction]) -> Fraction:
        """The same for sizes that are no whole numbers."""
        return sum(
            (
                math.prod((sizes.get(dim, Fraction(dim.size.static_or(0))) for dim in segment), start=Fraction(1))
                for segment in self.segments
            ),
            start=Fraction(0),
        )


@dataclass(frozen=True)
class Heads:
    """The heads of one attention: queries in groups, one group for each key/value head.

    Args:
        kv_heads: the factors of the key/value heads. In an attention with one key/value head, or with as many as query
            heads, these are the factors of the query heads.
        group: the factors of the queries of one key/value head, if there are several.
    """

    kv_heads: Width
    group: Width


def attentions(dimensions: Dimensions, named: Sequence[NamedDim]) -> list[Heads]:
    """The heads of every attention, each combination of dimensions once."""
    roles = {dimension.dim: dimension.role for dimension in named}
    heads = (
        Heads(
            tuple(dim for dim in batch if roles[dim] == "heads"), tuple(dim for dim in batch if roles[dim] == "group")
        )
        for batch in head_batches(dimensions)
    )
    return list(dict.fromkeys(both for both in heads if both.kv_heads))


def quantities(dimensions: Dimensions, named: Sequence[NamedDim]) -> list[Quantity]:
    """Every size of a model that people have a name for, by role in the order of `SIZE_ROLES`."""
    names = {dimension.dim: dimension for dimension in named}

    def name(role: str, segments: tuple[Width, ...]) -> str:
        if role == "heads" and len(heads := [dim for dim in segments[0] if names[dim].role == "heads"]) == 1:
            return names[heads[0]].name
        return " + ".join(" ".join(names[dim].called for dim in segment) for segment in segments)

    parts = [*_widths_as_people_count(dimensions, named), *_heads(dimensions, named), *_head_sizes(dimensions, named)]
    return [
        Quantity(role, name(role, segments), segments)
        for wanted in SIZE_ROLES
        for role, segments in dict.fromkeys(parts)
        if role == wanted
    ]


Found = tuple[str, tuple[Width, ...]]
"""The role and the segments of a quantity that has no name yet."""


def _widths_as_people_count(dimensions: Dimensions, named: Sequence[NamedDim]) -> Iterable[Found]:
    """The widths. Where a width is reshaped into several factors, it is one quantity with these factors."""
    roles = {dimension.dim: dimension.role for dimension in named if dimension.role in WIDTH_ROLES}
    widths = [
        tuple(dim for dim in width if dim in roles)
        for kind in WIDTHS
        for term, _ in dimensions.facts[kind]
        for width in widths_of(dimensions.space, term)
    ]
    alone = {width[0] for width in widths if len(width) == 1}
    composite: dict[Dim, Width] = {}
    for width in sorted(widths, key=len):
        for dim in width:
            composite.setdefault(dim, (dim,) if not alone.isdisjoint(width) else width)
    for dim, role in roles.items():
        yield role, (composite.get(dim, (dim,)),)
    if "hidden" not in roles.values():
        yield from _streams_of_heads(dimensions, named)


def _streams_of_heads(dimensions: Dimensions, named: Sequence[NamedDim]) -> Iterable[Found]:
    """Residual streams that are heads and their sizes, because no weight lies between the attention and the stream."""
    roles = {dimension.dim: dimension.role for dimension in named}
    for kind in (Fact.NORMALISED, Fact.EMBEDDING):
        for term, _ in dimensions.facts[kind]:
            for width in widths_of(dimensions.space, term):
                if len(width) > 1 and {roles.get(dim) for dim in width} <= {"heads", "group", "head_dim"}:
                    yield "hidden", (width,)


def _heads(dimensions: Dimensions, named: Sequence[NamedDim]) -> Iterable[Found]:
    for heads in attentions(dimensions, named):
        yield "heads", ((*heads.kv_heads, *heads.group),)
        if heads.group:
            yield "kv_heads", (heads.kv_heads,)
            yield "group", (heads.group,)


def _head_sizes(dimensions: Dimensions, named: Sequence[NamedDim]) -> Iterable[Found]:
    """The sizes of heads: what queries and keys are contracted over, and the width of the values."""
    space = dimensions.space
    sizes = [dimension.dim for dimension in named if dimension.role == "head_dim"]
    whole: dict[tuple[Width, ...], None] = {}
    for kind in (Fact.CONTRACTED_WITH_ACTIVATION, Fact.VALUE_AXIS):
        for term, _ in dimensions.facts[kind]:
            segments = segments_of(space, term)
            if segments and set(sizes).issuperset(itertools.chain(*segments)):
                whole.setdefault(segments)
    # The angles of a rotary embedding are made for one half of a head. That half is no head.
    longest: dict[Dim, int] = {}
    for segments in whole:
        for dim in itertools.chain(*segments):
            longest[dim] = max(longest.get(dim, 0), len(segments))
    for segments in whole:
        if any(longest[dim] == len(segments) for dim in itertools.chain(*segments)):
            yield "head_dim", segments
    for dim in sizes:
        if dim not in longest:
            yield "head_dim", ((dim,),)


def segments_of(space: Space, term: Term) -> tuple[Width, ...]:
    """An axis as products that lie side by side. The segments of ``((a b) + c) d`` are ``a b d`` and ``c d``."""
    resolved = space.resolve(term)
    if isinstance(resolved, Dim):
        return ((resolved,),)
    if isinstance(resolved, Concat):
        return tuple(itertools.chain(*(segments_of(space, segment) for segment in resolved.segments)))
    assert isinstance(resolved, Product)
    parts = [segments_of(space, factor) for factor in resolved.factors]
    return tuple(tuple(itertools.chain(*atoms)) for atoms in itertools.product(*parts))


def widths_of(space: Space, term: Term) -> dict[Width, None]:
    """The widths that lie side by side along an axis, as the keys of a dict. Equal widths are one key."""
    return dict.fromkeys(segments_of(space, term))
