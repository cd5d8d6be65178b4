"""Weight selection: rows, columns and layers of a model that stay, the same ones wherever a dimension appears."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Outcome, build_model, names_in, normal, perceptron
from test_layers import blocks

from hyperclone_onnx import BadRequest, Plan, Refused, SourceMap, Strategy, analyse, rewrite, shrink
from hyperclone_onnx.planning.making import make_plan
from hyperclone_onnx.planning.picking import pick
from hyperclone_onnx.rewriting.source_record import METADATA_KEY as SOURCE_KEY
from hyperclone_onnx.shrinking.selection import SELECTED_KEY
from models import zoo_store

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a model. Tests must not write to it."""
    path = tmp_path_factory.mktemp("large") / "large.onnx"
    onnx.save(perceptron(), path)
    return path


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a model with four layers. Tests must not write to it."""
    path = tmp_path_factory.mktemp("stack") / "stack.onnx"
    onnx.save(blocks("aaaa"), path)
    return path


def stored(path: Path) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


MAPS = [
    (SourceMap(12, even=6), [0, 2, 4, 6, 8, 10]),
    (SourceMap(12, even=5), [0, 3, 6, 8, 11]),
    (SourceMap(12, even=1), [0]),
    (SourceMap(12, first=3), [0, 1, 2]),
    (SourceMap(12, pick=(7, 2, 9)), [7, 2, 9]),
]


@pytest.mark.parametrize(("source_map", "indices"), MAPS)
def test_maps_that_pick(source_map: SourceMap, indices: list[int]) -> None:
    assert source_map.indices.tolist() == indices
    assert source_map.grown == len(indices) and source_map.picks
    assert SourceMap.from_json(12, source_map.to_json()) == source_map


def test_evenly_spaced_indices_are_distinct_and_in_order() -> None:
    for size in range(1, 60):
        for number in range(1, size + 1):
            indices = SourceMap(size, even=number).indices
            assert len(indices) == number and (np.diff(indices) > 0).all()
            assert indices[0] == 0 and indices[-1] < size


@pytest.mark.parametrize(
    "wrong", [{"even": 0}, {"even": 13}, {"first": 13}, {"pick": ()}, {"pick": (1, 1)}, {"pick": (12,)}]
)
def test_maps_that_cannot_pick(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="pick"):
        SourceMap(12, **wrong)


def test_the_same_indices_wherever_a_dimension_appears(large: Path, tmp_path: Path) -> None:
    before = stored(large)
    result = shrink(large, tmp_path / "small.onnx", factor=0.5, check=False)
    small = stored(tmp_path / "small.onnx")
    hidden, ffn = np.arange(0, 12, 2), np.arange(0, 20, 2)
    assert np.array_equal(small["embedding"], before["embedding"][:, hidden])
    assert np.array_equal(small["up.0"], before["up.0"][np.ix_(hidden, ffn)])
    assert np.array_equal(small["down.1"], before["down.1"][np.ix_(ffn, hidden)])
    assert np.array_equal(small["head"], before["head"][hidden])
    assert result.parameters_after == sum(array.size for array in small.values() if array.dtype.kind == "f")
    keys = {entry.key for entry in onnx.load(tmp_path / "small.onnx").metadata_props}
    assert SELECTED_KEY in keys and SOURCE_KEY not in keys
    assert (
        Plan.carried_by({entry.key: entry.value for entry in onnx.load(tmp_path / "small.onnx").metadata_props}) is None
    )


def test_the_outputs_are_those_of_the_parts_that_stay(tmp_path: Path) -> None:
    """Without a norm, a model without what was left out is the source with zeros there: ONNX Runtime agrees."""
    import onnxruntime as ort

    weights = normal(7, {"a": (6, 8), "b": (8, 4)})
    graph = """g (float[n, 6] x) => (float[n, 4] y) {
        h = MatMul (x, a)
        r = Relu (h)
        y = MatMul (r, b)
    }"""
    onnx.save(build_model(graph, weights), tmp_path / "large.onnx")
    kept = [1, 4, 6]
    result = shrink(tmp_path / "large.onnx", tmp_path / "small.onnx", select={"ffn": kept}, device="cpu")
    zeroed = weights["b"] * np.isin(np.arange(8), kept)[:, None]
    onnx.save(build_model(graph, {**weights, "b": zeroed.astype(np.float32)}), tmp_path / "zeroed.onnx")
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    got, want = (
        ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for name in ("small.onnx", "zeroed.onnx")
    )
    assert np.allclose(got, want, atol=1e-6)
    assert result.moved[0].max_relative > 1e-3 and "equal" not in result.verdict


def test_gains_take_what_a_norm_loses(tmp_path: Path) -> None:
    """The channels that are kept are twice as large as the others: the norm divides by more, and the gain makes up."""
    scale = np.where(np.arange(16) % 2 == 0, 2.0, 1.0).astype(np.float32)
    weights = normal(3, {"table": (40, 16), "head": (16, 40)})
    weights["table"] = (weights["table"] * scale).astype(np.float32)
    weights |= {"gain": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}
    graph = """g (int64[b, s] ids) => (float[b, s, 40] y) {
        x = Gather (table, ids)
        n = LayerNormalization (x, gain, bias)
        y = MatMul (n, head)
    }"""
    onnx.save(build_model(graph, weights), tmp_path / "large.onnx")
    shrink(tmp_path / "large.onnx", tmp_path / "small.onnx", factor=0.5, device="cpu")
    gain = stored(tmp_path / "small.onnx")["gain"]
    assert np.allclose(gain, np.sqrt(4.0 / 2.5), rtol=0.1)
    assert len(set(gain.tolist())) == 1


def test_a_written_norm_is_scaled_too() -> None:
    from hyperclone_onnx.shrinking.gains import norms_of

    analysis = analyse(zoo_store.load("llama.distinct"))
    growth = pick(analysis.dimensions, Fraction(1, 2))
    norms, without = norms_of(growth)
    assert without == 0 and len(norms) == len({norm.gain for norm in norms}) > 2


def test_layers_that_stay(stack: Path, tmp_path: Path) -> None:
    result = shrink(stack, tmp_path / "small.onnx", layers=2, device="cpu")
    before, small = stored(stack), stored(tmp_path / "small.onnx")
    assert result.layers == {"layers": (4, 2)}
    assert small.keys() < before.keys()
    assert all(np.array_equal(small[name], before[name]) for name in small)
    assert result.moved


def test_listed_layers_are_numbered_anew(stack: Path, tmp_path: Path) -> None:
    shrink(stack, tmp_path / "first.onnx", layers=2, check=False)
    shrink(stack, tmp_path / "listed.onnx", select={"layers": [1, 3]}, check=False)
    first, listed = stored(tmp_path / "first.onnx"), stored(tmp_path / "listed.onnx")
    assert first.keys() == listed.keys()
    assert any(not np.array_equal(first[name], listed[name]) for name in first)


def test_the_command(large: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"ffn.0": [0, 3, 5], "ffn.1": [1, 2, 4]}))
    outcome = cli(
        "shrink", large, "-o", tmp_path / "small.onnx", "--size", "hidden=6", "--select", lists, "--device", "cpu",
        "--plan-out", tmp_path / "plan.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    assert "equal" not in outcome.stdout and "outputs moved by up to" in outcome.stdout
    assert stored(tmp_path / "small.onnx")["up.1"].shape == (6, 3)
    assert Plan.read(tmp_path / "plan.json").maps["ffn.0"] == SourceMap(20, pick=(0, 3, 5))


def test_shards_stay_what_they_are(large: Path, tmp_path: Path) -> None:
    one = shrink(large, tmp_path / "one.onnx", factor=0.5, check=False)
    several = shrink(large, tmp_path / "several.onnx", factor=0.5, check=False, max_shard_size=1000, workers=2)
    assert len(several.files) > 2 and len(one.files) == 1
    first, second = stored(tmp_path / "one.onnx"), stored(tmp_path / "several.onnx")
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 30 words. Skips where the package is not installed."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number}": number for number in range(30)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_text_and_a_tokenizer_are_data(large: Path, tokenizer: Path, tmp_path: Path) -> None:
    from hyperclone_onnx.shrinking.text import inputs_from_text

    (tmp_path / "text.txt").write_text(" ".join(f"w{number % 7 + 3}" for number in range(2000)))
    feeds = inputs_from_text(analyse(large), tmp_path / "text.txt", tokenizer, "cpu")
    assert feeds["ids"].ravel()[:8].tolist() == [3, 4, 5, 6, 7, 8, 9, 3] and feeds["ids"].shape == (8, 128)


def test_texts_that_do_not_fit(large: Path, tokenizer: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    (tmp_path / "text.txt").write_text("w1 w2")
    start = ("shrink", large, "-o", tmp_path / "s.onnx", "--factor", "0.5", "--data", tmp_path / "text.txt")
    outcome = cli(*start, "--tokenizer", tokenizer)
    assert outcome.code == 2 and "give a longer text" in outcome.error
    outcome = cli(*start)
    assert outcome.code == 2 and "no tokenizer" in outcome.error


# -- importance -------------------------------------------------------------------------------------------


def test_units_with_the_largest_activations_stay(tmp_path: Path) -> None:
    weights = normal(7, {"a": (6, 8), "b": (8, 4)})
    large = np.array([1, 4, 6])
    weights["a"][:, large] *= 10.0
    graph = "g (float[n, 6] x) => (float[n, 4] y) {\nh = MatMul (x, a)\nr = Relu (h)\ny = MatMul (r, b)\n}"
    onnx.save(build_model(graph, weights), tmp_path / "large.onnx")
    scores = tmp_path / "scores.json"
    result = shrink(
        tmp_path / "large.onnx", tmp_path / "small.onnx", method="importance", sizes={"ffn": 3}, scores=scores,
        data={"x": np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)}, device="cpu",
    )  # fmt: skip
    assert result.method == "importance" and result.plan.maps["ffn"].indices.tolist() == large.tolist()
    measured = json.loads(scores.read_text())["dimensions"]["ffn"]
    assert sorted(np.argsort(measured)[-3:].tolist()) == large.tolist()
    assert np.array_equal(stored(tmp_path / "small.onnx")["b"], weights["b"][large])


def test_scores_follow_the_data(tmp_path: Path) -> None:
    """Other inputs wake other units: each unit reads one feature, and the data have only some of the features."""
    weights = {"a": np.eye(6, dtype=np.float32), **normal(7, {"b": (6, 4)})}
    graph = "g (float[n, 6] x) => (float[n, 4] y) {\nh = MatMul (x, a)\nr = Relu (h)\ny = MatMul (r, b)\n}"
    onnx.save(build_model(graph, weights), tmp_path / "large.onnx")
    for features in ([0, 5], [2, 3]):
        x = np.zeros((4, 6), np.float32)
        x[:, features] = 1.0
        result = shrink(
            tmp_path / "large.onnx", tmp_path / "small.onnx", method="importance", sizes={"ffn": 2}, data={"x": x},
            device="cpu",
        )  # fmt: skip
        assert result.plan.maps["ffn"].indices.tolist() == features
        assert result.moved[0].max_relative == 0.0  # nothing that these inputs use was left out


def test_the_layer_that_changes_least_is_left_out(stack: Path, tmp_path: Path) -> None:
    model = onnx.load(stack)
    names = [tensor.name for tensor in model.graph.initializer]
    step = {name for name in names if ".2." in name}
    assert step
    for tensor in model.graph.initializer:
        if tensor.name in step:
            array = onnx.numpy_helper.to_array(tensor) * np.float32(1e-3)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    onnx.save(model, tmp_path / "large.onnx")
    scores = tmp_path / "scores.json"
    shrink(tmp_path / "large.onnx", tmp_path / "small.onnx", method="importance", layers=3, scores=scores, device="cpu")
    (measured,) = json.loads(scores.read_text())["layers"].values()
    assert int(np.argmin(measured)) == 2 and len(measured) == 4
    shrink(tmp_path / "large.onnx", tmp_path / "same.onnx", select={"layers": [0, 1, 3]}, check=False)
    one, other = stored(tmp_path / "small.onnx"), stored(tmp_path / "same.onnx")
    assert all(np.array_equal(one[name], other[name]) for name in other)


BAD = [
    ("--size hidden=24", 2, "hidden=24 is above the source's 12: shrink makes sizes smaller, use expand to grow"),
    ("--factor 2", 2, "use expand"),
    ("--size hiden=6", 2, "did you mean 'hidden'"),
    ("--size vocab=8", 3, "vocab (size 31) cannot become smaller: indexed by values"),
    ("--factor 0.5 --method collapse", 2, "leave out sizes"),
    ("--factor 0.5 --plan none.json", 2, "belong to the method collapse"),
    ("--method selection", 2, "say how small"),
    ("--select none.json", 2, "no readable JSON file"),
    ("--factor 0.999", 2, "nothing would become smaller"),
    ("--size heads=2", 2, "no dimension 'heads'"),
    ("--factor 0.5 --scores s.json", 2, "what the method importance finds"),
    ("--factor 0.5 --method importance --data none.npz", 2, "--data none.npz: does not exist"),
    ("--data none.npz", 2, "and not to collapse"),
]


def test_data_of_another_model_are_refused(large: Path, tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    np.savez(tmp_path / "data.npz", other=np.zeros((2, 3)))
    before = names_in(tmp_path)
    outcome = cli(
        "shrink", large, "-o", tmp_path / "small.onnx", "--method", "importance", "--factor", "0.5",
        "--data", tmp_path / "data.npz",
    )  # fmt: skip
    assert outcome.code == 2 and "--data" in outcome.error and "'ids'" in outcome.error
    assert names_in(tmp_path) == before


@pytest.mark.parametrize(("arguments", "code", "why"), BAD)
def test_bad_input_gets_one_line(
    arguments: str, code: int, why: str, large: Path, tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    outcome = cli("shrink", large, "-o", tmp_path / "small.onnx", *arguments.split())
    assert (outcome.code, why in outcome.error) == (code, True), outcome.stderr
    assert names_in(tmp_path) == set()


LAYERS = [
    ({"layers": 5}, BadRequest, "layers=5 is above the source's 4"),
    ({"layers": 0}, BadRequest, "ask for a multiple of"),
    ({"select": {"layers": [1, 9]}}, BadRequest, "of the layers 0 to 3"),
    ({"select": {"layers": [1, 1]}}, BadRequest, "each once"),
]


@pytest.mark.parametrize(("how", "kind", "why"), LAYERS)
def test_layers_that_cannot_stay(
    how: dict[str, Any], kind: type[Exception], why: str, stack: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=why):
        shrink(stack, tmp_path / "small.onnx", **how)


def test_a_graph_without_layers(large: Path, tmp_path: Path) -> None:
    weights = normal(7, {"a": (6, 8)})
    onnx.save(build_model("g (float[n, 6] x) => (float[n, 8] y) {\ny = MatMul (x, a)\n}", weights), tmp_path / "m.onnx")
    with pytest.raises(BadRequest, match="no layers were found"):
        shrink(tmp_path / "m.onnx", tmp_path / "small.onnx", layers=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_store.names())
def test_every_graph_of_the_zoo_shrinks_and_runs(name: str, tmp_path: Path) -> None:
    """The small model runs, with the sizes that its graph states."""
    onnx.save(zoo_store.load(name), tmp_path / "large.onnx")
    try:
        result = shrink(tmp_path / "large.onnx", tmp_path / "small.onnx", factor=0.5, device="cpu", check="full")
    except Refused as problem:
        pytest.skip(str(problem))
    assert result.parameters_after < result.parameters_before
    assert result.moved and not any(report.problem for report in result.moved)


@pytest.mark.parametrize("name", ["gpt2.fused", "llama.distinct", "bert.distinct", "gemma3.cached", "vit.distinct"])
def test_sizes_in_graphs_become_smaller(name: str) -> None:
    analysis = analyse(zoo_store.load(name))
    plan = make_plan(pick(analysis.dimensions, Fraction(1, 2)), Strategy("selection"))
    small = rewrite(analysis.model, plan)
    for tensor, recipe in plan.tensors.items():
        shape = tuple(small.graph.initializers[tensor].const_value.shape.numpy())  # type: ignore[union-attr]
        assert np.prod(shape) < np.prod(recipe.source_shape(plan.maps))
