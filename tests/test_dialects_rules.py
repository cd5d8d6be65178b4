"""Graphs from public reports of users: every dimension that can grow does grow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import build_model, normal, perceptron
from onnx import TensorProto, helper
from test_dialects import grow

from fuzz.oracle import compare, run_source, session
from hyperclone_onnx import Refused, Strategy, analyse, expand, plan_expansion
from hyperclone_onnx.analysis.walk import infer
from hyperclone_onnx.plan.edits import ScaleOutput
from hyperclone_onnx.reading.normalise import normalise

HEAD = "g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {{ h = Gather (e, ids) {} }}"
SHAPES = {"e": (31, 12), "gain": (12,), "up": (12, 20), "down": (20, 12), "head": (12, 31)}


# -- norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2])
def test_a_norm_whose_gain_takes_the_scale(tmp_path: Path, p: int) -> None:
    """An RMS norm written as an L2 norm. The gain behind it takes the scale, so growth adds no node."""
    body = (
        f"l = LpNormalization <axis = -1, p = {p}> (h) n = Mul (l, gain) u = MatMul (n, up) r = Relu (u) "
        "d = MatMul (r, down) y = Add (h, d) logits = MatMul (y, head)"
    )
    model = build_model(HEAD.format(body), normal(2, SHAPES))
    assert grow(model, tmp_path) == {"hidden", "ffn"}
    assert len(onnx.load(tmp_path / "big.onnx").graph.node) == len(model.graph.node)


@pytest.mark.parametrize("p", [1, 2])
def test_a_norm_at_the_end(tmp_path: Path, p: int) -> None:
    """A sentence embedding. No weight follows the norm, so growth adds a node for the scale."""
    graph = (
        "g (int64[batch, sequence] ids) => (float[batch, 12] y) { h = Gather (e, ids) u = MatMul (h, up) r = Relu (u) "
        f"d = MatMul (r, down) s = Add (h, d) m = ReduceMean <keepdims = 0> (s, one) "
        f"y = LpNormalization <axis = 1, p = {p}> (m) }}"
    )
    weights = normal(2, {name: SHAPES[name] for name in ("e", "up", "down")}) | {"one": np.array([1])}
    model = build_model(graph, weights)
    onnx.save(model, tmp_path / "small.onnx")
    report = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, strategy=Strategy("symmetric"), check=False)
    assert compare(tmp_path / "big.onnx", run_source(tmp_path / "small.onnx", 0)) == ""
    assert {dim.role for dim in report.plan.dims.values()} == {"hidden", "ffn"}
    assert sum(isinstance(edit, ScaleOutput) for edit in report.plan.edits) == 1


# -- stacked layers ---------------------------------------------------------------------------------------


def test_weights_stacked_along_a_scan(tmp_path: Path) -> None:
    """Each step of a Scan reads the weights of one layer. Their repeats share the sums, as those of any weight."""

    def value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("LayerNormalization", ["x", "g"], ["n"]),
        helper.make_node("MatMul", ["n", "u"], ["nu"]),
        helper.make_node("Relu", ["nu"], ["r"]),
        helper.make_node("MatMul", ["r", "d"], ["rd"]),
        helper.make_node("Add", ["x", "rd"], ["y"]),
    ]
    inputs = [value("x", ["b", "s", 12]), value("g", [12]), value("u", [12, 20]), value("d", [20, 12])]
    body = helper.make_graph(nodes, "layer", inputs, [value("y", ["b", "s", 12])])
    scan = helper.make_node("Scan", ["h", "gains", "ups", "downs"], ["z"], body=body, num_scan_inputs=3)
    model = build_model(
        HEAD.format("logits = MatMul (z, head)").replace("logits = MatMul", "z = Identity (h) logits = MatMul"),
        normal(2, {"e": (31, 12), "gains": (3, 12), "ups": (3, 12, 20), "downs": (3, 20, 12), "head": (12, 31)}),
    )
    model.graph.node[1].CopyFrom(scan)
    onnx.save(model, tmp_path / "small.onnx")
    report = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, check=False)
    assert {dim.role for dim in report.plan.dims.values()} == {"hidden", "ffn"}
    assert report.plan.tensors["ups"].shared and report.plan.tensors["downs"].shared
    assert compare(tmp_path / "big.onnx", run_source(tmp_path / "small.onnx", 0)) == ""


# -- bounds that mean "to the end" -------------------------------------------------------------------------


@pytest.mark.parametrize("end", [10**9, 2**31 - 1, 2**62])
def test_a_slice_to_the_end_is_the_whole_axis(tmp_path: Path, end: int) -> None:
    """The length of the slice is that of the axis, not 10^9, also if it is known only when running."""
    body = (
        "k = Slice (h, zero, far, one) u = MatMul (k, up) r = Relu (u) d = MatMul (r, down) logits = MatMul (d, head)"
    )
    bounds = {"zero": np.array([0]), "far": np.array([end]), "one": np.array([1])}
    weights = normal(2, {name: SHAPES[name] for name in ("e", "up", "down", "head")})
    model = build_model(HEAD.format(body), weights | bounds)
    dimensions = infer(normalise(ir.from_proto(model)))
    sliced = next(node for node in dimensions.model.graph if node.op_type == "Slice").outputs[0]
    assert [str(dimensions.space.size(term)) for term in dimensions.axes[sliced] or ()] == ["batch", "sequence", "12"]
    assert "ffn" in grow(model, tmp_path)


# -- shapes that a file does not declare ------------------------------------------------------------------


def test_an_output_without_a_declared_shape(tmp_path: Path) -> None:
    model = perceptron()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert grow(model, tmp_path) == {"hidden", "ffn"}


def test_an_input_without_a_declared_shape_is_named(tmp_path: Path) -> None:
    """The axes of all values that depend on it are unknown, and the refusal names the input."""
    model = perceptron()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "small.onnx")
    with pytest.raises(Refused, match=r"no shape is declared for it .*input 'ids'"):
        expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, check=False)


def test_wrong_shapes_of_values_are_dropped(tmp_path: Path) -> None:
    """If a tool changed the widths but not the declared shapes, we believe the rules."""
    model = perceptron()
    for name, size in (("u0", 21), ("n1", 1)):
        shape = ["batch", "sequence", size]
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 99
    assert grow(model, tmp_path, perceptron()) == {"hidden", "ffn"}
    output = onnx.load(tmp_path / "big.onnx").graph.output[0].type.tensor_type.shape
    assert 99 not in [dim.dim_value for dim in output.dim]


def test_one_wrong_shape_takes_the_others_with_it() -> None:
    """Only the file has the sizes of a Resize. If another shape in the file is wrong, we do not believe these."""
    graph = (
        "g (float[1, 3, 4, 4] x) => (float[1, 3, q, p] y) { "
        "s = Resize <coordinate_transformation_mode = 'tf_crop_and_resize'> (x, roi, scales) "
        "t = Relu (x) u = MatMul (t, w) "
        "v = ReduceMean <keepdims = 1> (u) y = Add (s, v) }"
    ).replace("'", '"')
    weights = {"scales": np.array([1, 1, 2, 2], np.float32), "w": np.ones((4, 5), np.float32)}
    weights["roi"] = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32)
    for declared, believed in ((5, True), (6, False)):
        model = build_model(graph, weights)
        for name, shape in (("s", [1, 3, 8, 8]), ("u", [1, 3, 4, declared])):
            model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        dimensions = infer(normalise(ir.from_proto(model)))
        resized = next(node for node in dimensions.model.graph if node.op_type == "Resize").outputs[0]
        sizes = [dimensions.space.static(term) for term in dimensions.axes[resized] or ()]
        assert sizes == [1, 3, *([8, 8] if believed else [None, None])]


# -- lengths that a file names and a node proves -----------------------------------------------------------


def named_width(second: str) -> onnx.ModelProto:
    """A width declared by a name, which meets a gain of 12 before a cache of 12 is joined to it."""
    graph = (
        f"g (float[batch, sequence, width] x, float[batch, past, {second}] c) => (float[batch, sequence, 12] y, "
        "float[batch, total, w] present) { n = RMSNormalization <axis = -1> (x, gain) u = MatMul (n, up) "
        "r = Relu (u) d = MatMul (r, down) y = Add (x, d) present = Concat <axis = 1> (c, d) }"
    )
    return build_model(graph, normal(2, {name: SHAPES[name] for name in ("gain", "up", "down")}), opset=23)


@pytest.mark.parametrize("second", ["width", "other", "12"])
def test_a_named_width_that_nodes_prove(tmp_path: Path, second: str) -> None:
    onnx.save(named_width(second), tmp_path / "small.onnx")
    made = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, strategy=Strategy("symmetric"), check=False)
    assert {dim.role for dim in made.plan.dims.values()} == {"hidden", "ffn"}
    small, big = session(tmp_path / "small.onnx"), session(tmp_path / "big.onnx")
    assert {each.name: each.shape[2] for each in big.get_inputs()} == {"x": 24, "c": 24}
    rng = np.random.default_rng(0)
    fed = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("x", (2, 3, 12)), ("c", (2, 4, 12)))
    }
    wide = {name: np.tile(array, (1, 1, 2)) for name, array in fed.items()}
    for want, got in zip(small.run(None, fed), big.run(None, wide), strict=True):
        np.testing.assert_allclose(got, np.tile(want, (1, 1, 2)), atol=1e-5)


def test_a_name_that_meets_two_lengths_is_bound_to_none(tmp_path: Path) -> None:
    """By broadcasting it could be 1, and nothing else."""
    graph = (
        "g (float[batch, width] x) => (float[batch, 12] y, float[batch, 20] z) { y = Mul (x, gain) z = Mul (x, other) }"
    )
    model = build_model(graph, normal(2, {"gain": (12,), "other": (20,)}))
    dimensions = infer(normalise(ir.from_proto(model)))
    x = dimensions.axes[dimensions.model.graph.inputs[0]] or ()
    assert dimensions.space.static(x[1]) is None


# -- one feature of many ----------------------------------------------------------------------------------

PICKS = {
    "Slice": "one = Slice (n, five, six, last)",
    "Gather": "one = Gather <axis = -1> (n, five)",
}


@pytest.mark.parametrize("pick", PICKS)
def test_one_feature_of_a_normalised_stream(tmp_path: Path, pick: str) -> None:
    """A norm averages over all features, so they grow by one factor. The picked feature may be any of its clones."""
    body = (
        f"n = LayerNormalization (h, gain) {PICKS[pick]} s = Sigmoid (one) g = Mul (n, s) u = MatMul (g, up) "
        "r = Relu (u) d = MatMul (r, down) y = Add (h, d) logits = MatMul (y, head)"
    )
    bounds = {"five": np.array([5]), "six": np.array([6]), "last": np.array([-1])}
    model = build_model(HEAD.format(body), normal(2, SHAPES) | bounds)
    assert grow(model, tmp_path) == {"hidden", "ffn"}


def test_a_norm_over_a_part_of_size_1(tmp_path: Path) -> None:
    """A norm over parts of an axis, of which one keeps its size: its averages count each source index once."""
    body = (
        "a = Slice (h, zero, five, last) b = Slice (h, five, six, last) c = Slice (h, six, end, last) "
        "j = Concat <axis = -1> (a, b, c) n = LayerNormalization (j, gain) logits = MatMul (n, head)"
    )
    bounds = {name: np.array([n]) for name, n in (("zero", 0), ("five", 5), ("six", 6), ("end", 12), ("last", -1))}
    model = build_model(HEAD.format(body), normal(2, {n: SHAPES[n] for n in ("e", "gain", "head")}) | bounds)
    onnx.save(model, tmp_path / "small.onnx")
    done = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, device="cpu")
    assert done.validation is not None and done.validation.equal and len(done.plan.weighed) == 1


# -- rows replaced under a mask ---------------------------------------------------------------------------


def test_image_features_replace_rows_of_the_stream(tmp_path: Path) -> None:
    """Image tokens enter a language model like this: a mask is expanded over hidden, and flat features replace rows."""
    graph = """g (int64[batch, sequence] ids, float[tokens, 7] image) => (float[batch, sequence, 31] logits) {
        h = Gather (e, ids) m = Equal (ids, token) m3 = Unsqueeze (m, last) shape = Shape (h) whole = Expand (m3, shape)
        hits = NonZero (whole) tuples = Transpose <perm = [1, 0]> (hits) f = MatMul (image, project)
        flat = Reshape (f, last) size = Shape (tuples) count = Gather (size, zero)
        part = Slice (flat, zero, count, zero) x = ScatterND (h, tuples, part) n = LayerNormalization (x, gain)
        u = MatMul (n, up) r = Relu (u) d = MatMul (r, down) y = Add (x, d) logits = MatMul (y, head) }"""
    stored = {"token": np.array(3), "last": np.array([-1]), "zero": np.array([0])}
    model = build_model(graph, normal(2, SHAPES | {"project": (7, 12)}) | stored)
    small, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(model, small)
    report = expand(small, big, 2, strategy=Strategy("symmetric"), check=False)
    assert {"hidden", "ffn"} <= {dim.role for dim in report.plan.dims.values()}
    image = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    for ids in ([[1, 3, 3, 4], [3, 2, 3, 5]], [[1, 2, 4, 5]]):
        fed = {"ids": np.array(ids), "image": image}
        wide = session(big).get_inputs()[1].shape[1]
        want = session(small).run(None, fed)[0]
        got = session(big).run(None, fed | {"image": np.tile(image, (1, wide // 7))})[0]
        np.testing.assert_allclose(got, want, atol=1e-5)


# -- a softmax over features ------------------------------------------------------------------------------

GATE = (
    "n = LayerNormalization (h, gain) a = MatMul (n, square) p = {} <axis = -1> (a) g = Mul (n, p) u = MatMul (g, up) "
    "r = Relu (u) d = MatMul (r, down) y = Add (h, d) logits = MatMul (y, head)"
)
GATE_SHAPES = SHAPES | {"square": (12, 12)}


@pytest.mark.parametrize("opset", [11, 20])
def test_a_softmax_that_gates_features(tmp_path: Path, opset: int) -> None:
    """Two repeats take half of the share each, so that the softmax is multiplied by two."""
    body = GATE.format("Softmax").replace("LayerNormalization (h, gain)", "Mul (c, gain)")
    norm = (
        "m = ReduceMean <axes = [-1]> (h) c = Sub (h, m) " if opset < 18 else "m = ReduceMean (h, last) c = Sub (h, m) "
    )
    body = body if opset > 12 else body.replace("axis = -1", "axis = 2")
    stored = {} if opset < 18 else {"last": np.array([-1])}
    model = build_model(HEAD.format(norm + body), normal(2, GATE_SHAPES) | stored, opset=opset)
    assert grow(model, tmp_path) == {"hidden", "ffn"}
    assert any(
        node.op_type == "Mul" and "scale" in "".join(node.input) for node in onnx.load(tmp_path / "big.onnx").graph.node
    )


@pytest.mark.parametrize("other", ["LogSoftmax", "Hardmax"])
def test_what_no_factor_makes_up_for_keeps_the_features(tmp_path: Path, other: str) -> None:
    onnx.save(build_model(HEAD.format(GATE.format(other)), normal(2, GATE_SHAPES)), tmp_path / "small.onnx")
    with pytest.raises(Refused, match=f"{other} runs over it"):
        expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, check=False)


def test_a_softmax_over_choices_stays(tmp_path: Path) -> None:
    """A router's choices are contracted with a weight too, but no norm averages over them."""
    body = (
        "n = LayerNormalization (h, gain) a = MatMul (n, router) p = Softmax <axis = -1> (a) w = MatMul (p, values) "
        "y = Add (h, w) logits = MatMul (y, head)"
    )
    model = build_model(HEAD.format(body), normal(2, SHAPES | {"router": (12, 5), "values": (5, 12)}))
    assert grow(model, tmp_path) == {"hidden"}


