"""A shape that a graph computes, with whatever operators, grows right, or is refused with the name of the operator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import build_model, normal

from fuzz.oracle import compare, run_source
from hyperclone_onnx import Refused, analyse, expand, plan_expansion, rewrite
from hyperclone_onnx.algebra import shape_values as known
from hyperclone_onnx.algebra.sizes import Size
from hyperclone_onnx.plan.edits import ResizeVector
from hyperclone_onnx.plan.strategies import Strategy
from hyperclone_onnx.writing import onnx_files as writer

OPERATORS = {
    "Identity": "{y} = Identity ({x})",
    "Add": "{y} = Add ({x}, zeros{n})",
    "BitwiseAnd": "{y} = BitwiseAnd ({x}, minus)",
    "Cast": "{y}f = Cast <to = 1> ({x}) {y} = Cast <to = 7> ({y}f)",
    "Cast to 32 bits": "{y}f = Cast <to = 6> ({x}) {y} = Cast <to = 7> ({y}f)",
    "Clip": "{y} = Clip ({x})",
    "Compress": "{y}c = Equal (ones{n}, ones{n}) {y} = Compress ({x}, {y}c)",
    "CumSum": "{y}r = Unsqueeze ({x}, zero) {y}s = CumSum ({y}r, first) {y} = Squeeze ({y}s, zero)",
    "Div": "{y} = Div ({x}, ones{n})",
    "Expand": "{y} = Expand ({x}, count{n})",
    "Gather": "{y}g = Gather ({x}, turn{n}) {y} = Gather ({y}g, turn{n})",
    "GatherElements": "{y} = GatherElements ({x}, index{n})",
    "GatherND": "{y} = GatherND ({x}, tuples{n})",
    "MatMul": "{y} = MatMul ({x}, eye{n})",
    "Max": "{y} = Max ({x}, minus)",
    "Min": "{y} = Min ({x}, large)",
    "Mul": "{y} = Mul ({x}, ones{n})",
    "Neg": "{y}g = Neg ({x}) {y} = Neg ({y}g)",
    "Pad": "{y} = Pad ({x}, none)",
    "Pow": "{y} = Pow ({x}, ones{n})",
    "ReduceMax": "{y}r = Unsqueeze ({x}, zero) {y} = ReduceMax <keepdims = 0> ({y}r, zero)",
    "ReduceMin": "{y}r = Unsqueeze ({x}, zero) {y} = ReduceMin <keepdims = 0> ({y}r, zero)",
    "ReduceProd": "{y}r = Unsqueeze ({x}, zero) {y} = ReduceProd <keepdims = 0> ({y}r, zero)",
    "ReduceSum": "{y}r = Unsqueeze ({x}, zero) {y} = ReduceSum <keepdims = 0> ({y}r, zero)",
    "ScatterElements": "{y} = ScatterElements (zeros{n}, index{n}, {x})",
    "ScatterND": "{y} = ScatterND (zeros{n}, tuples{n}, {x})",
    "Sequence": "{y}q = SplitToSequence ({x}, unit) {y} = ConcatFromSequence <axis = 0> ({y}q)",
    "Sign": "{y}a = Sign ({x}) {y}b = Abs ({x}) {y} = Mul ({y}a, {y}b)",
    "Slice": "{y}r = Slice ({x}, minus, before, zero, minus) {y} = Slice ({y}r, minus, before, zero, minus)",
    "Sub": "{y} = Sub ({x}, zeros{n})",
    "Tile": "{y} = Tile ({x}, one)",
    "TopK": "{y}v, {y}i = TopK <sorted = 0> ({x}, count{n}) {y}w, {y}j = TopK <largest = 0> ({y}i, count{n}) "
    "{y} = GatherElements ({y}v, {y}j)",
    "Where": "{y}c = Equal (ones{n}, ones{n}) {y} = Where ({y}c, {x}, zeros{n})",
    "Where of a size": "{y}c = Greater ({x}, large) {y} = Where ({y}c, zeros{n}, {x})",
}
"""Operators that leave a vector of sizes {x}, of {n} elements, unchanged in {y}."""

STORED = {
    "first": 0, "unit": 1, "zero": [0], "one": [1], "three": [3], "four": [4], "minus": [-1], "large": [2**62],
    "before": [-(2**62)], "none": [0, 0], "split": [0, 0, 3, 4], "join": [0, 0, 12], "behind": [1, 2],
    "zeros1": [0], "ones1": [1], "index1": [0], "turn1": [0], "tuples1": [[0]], "eye1": [[1]], "count1": [1],
    "zeros3": [0, 0, 0], "ones3": [1, 1, 1], "index3": [0, 1, 2], "turn3": [2, 1, 0], "tuples3": [[0], [1], [2]],
    "eye3": np.eye(3), "count3": [3],
}  # fmt: skip

MERGE = (
    "plain = Concat <axis = 0> (minus, S, four) q4 = Reshape (q, split) qt = Transpose <perm = [0, 2, 1, 3]> (q4) "
    "qm = Reshape (qt, plain) "
)
"""Queries with batch and heads in one axis."""

READERS = {
    "Reshape": (("-1", "B3"), "q4 = Reshape (q, split) qt = Transpose <perm = [0, 2, 1, 3]> (q4) qr = Reshape (qt, t)"),
    "Expand": (("1", "B3"), MERGE + "qr = Expand (qm, t)"),
    "ConstantOfShape": (("B3",), MERGE + "made = ConstantOfShape <value = float[1] {1.0}> (t) qr = Add (qm, made)"),
    "Tile": (("B3",), MERGE + "t1 = Slice (t, zero, one) t3 = Concat <axis = 0> (t1, one, one) made = Tile (bias, t3) "
             "qr = Add (qm, made)"),
    "Range": (("B3",), MERGE + "t0 = Gather (t, first) made = Range (first, t0, unit) f = Cast <to = 1> (made) "
              "f3 = Unsqueeze (f, behind) qr = Add (qm, f3)"),
    "Slice": (("B3",), MERGE + "end = Slice (t, zero, one) qr = Slice (qm, zero, end, zero)"),
}  # fmt: skip
"""Nodes that make or cut an axis of batch * heads by the first element of t; and the meaning of that element."""


NOT_FOLLOWED = {
    "Where of a size",
    *"BitwiseAnd Clip GatherElements GatherND MatMul Min Pad Pow ScatterElements ScatterND Sequence Sign Tile".split(),
    "TopK",
}
"""What these make may be any number: an axis that is sliced there keeps its size. Compress hides even the length of a
vector; and a Range is repeated by stored indices, which have no room for a batch."""


def model_of(reader: str, says: str, operator: str, whole: bool) -> onnx.ModelProto:
    """Attention whose merged axis of batch and heads gets its size from a vector that passed through an operator."""
    first = {"-1": "A = Identity (minus)", "1": "A = Identity (one)", "B3": "A = Mul (B, three)"}[says]
    through = OPERATORS[operator]
    if whole:
        vector = f"s = Concat <axis = 0> (A, S, four) {through.format(x='s', y='t', n=3)}"
    else:
        vector = f"{through.format(x='A', y='t0x', n=1)} t = Concat <axis = 0> (t0x, S, four)"
    graph = f"""g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {{
        h = Gather (e, ids) n = LayerNormalization (h, gain) sh = Shape (n) B = Gather (sh, zero) S = Gather (sh, one)
        {first} {vector} q = MatMul (n, wq) k = MatMul (n, wk) v = MatMul (n, wv) {READERS[reader][1]}
        merged = Concat <axis = 0> (minus, S, four)
        k4 = Reshape (k, split) kt = Transpose <perm = [0, 2, 1, 3]> (k4) km = Reshape (kt, merged)
        v4 = Reshape (v, split) vt = Transpose <perm = [0, 2, 1, 3]> (v4) vm = Reshape (vt, merged)
        kx = Transpose <perm = [0, 2, 1]> (km) scores = MatMul (qr, kx) p = Softmax (scores) w = MatMul (p, vm)
        back = Concat <axis = 0> (B, three, S, four) w4 = Reshape (w, back) wt = Transpose <perm = [0, 2, 1, 3]> (w4)
        y = Reshape (wt, join) logits = MatMul (y, wo) }}"""
    shapes = {"e": (31, 12), "gain": (12,), "wq": (12, 12), "wk": (12, 12), "wv": (12, 12), "wo": (12, 31)}
    weights = normal(3, shapes | {"bias": (1, 1, 4)}) | {n: np.array(v, np.int64) for n, v in STORED.items()}
    model = build_model(graph, weights)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
        model.graph.initializer.remove(tensor)
    return model


def grown(model: onnx.ModelProto, folder: Path, factor: int = 3) -> str:
    """What became of a model: "equal", or why it was refused.

    Raises:
        AssertionError: it grew into something else.
    """
    small, big = folder / "small.onnx", folder / "big.onnx"
    onnx.save(model, small)
    ran = run_source(small, 0)
    try:
        expand(small, big, factor, strategy=Strategy("symmetric"), check=False)
    except Refused as problem:
        assert not big.exists()
        return str(problem)
    assert compare(big, ran) == ""
    return "equal"


CASES = [
    (reader, says, operator) for reader, (firsts, _) in READERS.items() for says in firsts for operator in OPERATORS
]


@pytest.mark.parametrize(
    ("reader", "says", "operator"),
    [
        pytest.param(*case, marks=pytest.mark.slow if (index // len(OPERATORS) + index) % 2 else [])
        for index, case in enumerate(CASES)
    ],
)
def test_a_size_through_an_operator(reader: str, says: str, operator: str, tmp_path: Path) -> None:
    """For any operator on a vector of sizes, the model grows and computes the same, or the refusal names a node."""
    model = model_of(reader, says, operator, whole=False)
    end = grown(model, tmp_path)
    refused = operator == "Compress" or reader == "Range" or (reader == "Slice" and operator in NOT_FOLLOWED)
    assert end == "equal" or (refused and named(end, model)), end


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("reader", ["Reshape", "Expand"])
def test_a_vector_of_sizes_through_an_operator(reader: str, operator: str, tmp_path: Path) -> None:
    model = model_of(reader, READERS[reader][0][0], operator, whole=True)
    end = grown(model, tmp_path)
    assert end == "equal" or named(end, model), end


def named(refusal: str, model: onnx.ModelProto) -> bool:
    """Whether a refusal is one line that names a node of the model by its operator."""
    return "\n" not in refusal and any(f"{node.op_type} '" in refusal for node in model.graph.node)


@pytest.mark.parametrize(("reader", "says"), [("Reshape", "-1"), ("Expand", "1")])
def test_an_element_that_is_no_size_stays(reader: str, says: str, tmp_path: Path) -> None:
    """A size that cannot be followed may be -1 when the model runs. A plan that multiplies it would break the model."""
    small, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(model_of(reader, says, "Pow", whole=False), small)
    analysis = analyse(small)
    plan = plan_expansion(analysis, 3, strategy=Strategy("symmetric"))
    kept = [edit for edit in plan.edits if isinstance(edit, ResizeVector) and edit.keep is not None]
    assert [edit.keep for edit in kept] == [int(says)]
    assert type(plan).loads(plan.dumps()) == plan
    blind = replace(plan, edits=tuple(replace(e, keep=None) if e in kept else e for e in plan.edits))
    for chosen, right in ((plan, True), (blind, False)):
        writer.save(rewrite(analysis.model, chosen), big, external=False)
        assert (compare(big, run_source(small, 0)) == "") == right


# -- sizes that can be followed ---------------------------------------------------------------------------

NUMBERS = [np.arange(1, 13).reshape(2, 3, 2), np.arange(3), np.array([[2, 3]]), np.arange(4).reshape(4, 1)]


@pytest.mark.parametrize("array", NUMBERS, ids=lambda array: str(array.shape))
def test_sums_of_known_elements_are_numpys(array: np.ndarray) -> None:
    functions = {"ReduceSum": np.sum, "ReduceProd": np.prod, "ReduceMax": np.max, "ReduceMin": np.min}
    for axes in [[], *([axis] for axis in range(array.ndim)), list(range(array.ndim))]:
        for name, function in functions.items():
            result = known.folded(name, known.known(array), axes)
            assert result is not None and np.array_equal(result, known.known(function(array, axis=tuple(axes)))), (
                name,
                axes,
            )
    for axis in range(array.ndim):
        forth, back = np.cumsum(array, axis), np.flip(np.cumsum(np.flip(array, axis), axis), axis)
        for expected, reverse in ((forth, False), (back, True)):
            for exclusive in (False, True):
                result = known.accumulated(known.known(array), axis, exclusive, reverse)
                assert np.array_equal(result, known.known(expected - exclusive * array))


def test_sums_with_an_unknown_element_are_unknown() -> None:
    batch = Size.symbol("batch")
    assert known.folded("ReduceProd", known.known([batch, 3]), [0]) == known.known(batch * 3)
    assert known.folded("ReduceProd", known.known([batch, None]), [0]) == known.known(None)
    assert known.folded("ReduceMax", known.known(np.zeros((0, 2))), [0]) is None
    assert list(known.accumulated(known.known([1, None, 2]), 0, True, False)) == [Size.of(0), Size.of(1), None]


def test_a_shape_of_which_one_size_is_replaced(tmp_path: Path) -> None:
    """The exporter of ``index_copy`` computes the shape of its indices so."""
    graph = """g (float[batch, 3, 16, 4] cache, float[5] rows) => (int64[4] shape) {
        whole = Shape (cache)
        count = Shape (rows)
        shape = ScatterElements <axis = 0> (whole, place, count)
    }"""
    onnx.save(build_model(graph, {"place": np.asarray([2])}), tmp_path / "model.onnx")
    dimensions = analyse(tmp_path / "model.onnx").dimensions
    shape = dimensions.known[dimensions.model.graph.outputs[0]]
    assert list(map(str, shape)) == ["batch", "3", "5", "4"]


LENGTHS = {
    "the last of an axis that may be shorter": ("x = Slice (v, last, far, unit)", [None, None, 8]),
    "backwards": ("x = Slice (v, minus, before, two, minus)", [None, None, 8]),
    "every second, backwards": ("x = Slice (v, minus, before, two, twice)", [None, None, 4]),
    "resized to known sizes": ("f = Resize (i, , , sizes) x = Squeeze (f, zero)", [1, 7, 9]),
    "resized by known scales": ("f = Resize (i, , scales) x = Squeeze (f, zero)", [None, None, 12]),
    "a stored fraction that is rounded": (
        "c = Ceil (half) w = Mul (c, five) n = Cast <to = 7> (w) u = Unsqueeze (n, zero)"
        " t = Concat <axis = 0> (unit, unit, u) x = Expand (narrow, t)",
        [1, 1, 5],
    ),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_that_follow_from_constants(case: str, tmp_path: Path) -> None:
    nodes, expected = LENGTHS[case]
    graph = f"""g (float[batch, length, 8] v) => (float[n, m, k] x) {{ i = Unsqueeze (v, zero)
        narrow = ReduceMax (v) {nodes} }}"""
    stored = {name: np.asarray(STORED[name]) for name in ("before", "minus", "unit", "zero")}
    stored |= {"unit": np.asarray([1]), "far": np.asarray([2**62]), "last": np.asarray([-512]), "two": np.asarray([2])}
    stored |= {"twice": np.asarray([-2]), "sizes": np.asarray([1, 1, 7, 9]), "half": np.asarray(0.5, np.float32)}
    stored |= {"five": np.asarray(5, np.float32), "scales": np.asarray([1, 1, 1.5, 1.5], np.float32)}
    onnx.save(build_model(graph, stored), tmp_path / "model.onnx")
    dimensions = analyse(tmp_path / "model.onnx").dimensions
    axes = dimensions.axes[dimensions.model.graph.outputs[0]]
    assert axes is not None
    assert [dimensions.space.static(axis) for axis in axes] == expected
