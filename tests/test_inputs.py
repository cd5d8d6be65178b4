"""Inputs are generated for models that need particular sizes and values, and the user's own inputs are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import ROOT, Command, build_model, names_in, normal, perceptron
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from hyperclone_onnx import BadRequest, Refused, analyse, expand, validate_files
from hyperclone_onnx.algebra.evaluation import evaluate, parse, variables_of
from hyperclone_onnx.algebra.sizes import Size, function
from hyperclone_onnx.validation.inputs import search
from hyperclone_onnx.validation.inputs.equations import Contradiction, equations_of
from hyperclone_onnx.validation.inputs.given import wishes_of
from hyperclone_onnx.validation.inputs.search import NoInputs, Wishes, find_inputs
from hyperclone_onnx.validation.inputs.uses import uses_of
from hyperclone_onnx.validation.sessions import Runner, runtime_message

Array = np.ndarray[Any, Any]

# -- expressions ------------------------------------------------------------------------------------------

EXPRESSIONS = {
    "floor(width, 2)": 3,
    "floor(height*width, 4)": 8,
    "ceil(width, 2)": 4,
    "height + 1": 6,
    "height - 1": 4,
    "(width//2)": 3,
    "2*(width//4)": 2,
    "width / 7": 1,
    "Max(1, height)": 5,
    "min(height, width) % 3": 2,
    "-1*height + width": 2,
    "=width=7": 1,
    "-height": -5,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_name_that_is_an_expression_has_its_value(text: str) -> None:
    assert evaluate(Size.symbol(text), {"height": 5, "width": 7}) == EXPRESSIONS[text]
    assert variables_of(text) <= {"height", "width"}
    assert evaluate(Size.symbol(text), {}) is None


@pytest.mark.parametrize("text", ["batch", "?12", "unk__3", "a b", "f(x)", "floor(x", "x +", "floor(1, 2, 3)", "x ! y"])
def test_a_name_that_is_none_stands_for_itself(text: str) -> None:
    assert parse(text) is None and variables_of(text) == {text}
    assert evaluate(Size.symbol(text), {text: 3}) == 3


def test_nothing_is_divided_by_zero() -> None:
    assert evaluate(Size.symbol("floor(x, y)"), {"x": 3, "y": 0}) is None


@given(st.integers(0, 500), st.integers(1, 50), st.integers(-5, 5), st.integers(-20, 20))
def test_sizes_are_computed_as_integers_are(x: int, by: int, times: int, more: int) -> None:
    quotient = function("floor", Size.symbol("x"), Size.of(by))
    assert evaluate(quotient * times + more, {"x": x}) == x // by * times + more


# -- models that take particular sizes and values ---------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A graph, its stored tensors, and conditions on its inputs."""

    graph: str
    right: Callable[[Mapping[str, Array]], bool] = lambda feeds: True
    """A condition that every accepted input set must fulfil."""
    some: Callable[[Mapping[str, Array]], bool] = lambda feeds: True
    """A condition that at least one accepted input set must fulfil."""
    weights: Mapping[str, Array] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    """Other names for sizes, where the syntax of the graph does not allow them."""
    sets: int = 3


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


W = normal(0, {"w": (4, 4)})
CONV = {"k": np.ones((1, 1, 10), np.float32), "l": np.ones((1, 1, 3), np.float32)}

