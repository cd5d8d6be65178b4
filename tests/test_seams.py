"""The places where new kinds of growth can be added: transforms, origins of tensors, edits, laws of sharing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import perceptron
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclone_onnx import (
    BadModel,
    BadRequest,
    GrownTensor,
    Plan,
    Recipe,
    Refused,
    SourceMap,
    Strategy,
    analyse,
    expand,
    plan_expansion,
    rewrite,
    validate_files,
)
from hyperclone_onnx.diagnosis import diagnose
from hyperclone_onnx.plan import strategies
from hyperclone_onnx.plan.edits import Edit, ScaleInput, SetAttribute, edit, edit_from_json
from hyperclone_onnx.plan.maps import Kept, Named
from hyperclone_onnx.plan.origins import Drawn, Joined
from hyperclone_onnx.plan.plans import TransformStep
from hyperclone_onnx.plan.strategies import Law, Number
from hyperclone_onnx.rewriting.rewriting import check_fits
from hyperclone_onnx.tensors.assembled import DrawnTensor, JoinedTensor
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.tensors.stored_rows import StoredRows
from hyperclone_onnx.transforms import registry
from hyperclone_onnx.writing.onnx_files import save

Array = np.ndarray[Any, Any]
IDENTITY = (TransformStep("identity"),)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("seams") / "small.onnx"
    onnx.save(perceptron(), path)
    return path


# -- transforms -------------------------------------------------------------------------------------------


def test_a_transform_goes_through_expand_validate_and_diagnose(small: Path, tmp_path: Path) -> None:
    big, plain = tmp_path / "big.onnx", tmp_path / "plain.onnx"
    result = expand(small, big, 2, transforms=IDENTITY, plan_out=tmp_path / "plan.json")
    expand(small, plain, 2)
    carried = Plan.carried_by(dict(ir.load(big).metadata_props))
    assert carried is not None and carried.transforms == IDENTITY == Plan.read(tmp_path / "plan.json").transforms
    assert replace(carried, transforms=()).to_json() == Plan.carried_by(dict(ir.load(plain).metadata_props)).to_json()  # type: ignore[union-attr]
    assert result.validation is not None and result.validation.equal
    assert validate_files(small, big).equal
    assert diagnose(big, small).notes is not None


def test_a_transform_that_this_release_has_not_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"transform 'shuffle'; this release has .*identity"):
        expand(small, tmp_path / "big.onnx", 2, transforms=(TransformStep("shuffle"),))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "why"),
    [({}, "missing a required .*argument: 'to'"), ({"to": "big", "by": 2}, "unexpected keyword argument 'by'")],
)
def test_options_that_a_transform_does_not_have_are_refused(options: dict[str, Any], why: str) -> None:
    def rename(model: ir.Model, *, to: str) -> ir.Model:
        model.graph.name = to
        return model

    registry.transform("rename")(rename)
    try:
        model = ir.from_proto(perceptron())
        assert registry.transformed(model, [TransformStep("rename", {"to": "big"})]).graph.name == "big"
        with pytest.raises(BadModel, match=f"options of the transform 'rename' are wrong: .*{why}"):
            registry.transformed(model, [TransformStep("rename", options)])
    finally:
        del registry._transforms["rename"]


# -- laws of sharing --------------------------------------------------------------------------------------


class Copy(Law):
    """A law under which each repeat takes the whole weight, so that sums are too large."""

    name = "copy"
    preserves = False
    shares_equally = False

    def takes_whole(self, number: int, count: Number, other: Number) -> Any:
        return np.True_


@pytest.fixture
def copying() -> Iterator[Strategy]:
    strategies.register(Copy())
    yield Strategy("copy")
    del strategies._laws["copy"]


def test_a_law_that_does_not_preserve_must_be_allowed(copying: Strategy, small: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"'copy' changes what the model computes"):
        expand(small, tmp_path / "big.onnx", 2, strategy=copying)
    assert not list(tmp_path.iterdir())


def test_a_law_that_does_not_preserve_is_reported_and_not_demanded(
    copying: Strategy, small: Path, tmp_path: Path
) -> None:
    result = expand(small, tmp_path / "big.onnx", 2, strategy=copying, allow_change=True)
    assert result.validation is not None
    assert not result.validation.equal and result.validation.problems == []
    assert result.validation.largest_change > 0.1
    data = result.validation.to_json()
    assert data["equal"] is False and data["preserves"] is False


def test_a_law_is_known_by_one_name(copying: Strategy) -> None:
    with pytest.raises(ValueError, match="there is a strategy 'copy' already"):
        strategies.register(Copy())


# -- origins of tensors -----------------------------------------------------------------------------------

HIDDEN = SourceMap(6, tile=2)


def numbers(shape: tuple[int, ...], seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("axis", "stacked"), [(0, False), (1, False), (0, True), (1, True), (2, True)])
def test_joined_tensors_read_any_of_their_bytes(axis: int, stacked: bool) -> None:
    one, other = numbers((4, 3)), numbers((4, 3) if stacked or axis > 1 else (4, 5) if axis else (2, 3), 2)
    joined = JoinedTensor(Joined(("a", "b"), axis, stacked), [ir.tensor(one), ir.tensor(other)])
    expected = np.stack([one, other], axis) if stacked else np.concatenate([one, other], axis)
    np.testing.assert_array_equal(joined.numpy(), expected)
    rows = StoredRows(joined, expected.shape[0], expected.nbytes // expected.shape[0])
    for start, count in [(0, expected.nbytes), (3, 9), (expected.nbytes - 5, 5)]:
        read = rows.read_bytes(start, count, Scratch())
        assert read.tobytes() == expected.tobytes()[start : start + count]


@pytest.mark.parametrize(("other", "why"), [((4, 3), "joined along axis 0"), ((5, 4), "joined along axis 0")])
def test_tensors_that_do_not_fit_are_not_stacked(other: tuple[int, int], why: str) -> None:
    parts = [ir.tensor(numbers((5, 3))), ir.tensor(numbers(other))]
    with pytest.raises(ValueError, match=why):
        JoinedTensor(Joined(("a", "b"), 0, stacked=True), parts)


@pytest.mark.parametrize("name", ["symmetric", "noisy-diagonal"])
def test_a_recipe_of_two_sources_grows_like_one_stored_tensor(name: str) -> None:
    one, other = numbers((6, 3)), numbers((6, 4), 2)
    origin = Joined(("a", "b"), 1)
    recipe = Recipe(origin, ((Named("hidden"),), (Kept(7),)), shared=((0, 0),))
    joined = GrownTensor(
        JoinedTensor(origin, [ir.tensor(one), ir.tensor(other)]), recipe, {"hidden": HIDDEN}, Strategy(name)
    )
    whole = GrownTensor(
        ir.tensor(np.concatenate([one, other], 1)), replace(recipe, origin="a+b"), {"hidden": HIDDEN}, Strategy(name)
    )
    np.testing.assert_array_equal(joined.numpy(), whole.numpy())
    np.testing.assert_array_equal(joined[3:9, 2:5], whole[3:9, 2:5])


def test_a_recipe_of_two_sources_goes_into_a_file_and_back(tmp_path: Path) -> None:
    """A model whose last weight is stored in two halves, which other nodes read too."""
    model = perceptron()
    (weight,) = [t for t in model.graph.initializer if t.name == model.graph.node[-1].input[1]]
    whole = onnx.numpy_helper.to_array(weight)
    half = whole.shape[0] // 2
    for name, part in (("first", whole[:half]), ("second", whole[half:])):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(part), name))
        model.graph.node.append(onnx.helper.make_node("Identity", [name], [f"{name}_out"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}_out", weight.data_type, part.shape))
    path = tmp_path / "small.onnx"
    onnx.save(model, path)
    analysis = analyse(path)
    plan = plan_expansion(analysis, 2, strategy=Strategy("symmetric"))
    joined = replace(plan.tensors[weight.name], origin=Joined(("first", "second"), 0))
    plan = Plan.loads(replace(plan, tensors={**plan.tensors, weight.name: joined}).dumps())
    assert plan.tensors[weight.name].sources == ("first", "second")
    check_fits(plan, analysis.model)
    big = tmp_path / "big.onnx"
    save(rewrite(analysis.model, plan), big, external=True)
    report = validate_files(path, big)
    assert report.equal and report.tensors is not None and report.tensors.checked >= len(plan.tensors)
    with pytest.raises(Refused, match="is made of first, second does not have exactly one source"):
        _ = plan.tensors[weight.name].source


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    st.sampled_from(["normal", "constant"]),
    st.sampled_from(["FLOAT", "FLOAT16", "BFLOAT16"]),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_bytes_of_a_drawn_tensor_are_those_of_the_whole(
    shape: tuple[int, ...], law: Any, dtype: str, data: st.DataObject
) -> None:
    drawn = Drawn("fresh", shape, dtype, law, 0.5, seed=3)
    tensor = DrawnTensor(drawn)
    whole = tensor.numpy().tobytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    count = data.draw(st.integers(1, len(whole) - start))
    assert StoredRows(tensor, 1, len(whole)).read_bytes(start, count, Scratch()).tobytes() == whole[start:][:count]


def test_drawn_numbers_follow_their_law_and_their_seed() -> None:
    normal = DrawnTensor(Drawn("fresh", (200, 100), "FLOAT", "normal", 0.5, seed=1)).numpy()
    assert abs(float(normal.std()) - 0.5) < 0.01 and abs(float(normal.mean())) < 0.01
    other = DrawnTensor(Drawn("fresh", (200, 100), "FLOAT", "normal", 0.5, seed=2)).numpy()
    assert not np.array_equal(normal, other)
    assert (DrawnTensor(Drawn("ones", (3,), "FLOAT", "constant", 1.0)).numpy() == 1).all()


def test_a_drawn_recipe_reads_no_tensor_and_is_the_same_after_json() -> None:
    recipe = Recipe(Drawn("fresh", (6, 3), "FLOAT", "normal", 0.1, 5), ((Named("hidden"),), (Kept(3),)))
    assert recipe.sources == () and Recipe.from_json(recipe.to_json()) == recipe
    joined = Recipe(Joined(("a", "b"), 0, stacked=True), ((Kept(2),),))
    assert Recipe.from_json(joined.to_json()) == joined


# -- edits ------------------------------------------------------------------------------------------------


def test_an_edit_of_a_new_kind_needs_its_class_alone() -> None:
    @edit
    @dataclass(frozen=True)
    class Rename(Edit):
        node: str
        text: str

        def apply(self, editor: Any) -> None:
            editor.set_attribute(self.node, "name", self.text)

    rename = Rename("a", "b")
    assert rename.to_json() == {"edit": "Rename", "node": "a", "text": "b"}
    assert edit_from_json(rename.to_json()) == rename
    with pytest.raises(ValueError, match="there is an edit SetAttribute already"):
        edit(SetAttribute)


# -- constants that growth adds ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["{}.scale_bias", "{}.scale", "{}.scale.1"])
def test_a_tensor_of_the_source_is_not_taken_for_one_that_growth_put_in(name: str, tmp_path: Path) -> None:
    """The source has tensors with names like those of divisors. The grown file records which constants growth added."""
    model = perceptron(tied=True)
    path = tmp_path / "small.onnx"
    onnx.save(model, path)
    (divided,) = [e.node for e in plan_expansion(analyse(path), 2).edits if isinstance(e, ScaleInput)]
    own = name.format(divided)
    for tensor in model.graph.initializer:
        tensor.name = own if tensor.name == "gain" else tensor.name
    for node in model.graph.node:
        node.input[:] = [own if read == "gain" else read for read in node.input]
    onnx.save(model, path)
    source = analyse(path).model
    grown = rewrite(source, plan_expansion(analyse(path), 2))
    carried = Plan.carried_by(grown.metadata_props)
    assert carried is not None and own in source.graph.initializers
    assert not any(carried.brings_in(tensor) for tensor in source.graph.initializers)
    added = set(grown.graph.initializers) - set(source.graph.initializers) - set(carried.tensors)
    assert added and all(map(carried.brings_in, added))


@pytest.mark.frameworks
def test_a_transform_goes_through_the_handoff_and_back(small: Path, tmp_path: Path) -> None:
    from hyperclone_onnx.frameworks.absorb import absorb
    from hyperclone_onnx.frameworks.torch import load

    big, plan_file = tmp_path / "big.onnx", tmp_path / "plan.json"
    expand(small, big, 2, transforms=IDENTITY, plan_out=plan_file)
    planned, stored = load(small, plan=plan_file).state_dict(), load(big).state_dict()
    assert planned.keys() == stored.keys()
    assert all(bool((planned[name] == stored[name]).all()) for name in stored)
    trained = tmp_path / "trained.onnx"
    absorb(big, {name: tensor + 1 for name, tensor in stored.items()}, trained)
    carried = Plan.carried_by(dict(ir.load(trained).metadata_props))
    assert carried is not None and carried.transforms == IDENTITY
    assert not validate_files(small, trained).equal