# -- one row of a computed table ---------------------------------------------------------------------------


def test_a_computed_row_is_replaced(tmp_path: Path) -> None:
    """Sinusoidal positions, of which that of padding is set to zero: its indices count through the row."""
    body = (
        "r = Range (zero, seven, one) f = Cast <to = 1> (r) t = Unsqueeze (f, last) table = MatMul (t, wave) "
        "set = ScatterND (table, tuples, zeros) shape = Shape (ids) count = Gather (shape, one) "
        "places = Range (zero, count, one) at = Gather (set, places) s = Add (h, at) n = LayerNormalization (s, gain) "
        "u = MatMul (n, up) k = Relu (u) d = MatMul (k, down) y = Add (s, d) logits = MatMul (y, head)"
    )
    stored = {
        **{name: np.array(number) for name, number in (("zero", 0), ("one", 1), ("seven", 70))},
        **{"last": np.array([-1]), "zeros": np.zeros(12, np.float32)},
        "tuples": np.stack([np.ones(12, np.int64), np.arange(12)], axis=1),
    }
    model = build_model(HEAD.format(body), normal(2, SHAPES | {"wave": (1, 12)}) | stored)
    assert grow(model, tmp_path) == {"hidden", "ffn"}


# -- groups across joined parts ----------------------------------------------------------------------------

