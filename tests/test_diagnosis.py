"""Distances of clones: they have known values, do not depend on the order of clones, and show a clone that differs."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import Array, Command, build_model, normal, perceptron
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclone_onnx import BadModel, BadRequest, Plan, Recipe, SourceMap, Strategy, expand
from hyperclone_onnx.diagnosis import Diagnosis, TensorDiagnosis, activations, diagnose, weights
from hyperclone_onnx.diagnosis.distance import joint, spread, spread_along
from hyperclone_onnx.diagnosis.rank import spectrum
from hyperclone_onnx.diagnosis.verdict import lasting
from hyperclone_onnx.plan.maps import Axis, ConcatOf, Kept, Named, ProductOf, index_axis
from hyperclone_onnx.plan.plans import METADATA_KEY

Zoo = Callable[[str], Path]
EXACT = ("symmetric", "diagonal")
NOISY = ("noisy-symmetric", "noisy-diagonal")


def grown(
    source: Path, out: Path, strategy: str = "symmetric", factor: int = 2, snr_db: float = 10.0, **more: Any
) -> Path:
    expand(source, out, factor, strategy=Strategy(strategy, snr_db), check=False, **more)  # type: ignore[arg-type]
    return out


def plan_of(path: Path) -> Plan:
    model = onnx.load(path, load_external_data=False)
    return Plan.loads(next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY))


def change(path: Path, edit: Callable[[dict[str, Array]], None]) -> Path:
    """Edit the weights in a model's file: `edit` changes the arrays, or replaces them."""
    model = onnx.load(path)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    edit(arrays)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(arrays[tensor.name]), tensor.name))
    onnx.save(model, path)
    return path