MODELS: dict[str, Model] = {
    "names that must agree": Model(
        "g (float[b, s1, 4] x, float[batch, s2, 4] y) => (float[n, m, 4] z) { z = Concat <axis = 2> (x, y) }",
        lambda feeds: feeds["x"].shape == feeds["y"].shape,
    ),
    "a mask as wide as cache and prompt": Model(
        """g (float[b, new, 4] x, float[b, past, 4] k, float[b, past, 4] v, float[b, all] mask)
             => (float[b, n, m] z) {
            keys = Concat <axis = 1> (k, x)
            values = Concat <axis = 1> (v, x)
            sum = Add (keys, values)
            wide = Unsqueeze (mask, two)
            z = Mul (sum, wide)
        }""",
        lambda feeds: feeds["mask"].shape[1] == feeds["x"].shape[1] + feeds["k"].shape[1],
        lambda feeds: feeds["k"].shape[1] == 0 and feeds["x"].shape[1] > 1,
        {"two": ints(2)},
    ),
    "arithmetic in a name": Model(
        "g (float[b, past] k, float[b, more] mask, float[b, new] x) => (float[b, n] z) {"
        " all = Concat <axis = 1> (k, x) z = Mul (all, mask) }",
        lambda feeds: feeds["x"].shape[1] == 1,
        names={"more": "past + 1"},
    ),
    "one name with two meanings": Model(
        "g (float[n, 3] x, float[n, 3] y) => (float[a, 3] z) { twice = Concat <axis = 0> (x, x) z = Add (twice, y) }",
        lambda feeds: len(feeds["y"]) in (2 * len(feeds["x"]), 1),
        lambda feeds: len(feeds["y"]) > 1,
    ),
    "no rank": Model(
        "g (float x, float[b, 4] y) => (float[b, 4] z) { z = Add (x, y) }",
        weights={},
    ),
    "no names": Model(
        "g (float[?, ?, 4] x, float[?, ?, 4] y) => (float[?, ?, 4] z) { z = Concat <axis = 2> (x, y) }",
        lambda feeds: feeds["x"].shape == feeds["y"].shape,
    ),
    "a mask of scores that are broadcast": Model(
        "g (float[b, s, 4] x, float[q, k] mask) => (float[b, s, t] z) {"
        " t = Transpose <perm = [0, 2, 1]> (x) scores = MatMul (x, t) m = Add (scores, mask) z = Softmax (m) }",
        lambda feeds: feeds["mask"].shape == (feeds["x"].shape[1],) * 2,
    ),
    "windows that divide the sides": Model(
        """g (float[b, 1, h, w] x) => (float[n, m] z) {
            s = Shape (x)
            high = Gather (s, two)
            q = Div (high, seven)
            first = Slice (s, zero, two)
            last = Slice (s, three, four)
            target = Concat <axis = 0> (first, q, seven, last)
            r = Reshape (x, target)
            z = ReduceSum (r, axes)
        }""",
        lambda feeds: feeds["x"].shape[2] % 7 == 0 and feeds["x"].size > 0,
        weights={
            name: ints(i) for name, i in zip("zero two three four seven axes".split(), (0, 2, 3, 4, 7, -1), strict=True)
        },
    ),
    "windows longer than sentences": Model(
        "g (float[b, 1, t] x) => (float[b, 1, n] z) {"
        " y = Conv <strides = [5]> (x, k) z = Conv <strides = [2]> (y, l) }",
        lambda feeds: feeds["x"].shape[2] >= 20,
        weights=CONV,
    ),
    "a reflecting pad": Model(
        'g (float[b, t] x) => (float[b, n] z) { z = Pad <mode = "reflect"> (x, pads) }',
        lambda feeds: feeds["x"].shape[1] > 30,
        weights={"pads": ints(0, 30, 0, 30)},
    ),
    "a slice to the end": Model(
        "g (float[b, s] x, float[b, s] y) => (float[b, n] z) { t = Slice (x, zero, end, one) z = Add (t, y) }",
        lambda feeds: feeds["x"].shape[1] < 100,
        weights={"zero": ints(0), "one": ints(1), "end": ints(1_000_000_000)},
    ),
    "indices within a table, shifted": Model(
        "g (int64[b, s] ids) => (float[b, s, 4] z) { two = Constant <value = int64 {2}> ()"
        " p = Add (ids, two) z = Gather (table, p) }",
        lambda feeds: feeds["ids"].min() >= 0 and feeds["ids"].max() <= 5,
        weights={"table": np.ones((8, 4), np.float32)},
    ),
    "fields that share one table": Model(
        "g (int64[b, 3] fields) => (float[b, 3, 4] z) { rows = Add (fields, first) z = Gather (table, rows) }",
        lambda feeds: feeds["fields"].min() >= 0 and feeds["fields"].max() < 10,
        weights={"first": ints(0, 4, 20), "table": np.ones((30, 4), np.float32)},
    ),
    "positions behind a cache": Model(
        """g (float[b, s, 4] x, float[b, past, 4] k, float[b, past, 4] v, int64[b, s] position_ids)
             => (float[b, n, 4] z) {
            e = Gather (table, position_ids)
            y = Add (x, e)
            c = Add (k, v)
            z = Concat <axis = 1> (c, y)
        }""",
        lambda feeds: feeds["position_ids"].min(initial=0) in (0, feeds["k"].shape[1]),
        lambda feeds: feeds["k"].shape[1] > 0 and feeds["position_ids"][0, 0] == feeds["k"].shape[1],
        weights={"table": np.ones((50, 4), np.float32)},
    ),
    "a mask that hides where it is true": Model(
        """g (float[b, s] x, bool[b, s] hidden) => (float[b, s] z) {
            low = Where (hidden, inf, x)
            z = Softmax (low)
        }""",
        lambda feeds: not feeds["hidden"].all(),
        weights={"inf": np.array(-np.inf, np.float32)},
    ),
    "a logarithm": Model(
        "g (float[b, s] x) => (float[b, s] z) { z = Log (x) }",
        lambda feeds: bool((feeds["x"] > 0).all()),
    ),
    "a rate that is compared": Model(
        """g (float[b, s] x, int64[1] rate) => (float[b, s] z) {
            sixteen = Constant <value = int64 {16000}> ()
            same = Equal (rate, sixteen)
            z = If (same) <
                then_branch = yes () => (float[b, s] t) { t = Neg (x) },
                else_branch = no () => (float[b, s] e) { e = Abs (x) }>
        }""",
        lambda feeds: feeds["rate"].item() in (16000, 0, 1),
        lambda feeds: feeds["rate"].item() == 16000,
    ),
    "an end that is looked for": Model(
        """g (int64[b, s] ids) => (int64[b] z) {
            end = Constant <value = int64 {5}> ()
            e = Gather (table, ids)
            same = Equal (ids, end)
            hot = Cast <to = 7> (same)
            z = ArgMax <axis = 1, keepdims = 0> (hot)
        }""",
        some=lambda feeds: bool((feeds["ids"] == 5).any(axis=1).all()),
        weights={"table": np.ones((8, 4), np.float32)},
    ),
    "places that another input fills": Model(
        """g (int64[b, s] ids, float[n, 4] images) => (float[b, s, 4] z) {
            seven = Constant <value = int64 {7}> ()
            e = Gather (table, ids)
            same = Equal (ids, seven)
            where = NonZero (same)
            places = Transpose (where)
            z = ScatterND (e, places, images)
        }""",
        lambda feeds: int((feeds["ids"] == 7).sum()) == len(feeds["images"]),
        weights={"table": np.ones((8, 4), np.float32)},
    ),
    "lengths within their axis": Model(
        "g (float[s, b, 4] x, int64[b] lengths) => (float[s, b, 4] z) {"
        " z = ReverseSequence <time_axis = 0, batch_axis = 1> (x, lengths) }",
        lambda feeds: feeds["lengths"].min() >= 1 and feeds["lengths"].max() <= feeds["x"].shape[0],
    ),
    "a size that is asked for": Model(
        """g (float[b, 4] x, int64[1] count) => (float[b, n] z) {
            target = Concat <axis = 0> (one, count)
            repeated = Tile (x, target)
            z = Neg (repeated)
        }""",
        lambda feeds: 0 < feeds["count"].item() < 10,
        weights={"one": ints(1)},
    ),
    "counts that are weighed": Model(
        "g (int64[b, 4] counts) => (float[b, 4] z) { c = Cast <to = 1> (counts) z = MatMul (c, w) }",
        lambda feeds: feeds["counts"].min() >= 0 and feeds["counts"].max() < 10,
        lambda feeds: len(np.unique(feeds["counts"])) > 2,
        weights=W,
    ),
    "an image": Model(
        "g (float[b, 1, h, w] x) => (float[b, 1, n, m] z) { z = Conv (x, k) }",
        lambda feeds: feeds["x"].min() >= 0.0 and feeds["x"].max() <= 1.0,
        weights={"k": np.ones((1, 1, 3, 3), np.float32)},
    ),
    "fixed sizes": Model("g (float[2, 4] x) => (float[2, 4] z) { z = MatMul (x, w) }", weights=W, sets=1),
    "fixed sizes and a switch": Model(
        """g (float[2, 4] x, bool[1] on) => (float[2, 4] z) {
            z = If (on) <
                then_branch = yes () => (float[2, 4] t) { t = Neg (x) },
                else_branch = no () => (float[2, 4] e) { e = Abs (x) }>
        }""",
        some=lambda feeds: not feeds["on"].all(),
    ),
}


