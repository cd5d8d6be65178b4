"""Grown tensors with several blocks, in double precision, and of odd shapes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from hyperclone_onnx import GrownTensor, Recipe, SourceMap, Strategy
from hyperclone_onnx.plan.maps import Kept, Named
from hyperclone_onnx.plan.strategies import STRATEGIES
from hyperclone_onnx.tensors import table as grown_table
from hyperclone_onnx.tensors.scratch import Scratch

A, B, C = Named("a"), Named("b"), Named("c")
RECIPE = Recipe("w", ((A, C), (B,)), ((0, 0),))


def grown(source: Any, strategy: Strategy, maps: dict[str, SourceMap], dtype: ir.DataType | None = None) -> GrownTensor:
    return GrownTensor(ir.tensor(source), RECIPE, maps, strategy, dtype)


@pytest.mark.parametrize("name", STRATEGIES)
def test_blocks_and_slices_do_not_show(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of noise have other bounds than blocks of rows, but any rows are the same as in the whole tensor."""
    monkeypatch.setattr(grown_table, "BLOCK", 16)
    maps = {"a": SourceMap(5, index=(4, 0, 1, 1, 2, 3, 1, 4)), "b": SourceMap(3, repeat=2), "c": SourceMap(2, tile=3)}
    tensor = grown(np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32), Strategy(name), maps)
    whole = tensor.numpy()
    assert whole.shape == tensor.shape == (48, 6)
    for start in range(48):
        for end in (start + 1, start + 7, 48):
            np.testing.assert_array_equal(tensor[(slice(start, end), slice(1, 4))], whole[start:end, 1:4])
    np.testing.assert_array_equal(tensor.as_lazy("w").numpy(), whole)


@pytest.mark.parametrize("repeats", [2, 3, 5])
@pytest.mark.parametrize("name", ["noisy-symmetric", "noisy-diagonal"])
def test_in_double_precision_noise_sums_to_zero(name: Any, repeats: int) -> None:
    source = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
    maps = {"a": SourceMap(6, tile=repeats), "b": SourceMap(4, tile=2), "c": SourceMap(2, tile=1)}
    tensor = grown(source, Strategy(name, snr_db=0.0), maps, ir.DataType.DOUBLE)
    total = tensor.numpy().reshape(repeats, 12, 2, 4).sum(axis=0)
    np.testing.assert_allclose(total, np.stack([source, source], axis=1), atol=1e-14)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("value", [0.0, 2.0**-140, 1e30])
def test_extreme_magnitudes_stay_finite(name: Any, value: float) -> None:
    maps = {"a": SourceMap(4, tile=2), "b": SourceMap(3, tile=2), "c": SourceMap(1, tile=1)}
    array = grown(np.full((4, 3), value, np.float32), Strategy(name), maps).numpy()
    assert np.isfinite(array).all()
    np.testing.assert_allclose(array.reshape(2, 4, 6).sum(axis=0), np.full((4, 6), np.float32(value)), rtol=1e-5)


def test_a_shared_tensor_of_no_elements() -> None:
    maps = {"a": SourceMap(2, tile=2), "b": SourceMap(0, tile=1), "c": SourceMap(3, tile=1)}
    assert grown(np.zeros((6, 0), np.float32), Strategy(), maps).numpy().shape == (12, 0)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("repeats", [2, 3, 5])
@pytest.mark.parametrize("name", STRATEGIES)
def test_shares_of_few_bits_add_up(name: Any, repeats: int, dtype: ir.DataType) -> None:
    """The shares add up exactly, however strong the noise is; and there is noise."""
    source = np.random.default_rng(1).standard_normal((12, 40)).astype(dtype.numpy())
    source[0, :3] = [0.0, -0.0, 1e-7]
    maps = {"a": SourceMap(6, tile=repeats), "b": SourceMap(40, tile=1), "c": SourceMap(2, tile=1)}
    array = grown(source, Strategy(name, snr_db=0.0), maps, dtype).numpy().astype(np.float64).reshape(repeats, 12, 40)
    np.testing.assert_array_equal(array.sum(axis=0), source.astype(np.float64))
    if "noisy" in name:
        assert float(np.mean(array[0] == array[1])) < 0.05


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("level", [0.02, 1.0, 500.0])
def test_a_weight_of_zero_gets_its_noise_too(level: float, dtype: ir.DataType) -> None:
    """The noise on a zero is as strong as on other weights, which rounding cuts; both repeats have opposite noise."""
    source = (np.random.default_rng(1).standard_normal((64, 256)) * level).astype(dtype.numpy())
    source[:, ::2] = 0.0
    maps = {"a": SourceMap(64, tile=2), "b": SourceMap(256, tile=1), "c": SourceMap(1, tile=1)}
    array = grown(source, Strategy("noisy-symmetric", snr_db=10.0), maps, dtype).numpy().astype(np.float64)
    first, second = array[:64, ::2], array[64:, ::2]
    np.testing.assert_array_equal(first, -second)
    rms = float(np.sqrt(np.mean(source.astype(np.float64) ** 2)))
    assert float(np.sqrt(np.mean(first**2))) == pytest.approx(rms / 2 * 10**-0.5, rel=0.05)


def test_a_table_is_dropped_with_its_tensor() -> None:
    """Index vectors take megabytes. A reference cycle would keep them until the next garbage collection."""
    source = ir.Tensor(np.ones((4, 4), np.float32), name="w")
    recipe = Recipe("w", axes=((Named("hidden"),), (Kept(4),)), shared=((0, 0),))
    gc.disable()
    try:
        grown = GrownTensor(source, recipe, {"hidden": SourceMap(4, tile=2)}, Strategy("noisy-symmetric"))
        table = weakref.ref(grown.table)
        for piece in grown.pieces():
            for _ in piece(Scratch()):
                pass
        assert table() is not None
        del grown, piece
        assert table() is None
    finally:
        gc.enable()


def test_equal_maps_share_their_vectors() -> None:
    one, other = SourceMap(6, tile=3), SourceMap(6, tile=3)
    assert one.indices is other.indices
    for times in (1, 2, 3):
        for chosen in (SourceMap(5, tile=times), SourceMap(5, repeat=times)):
            written_out = SourceMap(5, index=tuple(chosen.indices.tolist()))
            for name in ("indices", "numbers", "counts"):
                np.testing.assert_array_equal(getattr(chosen, name), getattr(written_out, name))
