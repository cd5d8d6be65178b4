"""Grown tensors and plans: shares add up, slices agree, noise is what was asked for."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclone_onnx import BadModel, GrownTensor, Plan, Recipe, SourceMap, Strategy
from hyperclone_onnx.maps import ConcatOf, Kept, Named, ProductOf
from hyperclone_onnx.plan import (
    Feed,
    GatherOutput,
    GrownDim,
    Interface,
    ResizeVector,
    ScaleInput,
    SetAttribute,
    SetInput,
)
from hyperclone_onnx.strategies import STRATEGIES

Array = np.ndarray[Any, Any]
A, B, C = Named("a"), Named("b"), Named("c")
SHAPES = {
    "rows": (((A,), (B,)), ((0, 0),)),
    "columns": (((B,), (A,)), ((1, 0),)),
    "both": (((A,), (C,), (B,)), ((0, 0), (1, 0))),
    "factor": (((C, A), (B,)), ((0, 1),)),
    "segments": (((ConcatOf((A, Kept(3), C)),), (B,)), ((0, 0),)),
}
MAPS = {
    "tile2": {"a": SourceMap(4, tile=2), "b": SourceMap(5, tile=2), "c": SourceMap(3, tile=2)},
    "tile3": {"a": SourceMap(4, tile=3), "b": SourceMap(5, tile=3), "c": SourceMap(3, tile=3)},
    "tile5": {"a": SourceMap(4, tile=5), "b": SourceMap(5, tile=1), "c": SourceMap(3, tile=2)},
    "repeat": {"a": SourceMap(4, repeat=3), "b": SourceMap(5, repeat=2), "c": SourceMap(3, repeat=2)},
    "unequal": {
        "a": SourceMap(4, index=(0, 3, 1, 2, 1, 1)),
        "b": SourceMap(5, index=(4, 3, 2, 1, 0, 0)),
        "c": SourceMap(3, index=(2, 0, 1, 2)),
    },
}


def grown(shape: str, maps: str, strategy: Strategy) -> GrownTensor:
    axes, shared = SHAPES[shape]
    recipe = Recipe("w", axes, shared)
    probe = GrownTensor(ir.tensor(np.zeros(1, np.float32)), recipe, MAPS[maps], strategy)
    source = np.random.default_rng(0).standard_normal([axis.source_size for axis in probe.axes]).astype(np.float32)
    return GrownTensor(ir.tensor(source), recipe, MAPS[maps], strategy)


def collapse(tensor: GrownTensor, values: Array) -> tuple[Array, Array]:
    """(sums over the repeats of shared dimensions, how often each sum's elements were found)."""
    shape = [axis.collapsed_size for axis in tensor.axes]
    total = np.zeros(shape)
    for index in itertools.product(*(range(n) for n in values.shape)):
        total[tuple(axis.collapsed[i] for axis, i in zip(tensor.axes, index, strict=True))] += float(values[index])
    want = np.zeros(shape)
    source = np.asarray(tensor.source.numpy(), dtype=np.float64)
    for index in itertools.product(*(range(n) for n in values.shape)):
        where = tuple(axis.collapsed[i] for axis, i in zip(tensor.axes, index, strict=True))
        want[where] = source[tuple(axis.source[i] for axis, i in zip(tensor.axes, index, strict=True))]
    return total, want


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shares_add_up_to_the_source(shape: str, maps: str, name: Any) -> None:
    tensor = grown(shape, maps, Strategy(name, snr_db=0.0))
    np.testing.assert_allclose(*collapse(tensor, tensor.numpy()), atol=2e-6)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("maps", MAPS)
def test_in_double_the_noise_leaves_no_residue(maps: str, name: Any) -> None:
    single = grown("rows", maps, Strategy(name, snr_db=0.0))
    tensor = GrownTensor(single.source, single.recipe, MAPS[maps], single.strategy, ir.DataType.DOUBLE)
    np.testing.assert_allclose(*collapse(tensor, tensor.numpy()), atol=1e-14)


@given(st.sampled_from(sorted(SHAPES)), st.sampled_from(sorted(MAPS)), st.sampled_from(STRATEGIES), st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_slice_is_the_slice_of_the_whole(shape: str, maps: str, name: Any, data: st.DataObject) -> None:
    tensor = grown(shape, maps, Strategy(name))
    window = []
    for size in tensor.shape:
        start = data.draw(st.integers(0, size - 1))
        window.append(slice(start, data.draw(st.integers(start + 1, size))))
    np.testing.assert_array_equal(tensor[tuple(window)], tensor.numpy()[tuple(window)])


def test_noise_has_the_level_asked_for_and_differs_between_clones() -> None:
    maps = {"a": SourceMap(64, tile=2), "b": SourceMap(64, tile=2)}
    source = ir.tensor(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32))
    recipe = Recipe("w", ((A,), (B,)), ((0, 0),))
    plain = GrownTensor(source, recipe, maps, Strategy("symmetric")).numpy()
    for snr in (0.0, 10.0, 20.0):
        noisy = GrownTensor(source, recipe, maps, Strategy("noisy-symmetric", snr)).numpy()
        noise = noisy - plain
        measured = 10 * np.log10(np.mean(plain**2) / np.mean(noise**2))
        assert abs(measured - snr) < 0.5
        assert not np.allclose(noise[:64, :64], noise[:64, 64:])
        assert not np.allclose(noise[:64], noise[64:])


def test_the_seed_and_the_name_draw_the_noise() -> None:
    maps = {"a": SourceMap(4, tile=2), "b": SourceMap(5, tile=2)}
    source = ir.tensor(np.ones((4, 5), np.float32))

    def draw(name: str, seed: int) -> bytes:
        recipe = Recipe(name, ((A,), (B,)), ((0, 0),))
        return GrownTensor(source, recipe, maps, Strategy(seed=seed)).numpy().tobytes()

    assert draw("w", 0) == draw("w", 0)
    assert len({draw("w", 0), draw("w", 1), draw("v", 0)}) == 3


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE])
def test_other_floating_types_round_once(dtype: ir.DataType) -> None:
    maps = {"a": SourceMap(4, tile=3), "b": SourceMap(5, tile=3)}
    exact = np.random.default_rng(1).standard_normal((4, 5))
    source = ir.tensor(exact.astype(dtype.numpy()), dtype=dtype)
    tensor = GrownTensor(source, Recipe("w", ((A,), (B,)), ((0, 0),)), maps, Strategy("symmetric"))
    wide = np.tile(np.asarray(source.numpy(), dtype=np.float64) / 3, (3, 3))
    assert tensor.numpy().dtype == dtype.numpy()
    work = np.float64 if dtype == ir.DataType.DOUBLE else np.float32
    np.testing.assert_array_equal(tensor.numpy(), wide.astype(work).astype(dtype.numpy()))