def saved(model: Model, path: Path) -> Path:
    built = build_model(model.graph, model.weights)
    for value in built.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in model.names:
                size.dim_param = model.names[size.dim_param]
    onnx.save(built, path)
    return path


def cases_named(page: str) -> set[str]:
    """The cases in the last columns of a page's tables."""
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    names = {name.strip() for row in rows if len(row) == 3 for name in row[-1].split(";")}
    return names - {"tested by"}


def test_the_page_on_inputs_says_what_is_tested() -> None:
    """Every row of its tables has a case here, and every case has a row."""
    page = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    assert cases_named(page) == set(MODELS)
    assert cases_named("| a | b | c; d |\n|---|---|---|\n| e | f | |") == {"c", "d", ""}


@pytest.mark.parametrize("case", MODELS)
def test_inputs_are_found(case: str, tmp_path: Path) -> None:
    model = MODELS[case]
    path = saved(model, tmp_path / "model.onnx")
    accepted = find_inputs(analyse(path).dimensions, Runner(path, "cpu").run)
    assert len(accepted) >= min(2, model.sets) and all(one.has_numbers for one in accepted)
    assert all(model.right(one.case.feeds) for one in accepted), [one.case.label for one in accepted]
    assert any(model.some(one.case.feeds) for one in accepted), [one.case.label for one in accepted]
    shapes = {tuple(array.shape for array in one.case.feeds.values()) for one in accepted}
    assert len(shapes) > 1 or model.sets == 1 or "fixed" in case
    assert len({one.case.label for one in accepted}) == len(accepted) or "fixed" in case


