"""Tests of the algebra, which does not know ONNX: sizes, dimensions and source maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclone_onnx import SourceMap
from hyperclone_onnx.algebra.dims import ONE, Concat, Dim, Product, Space, Term
from hyperclone_onnx.algebra.shape_values import binary, known, static_values, truncated, unary, where
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.plan.maps import index_axis
from hyperclone_onnx.rules.dimensions import Dimensions
from hyperclone_onnx.rules.grown_terms import GrownTerms
from hyperclone_onnx.rules.op import parse_size

B, S = Size.symbol("batch"), Size.symbol("sequence")


def shape(space: Space, term: Term) -> str:
    """A term as the sizes of its parts."""
    resolved = space.resolve(term)
    if isinstance(resolved, Dim):
        return str(space.size(resolved))
    if resolved == ONE:
        return "1"
    joint, parts = (" ", resolved.factors) if isinstance(resolved, Product) else (" + ", resolved.segments)
    return "(" + joint.join(shape(space, part) for part in parts) + ")"


def split(space: Space, *sizes: int | Size) -> Product:
    return Product(tuple(space.dim(size) for size in sizes))


def joined(space: Space, *sizes: int) -> Concat:
    return Concat(tuple(space.dim(size) for size in sizes))


def growable(space: Space, term: Term) -> list[bool]:
    return [atom.growable for atom in space.atoms(term)]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([768], [12, 64], "(12 64)"),
        ([2, 3, 4], [6, 4], "(2 3 4)"),
        ([4, 6], [2, 12], "(2 2 6)"),
        ([B, 12, S], [B * 12, S], "(batch 12 sequence)"),
        ([B, S, 768], [Size.symbol("?"), 768], "(batch sequence 768)"),
    ],
)
def test_factors_are_matched_and_split(left: list[int | Size], right: list[int | Size], expected: str) -> None:
    space = Space()
    one, other = split(space, *left), split(space, *right)
    space.unify(one, other)
    assert shape(space, one) == shape(space, other) == expected
    assert all(atom.growable for atom in space.atoms(one) if space.static(atom) is not None)


def test_factors_that_fit_nowhere_are_pinned_with_the_reason() -> None:
    space = Space()
    space.place = "Reshape 'r'"
    one, other = split(space, 4, 9), split(space, 6, 6)
    space.unify(one, other)
    assert not any(growable(space, one) + growable(space, other))
    pin = next(space.atoms(one)).pin
    text = "an axis is divided into 4 x 9 and into 6 x 6, which do not divide each other (at Reshape 'r')"
    assert pin is not None and pin.gap and str(pin) == text


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([4, 8], [8, 4], "(4 + 4 + 4)"),
        ([12], [4, 8], "(4 + 8)"),
        ([2, 10], [6, 6], "(2 + 4 + 6)"),
    ],
)
def test_segments_are_cut_at_the_union_of_their_boundaries(left: list[int], right: list[int], expected: str) -> None:
    space = Space()
    one, other = joined(space, *left), joined(space, *right)
    space.unify(one, other)
    assert shape(space, one) == shape(space, other) == expected
    assert all(growable(space, one))


def test_a_cut_falls_on_the_outermost_factor() -> None:
    space = Space()
    packed, parts = split(space, 3, 8), joined(space, 8, 8, 8)
    space.unify(packed, parts)
    assert shape(space, packed) == "((1 + 1 + 1) 8)"
    heads = split(space, 6, 8)
    assert space.segments(heads, [32, 16]) is not None
    assert shape(space, heads) == "((4 + 2) 8)"


def test_a_cut_through_an_inner_factor_is_refused() -> None:
    space = Space()
    assert space.segments(split(space, 6, 8), [20, 28]) is None


def test_a_symbolic_composite_does_not_pin_its_static_part() -> None:
    space = Space()
    folded, heads = space.dim(B * 12), space.dim(12)
    space.match([folded], [space.dim(B), heads])
    assert growable(space, heads) == [True]


def test_a_pin_goes_with_every_binding() -> None:
    space = Space()
    whole, parts = space.dim(12), split(space, 3, 4)
    space.pin(whole, "indexed by values")
    space.unify(whole, parts)
    assert growable(space, parts) == [False, False]


def test_the_chain_names_the_places_in_order() -> None:
    space = Space()
    a, b, c = (space.dim(6) for _ in range(3))
    space.place = "Add 'one'"
    space.unify(a, b)
    space.place = "Mul 'two'"
    space.unify(b, c)
    assert isinstance(a, Dim) and isinstance(c, Dim)
    assert space.chain(a.uid, c.uid) == ["Add 'one'", "Mul 'two'"]


def test_an_axis_of_size_one_cannot_grow() -> None:
    assert Space().dim(1) == ONE


@st.composite
def refinements(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two factorisations of one size, in which each boundary of one divides or is divided by those of the other."""
    factors = draw(st.lists(st.integers(2, 4), min_size=2, max_size=5))

    def grouped() -> list[int]:
        sizes = [factors[0]]
        for factor in factors[1:]:
            if draw(st.booleans()):
                sizes.append(factor)
            else:
                sizes[-1] *= factor
        return sizes

    return grouped(), grouped()