def test_integers_are_copied_and_scales_applied() -> None:
    maps = {"a": SourceMap(3, repeat=2)}
    codes = GrownTensor(ir.tensor(np.array([7, 8, 9])), Recipe("q", ((A,),)), maps, Strategy())
    assert codes.numpy().tolist() == [7, 7, 8, 8, 9, 9]
    gain = GrownTensor(ir.tensor(np.ones(3, np.float32)), Recipe("g", ((A,),), scale=0.5), maps, Strategy())
    assert gain.numpy().tolist() == [0.5] * 6


PLAN = Plan(
    dims={"a": GrownDim("hidden", SourceMap(4, tile=2)), "b": GrownDim("ffn", SourceMap(2, index=(0, 1, 1)))},
    tensors={"w": Recipe("v", ((A, Kept(3)), (ConcatOf((B, ProductOf((A, Kept(2))))),)), ((0, 0),), 0.25)},
    feeds=(Feed("node", 1, "w"),),
    edits=(
        SetAttribute("n", "group", 4),
        SetAttribute("n", "split", (1, 2)),
        SetAttribute("n", "scale", 0.5),
        SetAttribute("n", "num_outputs", None),
        SetInput("n", 1, (2, 3), (2,)),
        ResizeVector("n", 1, False, (None, 8), ((3, 2), (1, 1))),
        ScaleInput("n", 0, ((-1, (A, B)),), 0.5),
        GatherOutput("n", 0, 1, (A, ConcatOf((B, Kept(1))))),
    ),
    inputs=(Interface("x", (None, (A,))),),
    outputs=(Interface("y", ((A, B),)),),
    strategy=Strategy("diagonal", 12.0, 3),
    keep_interface=True,
    source={"digest": "1"},
)


def test_a_plan_survives_json() -> None:
    assert Plan.loads(PLAN.dumps()) == PLAN == Plan.loads(PLAN.dumps(indent=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "version None"),
        ('{"version": 99}', "version 99"),
        ('{"version": 1}', "malformed plan"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadModel, match=message):
        Plan.loads(text)