def test_a_model_without_working_inputs_is_refused_before_anything_is_written(
    small: Path, cli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line says what was tried, why it failed, and what the user can do."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was written")

    def fail(self: Runner, feeds: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Runner, "run", fail)
    monkeypatch.setattr("hyperclone_onnx.writing.onnx_files.save", never)
    done = cli("expand", small, "--factor", "2", "-o", tmp_path / "big.onnx", "--device", "cpu")
    assert (done.code, done.stdout) == (3, "") and names_in(tmp_path) == set()
    for word in ("small.onnx: the source itself does not run", "sets were tried", "no such luck", "--inputs", "--dim"):
        assert word in done.error
    assert "batch, sequence" in done.error


def test_inputs_that_failed_are_not_tried_again(small: Path) -> None:
    """A model accepts one length only, but its graph does not show that. The errors name the two numbers that clash."""
    tried: list[tuple[int, ...]] = []

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        shape = feeds["ids"].shape
        assert shape not in tried
        tried.append(shape)
        if shape[1] != 24:
            raise RuntimeError(f"Add 'h1': {shape[1]} by 24")
        return {"logits": np.ones(1)}

    accepted = find_inputs(analyse(small).dimensions, run)
    assert {one.case.feeds["ids"].shape[1] for one in accepted} == {24} and len(accepted) > 1
    assert len(tried) < 10


def test_sets_without_numbers_are_passed_over(small: Path) -> None:
    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        quiet = feeds["ids"].shape[0] != 3
        return {"logits": np.full(3, np.nan if quiet else 1.0)}

    accepted = find_inputs(analyse(small).dimensions, run)
    assert all(one.has_numbers for one in accepted) and accepted


