"""Widths of any size under every norm: averages that count each source channel once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import build_model, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclone_onnx import ModelsDiffer, Refused, SourceMap, Strategy, analyse, expand, plan_expansion
from hyperclone_onnx.plan.edits import WeighAverage, edit_from_json, shares_of_copies
from hyperclone_onnx.plan.maps import Named
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.rewriting.rewriting import rewrite
from hyperclone_onnx.rewriting.written_norms import FORMS
from hyperclone_onnx.validation.wide import to_double

Array = np.ndarray[Any, Any]
HIDDEN = 12

NORMS = {
    "LayerNormalization": "n = LayerNormalization <epsilon = 0.3> (y, gain, bias)",
    "LayerNormalization without bias": "n = LayerNormalization <axis = 2, epsilon = 0.3> (y, gain)",
    "LayerNormalization over two axes": "n = LayerNormalization <axis = -2, epsilon = 0.3> (y, places, places)",
    "RMSNormalization": "n = RMSNormalization <epsilon = 0.3> (y, gain)",
    "SimplifiedLayerNormalization": "n = SimplifiedLayerNormalization <epsilon = 0.3> (y, gain)",
    "ReduceMean": "m = ReduceMean (y, last)  n = Sub (y, m)",
    "ReduceMean without its axis": "m = ReduceMean <keepdims = 0> (y, last)  k = Unsqueeze (m, last)  n = Mul (y, k)",
    "ReduceL2": "m = ReduceL2 (y, last)  n = Div (y, m)",
    "ReduceSumSquare": "m = ReduceSumSquare (y, last)  n = Div (y, m)",
    "MeanVarianceNormalization": "n = MeanVarianceNormalization <axes = [2]> (y)",
    "LpNormalization": "n = LpNormalization (y)",
    "LpNormalization of absolute values": "n = LpNormalization <p = 1, axis = 2> (y)",
    "Softmax": "n = Softmax (y)",
    "GroupNormalization": """t = Transpose <perm = [0, 2, 1]> (y)
        g = GroupNormalization <num_groups = 1, epsilon = 0.3> (t, gain, bias)  n = Transpose <perm = [0, 2, 1]> (g)""",
}
"""Norms of a value y. Epsilon is large, so that an epsilon that does not fit would show."""


FLOAT32_ALONE = ("MeanVarianceNormalization", "GroupNormalization")
"""The norms that ONNX Runtime does not compute in float64, or not to its precision."""


def behind_another(norm: str, dtype: type[np.floating[Any]] = np.float32) -> onnx.ModelProto:
    """A norm behind a LayerNorm, so that no construction with a stretched stream fits; then a head."""
    weights: dict[str, Any] = normal(1, {"table": (31, HIDDEN), "places": (9, HIDDEN), "head": (HIDDEN, 31)})
    weights |= normal(2, dict.fromkeys(["gain", "bias", "first", "last_gain"], (HIDDEN,)))
    weights = {name: array.astype(dtype) for name, array in weights.items()} | {"last": np.array([-1])}
    kind = {np.float32: "float", np.float16: "float16", np.float64: "double"}[dtype]
    text = f"""g (int64[batch, 9] ids) => ({kind}[batch, 9, 31] logits) {{
        x = Gather (table, ids)  y = LayerNormalization <epsilon = 0.3> (x, first)
        {norm}
        r = Add (n, y)  z = LayerNormalization (r, last_gain)  logits = MatMul (z, head)
    }}"""
    used = text.replace("(", " ").replace(",", " ").replace(")", " ").split()
    return build_model(text, {name: array for name, array in weights.items() if name in used}, opset=23)


def computed(model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


def planned(path: Path, model: onnx.ModelProto, source_map: SourceMap) -> tuple[ir.Model, Plan]:
    """The analysed source, and the plan that grows its width."""
    onnx.save(model, path)
    analysis = analyse(path)
    plan = plan_expansion(analysis, maps={"hidden": source_map}, strategy=Strategy("noisy-symmetric", seed=3))
    return analysis.model, plan


def grown(path: Path, model: onnx.ModelProto, source_map: SourceMap) -> tuple[ir.Model, Plan]:
    """Grow the width of a model, and check that it computes the same to rounding, in float64 where that runs."""
    source, plan = planned(path, model, source_map)
    feeds = {"ids": np.arange(18).reshape(2, 9)}
    wide = not any(node.op_type in FLOAT32_ALONE for node in source.graph)
    pair = (source, rewrite(source, plan))
    if wide:
        pair = (to_double(source.clone()), to_double(rewrite(source, plan, ir.DataType.DOUBLE)))
    small, big = (next(iter(computed(graph, feeds).values())) for graph in pair)
    assert np.isfinite(small).all() and small.std() > 0.1
    tolerance = 1e-12 if wide else 1e-2 if small.dtype == np.float16 else 1e-5
    np.testing.assert_allclose(big, small, rtol=0, atol=tolerance * np.abs(small).max())
    return rewrite(source, plan), plan


@st.composite
def index_maps(draw: st.DrawFn, size: int) -> SourceMap:
    extra = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=2 * size))
    return SourceMap(size, index=tuple(draw(st.permutations([*range(size), *extra]))))


@given(index_maps(HIDDEN), st.sampled_from(sorted(NORMS)))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_map_goes_through_any_norm(
    tmp_path_factory: pytest.TempPathFactory, source_map: SourceMap, norm: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "model.onnx"
    _, plan = grown(path, behind_another(NORMS[norm]), source_map)
    assert not plan.stretched, "all copies are plain copies"
    assert Plan.loads(plan.dumps()) == plan


@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_is_written_out_where_the_width_is_no_multiple(norm: str, tmp_path: Path) -> None:
    big, plan = grown(tmp_path / "model.onnx", behind_another(NORMS[norm]), SourceMap(HIDDEN, cycle=17))
    weights = [name for name in big.graph.initializers if name.endswith(".average")]
    assert [f"{node}.average" for node in plan.weighed] == weights and len(weights) >= 2
    assert all(plan.brings_in(name) for name in weights) and not plan.tensors.keys() & set(weights)
    copies = np.bincount(np.arange(17) % HIDDEN)[np.arange(17) % HIDDEN]
    for name in weights:
        array = big.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
        total = 17 / HIDDEN if name.split("_")[0] not in ("Softmax", "LpNormalization") else 1.0
        np.testing.assert_allclose(array.reshape(-1), total / copies, rtol=1e-6)


def test_a_whole_factor_keeps_the_norms(tmp_path: Path) -> None:
    onnx.save(behind_another(NORMS["LayerNormalization"]), tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    assert not plan_expansion(analysis, 2).weighed and not plan_expansion(analysis, 3).weighed


def test_groups_across_joined_parts_take_whole_factors(tmp_path: Path) -> None:
    """A fraction gives the nearest one, and a size that is no multiple is refused."""
    weights = normal(0, {"a": (5, 16), "b": (5, 8), "gain": (24,), "bias": (24,), "head": (24, 7)})
    model = build_model(
        """g (float[batch, 9, 5] x) => (float[batch, 9, 7] y) {
            p = MatMul (x, a)  q = MatMul (x, b)  j = Concat <axis = 2> (p, q)  t = Transpose <perm = [0, 2, 1]> (j)
            n = GroupNormalization <num_groups = 4> (t, gain, bias)  u = Transpose <perm = [0, 2, 1]> (n)
            y = MatMul (u, head)
        }""",
        weights,
        opset=21,
    )
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    assert [dimension.size for dimension in analysis.named if dimension.dim.tied is not None] == [16, 8]
    (one, other) = (dimension.name for dimension in analysis.named if dimension.dim.tied is not None)
    for factor, times in ((1.5, 2), (1.25, 1), (2.75, 3)):
        sizes = {name: dim.map.grown for name, dim in plan_expansion(analysis, factor).dims.items()}
        assert (sizes.get(one, 16), sizes.get(other, 8)) == (16 * times, 8 * times)
    with pytest.raises(Refused, match="so they must grow by one whole factor"):
        plan_expansion(analysis, sizes={one: 24, other: 12})


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("norm", ["LayerNormalization", "RMSNormalization", "ReduceMean", "GroupNormalization"])
def test_half_precision_averages_in_float32(norm: str, dtype: Any, tmp_path: Path) -> None:
    big, _ = grown(tmp_path / "model.onnx", behind_another(NORMS[norm], dtype), SourceMap(HIDDEN, cycle=17))
    constants = [name for name in big.graph.initializers if name.endswith((".average", ".epsilon"))]
    wanted = ir.DataType.FLOAT if dtype == np.float16 else ir.DataType.DOUBLE
    assert constants and {big.graph.initializers[name].dtype for name in constants} == {wanted}
    onnx.checker.check_model(ir.to_proto(big), full_check=True)


def test_all_outputs_of_a_norm_stay(tmp_path: Path) -> None:
    """The mean, the inverse deviation, and the sum that a fused norm gives besides."""
    weights = normal(0, {"table": (31, HIDDEN), "gain": (HIDDEN,), "bias": (HIDDEN,), "more": (HIDDEN,)})
    weights |= normal(1, {"head": (HIDDEN, 7)})
    model = build_model(
        """g (int64[batch] ids) => (float[batch, w] a, float[batch, 1] mean, float[batch, 1] inverse, float[batch, w] b,
            float[batch, w] total, float[batch, w] c, float[batch, w] plain, float[batch, 7] logits) {
            x = Gather (table, ids)
            a, mean, inverse = LayerNormalization <epsilon = 0.3> (x, gain, bias)
            b, none, nothing, total = com.microsoft.SkipLayerNormalization <epsilon = 0.3> (a, x, gain, bias, more)
            c, no, not, plain = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.3> (b, total, gain, more)
            logits = MatMul (c, head)
        }""",
        weights,
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    for node in model.graph.node:
        if node.domain:
            node.output[1] = node.output[2] = ""
    onnx.save(model, tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    source_map = SourceMap(HIDDEN, index=(*range(HIDDEN), 0, 0, 5))
    plan = plan_expansion(analysis, maps={"hidden": source_map})
    assert len(plan.weighed) == 3
    feeds = {"ids": np.arange(7)}
    small, big = computed(analysis.model, feeds), computed(rewrite(analysis.model, plan), feeds)
    for output, array in small.items():
        wanted = array[:, source_map.indices] if array.shape[1] == HIDDEN else array
        np.testing.assert_allclose(big[output], wanted, atol=3e-6, err_msg=output)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_positions", [False, True])
def test_embeddings_with_a_norm(with_mask: bool, with_positions: bool, tmp_path: Path) -> None:
    weights = normal(0, {"words": (31, HIDDEN), "places": (9, HIDDEN), "kinds": (2, HIDDEN), "head": (HIDDEN, 7)})
    weights |= normal(1, {"gain": (HIDDEN,), "bias": (HIDDEN,)})
    more = f"{', mask' if with_mask else ', ' if with_positions else ''}{', positions' if with_positions else ''}"
    model = build_model(
        f"""g (int32[batch, 9] ids, int32[batch, 9] segments{", int32[batch, 9] mask" if with_mask else ""}
            {", int32[batch, 9] positions" if with_positions else ""})
            => (float[batch, 9, 7] logits, int32[batch] shown, float[batch, 9, w] total) {{
            x, shown, total = com.microsoft.EmbedLayerNormalization
                <epsilon = 0.3> (ids, segments, words, places, kinds, gain, bias{more})
            y = LayerNormalization (x, gain)
            logits = MatMul (y, head)
        }}""",
        weights,
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    source, plan = planned(tmp_path / "model.onnx", model, SourceMap(HIDDEN, cycle=17))
    rng, shape = np.random.default_rng(0), (2, 9)
    feeds: dict[str, Array] = {"ids": rng.integers(0, 31, shape), "segments": rng.integers(0, 2, shape)}
    feeds |= {"mask": rng.integers(0, 2, shape)} if with_mask else {}
    feeds |= {"positions": rng.integers(0, 9, shape)} if with_positions else {}
    feeds = {name: array.astype(np.int32) for name, array in feeds.items()}
    small, big = computed(source, feeds), computed(rewrite(source, plan), feeds)
    np.testing.assert_array_equal(big["shown"], small["shown"])
    np.testing.assert_allclose(big["logits"], small["logits"], atol=3e-6)
    np.testing.assert_allclose(big["total"], small["total"][..., np.arange(17) % HIDDEN], atol=3e-6)


def test_wrong_weights_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An average that counts copies is another average, and validation says so."""
    monkeypatch.setattr("hyperclone_onnx.plan.edits.shares_of_copies", lambda *_: np.ones(17) * HIDDEN / 17)
    onnx.save(behind_another(NORMS["LayerNormalization"]), tmp_path / "model.onnx")
    with pytest.raises(ModelsDiffer):
        expand(
            tmp_path / "model.onnx", tmp_path / "big.onnx", maps={"hidden": SourceMap(HIDDEN, cycle=17)}, device="cpu"
        )
    assert not (tmp_path / "big.onnx").exists()


def test_the_edit_is_plain_data() -> None:
    made = WeighAverage("norm", (-2, -1), ((-1, (Named("hidden"),)),))
    assert edit_from_json(json.loads(json.dumps(made.to_json()))) == made
    shares = shares_of_copies((Named("a"),), {"a": SourceMap(3, index=(0, 0, 1, 2, 0))})
    np.testing.assert_allclose(shares, np.array([1 / 3, 1 / 3, 1, 1, 1 / 3]))


def test_every_form_that_planning_knows_can_be_written() -> None:
    from hyperclone_onnx.planning import weighing

    assert weighing._FORMS.keys() == FORMS.keys()