UNET = """g (float[batch, 3, 6, 6] x) => (float[batch, 3, 6, 6] y) {{
    h = Conv <pads = [1, 1, 1, 1]> (x, first) a = Relu (h) b = Conv <pads = [1, 1, 1, 1]> (a, second)
    j = Concat <axis = 1> (b, h) {} r = Relu (s) y = Conv <pads = [1, 1, 1, 1]> (r, last) }}"""
GROUPS = {
    "written out": (
        "g = Reshape (j, three) i = InstanceNormalization (g, ones, zeros) shape = Shape (j) k = Reshape (i, shape) "
        "s = Mul (k, gain)"
    ),
    "one operator": "s = GroupNormalization <num_groups = 3> (j, scale, bias)",
}


def unet(norm: str) -> onnx.ModelProto:
    """Three groups of five channels of 8 and 7 that were joined: one group has channels of both parts."""
    weights = normal(3, {"first": (7, 3, 3, 3), "second": (8, 7, 3, 3), "last": (3, 15, 3, 3), "gain": (15, 1, 1)})
    weights |= {"scale": np.ones(15, np.float32), "bias": np.zeros(15, np.float32)}
    weights |= {"three": np.array([0, 3, -1]), "ones": np.ones(3, np.float32), "zeros": np.zeros(3, np.float32)}
    body = UNET.format(GROUPS[norm])
    return build_model(body, {name: array for name, array in weights.items() if name in body}, opset=21)


@pytest.mark.parametrize("norm", GROUPS)
def test_groups_of_channels_that_reach_across_joined_parts(tmp_path: Path, norm: str) -> None:
    """The skip connections of a U-Net. Each channel is repeated in place, so that groups keep their channels."""
    onnx.save(unet(norm), tmp_path / "small.onnx")
    for factor in (2, 3):
        big = tmp_path / f"big{factor}.onnx"
        made = expand(tmp_path / "small.onnx", big, factor, strategy=Strategy("symmetric"), check=False)
        assert compare(big, run_source(tmp_path / "small.onnx", 0)) == ""
        assert {dim.map.repeat for dim in made.plan.dims.values()} == {factor}
        shapes = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(big).graph.initializer}
        assert shapes["last"] == (3, 15 * factor, 3, 3)


def test_parts_of_such_groups_grow_by_one_factor(tmp_path: Path) -> None:
    onnx.save(unet("one operator"), tmp_path / "small.onnx")
    analysis = analyse(tmp_path / "small.onnx")
    tied = [dimension.name for dimension in analysis.named if dimension.dim.tied is not None]
    with pytest.raises(Refused, match="must grow by one whole factor"):
        plan_expansion(analysis, 1, {tied[0]: 2, tied[1]: 3})
