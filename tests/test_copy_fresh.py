"""The strategy `copy-fresh`: the source in the first rows and columns, all other numbers drawn anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Array, Command, build_model, names_in

from hyperclone_onnx import BadRequest, Refused, Strategy, analyse, expand, plan_expansion, validate_files
from hyperclone_onnx.plan.maps import Named, SourceMap
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.plan.strategies import StrategyRule
from hyperclone_onnx.tensors.grown_tensor import GrownTensor

Zoo = Callable[[str], Path]
FRESH = Strategy("copy-fresh")


def tensors(path: Path) -> dict[str, Array]:
    """The stored tensors of a file, by name."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def corner(array: Array, like: Array) -> tuple[Array, Array]:
    """The first rows and columns, and all numbers beside them."""
    windows = tuple(slice(size) for size in like.shape)
    beside = np.ones(array.shape, bool)
    beside[windows] = False
    return array[windows], array[beside]


def test_the_source_stands_in_the_corner(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    report = expand(small, out, sizes={"hidden": 29, "ffn": 64}, strategy=FRESH, allow_change=True, device="cpu")
    source, grown = tensors(small), tensors(out)
    assert grown["up.0"].shape == (29, 64)
    for name in ("embedding", "up.0", "up.1", "down.0", "bias.0", "gain", "head"):
        kept, drawn = corner(grown[name], source[name])
        assert np.array_equal(kept, source[name]), name
        assert len(np.unique(drawn)) > 0.9 * drawn.size, name
        if drawn.size > 200:
            assert abs(drawn.std() / source[name].std() - 1) < 0.1, name
            assert abs(drawn.mean() - source[name].mean()) < 0.2 * source[name].std(), name
    assert report.validation is not None
    assert not report.validation.problems
    assert not report.validation.equal
    assert not [edit for edit in report.plan.edits if "Scale" in type(edit).__name__], "nothing is divided"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("names", ["ab", "ba", "cb", "bc", "aac"])
def test_any_window_has_the_numbers_of_the_whole(names: str, dtype: type[np.floating[Any]]) -> None:
    maps = {"a": SourceMap(6, cycle=10), "b": SourceMap(9, cycle=22), "c": SourceMap(5, repeat=3)}
    shape = [maps[name].size for name in names]
    source = np.random.default_rng(0).normal(3, 1, shape).astype(dtype)
    recipe = Recipe("t", tuple((Named(name),) for name in names))
    grown = GrownTensor(ir.Tensor(source, name="t"), recipe, maps, FRESH)
    whole = grown.numpy()
    windows = tuple(slice(1, size - 2) for size in whole.shape)
    assert whole.dtype == dtype
    assert np.array_equal(grown[windows], whole[windows])
    first = np.ix_(*(np.flatnonzero(maps[name].numbers == 0) for name in names))
    assert np.array_equal(whole[first], source)
    beside = np.ones(whole.shape, bool)
    beside[first] = False
    assert abs(whole[beside].astype(float).mean() - source.astype(float).mean()) < 0.5


def test_the_numbers_follow_from_the_seed_alone(small: Path, tmp_path: Path) -> None:
    def written(name: str, seed: int, workers: int) -> bytes:
        out = tmp_path / name
        strategy = Strategy("copy-fresh", seed=seed)
        expand(small, out, 3, strategy=strategy, allow_change=True, check=False, workers=workers)
        return out.read_bytes()

    first = written("a.onnx", 0, 1)
    assert written("b.onnx", 0, 2) == first
    assert written("c.onnx", 1, 1) != first


def test_a_number_that_is_not_as_planned_is_noticed(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    expand(small, out, 2, strategy=FRESH, allow_change=True, device="cpu")
    assert not validate_files(small, out, "cpu").problems
    model = onnx.load(out)
    (up,) = [tensor for tensor in model.graph.initializer if tensor.name == "up.0"]
    array = onnx.numpy_helper.to_array(up).copy()
    array[20, 25] *= 1.01
    up.CopyFrom(onnx.numpy_helper.from_array(array, "up.0"))
    onnx.save(model, out)
    assert any("up.0" in problem for problem in validate_files(small, out, "cpu").problems)


def test_gains_stay_near_their_mean_and_rotary_angles_are_not_drawn(zoo: Zoo, tmp_path: Path) -> None:
    source, out = zoo("llama.distinct"), tmp_path / "big.onnx"
    requests = {"head_dim": 2}
    report = expand(source, out, 2, requests, strategy=FRESH, allow_change=True, device="cpu")
    assert report.validation is not None
    assert not report.validation.problems
    repeated = {name for name in report.plan.tensors if report.plan.strategy_of(name).name != "copy-fresh"}
    assert len(repeated) == 1, repeated
    (angles,) = (tensors(out)[name] for name in repeated)
    assert len(np.unique(angles)) == angles.size // 2
    before, after = tensors(source), tensors(out)
    for name in (name for name, tensor in after.items() if tensor.ndim == 1 and name in report.plan.tensors):
        assert abs(after[name].mean() - before[name].mean()) < before[name].std() + 1e-6, name


CODES = """
g (float[rows, 6] x) => (float[rows, 5] y) {
    up = DequantizeLinear (up_codes, scale)
    u = MatMul (x, up)
    r = Relu (u)
    y = MatMul (r, down)
}
"""


def test_codes_cannot_be_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "up_codes": rng.integers(-100, 100, (6, 8)).astype(np.int8),
        "scale": np.float32(0.01),
        "down": rng.normal(size=(8, 5)).astype(np.float32),
    }
    onnx.save(build_model(CODES, weights), tmp_path / "codes.onnx")
    with pytest.raises(Refused, match="'up_codes' is stored as codes, and the strategy 'copy-fresh' can draw no codes"):
        plan_expansion(analyse(tmp_path / "codes.onnx"), 2, strategy=FRESH, allow_change=True)


def test_refusals(small: Path, tmp_path: Path, cli: Command) -> None:
    outcome = cli("expand", small, "--factor", "2", "--strategy", "copy-fresh", "-o", tmp_path / "big.onnx")
    assert outcome.code == 2
    assert "the strategy 'copy-fresh' changes what the model computes: --allow-change" in outcome.stderr
    assert not names_in(tmp_path)
    for default, rule in (
        (FRESH, StrategyRule(role="ffn", name="symmetric")),
        (None, StrategyRule(role="ffn", name="copy-fresh")),
    ):
        with pytest.raises(BadRequest, match="'copy-fresh' is for the whole model"):
            plan_expansion(analyse(small), 2, strategy=default, strategies=[rule], allow_change=True)