def test_a_model_with_many_weights_gets_one_set_of_several_tokens(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sets still have unlike sizes. A cache is filled, empty, and of another length."""
    monkeypatch.setattr(search, "MANY_WEIGHTS", 0)
    accepted = find_inputs(analyse(small).dimensions, Runner(small).run)
    assert [one.case.feeds["ids"].shape for one in accepted] == [(2, 5), (1, 1)]
    cached = saved(MODELS["positions behind a cache"], tmp_path / "model.onnx")
    accepted = find_inputs(analyse(cached).dimensions, Runner(cached).run)
    shapes = [(one.case.feeds["position_ids"].shape, one.case.feeds["k"].shape[1]) for one in accepted]
    assert shapes == [((2, 3), 4), ((1, 1), 0), ((1, 1), 6)]


# -- equations --------------------------------------------------------------------------------------------


def test_equations_are_solved_and_contradicted(tmp_path: Path) -> None:
    path = saved(MODELS["a mask as wide as cache and prompt"], tmp_path / "model.onnx")
    equations = equations_of(analyse(path).dimensions)
    assert equations.free == ("b", "new", "past", "all")
    assert equations.solved({"new": 3, "past": 4}).numbers["all"] == 7
    assert equations.solved({"all": 9, "past": 4}).numbers["new"] == 5
    with pytest.raises(Contradiction):
        equations.solved({"new": 3, "past": 4, "all": 8})
    with pytest.raises(Contradiction):
        equations.solved({"all": 3, "past": 4})


def test_a_cache_that_slides_holds_a_window(tmp_path: Path) -> None:
    model = build_model(
        """g (float[b, s, 32] q, float[b, 1, past, 16] k, float[b, 1, past, 16] v, int32[b] last, int32[1] all)
             => (float[b, s, 16] y, float[b, 1, p, 16] nk, float[b, 1, p, 16] nv) {
            y, nk, nv = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1,
                sliding_window_cache = 1, local_window_size = 640> (q, , , k, v, last, all)
        }""",
        {},
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "model.onnx")
    least = {str(bound.size): bound.least for bound in equations_of(analyse(tmp_path / "model.onnx").dimensions).least}
    assert least == {"past": 640}


def test_the_uses_of_inputs(tmp_path: Path) -> None:
    uses = uses_of(analyse(saved(MODELS["a logarithm"], tmp_path / "a.onnx")).dimensions)
    assert uses["x"].positive and not uses["x"].masks
    uses = uses_of(analyse(saved(MODELS["a mask that hides where it is true"], tmp_path / "b.onnx")).dimensions)
    assert uses["hidden"].masks and not uses["x"].masks


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_any_seed_gives_inputs_that_run(seed: int, small: Path) -> None:
    accepted = find_inputs(analyse(small).dimensions, Runner(small, "cpu").run, Wishes(seed=seed))
    assert len(accepted) == 3


# -- the user's own ---------------------------------------------------------------------------------------


def protobuf(path: Path, array: Array, name: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(numpy_helper.from_array(array, name).SerializeToString())


def as_npz(folder: Path, ids: Array) -> Path:
    np.savez(folder / "inputs.npz", ids=ids, other=np.ones(3))
    return folder / "inputs.npz"


def as_folder(folder: Path, ids: Array) -> Path:
    (folder / "inputs").mkdir()
    np.save(folder / "inputs" / "ids.npy", ids)
    return folder / "inputs"


def as_test_data(folder: Path, ids: Array) -> Path:
    protobuf(folder / "data" / "test_data_set_0" / "input_0.pb", ids)
    protobuf(folder / "data" / "test_data_set_1" / "input_0.pb", ids[:1], "ids")
    return folder / "data"


def as_one_set(folder: Path, ids: Array) -> Path:
    protobuf(folder / "one" / "input_0.pb", ids)
    return folder / "one"


IDS = ints(1, 2, 3, 4, 5, 6).reshape(2, 3)


@pytest.mark.parametrize(("give", "sets"), [(as_npz, 1), (as_folder, 1), (as_test_data, 2), (as_one_set, 1)])
def test_inputs_of_one_s_own(
    give: Callable[[Path, Array], Path], sets: int, small: Path, cli: Command, tmp_path: Path
) -> None:
    path = give(tmp_path, IDS.astype(np.int32))
    done = cli("expand", small, "--factor", "2", "-o", tmp_path / "big.onnx", "--inputs", path, "--device", "cpu")
    assert done.code == 0, done.error
    assert f"with {sets} input sets: {path}" in done.stdout.replace("\n", " ")
    cases = validate_files(small, tmp_path / "big.onnx", "cpu", inputs=path).cases
    assert len(cases) == sets and all(case.startswith(str(path)) for case in cases)


def test_inputs_and_sizes_in_python(small: Path, tmp_path: Path) -> None:
    result = expand(small, tmp_path / "big.onnx", 2, device="cpu", inputs={"ids": IDS}).validation
    assert result is not None and result.cases == ("the inputs given",)
    result = validate_files(small, tmp_path / "big.onnx", "cpu", inputs=[{"ids": IDS}, {"ids": IDS + 1}])
    assert len(result.cases) == 2 and result.equal
    result = validate_files(small, tmp_path / "big.onnx", "cpu", dims={"sequence": 6})
    assert len(result.cases) == 3 and all("sequence=6" in case for case in result.cases)


def test_inputs_that_grow(tmp_path: Path) -> None:
    """The grown model gets grown inputs. A diagnosis accepts inputs of the source or of the grown model."""
    graph = "g (float[b, 8] x) => (float[b, 8] y) { u = MatMul (x, w) r = Relu (u) d = MatMul (r, v) y = Add (x, d) }"
    onnx.save(build_model(graph, normal(0, {"w": (8, 12), "v": (12, 8)})), tmp_path / "small.onnx")
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    result = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, device="cpu", inputs={"x": x})
    assert result.validation is not None and result.validation.equal
    big = analyse(tmp_path / "big.onnx").model
    for given_x in (x, np.tile(x, 2)):
        (case,) = wishes_of(big, {"x": given_x}, plan=result.plan).given
        assert np.array_equal(case.feeds["x"], np.tile(x, 2))


WRONG: dict[str, tuple[Callable[[Path], tuple[str, ...]], str]] = {
    "no such file": (lambda folder: ("--inputs", str(folder / "none.npz")), "does not exist; it takes an .npz file"),
    "an empty folder": (lambda folder: ("--inputs", str(folder)), "holds no inputs; it takes an .npz file"),
    "no archive": (lambda folder: ("--inputs", written(folder / "a.npz", b"{")), "not a readable .npz file"),
    "no tensor": (lambda folder: ("--inputs", str(torn(folder))), "input_0.pb: holds no tensor"),
    "another name": (
        lambda folder: ("--inputs", archive(folder, other=IDS)),
        "lacks 'ids'; the model's inputs are 'ids'",
    ),
    "another rank": (
        lambda folder: ("--inputs", archive(folder, ids=IDS[0])),
        "'ids' has the shape (3,), the model takes",
    ),
    "floats": (
        lambda folder: ("--inputs", archive(folder, ids=IDS * 0.5)),
        "'ids' holds float64, the model takes int64",
    ),
    "beyond the table": (lambda folder: ("--inputs", archive(folder, ids=IDS + 100)), "does not run on the inputs of"),
    "no such size": (lambda folder: ("--dim", "width=3"), "no size of that name; its inputs have batch, sequence"),
    "no number": (lambda folder: ("--dim", "batch=two"), "write NAME=N"),
}


def written(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def archive(folder: Path, **arrays: Array) -> str:
    np.savez(folder / "inputs.npz", **arrays)
    return str(folder / "inputs.npz")


def torn(folder: Path) -> Path:
    (folder / "torn").mkdir()
    (folder / "torn" / "input_0.pb").write_bytes(b"\x08\xff")
    return folder / "torn"


@pytest.mark.parametrize("case", WRONG)
def test_inputs_that_do_not_fit_are_refused_in_one_line(case: str, small: Path, cli: Command, tmp_path: Path) -> None:
    options, text = WRONG[case]
    place = tmp_path / "inputs"
    place.mkdir()
    arguments = options(place)
    done = cli("expand", small, "--factor", "2", "-o", tmp_path / "big.onnx", *arguments, "--device", "cpu")
    assert done.code == (3 if case == "beyond the table" else 2) and done.stdout == ""
    assert text in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert names_in(tmp_path) == {"inputs"}


def test_swapped_arguments_are_reported(small: Path, tmp_path: Path, cli: Command) -> None:
    big = tmp_path / "big.onnx"
    expand(small, big, 2, check=False)
    done = cli("validate", big, small, "--device", "cpu")
    assert (done.code, done.stdout) == (2, "") and "the source comes first" in done.error
    with pytest.raises(BadRequest):
        validate_files(big, small)
    other = tmp_path / "other.onnx"
    onnx.save(perceptron(hidden=24, ffn=40), other)
    assert cli("validate", big, other, "--device", "cpu").code == 1, "another model is only another model"


MESSAGES = {
    "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running Gather node. "
    "Name:'node_embedding' Status Message: indices element out of data bounds, idx=8465 must be within the inclusive "
    "range [-96,95]": "Gather 'node_embedding': indices element out of data bounds, idx=8465 must be within the "
    "inclusive range [-96,95]",
    "[ONNXRuntimeError] : 1 : FAIL : Load model from a.onnx failed:Fatal error:\n  x": "Load model from a.onnx "
    "failed:Fatal error: x",
    "Got invalid dimensions for input: x for the following indices\n index: 1 Got: 7 Expected: 8\n Please fix": "Got "
    "invalid dimensions for input: x for the following indices index: 1 Got: 7 Expected: 8 Please fix",
    "": "str",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_the_runtime_s_messages_are_cut_to_their_point(message: str) -> None:
    assert runtime_message(message) == MESSAGES[message]


def test_a_user_s_inputs_that_fail_are_refused(small: Path) -> None:
    dimensions = analyse(small).dimensions
    wishes = wishes_of(analyse(small).model, {"ids": IDS + 100})
    with pytest.raises(NoInputs, match="does not run on the inputs of the inputs given"):
        find_inputs(dimensions, Runner(small, "cpu").run, wishes)
    assert issubclass(NoInputs, Refused)
