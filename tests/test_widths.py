"""Widths of any size under norms: the residual stream is stretched, and everything else follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
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
from zoo_harness import Expected, Zoo, assert_computes_the_same, assert_validation_says_so

from hyperclone_onnx import ModelsDiffer, Refused, SourceMap, Strategy, analyse, expand, plan_expansion
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray
from hyperclone_onnx.frameworks.optimizer.moments import GrownMoment
from hyperclone_onnx.plan.edits import ScaleInput, ScaleOutput
from hyperclone_onnx.plan.maps import Kept, Named, axis_from_json, axis_to_json, index_axis
from hyperclone_onnx.plan.plans import Plan
from hyperclone_onnx.plan.recipes import Recipe
from hyperclone_onnx.planning.activations import activations
from hyperclone_onnx.planning.equations import Equation, Powers
from hyperclone_onnx.rewriting.rewriting import rewrite
from hyperclone_onnx.tensors.grown_tensor import GrownTensor
from hyperclone_onnx.tensors.scratch import Scratch
from hyperclone_onnx.validation.first_blocks import repeated

Array = np.ndarray[Any, Any]
HIDDEN, FFN = 12, 18

NORMS = {
    "fused": "{out} = RMSNormalization <epsilon = 0.3> ({x}, {gain})",
    "simplified": "{out} = SimplifiedLayerNormalization <epsilon = 0.3> ({x}, {gain})",
    "power": """{out}q = Pow ({x}, two)  {out}m = ReduceMean ({out}q, last)  {out}e = Add ({out}m, eps)
        {out}s = Sqrt ({out}e)  {out}r = Reciprocal ({out}s)  {out}n = Mul ({x}, {out}r)
        {out} = Mul ({gain}, {out}n)""",
    "product": """{out}q = Mul ({x}, {x})  {out}m = ReduceMean ({out}q, last)  {out}e = Add ({out}m, eps)
        {out}s = Sqrt ({out}e)  {out}n = Div ({x}, {out}s)  {out} = Mul ({out}n, {gain})""",
    "one more than the gain": """{out}q = Mul ({x}, {x})  {out}m = ReduceMean ({out}q, last)  {out}e = Add ({out}m, eps)
        {out}s = Sqrt ({out}e)  {out}n = Div ({x}, {out}s)  {out}g = Add ({gain}, one)  {out} = Mul ({out}n, {out}g)""",
    "no gain": """{out}q = Mul ({x}, {x})  {out}m = ReduceMean ({out}q, last)  {out}e = Add ({out}m, eps)
        {out}s = Sqrt ({out}e)  {out} = Div ({x}, {out}s)""",
}
"""Forms of RMSNorm; epsilon is large, so that an epsilon that does not fit would show."""


def stream(norm: str, *, tied: bool = False, middle: str = "h = Identity (e)", post: bool = False) -> onnx.ModelProto:
    """Two residual layers with RMSNorms, between an embedding and a head. Norms may be behind the layers (`post`)."""
    shapes: dict[str, tuple[int, ...]] = {"table": (31, HIDDEN), "places": (9, HIDDEN), "head": (HIDDEN, 31)}
    body = ["t = Gather (table, ids)", "e = Add (t, places)", middle]
    value = "h"
    for i in range(2):
        shapes |= {
            f"gain{i}": (HIDDEN,),
            f"up{i}": (HIDDEN, FFN),
            f"gate{i}": (HIDDEN, FFN),
            f"down{i}": (FFN, HIDDEN),
            f"bias{i}": (HIDDEN,),
        }
        read = value if post else f"n{i}"
        if not post:
            body.append(NORMS[norm].format(out=f"n{i}", x=value, gain=f"gain{i}"))
        body.append(f"u{i} = MatMul ({read}, up{i})  g{i} = MatMul ({read}, gate{i})  s{i} = Sigmoid (g{i})")
        body.append(f"a{i} = Mul (u{i}, s{i})  d{i} = MatMul (a{i}, down{i})  b{i} = Add (d{i}, bias{i})")
        added = f"b{i}"
        if post:
            body.append(NORMS[norm].format(out=f"n{i}", x=added, gain=f"gain{i}"))
            added = f"n{i}"
        body.append(f"h{i} = Add ({value}, {added})")
        value = f"h{i}"
    shapes["gain"] = (HIDDEN,)
    body.append(NORMS[norm].format(out="last_norm", x=value, gain="gain"))
    if tied:
        del shapes["head"]
        body.append("head = Transpose <perm = [1, 0]> (table)")
    body.append("logits = MatMul (last_norm, head)")
    weights: dict[str, Any] = normal(1, shapes)
    weights |= {"two": np.float32(2), "eps": np.float32(0.3), "one": np.float32(1), "last": np.array([-1])}
    text = f"g (int64[batch, 9] ids) => (float[batch, 9, 31] logits) {{ {' '.join(body)} }}"
    used = {name: array for name, array in weights.items() if name in text.replace("(", " ").replace(",", " ")}
    return build_model(text, {name: np.asarray(array) for name, array in used.items()}, opset=23)


def grown(
    tmp_path: Path, model: onnx.ModelProto, maps: Mapping[str, SourceMap], strategy: str = "noisy-symmetric"
) -> Plan:
    """Grow a model, check that it computes the same to rounding in float64, and return the plan."""
    onnx.save(model, tmp_path / "model.onnx")
    result = expand(
        tmp_path / "model.onnx",
        tmp_path / "big.onnx",
        maps=maps,
        strategy=Strategy(strategy, seed=3),
        device="cpu",
        precision="float64",
    )
    assert result.validation is not None and result.validation.equal
    assert max(output.max_relative for output in result.validation.double) <= 1e-12
    return result.plan


def bytes_of(tensor: GrownTensor) -> bytes:
    """The bytes that a file gets, piece by piece."""
    stored = np.zeros(tensor.nbytes, np.uint8)
    for piece in tensor.pieces():
        for array, offsets in piece(Scratch()):
            data = array.reshape(-1).view(np.uint8)
            for offset in offsets:
                stored[offset : offset + data.size] = data
    return stored.tobytes()


def multiplications(plan: Plan) -> set[str]:
    """The nodes at which growth put a multiplication into the graph."""
    return {edit.node for edit in plan.edits if isinstance(edit, ScaleInput | ScaleOutput)}


@pytest.mark.parametrize("strategy", ["symmetric", "noisy-diagonal"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_form_of_rms_norm_takes_any_width(norm: str, tied: bool, strategy: str, tmp_path: Path) -> None:
    plan = grown(tmp_path, stream(norm, tied=tied), {"hidden": SourceMap(HIDDEN, cycle=19)}, strategy)
    tables = [name for name, recipe in plan.tensors.items() if recipe.source == "table"]
    assert tables == ["table"], "a tied embedding stays one tensor"
    assert plan.tensors["table"].axes[1] == (Named("hidden", 1),)
    if not tied or norm in ("power", "product"):
        assert multiplications(plan) == set(), "stored tensors take all of it"
    assert Plan.loads(plan.dumps()) == plan


@st.composite
def index_maps(draw: st.DrawFn, size: int) -> SourceMap:
    extra = draw(st.lists(st.integers(0, size - 1), max_size=2 * size))
    return SourceMap(size, index=tuple(draw(st.permutations([*range(size), *extra]))))


@given(index_maps(HIDDEN), index_maps(FFN), st.sampled_from(sorted(NORMS)), st.booleans(), st.booleans())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_map_of_the_stream_computes_the_same(
    tmp_path_factory: pytest.TempPathFactory, hidden: SourceMap, ffn: SourceMap, norm: str, tied: bool, post: bool
) -> None:
    model = stream(norm, tied=tied, post=post)
    maps = {"hidden": hidden, "ffn.0": ffn, "ffn.1": SourceMap(FFN, cycle=FFN + 1)}
    grown(tmp_path_factory.mktemp("grown"), model, maps)


def test_whole_factors_give_the_plan_that_they_always_gave(tmp_path: Path) -> None:
    onnx.save(stream("fused", tied=True), tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    by_factor = plan_expansion(analysis, requests={"hidden": 3})
    by_map = plan_expansion(analysis, maps={"hidden": SourceMap(HIDDEN, index=(*range(HIDDEN),) * 3)})
    assert "stretched" not in by_factor.dumps()
    assert by_map.tensors == by_factor.tensors and not by_map.stretched


@pytest.mark.parametrize(
    ("middle", "corrected"),
    [
        ("h = Tanh (e)", 2),
        ("f = Add (e, one)  h = Relu (f)", 2),
        ("r = Relu (e)  h = Mul (r, eps)", 0),
        ("f = Cast <to = 11> (e)  h = Cast <to = 1> (f)", 0),
        ("p = Mul (e, e)  h = Sqrt (p)", 0),
    ],
    ids=["tanh", "a number added", "homogeneous", "converted", "root of the square"],
)
def test_what_is_not_linear_reads_copies(middle: str, corrected: int, tmp_path: Path) -> None:
    """An operator that is not linear cannot pass a stretch on: the graph multiplies in front of it and behind it."""
    plan = grown(tmp_path, stream("fused", middle=middle), {"hidden": SourceMap(HIDDEN, cycle=17)})
    stretching = [edit for edit in plan.edits if isinstance(edit, ScaleInput | ScaleOutput) and edit.power == 0]
    assert len(stretching) <= corrected
    assert bool(stretching) == bool(corrected)


@pytest.mark.parametrize("name", ["input", "output", "both"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_interface_never_shows_the_stretch(name: str, keep: bool, tmp_path: Path) -> None:
    weights: dict[str, Array] = normal(0, {"gain": (HIDDEN,), "up": (HIDDEN, FFN), "down": (FFN, HIDDEN)})
    begin = "" if name != "output" else "x = Gather (table, ids)"
    if name == "output":
        weights |= normal(1, {"table": (31, HIDDEN)})
    given_input = "int64[batch] ids" if name == "output" else f"float[batch, {HIDDEN}] x"
    end = "y = MatMul (h, up)" if name == "input" else "y = Identity (h)"
    model = build_model(
        f"""g ({given_input}) => (float[batch, width] y) {{
            {begin}
            n = RMSNormalization (x, gain)  u = MatMul (n, up)  r = Relu (u)  d = MatMul (r, down)  h = Add (x, d)
            {end}
        }}""",
        weights,
        opset=23,
    )
    onnx.save(model, tmp_path / "model.onnx")
    maps = {"hidden": SourceMap(HIDDEN, cycle=17)}
    result = expand(
        tmp_path / "model.onnx",
        tmp_path / "big.onnx",
        maps=maps,
        keep_interface=keep,
        device="cpu",
        precision="float64",
    )
    assert result.validation is not None and result.validation.equal
    assert max(output.max_relative for output in result.validation.double) <= 1e-12
    assert Plan.loads(result.plan.dumps()) == result.plan


@pytest.mark.parametrize("channelwise", [False, True])
def test_a_quantised_writer_takes_the_stretch_in_its_scales(channelwise: bool, tmp_path: Path) -> None:
    """Scales of channels take the stretch; one scale for all channels cannot, so that the graph multiplies."""
    model = stream("fused")
    for number in range(2):
        name = f"down{number}"
        index = [tensor.name for tensor in model.graph.initializer].index(name)
        weight = onnx.numpy_helper.to_array(model.graph.initializer[index])
        scale = np.abs(weight).max(axis=0 if channelwise else None).astype(np.float32) / 127
        codes = np.rint(weight / scale).astype(np.int8)
        del model.graph.initializer[index]
        for part, array in (("codes", codes), ("scale", np.asarray(scale))):
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, f"{name}.{part}"))
        node = onnx.helper.make_node(
            "DequantizeLinear", [f"{name}.codes", f"{name}.scale"], [name], name=f"decode{number}", axis=1
        )
        model.graph.node.insert(0, node)
    plan = grown(tmp_path, model, {"hidden": SourceMap(HIDDEN, cycle=17)})
    assert multiplications(plan) == (set() if channelwise else {"decode0", "decode1"})


def test_two_norms_that_share_one_gain_get_the_tensors_that_they_need(tmp_path: Path) -> None:
    model = stream("fused", tied=True)
    for node in model.graph.node:
        if node.op_type == "RMSNormalization":
            node.input[1] = "gain"
    del model.graph.initializer[[tensor.name for tensor in model.graph.initializer].index("gain0")]
    del model.graph.initializer[[tensor.name for tensor in model.graph.initializer].index("gain1")]
    plan = grown(tmp_path, model, {"hidden": SourceMap(HIDDEN, cycle=19)})
    powers = sorted(recipe.axes[0][0].power for recipe in plan.tensors.values() if recipe.source == "gain")  # type: ignore[union-attr]
    assert powers == [-1, 0]


def test_loops_and_branches_carry_the_stretch(tmp_path: Path) -> None:
    weights = normal(0, {"table": (31, HIDDEN), "gain": (HIDDEN,), "up": (HIDDEN, FFN), "down": (FFN, HIDDEN)})
    weights |= normal(1, {"head": (HIDDEN, 31)}) | {"three": np.array(3), "yes": np.array(True)}
    model = build_model(
        """g (int64[batch] ids, bool again) => (float[batch, 31] logits) {
            x = Gather (table, ids)
            h = Loop (three, yes, x) <body = turn (int64 i, bool go, float[batch, 12] s)
                                                  => (bool goes, float[batch, 12] t) {
                goes = Identity (go)
                n = RMSNormalization (s, gain)  u = MatMul (n, up)  r = Relu (u)  d = MatMul (r, down)  t = Add (s, d)
            }>
            z = If (again) <then_branch = one () => (float[batch, 12] a) { a = Add (h, x) },
                            else_branch = two () => (float[batch, 12] b) { b = Neg (h) }>
            m = RMSNormalization (z, gain)
            logits = MatMul (m, head)
        }""",
        weights,
        opset=23,
    )
    plan = grown(tmp_path, model, {"hidden": SourceMap(HIDDEN, cycle=17)})
    assert multiplications(plan) == set()
    assert {"t", "s", "a", "b", "z"} <= plan.stretched.keys()


# -- LayerNorm --------------------------------------------------------------------------------------------


def layers(*, tied: bool = False, middle: str = "h = Identity (e)") -> onnx.ModelProto:
    """Like `stream`, with LayerNorms that have biases, and a mean of the stream that is not zero."""
    model = stream("fused", tied=tied, middle=middle)
    for node in model.graph.node:
        if node.op_type == "RMSNormalization":
            node.op_type, name = "LayerNormalization", node.input[1] + ".bias"
            node.input.append(name)
            bias = np.random.default_rng(len(name)).standard_normal(HIDDEN).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(bias, name))
    for tensor in model.graph.initializer:
        if tensor.name in ("table", "bias0"):
            array = onnx.numpy_helper.to_array(tensor) + np.float32(0.4)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return model


def stored_in(path: Path) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("strategy", ["symmetric", "noisy-diagonal"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [13, 17, 31])
def test_layer_norm_takes_any_width(size: int, tied: bool, strategy: str, tmp_path: Path) -> None:
    """The channels left over hold the mean of the source's channels, and are zero behind the norms."""
    plan = grown(tmp_path, layers(tied=tied), {"hidden": SourceMap(HIDDEN, cycle=size)}, strategy)
    assert multiplications(plan) == set() and Plan.loads(plan.dumps()) == plan
    assert [name for name, recipe in plan.tensors.items() if recipe.source == "table"] == ["table"]
    source, stored = stored_in(tmp_path / "model.onnx"), stored_in(tmp_path / "big.onnx")
    copies = size // HIDDEN * HIDDEN
    factor, means = np.sqrt(size / copies), source["table"].mean(axis=1, keepdims=True)
    wanted = factor * np.hstack([np.tile(source["table"], size // HIDDEN), np.tile(means, size - copies)])
    np.testing.assert_allclose(stored["table"], wanted, rtol=1e-5, atol=1e-6)
    assert not stored["gain0.bias"][copies:].any() and stored["gain0"][copies:].all()
    assert stored["up0"][copies:].any(), "what reads the channels left over can learn from the first step"


@pytest.mark.parametrize(
    ("middle", "works"),
    [
        ("f = Neg (e)  h = Mul (f, eps)", True),
        ("h = LayerNormalization (e, gain0)", False),
        ("h = Tanh (e)", False),
        ("h = Mul (e, e)", False),
        ("h = Add (e, one)", False),
    ],
    ids=["linear", "another norm in front", "tanh", "square", "a number added"],
)
def test_what_a_layer_norm_reads_must_hold_means(middle: str, works: bool, tmp_path: Path) -> None:
    """A norm makes zeros where the next one needs means, as norms behind the residual add do. These are weighed."""
    onnx.save(layers(middle=middle), tmp_path / "model.onnx")
    plan = plan_expansion(analyse(tmp_path / "model.onnx"), maps={"hidden": SourceMap(HIDDEN, cycle=17)})
    assert bool(plan.weighed) != works and bool(plan.stretched) == works


def test_a_layer_norm_needs_whole_turns(tmp_path: Path) -> None:
    onnx.save(layers(), tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    assert plan_expansion(analysis, maps={"hidden": SourceMap(HIDDEN, index=(*range(HIDDEN), 3, 3))}).weighed
    listed = plan_expansion(analysis, maps={"hidden": SourceMap(HIDDEN, index=(*range(HIDDEN), 0, 1))})
    short = plan_expansion(analysis, maps={"hidden": SourceMap(HIDDEN, cycle=HIDDEN + 2)})
    assert listed.tensors == short.tensors


@pytest.mark.parametrize("size", [13, 24, 31])
def test_a_layer_norm_written_out_takes_any_map(size: int, tmp_path: Path) -> None:
    """Its mean is taken of stretched channels, too. Here growth multiplies in the graph."""
    weights: dict[str, Any] = normal(0, {"table": (31, HIDDEN), "gain": (HIDDEN,), "bias": (HIDDEN,)})
    weights |= normal(1, {"head": (HIDDEN, 31)})
    weights |= {"eps": np.asarray(0.3, np.float32), "two": np.asarray(2, np.float32), "last": np.array([-1])}
    model = build_model(
        """g (int64[batch] ids) => (float[batch, 31] logits) {
            x = Gather (table, ids)  m = ReduceMean (x, last)  d = Sub (x, m)  q = Pow (d, two)
            v = ReduceMean (q, last)  e = Add (v, eps)  s = Sqrt (e)  n = Div (d, s)  g = Mul (n, gain)
            y = Add (g, bias)  logits = MatMul (y, head)
        }""",
        weights,
    )
    extra = np.random.default_rng(size).integers(0, HIDDEN, size - HIDDEN)
    plan = grown(tmp_path, model, {"hidden": SourceMap(HIDDEN, index=(*range(HIDDEN), *extra.tolist()))})
    assert multiplications(plan)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("fills", [("mean", "mean"), ("mean", "zero"), ("zero", "mean")])
@pytest.mark.parametrize("shared", [(), ((0, 0),)])
def test_channels_that_hold_means_in_any_slice(dtype: str, fills: Any, shared: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 9)).astype(dtype)
    maps = {"a": SourceMap(7, cycle=17), "b": SourceMap(9, cycle=14)}
    recipe = Recipe("w", ((Named("a", 1, fills[0]),), (Named("b", -1, fills[1]),)), shared)
    big = GrownTensor(ir.Tensor(weight), recipe, maps, Strategy("symmetric"))
    wide = weight.astype(np.float64)
    wide = np.concatenate([wide, wide.mean(axis=1, keepdims=True) * (fills[1] == "mean")], axis=1)
    wide = np.concatenate([wide, wide.mean(axis=0, keepdims=True) * (fills[0] == "mean")])
    rows, columns = [*range(7)] * 2 + [7] * 3, [*range(9)] + [9] * 5
    wanted = wide[rows][:, columns] * maps["a"].shrink / maps["b"].shrink
    if shared:
        wanted /= np.array([2.0] * 14 + [3.0] * 3)[:, None]
    np.testing.assert_allclose(big.numpy(), wanted, rtol=0, atol=4 * np.finfo(dtype).eps * np.abs(wanted).max())
    window = (slice(5, 16), slice(3, 12))
    np.testing.assert_array_equal(big[window], big.numpy()[window])
    assert bytes_of(big) == big.numpy().tobytes()


# -- what the plan says, and who reads it ------------------------------------------------------------------


@pytest.mark.parametrize("model", [lambda: stream("product"), lambda: layers()], ids=["RMSNorm", "LayerNorm"])
def test_the_plan_tells_the_stretch_of_every_activation(model: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    """Every value inside the grown graph is what the plan makes of the source's value."""
    onnx.save(model(), tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    plan = plan_expansion(
        analysis, maps={"hidden": SourceMap(HIDDEN, cycle=17)}, strategy=Strategy("noisy-symmetric", seed=1)
    )
    axes_of = activations(analysis.dimensions, plan)
    big = rewrite(analysis.model, plan)
    names = [name for name in axes_of if not analysis.model.graph.initializers.get(name)]

    def run(graph: ir.Model) -> dict[str, Array]:
        shown = graph.clone()
        values = {value.name: value for node in shown.graph for value in node.outputs}
        shown.graph.outputs.extend(value for name in names if (value := values[name]) not in shown.graph.outputs)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(ir.to_proto(shown).SerializeToString(), options)
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, session.run(None, {"ids": np.arange(18).reshape(2, 9)}), strict=True))

    small, large = run(analysis.model), run(big)
    powers = {powers[0] for axes in plan.stretched.values() for powers in axes.values()}
    assert powers in ({1, 2}, {(1, "mean"), (0, "zero")}) and len(names) > 10
    for name in names:
        wanted = repeated(small[name], axes_of[name], plan.maps)
        np.testing.assert_allclose(large[name], wanted, rtol=0, atol=2e-6 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("spoiled", ["writer", "gain", "reader"])
def test_a_missing_stretch_shows(spoiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that forgets the stretch of one tensor makes another model, and validation says so."""
    from hyperclone_onnx.expansion import request

    name = {"writer": "down0", "gain": "gain1", "reader": "head"}[spoiled]
    made = request.make_plan

    def forgetful(*arguments: Any, **options: Any) -> Plan:
        plan = made(*arguments, **options)
        recipe = plan.tensors[name]
        change = 1 if spoiled == "reader" else 0
        axes = tuple(
            tuple(replace(part, power=change) if isinstance(part, Named) else part for part in axis)
            for axis in recipe.axes
        )
        assert axes != recipe.axes
        return replace(plan, tensors={**plan.tensors, name: replace(recipe, axes=axes)})

    monkeypatch.setattr(request, "make_plan", forgetful)
    onnx.save(stream("fused"), tmp_path / "model.onnx")
    with pytest.raises(ModelsDiffer):
        expand(
            tmp_path / "model.onnx", tmp_path / "big.onnx", maps={"hidden": SourceMap(HIDDEN, cycle=17)}, device="cpu"
        )
    assert not (tmp_path / "big.onnx").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_half_precision_rounds_a_stretched_weight_once(tied: bool, tmp_path: Path) -> None:
    """What a stretch leaves to round is measured, and allowed; the graph is right in float64."""
    model = stream("product", tied=tied)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), tensor.name))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    plan = grown(tmp_path, model, {"hidden": SourceMap(HIDDEN, cycle=19)})
    assert plan.stretched


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_bytes_with_any_number_of_workers(workers: int, tmp_path: Path) -> None:
    onnx.save(stream("fused"), tmp_path / "model.onnx")
    maps = {"hidden": SourceMap(HIDDEN, cycle=17)}
    expand(tmp_path / "model.onnx", tmp_path / "a.onnx", maps=maps, check=False, workers=workers)
    expand(tmp_path / "model.onnx", tmp_path / "b.onnx", maps=maps, check=False)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    plan = Plan.carried_by({entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props})
    assert plan is not None and plan.stretched


def test_an_average_that_no_scale_keeps_is_refused(tmp_path: Path) -> None:
    weights = normal(0, {"up": (5, HIDDEN), "gain": (HIDDEN,), "bias": (HIDDEN,), "head": (HIDDEN, 31)})
    model = build_model(
        """g (float[batch, 3, 3, 5] x) => (float[batch, 3, 3, 31] logits) {
            h = MatMul (x, up)
            [norm] n = com.microsoft.GroupNorm <activation = 0, channels_last = 1, groups = 1> (h, gain, bias)
            logits = MatMul (n, head)
        }""",
        weights,
    )
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(Refused, match=r"GroupNorm 'norm' averages over an axis whose indices"):
        plan_expansion(analyse(tmp_path / "model.onnx"), maps={"hidden": SourceMap(HIDDEN, cycle=17)})


# -- tensors ----------------------------------------------------------------------------------------------

MAPS = {"a": SourceMap(7, cycle=12), "b": SourceMap(5, index=(4, 0, 1, 2, 3, 4, 4, 1)), "t": SourceMap(4, tile=2)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("shared", [(), ((0, 0),), ((1, 0),)])
@pytest.mark.parametrize("law", ["symmetric", "noisy-diagonal"])
def test_a_stretched_tensor_adds_up_to_the_stretched_weight(dtype: str, shared: Any, law: str) -> None:
    weight = np.random.default_rng(0).standard_normal((7, 20)).astype(dtype)
    recipe = Recipe("w", ((Named("a", 1),), (Named("b", -1), Named("t"))), shared)
    big = GrownTensor(ir.Tensor(weight), recipe, MAPS, Strategy(law))
    whole = big.numpy().astype(np.float64)
    rows, columns = recipe.index(MAPS)
    factors = np.outer(MAPS["a"].stretch, np.repeat(1 / MAPS["b"].stretch, 8))
    total = np.zeros((rows.collapsed_size, columns.collapsed_size))
    np.add.at(total, (rows.collapsed[:, None], columns.collapsed[None, :]), whole)
    wanted = np.zeros_like(total)
    wanted[rows.collapsed[:, None], columns.collapsed[None, :]] = weight[rows.source][:, columns.source] * factors
    np.testing.assert_allclose(total, wanted, rtol=0, atol=4 * np.finfo(dtype).eps * np.abs(wanted).max())
    window = (slice(3, 9), slice(10, 41))
    np.testing.assert_array_equal(big[window], big.numpy()[window])
    assert bytes_of(big) == big.numpy().tobytes()


@pytest.mark.parametrize("shared", [(), ((0, 0),)])
@pytest.mark.parametrize("power", [1, -1, 2])
def test_moments_grow_by_the_dual_of_a_stretched_recipe(shared: Any, power: int) -> None:
    """The product of weights and gradients is the same in both models."""
    rng = np.random.default_rng(0)
    weight, gradient = rng.standard_normal((2, 7, 3))
    recipe = Recipe("w", ((Named("a", power),), (Kept(3),)), shared)
    big = GrownTensor(ir.Tensor(weight), recipe, MAPS, Strategy("symmetric")).numpy()
    read = StoredArray(gradient.shape, gradient.dtype, lambda: gradient)
    moment = GrownMoment(read, recipe, MAPS, 1).numpy()
    np.testing.assert_allclose((big * moment).sum(), (weight * gradient).sum(), rtol=1e-12)
    squares = StoredArray(gradient.shape, gradient.dtype, lambda: gradient**2)
    np.testing.assert_allclose(GrownMoment(squares, recipe, MAPS, 2).numpy(), moment**2, rtol=1e-12)


def test_axes_with_powers_are_plain_data() -> None:
    axis = Named("a", -1)
    assert axis_to_json(axis) == {"stretched": "a", "power": -1} and axis_from_json(axis_to_json(axis)) == axis
    assert axis_to_json(Named("a")) == "a"
    index = index_axis([(axis, True), (Named("b", 2), False)], MAPS)
    np.testing.assert_allclose(index.stretch, np.outer(1 / MAPS["a"].stretch, MAPS["b"].stretch ** 2).reshape(-1))  # type: ignore[arg-type]
    assert index_axis([(Named("a"), True)], MAPS).stretch is None


@given(index_maps(6), st.lists(st.floats(-3, 3), min_size=6, max_size=6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_stretch_keeps_the_mean_of_squares(source_map: SourceMap, values: list[float]) -> None:
    x = np.asarray(values)
    stretched = source_map.stretch * x[source_map.indices]
    np.testing.assert_allclose(np.mean(stretched**2), np.mean(x**2), rtol=1e-12, atol=1e-12)
    assert source_map.is_even == bool((source_map.stretch == 1).all())


# -- equations --------------------------------------------------------------------------------------------


def test_powers_follow_from_what_is_needed() -> None:
    powers: Powers[str] = Powers()
    stream, square, gain, out, weight = (powers.variable() for _ in range(5))
    powers.equations = [
        Equation(((stream, 2), (square, -1)), 0, square, "square"),
        Equation(((square, 1),), 2, square, "mean"),
        Equation(((stream, 1), (gain, 1), (out, -1)), 0, out, "gain"),
        Equation(((out, 1), (weight, 1)), 0, out, "product"),
    ]
    powers.wishes[0].append((square, 2))
    solved = powers.solve([gain, weight])
    assert [solved[powers.root(variable)] for variable in (stream, square, gain, out, weight)] == [1, 2, -1, 0, 0]
    assert powers.corrections(solved) == {}


def test_an_equation_that_does_not_hold_asks_for_a_correction() -> None:
    powers: Powers[str] = Powers()
    value, other = powers.variable(), powers.variable()
    powers.join(value, other)
    powers.equations = [Equation(((value, 1),), 1, value, "norm"), Equation(((other, 1),), 0, other, "tanh")]
    powers.wishes[0].append((value, 1))
    powers.wishes[1].append((other, 0))
    solved = powers.solve([])
    assert powers.corrections(solved) == {("tanh", other): -1}


# -- the zoo ----------------------------------------------------------------------------------------------


ZOO = ["llama.distinct", "gemma2.collide", "olmo2.distinct", "gpt2.distinct", "gptj.collide"]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param(name, more, marks=pytest.mark.slow if (row + column) % 2 else [])
        for row, name in enumerate(ZOO)
        for column, more in enumerate(["one more", "x1.5"])
    ],
)
def test_models_of_the_zoo_take_any_width(more: str, name: str, zoo: Zoo, expected: Expected, tmp_path: Path) -> None:
    """RMSNorm and LayerNorm, in front of the layers and behind them, with tied and untied embeddings."""
    maps = {
        dimension.name: SourceMap.to_size(
            dimension.size, dimension.size + 1 if more == "one more" else dimension.size * 3 // 2
        )
        for dimension in analyse(zoo(name)).named
        if dimension.role in ("hidden", "heads", "ffn") and dimension.dim.growable
    }
    result = expand(zoo(name), tmp_path / "big.onnx", maps=maps, device="cpu", precision="float64")
    assert_computes_the_same(tmp_path / "big.onnx", expected(name))
    assert_validation_says_so(result)
    assert result.plan.stretched and result.plan.dims.keys() == maps.keys()
    assert all(edit.power for edit in result.plan.edits if isinstance(edit, ScaleInput | ScaleOutput))
