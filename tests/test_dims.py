"""Unification: two descriptions of one axis must grow alike, however they are nested."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclone_onnx.algebra.dims import Concat, Dim, Product, Space, Term
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.analysis.roles import NamedDim, explain
from hyperclone_onnx.errors import Refused
from hyperclone_onnx.plan.maps import SourceMap, index_axis
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.rules.grown_terms import GrownTerms

Tree = int | tuple[str, tuple["Tree", ...]]
"""The size of a dimension, or a product ("*") or concatenation ("+") of trees."""


def times(*parts: Tree) -> Tree:
    return "*", parts


def plus(*parts: Tree) -> Tree:
    return "+", parts


def term(space: Space, tree: Tree) -> Term:
    if isinstance(tree, int):
        return space.dim(tree)
    kind, parts = tree
    terms = tuple(term(space, part) for part in parts)
    return Product(terms) if kind == "*" else Concat(terms)


def grown_terms(space: Space, terms: Sequence[Term], seed: int) -> GrownTerms:
    """A random map for every atom that may grow. Tied ones repeat each index in place, all as often."""
    rng = np.random.default_rng(seed)
    space.settle_ties()
    repeats = int(rng.integers(1, 4))
    maps: dict[Dim, tuple[str, SourceMap]] = {}
    for atom in dict.fromkeys(atom for term in terms for atom in space.atoms(term)):
        size = space.static(atom)
        if atom.growable and atom.tied is not None and size:
            maps[atom] = (f"d{atom.uid}", SourceMap(size, repeat=repeats))
        elif atom.growable and size:
            index = rng.permutation([*range(size), *rng.integers(0, size, rng.integers(0, 4))])
            maps[atom] = (f"d{atom.uid}", SourceMap(size, index=tuple(index.tolist())))
    return GrownTerms(space, maps)


def source(terms: GrownTerms, axis: Term) -> list[int]:
    factors = terms.factors(axis)
    assert factors is not None
    return [int(i) for i in index_axis([(factor, False) for factor in factors], terms.maps).source]


def check_alike(space: Space, left: Term, right: Term) -> None:
    for seed in range(3):
        terms = grown_terms(space, [left, right], seed)
        one, other = source(terms, left), source(terms, right)
        assert one == other
        assert set(one) == set(range(space.static(left) or 0))


def growable(space: Space, axis: Term) -> list[bool]:
    return [atom.growable for atom in space.atoms(axis)]


@pytest.mark.parametrize(
    "left, right, grows",
    [
        (768, times(12, 64), True),
        (times(12, 64), times(12, 2, 32), True),
        (times(4, 9), times(6, 6), False),
        (times(2, 4, 9), times(2, 6, 6), None),
        (plus(4, 8), plus(8, 4), True),
        (12, plus(4, 8), True),
        (times(3, 8), plus(8, 8, 8), True),
        (times(3, 8), plus(8, 16), True),
        (times(3, 8), plus(10, 14), None),
        (times(2, plus(3, 5)), times(2, 8), True),
        (times(2, plus(3, 5)), times(4, 4), None),
        (plus(times(2, 3), 6), times(4, 3), True),
        (plus(times(2, 3), times(3, 2)), 12, True),
        (plus(times(2, 3), 6), plus(6, times(3, 2)), True),
    ],
)
def test_two_descriptions(left: Tree, right: Tree, grows: bool | None) -> None:
    space = Space()
    one, other = term(space, left), term(space, right)
    space.unify(one, other)
    grow = growable(space, one) + growable(space, other)
    assert grows is None or (all(grow) if grows else not any(grow))
    check_alike(space, one, other)


@st.composite
def trees(draw: st.DrawFn, size: int, depth: int = 3) -> Tree:
    """A random description of an axis with `size` elements."""
    divisors = [n for n in range(2, size) if size % n == 0]
    kinds = ["dim"] + (["*"] if divisors else []) + (["+"] if size > 2 else [])
    kind = draw(st.sampled_from(kinds)) if depth else "dim"
    if kind == "*":
        outer = draw(st.sampled_from(divisors))
        return times(draw(trees(outer, depth - 1)), draw(trees(size // outer, depth - 1)))
    if kind == "+":
        at = draw(st.integers(1, size - 1))
        return plus(draw(trees(at, depth - 1)), draw(trees(size - at, depth - 1)))
    return size


@given(st.sampled_from([6, 8, 12, 24]), st.data())
@settings(max_examples=160, deadline=None, derandomize=True)
def test_any_two_descriptions_grow_alike(size: int, data: st.DataObject) -> None:
    space = Space()
    many = [term(space, data.draw(trees(size))) for _ in range(3)]
    space.unify(many[0], many[1])
    space.unify(many[1], many[2])
    check_alike(space, many[0], many[1])
    check_alike(space, many[0], many[2])


@given(st.sampled_from([8, 12, 24]), st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_index_spaces_of_several_axes_grow_alike(size: int, data: st.DataObject) -> None:
    """Two sequences of axes that a Reshape relates, with random descriptions."""
    space = Space()
    sides: list[list[Term]] = []
    for _ in range(2):
        rest, axes = size, []
        while rest > 1:
            here = data.draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0]))
            axes.append(term(space, data.draw(trees(here, 2))))
            rest //= here
        sides.append(axes)
    space.match(*sides)
    check_alike(space, Product(tuple(sides[0])), Product(tuple(sides[1])))


@given(st.sampled_from([6, 8, 12]), st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_cut_is_a_cut_of_the_grown_axis(size: int, data: st.DataObject) -> None:
    space = Space()
    whole = term(space, data.draw(trees(size)))
    at = data.draw(st.integers(1, size - 1))
    parts = space.cut(whole, at)
    if parts is None:
        return
    terms = grown_terms(space, [whole], 0)
    low, high = (source(terms, part) for part in parts)
    assert source(terms, whole) == low + [at + i for i in high]
    assert terms.offset(whole, at) == len(low)


def test_an_offset_inside_a_part_is_refused() -> None:
    space = Space()
    whole = term(space, times(3, 4))
    with pytest.raises(Refused, match="not a boundary"):
        grown_terms(space, [whole], 0).offset(whole, 6)


def test_symbolic_sizes_split_and_keep_their_static_part() -> None:
    batch, heads = Size.symbol("batch"), Space()
    folded, parts = heads.dim(batch * 12), (heads.dim(batch), heads.dim(12))
    heads.unify(folded, Product(parts))
    assert growable(heads, parts[1]) == [True] and growable(heads, parts[0]) == [False]
    assert str(heads.size(folded)) == "12*batch"


@pytest.mark.parametrize("pin_first", [False, True])
@pytest.mark.parametrize("pinned", [0, 1])
def test_a_pin_reaches_every_description(pin_first: bool, pinned: int) -> None:
    space = Space()
    both = term(space, 12), term(space, times(3, plus(1, 3)))
    if pin_first:
        space.pin(both[pinned], "indexed by values")
    space.unify(*both)
    if not pin_first:
        space.pin(both[pinned], "indexed by values")
    assert not any(growable(space, both[0]) + growable(space, both[1]))


def test_the_explanation_names_reason_place_and_way() -> None:
    space = Space()
    a, b, c = (space.dim(6) for _ in range(3))
    for place, one, other in (("Add 'one'", a, b), ("Mul 'two'", b, c)):
        space.place = place
        space.unify(one, other)
    space.place = "Gather 'g'"
    space.pin(c, "indexed by values")
    assert isinstance(a, Dim) and isinstance(c, Dim)
    assert space.chain(a.uid, c.uid) == ["Add 'one'", "Mul 'two'"]
    assert space.chain(a.uid, a.uid) == [] == space.chain(a.uid, 99)
    atom = next(space.atoms(a))
    text = explain(Dimensions(None, space), NamedDim(atom, "width", "width").dim)  # type: ignore[arg-type]
    assert text == "indexed by values (at Gather 'g'); reached by way of Add 'one' -> Mul 'two'"


# -- growth in place ---------------------------------------------------------------------------------------


def test_groups_across_joined_parts_are_tied() -> None:
    """Neither can be cut where the other is, but both agree where each index is repeated in place."""
    space = Space()
    first, second, groups, channels = (space.dim(size) for size in (16, 8, 4, 6))
    space.unify(Concat((first, second)), Product((groups, channels)))
    space.settle_ties()
    assert [dim.tied is not None for dim in (first, second, channels)] == [True] * 3  # type: ignore[union-attr]
    assert [dim.growable for dim in (first, second, channels, groups)] == [True] * 3 + [False]  # type: ignore[union-attr]


def test_parts_of_a_tied_dimension_are_tied() -> None:
    space = Space()
    first, second, outer, inner = (space.dim(size) for size in (16, 8, 4, 4))
    space.unify(Concat((first, second)), Product((space.dim(4), space.dim(6))))
    space.unify(first, Product((outer, inner)))
    pieces = space.cut(second, 3)
    assert pieces is not None
    assert [dim.tied is not None for dim in (inner, *pieces)] == [True] * 3  # type: ignore[union-attr]
    assert not outer.growable  # type: ignore[union-attr]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_one_part_that_keeps_its_size_pins_all_tied_dimensions(before: bool) -> None:
    space = Space()
    first, second, groups, channels = (space.dim(size) for size in (16, 8, 4, 6))
    if before:
        space.pin(second, "a reason")
    space.unify(Concat((first, second)), Product((groups, channels)))
    if not before:
        space.pin(second, "a reason")
    space.settle_ties()
    assert not any(dim.growable for dim in (first, second, groups, channels))  # type: ignore[union-attr]


def test_a_part_of_one_index_cannot_be_tied() -> None:
    space = Space()
    first, groups, channels = (space.dim(size) for size in (23, 4, 6))
    space.unify(Concat((first, space.dim(1))), Product((groups, channels)))
    assert not any(dim.growable for dim in (first, groups, channels))  # type: ignore[union-attr]