@given(refinements(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_two_descriptions_of_one_axis_grow_alike(pair: tuple[list[int], list[int]], seed: int) -> None:
    space, rng = Space(), np.random.default_rng(seed)
    one, other = split(space, *pair[0]), split(space, *pair[1])
    space.unify(one, other)
    dimensions = Dimensions(None, space)  # type: ignore[arg-type]
    maps = {}
    for atom in dict.fromkeys(space.atoms(one)):
        size = space.static(atom) or 0
        extra = rng.integers(0, size, int(rng.integers(0, 3)))
        index = rng.permutation(np.concatenate([np.arange(size), extra]))
        maps[atom] = (f"d{atom.uid}", SourceMap(size, index=tuple(index.tolist())))
    terms = GrownTerms(dimensions.space, maps)
    sources = []
    for term in (one, other):
        factors = terms.factors(term)
        assert factors is not None
        sources.append(index_axis([(factor, False) for factor in factors], terms.maps).source)
    np.testing.assert_array_equal(*sources)
    assert math.prod(pair[0]) == sources[0].max() + 1


def test_maps_number_the_repeats() -> None:
    tiled, repeated = SourceMap(3, tile=2), SourceMap(3, repeat=2)
    uneven = SourceMap(3, index=(2, 0, 2, 1, 2))
    assert tiled.indices.tolist() == [0, 1, 2, 0, 1, 2] and tiled.numbers.tolist() == [0, 0, 0, 1, 1, 1]
    assert repeated.indices.tolist() == [0, 0, 1, 1, 2, 2] and repeated.numbers.tolist() == [0, 1, 0, 1, 0, 1]
    assert uneven.counts.tolist() == [3, 1, 3, 1, 3] and uneven.numbers.tolist() == [0, 0, 1, 0, 2]
    assert SourceMap.from_json(3, uneven.to_json()) == uneven


@pytest.mark.parametrize("wrong", [{}, {"tile": 2, "repeat": 2}, {"tile": 0}, {"index": (0, 1)}])
def test_maps_that_are_none(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        SourceMap(3, **wrong)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(-3, 3), st.sampled_from(["", "batch", "sequence"])), max_size=4), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_sizes_compute_as_their_values_do(terms: list[tuple[int, str]], data: st.DataObject) -> None:
    values = {"batch": Size.of(3), "sequence": Size.of(5)}
    left = sum((Size.symbol(name) * c if name else Size.of(c) for c, name in terms), start=Size.of(0))
    right = data.draw(st.sampled_from([Size.of(2), B, B * S + 1, S * 3]))
    a, b = (size.substituted(values).static_or(-99) for size in (left, right))
    assert (left + right).substituted(values).static == a + b
    assert (left - right).substituted(values).static == a - b
    assert (left * right).substituted(values).static == a * b
    if len(right.terms) == 1:
        assert (left * right).divided_by(right) == left
    assert left.divided_by(0) is None


def test_declared_sizes_are_parsed() -> None:
    assert parse_size("past + 2*batch") == Size.symbol("past") + B * 2
    assert parse_size("floor(x/2)") == Size.symbol("floor(x/2)")


def test_known_elements_follow_shape_arithmetic() -> None:
    sizes = known([B, 12, None])
    assert binary("Mul", sizes, known([2])).tolist() == [B * 2, Size.of(24), None]
    assert static_values(binary("Equal", sizes[:2], known([-1]))) == [0, 0]
    assert where(known([1, 0, 1]), known([7, 7, 7]), sizes).tolist() == [Size.of(7), Size.of(12), Size.of(7)]
    assert static_values(binary("Div", known([-7]), known([2]))) == [-3]
    assert binary("Div", known([-7]), known([2]), integer=False).tolist() == [None]


S2, ODD = S + 1, Size.symbol("sequence") * 3 + 1


@pytest.mark.parametrize(
    ("op_type", "left", "right", "expected"),
    [
        ("Div", ODD, 2, "floor(3*sequence + 1, 2)"),
        ("Div", 7, 2, "3"),
        ("Div", -7, 2, "-3"),
        ("Mod", ODD, 2, "mod(3*sequence + 1, 2)"),
        ("Max", S, 4, "max(4, sequence)"),
        ("Min", 4, S, "min(4, sequence)"),
        ("Max", S, S2, "sequence + 1"),
        ("Div", -S, 2, "None"),
    ],
)
def test_a_size_that_is_no_polynomial_becomes_a_symbol(
    op_type: str, left: int | Size, right: int | Size, expected: str
) -> None:
    again = [binary(op_type, known(left), known(right)).item() for _ in range(2)]
    assert str(again[0]) == expected
    assert again[0] == again[1]


@pytest.mark.parametrize(("op_type", "expected"), [("Floor", "floor(batch, 2)"), ("Ceil", "ceil(batch, 2)")])
def test_a_quotient_in_floating_point_is_rounded_later(op_type: str, expected: str) -> None:
    quotient = binary("Div", known(B), known(2), integer=False)
    assert not quotient.item().is_whole
    assert str(unary(op_type, quotient).item()) == expected
    assert truncated(quotient).item() == unary("Floor", quotient).item() == binary("Div", known(B), known(2)).item()
    five = binary("Div", known(5), known(2), integer=False)
    assert unary("Ceil", five).item() == Size.of(3)