def by_name(diagnosis: Diagnosis) -> dict[str, TensorDiagnosis]:
    return {tensor.name: tensor for tensor in diagnosis.tensors}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A perceptron wide enough for averages. Its two tables are tied, so that each width has clones on both sides."""
    path = tmp_path_factory.mktemp("wide") / "wide.onnx"
    onnx.save(perceptron(hidden=48, ffn=64, vocab=61, tied=True), path)
    return path


# -- the distance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clones", "distance"),
    [
        ([[1.0, 1.0]], 0.0),
        ([[1.0, -1.0]], 1.0),
        ([[1.0, 0.0]], math.sqrt(0.5)),
        ([[3.0, 3.0, 3.0], [1.0, 1.0, 1.0]], 0.0),
        ([[1.0, 0.0, 0.0]], math.sqrt(2 / 3)),
        ([[0.1, 0.1, 0.1]], 0.0),
        ([[0.0, 0.0]], None),
    ],
)
def test_the_distance_of_clones(clones: list[list[float]], distance: float | None) -> None:
    measured = spread(np.array(clones).T).distance
    assert measured is None if distance is None else measured == pytest.approx(distance, abs=0.0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_distance_along_an_axis_is_its_definition(numbers: list[int], seed: int) -> None:
    _, source = np.unique(numbers, return_inverse=True)
    values = np.random.default_rng(seed).standard_normal((3, len(source)))
    means = np.stack([values[:, source == unit].mean(axis=1) for unit in source], axis=1)
    repeated = np.bincount(source)[source] > 1
    within, power = (float(np.square(array[:, repeated]).sum()) for array in (values - means, values))
    result = spread_along(values, source)
    assert (result.within, result.power) == pytest.approx((within, power))


def test_axes_taken_as_one() -> None:
    assert joint([np.array([0, 1, 0]), np.array([0, 0, 1])]).tolist() == [0, 0, 1, 2, 2, 3, 0, 0, 1]
    assert joint([]).tolist() == [0]


# -- the distances of a tensor ----------------------------------------------------------------------------


def spread_of_columns(table: Array, source: Array) -> tuple[float, float]:
    """The sums of squares of vectors, which are the columns of a table, by the definition."""
    means = np.stack([table[:, source == unit].mean(axis=1) for unit in source], axis=1)
    repeated = np.bincount(source)[source] > 1
    return float(np.square((table - means)[:, repeated]).sum()), float(np.square(table[:, repeated]).sum())


def by_definition(table: Array, inputs: Array, others: Array) -> dict[str, float | None]:
    """The distances of a table (inputs by others), computed one block at a time."""

    def distance(*sums: tuple[float, float]) -> float | None:
        within, power = (sum(numbers) for numbers in zip(*sums, strict=True))
        return math.sqrt(max(0.0, within) / power) if power else None

    def added(array: Array, rows: Array) -> Array:
        return np.stack([array[rows == unit].sum(axis=0) for unit in np.unique(rows)])

    def ordered(array: Array, rows: Array) -> Array:
        return np.concatenate([np.sort(array[rows == unit], axis=0) for unit in np.unique(rows)])

    return {
        "forward": distance(spread_of_columns(added(table, inputs), others)),
        "backward": distance(spread_of_columns(added(table.T, others), inputs)),
        "plain_forward": distance(spread_of_columns(table, others)),
        "plain_backward": distance(spread_of_columns(table.T, inputs)),
        "matched": distance(
            spread_of_columns(ordered(table, inputs), others), spread_of_columns(ordered(table.T, others), inputs)
        ),
    }


MAPS = {
    "t": SourceMap(3, tile=2),
    "r": SourceMap(2, repeat=3),
    "i": SourceMap(3, index=(0, 2, 1, 1, 0, 0)),
    "one": SourceMap(4, tile=1),
}
FACTORS = st.one_of(
    st.sampled_from([Kept(1), Kept(3), *map(Named, MAPS)]),
    st.just(ConcatOf((ProductOf((Named("t"), Kept(2))), Named("i"), Kept(1)))),
    st.just(ProductOf((Kept(2), Named("r")))),
)


@given(
    st.lists(st.tuples(FACTORS, st.booleans()), min_size=1, max_size=3),
    st.integers(0, 99),
    st.sampled_from([48, 1 << 17]),
)
@settings(max_examples=30, deadline=None)
def test_a_tensor_s_distances_are_their_definitions(factors: list[tuple[Axis, bool]], seed: int, block: int) -> None:
    """For all kinds of axes, block sizes, and infinite weights, which count as zeros."""
    recipe = Recipe(
        "w", tuple((factor,) for factor, _ in factors), tuple((i, 0) for i, (_, shared) in enumerate(factors) if shared)
    )
    table = weights.layout(recipe, MAPS)
    array = np.random.default_rng(seed).standard_normal(table.shape).astype(np.float32)
    array.reshape(-1)[seed % array.size] = np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "BLOCK", block)
        comparison = weights.compare(array, table)
    sources = [index_axis([(factor, False)], MAPS).source for factor, _ in factors]
    sides = [[i for i, (_, shared) in enumerate(factors) if shared == side] for side in (True, False)]
    inputs, others = (joint([sources[i] for i in side]) for side in sides)
    array.reshape(-1)[seed % array.size] = 0.0
    flat = array.transpose(*sides[0], *sides[1]).reshape(len(inputs), len(others)).astype(np.float64)
    for name, distance in by_definition(flat, inputs, others).items():
        assert getattr(comparison, name).distance == (
            None if distance is None else pytest.approx(distance, abs=1e-7)
        ), name


# -- clones right after growth ----------------------------------------------------------------------------

GRAPHS = ["llama.distinct", "gpt2.collide", "bart.distinct", "falcon_mq.distinct", "llama.cached", "bert.fused"]


@pytest.mark.parametrize("name", GRAPHS)
def test_symmetric_clones_are_exactly_the_same_and_stuck(zoo: Zoo, tmp_path: Path, name: str) -> None:
    diagnosis = diagnose(grown(zoo(name), tmp_path / "big.onnx"), ranks=False)
    assert (diagnosis.weights, diagnosis.forward, diagnosis.backward, diagnosis.activations) == (0.0, 0.0, 0.0, 0.0)
    assert diagnosis.stuck and diagnosis.conclusion.startswith("stuck")
    assert {part.verdict for part in (*diagnosis.layers, *diagnosis.roles)} == {"tied"}
    assert all(role.values for role in diagnosis.roles), "a role of which no activation was compared"
    assert set(diagnosis.tied) == set(plan_of(tmp_path / "big.onnx").dims)


FRESH = [
    *(("llama.distinct", strategy) for strategy in (*NOISY, "diagonal")),
    ("bart.distinct", "noisy-symmetric"),
    ("qwen3_moe.built", "noisy-diagonal"),
    ("t5_merged.cached", "noisy-symmetric"),
]


@pytest.mark.parametrize(("name", "strategy"), FRESH)
def test_fresh_clones_compute_the_same_up_to_rounding(zoo: Zoo, tmp_path: Path, name: str, strategy: str) -> None:
    diagnosis = diagnose(grown(zoo(name), tmp_path / "big.onnx", strategy), ranks=False)
    assert len(diagnosis.values) > 10
    assert diagnosis.activations < 1e-6
    assert {layer.verdict for layer in diagnosis.layers} <= {"ready", "tied"}
    if strategy in NOISY:
        assert not diagnosis.stuck and not diagnosis.tied and diagnosis.conclusion.startswith("ready")


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("snr_db", [0.0, 10.0, 20.0])
def test_noise_is_as_far_apart_as_asked(wide: Path, tmp_path: Path, snr_db: float, factor: int) -> None:
    diagnosis = diagnose(grown(wide, tmp_path / "big.onnx", "noisy-symmetric", factor, snr_db), activations=False)
    ratio = 10.0 ** (-snr_db / 20.0)
    for name in ("up.0", "down.1"):
        tensor = by_name(diagnosis)[name]
        assert tensor.plain_backward == pytest.approx(ratio / math.hypot(1.0, ratio), rel=0.05)
        shown = ratio / math.sqrt(factor)  # the sum over the readers' clones
        assert tensor.backward == pytest.approx(shown / math.hypot(1.0, shown), rel=0.1)
        assert tensor.forward is not None and tensor.forward < 1e-7


def test_weights_of_diagonal_clones_mislead(wide: Path, tmp_path: Path) -> None:
    diagnosis = diagnose(grown(wide, tmp_path / "big.onnx", "diagonal"))
    tensor = by_name(diagnosis)["up.0"]
    assert tensor.plain_backward == pytest.approx(math.sqrt(0.5)), "by themselves they have nothing in common"
    assert (tensor.matched, tensor.forward, tensor.backward, diagnosis.activations) == (0.0, 0.0, 0.0, 0.0)
    assert diagnosis.stuck and "rounding" in diagnosis.conclusion


def test_diagonal_clones_that_end_in_one_are_not_tied(small: Path, tmp_path: Path) -> None:
    """A separate head reads only one clone of each unit: the other clones get no gradient from it."""
    diagnosis = diagnose(grown(small, tmp_path / "big.onnx", "diagonal"))
    assert not diagnosis.stuck and by_name(diagnosis)["head"].backward == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"requests": {"ffn": 2}, "factor": 1},
        {"requests": {"head_dim": 2}, "factor": 3},
        {"keep_interface": True},
        {"factor": 4},
    ],
    ids=str,
)
def test_any_growth(zoo: Zoo, tmp_path: Path, options: dict[str, Any]) -> None:
    diagnosis = diagnose(grown(zoo("gpt_neox.distinct"), tmp_path / "big.onnx", **options), ranks=False)
    assert diagnosis.stuck and diagnosis.weights == 0.0 and diagnosis.activations < 1e-6 and diagnosis.values


@pytest.mark.parametrize("strategy", ["symmetric", "noisy-symmetric"])
def test_unequal_repeats(small: Path, tmp_path: Path, strategy: str) -> None:
    maps = {"ffn.0": SourceMap(20, index=(*range(20), *range(10), 0, 0, 1))}
    diagnosis = diagnose(grown(small, tmp_path / "big.onnx", strategy, maps=maps))
    assert diagnosis.activations < 1e-6 and diagnosis.stuck == (strategy == "symmetric")
    assert diagnosis.forward < 1e-7 and (diagnosis.backward > 0.1) == (strategy != "symmetric")


@pytest.mark.parametrize("dtype", ["float16", "double"])
@pytest.mark.parametrize("factor", [2, 5])
def test_other_types(tmp_path: Path, dtype: str, factor: int) -> None:
    onnx.save(perceptron(dtype=dtype), tmp_path / "small.onnx")
    diagnosis = diagnose(grown(tmp_path / "small.onnx", tmp_path / "big.onnx", factor=factor))
    assert diagnosis.stuck and diagnosis.forward == 0.0 and diagnosis.activations == 0.0
    assert ("in float32" in diagnosis.ran_on) == (dtype == "float16")
    noisy = diagnose(grown(tmp_path / "small.onnx", tmp_path / "big.onnx", "noisy-symmetric", factor, snr_db=20.0))
    assert noisy.conclusion.startswith("ready") and noisy.tied == ()


def test_codes_are_compared_as_numbers_and_have_no_rank(tmp_path: Path, small: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(small, tmp_path / "int8.onnx", weight_type=QuantType.QInt8)
    big = grown(tmp_path / "int8.onnx", tmp_path / "big.onnx", "noisy-symmetric")
    diagnosis = diagnose(big)
    codes = [tensor for tensor in diagnosis.tensors if tensor.name.endswith("_quantized")]
    assert len(codes) > 3 and diagnosis.stuck and not any(tensor.rank for tensor in codes)

    def shift(arrays: dict[str, Array]) -> None:
        arrays["up.0_quantized"][0, 0] += 1

    again = diagnose(change(big, shift))
    assert not again.stuck and by_name(again)["up.0_quantized"].forward


def test_grown_twice_the_last_growth_is_compared(zoo: Zoo, tmp_path: Path) -> None:
    source = zoo("gpt2.distinct")
    for first, last in (("symmetric", "noisy-symmetric"), ("noisy-symmetric", "symmetric")):
        middle = grown(source, tmp_path / "middle.onnx", first)
        diagnosis = diagnose(grown(middle, tmp_path / "big.onnx", last))
        assert diagnosis.strategy["name"] == last and diagnosis.stuck == (last == "symmetric")


# -- the order of clones ----------------------------------------------------------------------------------


def permuted(axis: Axis, orders: Mapping[str, Array]) -> Array:
    """A permutation of the indices of an axis that exchanges the clones within each unit of its dimensions."""
    match axis:
        case Kept(size):
            return np.arange(size)
        case Named(name):
            return orders[name]
        case ProductOf(parts):
            total = np.zeros(1, np.int64)
            for order in (permuted(part, orders) for part in parts):
                total = (total[:, None] * len(order) + order[None, :]).reshape(-1)
            return total
        case ConcatOf(parts):
            orders_of_parts = [permuted(part, orders) for part in parts]
            starts = np.cumsum([0, *(len(part) for part in orders_of_parts)])
            return np.concatenate([order + start for order, start in zip(orders_of_parts, starts, strict=False)])


def permute(path: Path) -> Path:
    """Give the clones of every unit another order: one order for each unit, the same wherever the dimension occurs."""
    plan, rng = plan_of(path), np.random.default_rng(3)
    orders = {}
    for name, source in plan.maps.items():
        orders[name] = np.arange(source.grown)
        for unit in range(source.size):
            clones = np.flatnonzero(source.indices == unit)
            orders[name][clones] = rng.permutation(clones)

    def edit(arrays: dict[str, Array]) -> None:
        for name, recipe in plan.tensors.items():
            for axis, factors in enumerate(recipe.axes):
                arrays[name] = np.take(arrays[name], permuted(ProductOf(factors), orders), axis=axis)

    return change(path, edit)


def run(path: Path) -> Array:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {value.name: np.ones((2, 5), np.int64) for value in session.get_inputs()}
    feeds[session.get_inputs()[0].name] = np.arange(10).reshape(2, 5) % 7
    return np.asarray(session.run(None, feeds)[0])


@pytest.mark.parametrize(
    ("name", "strategy", "factor"),
    [
        *(("gpt2.distinct", strategy, 3) for strategy in (*EXACT, *NOISY)),
        ("llama.distinct", "diagonal", 2),
        ("llama.distinct", "noisy-symmetric", 2),
    ],
)
def test_the_order_of_clones_does_not_matter(zoo: Zoo, tmp_path: Path, name: str, strategy: str, factor: int) -> None:
    big = grown(zoo(name), tmp_path / "big.onnx", strategy, factor)
    before, outputs = diagnose(big, ranks=False), run(big)
    after = diagnose(permute(big), ranks=False)
    assert np.abs(run(big) - outputs).max() < 1e-4, "the permuted model is another model"
    for which in ("weights", "forward", "backward"):
        assert getattr(after, which) == pytest.approx(getattr(before, which), rel=1e-4, abs=1e-7)
    assert after.activations < 1e-6
    assert (after.stuck, after.tied) == (before.stuck, before.tied)


# -- clones that have parted ------------------------------------------------------------------------------


def shifted(name: str, at: Any, by: float) -> Callable[[dict[str, Array]], None]:
    def edit(arrays: dict[str, Array]) -> None:
        arrays[name][at] += by

    return edit


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize(
    ("name", "at", "side"),
    [
        ("up.0", (slice(None), 3), "forward"),
        ("down.1", (5, slice(None)), "backward"),
        ("embedding", (slice(None), 0), "forward"),
    ],
)
def test_one_clone_that_parts_is_found(
    wide: Path, tmp_path: Path, strategy: str, name: str, at: Any, side: str
) -> None:
    big = grown(wide, tmp_path / "big.onnx", strategy)
    assert diagnose(big, ranks=False).stuck
    diagnosis = diagnose(change(big, shifted(name, at, 0.01)), ranks=False)
    tensor = by_name(diagnosis)[name]
    assert not diagnosis.stuck and not set(tensor.others if side == "forward" else tensor.inputs) & set(diagnosis.tied)
    assert getattr(tensor, side) > 100 * tensor.tolerance
    others = [tensor for tensor in diagnosis.tensors if tensor.name != name]
    assert all(
        (tensor.forward or 0.0) <= tensor.tolerance and (tensor.backward or 0.0) <= tensor.tolerance
        for tensor in others
    )
    assert (diagnosis.activations > diagnosis.tolerance) == (side == "forward")
    assert any(layer.verdict != "tied" for layer in diagnosis.layers)


@pytest.mark.parametrize(("size", "verdict"), [(0.03, "parting"), (3.0, "parted")])
def test_the_distance_decides_the_verdict(wide: Path, tmp_path: Path, size: float, verdict: str) -> None:
    big = grown(wide, tmp_path / "big.onnx")

    def edit(arrays: dict[str, Array]) -> None:
        rng = np.random.default_rng(0)
        for name in ("up.0", "down.0", "up.1", "down.1"):
            scale = size * arrays[name].std()
            arrays[name] += (rng.standard_normal(arrays[name].shape) * scale).astype(np.float32)

    diagnosis = diagnose(change(big, edit), ranks=False)
    layers = {layer.name: layer.verdict for layer in diagnosis.layers}
    assert layers["layer 0"] == layers["layer 1"] == verdict
    assert f"2 {verdict}" in diagnosis.conclusion


def test_clones_that_only_rounding_parted_are_nearly_stuck(wide: Path, tmp_path: Path) -> None:
    big = grown(wide, tmp_path / "big.onnx", "diagonal")
    diagnosis = diagnose(change(big, shifted("up.0", (slice(None), 3), 1e-3)), ranks=False)
    assert not diagnosis.stuck and diagnosis.conclusion.startswith(
        "nearly stuck: the clones in 2 of 2 layers differ by"
    )


def test_a_dimension_that_stays_tied_beside_one_that_parts(wide: Path, tmp_path: Path) -> None:
    """A changed clone parts the residual stream, whereas symmetric clones of the ffn all read the same sum."""
    big = grown(wide, tmp_path / "big.onnx")
    diagnosis = diagnose(change(big, shifted("embedding", (slice(None), 0), 0.5)), ranks=False)
    assert diagnosis.tied == ("ffn.0", "ffn.1") and "ffn stay tied" in diagnosis.conclusion
    diagonal = grown(wide, tmp_path / "diagonal.onnx", "diagonal")
    diagnosis = diagnose(change(diagonal, shifted("embedding", (slice(None), 0), 0.5)), ranks=False)
    assert diagnosis.tied == (), "each clone of the ffn reads clones of its own"


def test_the_stable_colouring_is_a_fixed_point() -> None:
    def tensor(inputs: str, others: str, **distances: float) -> TensorDiagnosis:
        all_distances = (
            dict.fromkeys(("matched", "forward", "backward", "plain_forward", "plain_backward"), 0.0) | distances
        )
        return TensorDiagnosis("w", "", (2, 2), (inputs,), (others,), tolerance=1e-6, **all_distances)

    chain = [tensor(a, b, plain_forward=1.0) for a, b in ("ab", "bc", "cd")]
    assert lasting(chain) == set("abcd")
    assert lasting([*chain, tensor("a", "a", backward=1.0)]) == set()
    assert lasting([*chain, tensor("c", "c", forward=1.0)]) == set("ab")


# -- ranks ------------------------------------------------------------------------------------------------


def test_effective_ranks_of_known_spectra() -> None:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((60, 60)))[0] for _ in "uv")
    flat = spectrum((u[:, :10] @ v[:10]).astype(np.float32))
    assert (flat.effective, flat.stable, flat.by) == (pytest.approx(10, rel=1e-5), pytest.approx(10, rel=1e-5), "exact")
    p = np.array([0.5, 0.25, 0.25])
    assert spectrum((u[:, :3] * p) @ v[:3]).effective == pytest.approx(2**1.5, rel=1e-6)
    assert spectrum(np.zeros((4, 4))).effective == 0.0


@pytest.mark.parametrize("power", [0.0, 0.7, 1.5])
def test_the_estimate_of_large_ones_is_near(power: float) -> None:
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((300, 300)))[0] for _ in "uv")
    matrix = (u * np.arange(1, 301.0) ** -power) @ v
    exact, near = spectrum(matrix), spectrum(matrix, exact=1)
    assert (exact.by, near.by) == ("exact", "lanczos")
    assert near.effective == pytest.approx(exact.effective, rel=0.05)
    assert near.stable == pytest.approx(exact.stable, rel=1e-3)


def test_ranks_beside_the_source_s(wide: Path, tmp_path: Path) -> None:
    symmetric = diagnose(grown(wide, tmp_path / "big.onnx"), wide, activations=False)
    noisy = diagnose(grown(wide, tmp_path / "noisy.onnx", "noisy-symmetric"), wide, activations=False)
    for name in ("up.0", "down.1"):
        one, two = by_name(symmetric)[name].rank, by_name(noisy)[name].rank
        assert one is not None and two is not None and one.source is not None
        assert one.effective == pytest.approx(one.source, rel=1e-3), "clones that are alike add no direction"
        assert one.largest == 96 and two.effective > 1.5 * one.source


# -- as a command -----------------------------------------------------------------------------------------


def test_the_command(cli: Command, small: Path, tmp_path: Path) -> None:
    big = grown(small, tmp_path / "big.onnx")
    done = cli("diagnose", big, "--source", small, "--json-out", tmp_path / "found.json")
    assert done.code == 0, "stuck is a diagnosis, no failure"
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["layer", "tensors", "weights"] and lines[-1].startswith(
        "stuck: the clones in 2 of 2"
    )
    assert any(line.split()[:2] == ["layer", "0"] and line.split()[-1] == "tied" for line in lines)
    data = json.loads((tmp_path / "found.json").read_text())
    assert data == json.loads(cli("diagnose", big, "--source", small, "--json").stdout)
    assert data == json.loads(json.dumps(diagnose(big, small).to_json(), allow_nan=False))
    assert data["schema"] == 1 and data["stuck"] is True and len(data["tensors"]) == len(plan_of(big).tensors)


def test_distances_that_were_not_measured_are_none(cli: Command, small: Path, tmp_path: Path) -> None:
    big = grown(small, tmp_path / "big.onnx")
    data = json.loads(cli("diagnose", big, "--no-activations", "--no-ranks", "--json").stdout)
    assert data["activations"] is None and data["values"] == [] and data["stuck"] is True
    assert not any(tensor["rank"] for tensor in data["tensors"])


def test_given_inputs_and_lengths(cli: Command, small: Path, tmp_path: Path) -> None:
    big = grown(small, tmp_path / "big.onnx", "noisy-symmetric")
    np.savez(tmp_path / "inputs.npz", ids=np.arange(6).reshape(1, 6))
    assert "inputs.npz" in cli("diagnose", big, "--inputs", tmp_path / "inputs.npz").stdout
    assert "batch=2, sequence=9" in cli("diagnose", big, "--length", "9").stdout
    assert "batch=2, sequence=32" in cli("diagnose", big).stdout


def test_activations_in_many_runs_are_those_of_one(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = grown(small, tmp_path / "big.onnx", "noisy-symmetric")
    once = diagnose(big, ranks=False)
    monkeypatch.setattr(activations, "BUDGET", 1)
    assert diagnose(big, ranks=False) == once and len(once.values) > 3


def test_inputs_whose_clones_differ_are_told(tmp_path: Path) -> None:
    graph = "g (float[b, 8] x) => (float[b, 8] y) { u = MatMul (x, w) r = Relu (u) d = MatMul (r, v) y = Add (x, d) }"
    shapes = {"w": (8, 12), "v": (12, 8)}
    onnx.save(build_model(graph, normal(0, shapes)), tmp_path / "small.onnx")
    big = grown(tmp_path / "small.onnx", tmp_path / "big.onnx")
    assert diagnose(big).stuck, "random inputs are alike"
    for alike in (True, False):
        half = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
        np.savez(tmp_path / "inputs.npz", x=np.concatenate([half, half if alike else -half], axis=1))
        diagnosis = diagnose(big, inputs=tmp_path / "inputs.npz")
        assert diagnosis.stuck == alike and bool(diagnosis.notes) != alike


def test_a_model_that_does_not_run_is_judged_by_its_weights(cli: Command, small: Path, tmp_path: Path) -> None:
    model = onnx.load(grown(small, tmp_path / "big.onnx"))
    model.graph.node.append(onnx.helper.make_node("Unheard", ["ids"], ["heard"], domain="of"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("heard", onnx.TensorProto.INT64, None))
    model.opset_import.append(onnx.helper.make_opsetid("of", 1))
    onnx.save(model, tmp_path / "big.onnx")
    done = cli("diagnose", tmp_path / "big.onnx")
    assert done.code == 0 and "weights alone were judged" in done.stdout and "stuck: " in done.stdout
    assert cli("diagnose", tmp_path / "big.onnx", "--length", "5").code == 3


def test_a_source_with_other_weights_is_told(small: Path, tmp_path: Path) -> None:
    big = grown(small, tmp_path / "big.onnx")
    other = tmp_path / "other.onnx"
    other.write_bytes(small.read_bytes())
    assert diagnose(big, other, activations=False).notes == ()
    change(other, shifted("up.0", (0, 0), 1.0))
    assert "other weights" in diagnose(big, other, activations=False).notes[0]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture(cli: Command, small: Path, tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"p.{suffix}"
    done = cli("diagnose", grown(small, tmp_path / "big.onnx"), "--no-activations", "--plot", picture)
    content = picture.read_bytes()
    assert done.code == 0 and content.startswith(start)
    if suffix == "SVG":
        assert b"<!-- clones parted -->" in content and b"<!-- nothing in common -->" in content


@pytest.mark.parametrize("name", ["p", "p.onnx", "p."])
def test_an_unknown_suffix_of_a_picture_is_refused_before_any_work(cli: Command, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    done = cli("diagnose", tmp_path / "none.onnx", "--plot", tmp_path / name)
    assert done.code == 2 and "the suffix says the format" in done.error and ".svg" in done.error
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_plan_from_elsewhere(cli: Command, small: Path, tmp_path: Path) -> None:
    big = grown(small, tmp_path / "big.onnx", plan_out=tmp_path / "plan.json")
    model = onnx.load(big)
    del model.metadata_props[:]
    onnx.save(model, big)
    assert cli("diagnose", big).code == 2
    assert cli("diagnose", big, "--plan", tmp_path / "plan.json").stdout.splitlines()[-1].startswith("stuck")


ERRORS = [
    (("small.onnx",), 2, "small.onnx: it carries no plan"),
    (("big.onnx", "--inputs", "bad.npz"), 2, "--inputs bad.npz: not a readable .npz file"),
    (("big.onnx", "--inputs", "other.npz"), 2, "--inputs other.npz: it lacks 'ids'; the model's inputs are 'ids'"),
    (("big.onnx", "--inputs", "wrong.npz"), 3, "does not run on the inputs of wrong.npz"),
    (
        ("big.onnx", "--source", "other.onnx"),
        2,
        "--source other.onnx: the plan is for another model: 'embedding' has the shape (31, 8)",
    ),
    (("big.onnx", "--source", "none.onnx"), 4, "none.onnx"),
    (("big.onnx", "--plan", "none.json"), 4, "none.json: not a readable plan"),
    (("big.onnx", "--plan", "bad.npz"), 4, "a plan that is not JSON"),
    (("torn.onnx",), 4, "torn.onnx: its metadata holds a malformed plan"),
    (("lacking.onnx",), 4, "lacking.onnx: it has no tensor 'gain.grown', which the plan names"),
    (("big.onnx", "--json-out", "big.onnx"), 2, "this would overwrite the source"),
    (("big.onnx", "--plot", "nowhere/p.png"), 2, "does not exist"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), ERRORS, ids=str)
def test_bad_requests_are_refused_in_one_line(
    cli: Command,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.onnx").write_bytes(small.read_bytes())
    onnx.save(perceptron(hidden=8), "other.onnx")
    grown(Path("small.onnx"), Path("big.onnx"))
    Path("bad.npz").write_text("{")
    np.savez("other.npz", tokens=np.ones((1, 2), np.int64))
    np.savez("wrong.npz", ids=np.full((1, 2), 10**6))
    for name in ("torn.onnx", "lacking.onnx"):
        model = onnx.load("big.onnx")
        stored = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
        plan = json.loads(stored.value)
        if name == "torn.onnx":
            del plan["tensors"]
        else:
            plan["tensors"]["gain.grown"] = plan["tensors"]["gain"]
        stored.value = json.dumps(plan)
        onnx.save(model, name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    outcome = cli("diagnose", *arguments)
    assert outcome.code == code and text in outcome.error, outcome.stderr
    assert outcome.error.startswith("error: ") and outcome.stdout == ""
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_matplotlib(cli: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    outcome = cli("diagnose", grown(small, tmp_path / "big.onnx"), "--plot", tmp_path / "p.png")
    assert outcome.code == 2 and "pip install 'hyperclone-onnx[plot]'" in outcome.error


def test_a_tensor_of_another_shape(small: Path, tmp_path: Path) -> None:
    big = grown(small, tmp_path / "big.onnx")
    plan = plan_of(big)
    other = dataclasses.replace(plan.tensors["gain"], axes=((Kept(25),), (Named("hidden"),)))
    with pytest.raises(BadModel, match=r"'gain' has the shape \(24,\), and \(25, 24\) in the plan"):
        diagnose(big, plan=dataclasses.replace(plan, tensors={**plan.tensors, "gain": other}))
    with pytest.raises(BadRequest, match="carries no plan"):
        diagnose(small)


def test_importing_it_is_light() -> None:
    heavy = "{'onnxruntime', 'matplotlib', 'scipy', 'torch', 'jax'}"
    code = f"import sys, hyperclone_onnx.diagnosis, hyperclone_onnx.diagnosis.plot; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
