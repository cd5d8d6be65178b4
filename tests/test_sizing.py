"""The growth of dimensions whose axes have several factors, and the sizes that the algebra can follow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import build_model, normal

from hyperclone_onnx import analyse, expand, plan_expansion


def regrouped(middle: str) -> onnx.ModelProto:
    """A residual stream of 36, whose second half reads what `middle` makes of it."""
    weights = normal(0, {"table": (31, 36), "gain": (36,), "up": (36, 20), "down": (20, 36), "head": (36, 31)})
    weights |= {"kernel": normal(1, {"k": (36, 9, 1)})["k"], "merge": normal(2, {"m": (72, 36)})["m"]}
    shapes = {"six": [0, 0, 6, 6], "flat": [0, 0, 36], "pairs": [0, -1, 2, 36], "wide": [0, -1, 72]}
    weights |= {name: np.asarray(shape) for name, shape in shapes.items()}  # type: ignore[misc]
    return build_model(
        f"""g (int64[batch, 8] ids) => (float[batch, rows, 31] logits) {{
            h = Gather (table, ids)
            n = LayerNormalization (h, gain)
            {middle}
            u = MatMul (x, up)
            r = Relu (u)
            d = MatMul (r, down)
            logits = MatMul (d, head)
        }}""",
        weights,
    )


@pytest.mark.parametrize(
    "middle",
    [
        pytest.param("s = Reshape (n, six)  a = Relu (s)  x = Reshape (a, flat)", id="six by six"),
        pytest.param(
            "t = Transpose <perm = [0, 2, 1]> (n)  c = Conv <group = 4, kernel_shape = [1]> (t, kernel)"
            "x = Transpose <perm = [0, 2, 1]> (c)",
            id="grouped convolution",
        ),
        pytest.param(
            "p = Reshape (n, pairs)  q = Transpose <perm = [0, 1, 2, 3]> (p)  w = Reshape (q, wide)"
            "x = MatMul (w, merge)",
            id="neighbours merged",
        ),
    ],
)
def test_an_axis_of_several_factors_grows_once(tmp_path: Path, middle: str) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(regrouped(middle), model)
    expand(model, tmp_path / "big.onnx", 2, device="cpu", precision="float64")
    grown = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer}
    assert grown["table"] == (31, 72)
    assert grown["up"] == (72, 40)
    if "kernel" in grown:
        assert grown["kernel"] == (72, 18, 1), "the groups stay, their channels grow"
    if "merge" in grown:
        assert grown["merge"] == (144, 72)


def test_a_factor_asked_for_by_name_grows_beside_another(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    onnx.save(regrouped("s = Reshape (n, six)  a = Relu (s)  x = Reshape (a, flat)"), model)
    analysis = analyse(model)
    both = [dimension.name for dimension in analysis.named if dimension.size == 6]
    plan = plan_expansion(analysis, requests=dict.fromkeys(both, 2))
    assert sorted(plan.dims) == sorted(both)


def test_two_decided_branches_that_use_the_same_names(tmp_path: Path) -> None:
    """The branch that runs takes the place of each If."""
    weights = normal(0, {"table": (31, 12), "gain": (12,), "up": (12, 20), "down": (20, 12), "head": (12, 31)})
    model = build_model(
        """g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {
            yes = Constant <value = bool {1}> ()
            h = Gather (table, ids)
            n = LayerNormalization (h, gain)
            a = If (yes) <then_branch = one () => (float[x, y, z] out) { u = MatMul (n, up)  out = Relu (u) },
                          else_branch = two () => (float[x, y, z] out) { out = MatMul (n, up) }>
            b = If (yes) <then_branch = three () => (float[x, y, z] out) { u = MatMul (a, down)  out = Relu (u) },
                          else_branch = four () => (float[x, y, z] out) { out = MatMul (a, down) }>
            c = If (yes) <then_branch = five () => (float[x, y, z] out) { out = Identity (b) },
                          else_branch = six () => (float[x, y, z] out) { out = Relu (b) }>
            logits = MatMul (c, head)
        }""",
        weights,
    )
    onnx.save(model, tmp_path / "model.onnx")
    expand(tmp_path / "model.onnx", tmp_path / "big.onnx", 2, device="cpu", precision="float64")
    grown = onnx.load(tmp_path / "big.onnx").graph
    assert "If" not in {node.op_type for node in grown.node}
    assert {tensor.name: list(tensor.dims) for tensor in grown.initializer}["up"] == [24, 40]


def test_groups_in_segments_side_by_side_grow_once(tmp_path: Path) -> None:
    """Scale and shift of a group norm, computed by one product: each half is (groups channels)."""
    weights = normal(0, {"up": (10, 24), "both": (10, 48), "down": (24, 5)})
    weights |= {"gain": np.ones(4, np.float32), "bias": np.zeros(4, np.float32)}
    shapes = {"groups": [0, 4, 6], "flat": [0, 24]}
    weights |= {name: np.asarray(shape) for name, shape in shapes.items()}  # type: ignore[misc]
    model = tmp_path / "model.onnx"
    graph = """g (float[batch, 10] x) => (float[batch, 5] y) {
        h = MatMul (x, up)
        r = Reshape (h, groups)
        n = InstanceNormalization (r, gain, bias)
        f = Reshape (n, flat)
        t = MatMul (x, both)
        a, b = Split <axis = 1, num_outputs = 2> (t)
        m = Mul (f, a)
        s = Add (m, b)
        y = MatMul (s, down)
    }"""
    onnx.save(build_model(graph, weights), model)
    expand(model, tmp_path / "big.onnx", 2, device="cpu", precision="float64")
    grown = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer}
    assert grown["both"][1] == 96


def test_an_average_over_a_width_and_a_length(tmp_path: Path) -> None:
    """A norm averages over the channels of a group and the sequence together. One factor of the axis grows evenly."""
    weights = normal(0, {"table": (31, 24), "gain": (4,), "bias": (4,), "head": (24, 31)})
    weights |= {"groups": np.asarray([0, 4, -1])}  # type: ignore[dict-item]
    model = tmp_path / "model.onnx"
    graph = """g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {
        h = Gather (table, ids)
        t = Transpose <perm = [0, 2, 1]> (h)
        r = Reshape (t, groups)
        n = InstanceNormalization (r, gain, bias)
        z = Shape (t)
        f = Reshape (n, z)
        x = Transpose <perm = [0, 2, 1]> (f)
        logits = MatMul (x, head)
    }"""
    onnx.save(build_model(graph, weights), model)
    expand(model, tmp_path / "big.onnx", 2, device="cpu", precision="float64")
    grown = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer}
    assert grown["table"] == (31, 48)


def test_the_experts_of_a_router_keep_their_number(tmp_path: Path) -> None:
    weights = normal(0, {"table": (31, 12), "gain": (12,), "gate": (12, 3), "mix": (3, 12), "up": (12, 20)})
    weights |= normal(1, {"down": (20, 12), "head": (12, 31)})
    model = tmp_path / "model.onnx"
    graph = """g (int64[batch, sequence] ids) => (float[batch, sequence, 31] logits) {
        h = Gather (table, ids)
        n = LayerNormalization (h, gain)
        g = MatMul (n, gate)
        p = Softmax (g)
        e = MatMul (p, mix)
        u = MatMul (n, up)
        r = Relu (u)
        d = MatMul (r, down)
        s = Add (e, d)
        logits = MatMul (s, head)
    }"""
    onnx.save(build_model(graph, weights), model)
    expand(model, tmp_path / "big.onnx", 2, device="cpu", precision="float64")
    grown = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer}
    assert (grown["gate"], grown["mix"], grown["up"]) == ((24, 3), (3, 24), (24, 40))


def test_a_width_beside_a_batch_of_fixed_size_is_no_head(tmp_path: Path) -> None:
    """A batch of two products between activations makes no heads: their free axes are widths like others."""
    weights = normal(0, {"up": (24, 40), "keys": (24, 5), "down": (40, 24)})
    graph = """g (float[2, 3, 24] x) => (float[2, 5, 24] y) {
        u = MatMul (x, up)
        t = Transpose <perm = [0, 2, 1]> (u)
        k = MatMul (x, keys)
        s = MatMul (t, k)
        z = Transpose <perm = [0, 2, 1]> (s)
        y = MatMul (z, down)
    }"""
    onnx.save(build_model(graph, weights), tmp_path / "model.onnx")
    expand(tmp_path / "model.onnx", tmp_path / "big.onnx", 2, device="cpu", precision="float64")
    assert {tensor.name: list(tensor.dims) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer}["up"][
        1
    ] == 80


def test_one_name_for_axes_of_two_lengths(tmp_path: Path) -> None:
    """Queries and documents are both declared as long as `s`. Nodes show that they are 5 and 7 long."""
    weights = normal(0, {"five": (5, 4), "seven": (7, 4), "up": (4, 6), "down": (6, 4)})
    weights |= {"end": np.asarray([2, 3]), "flat": np.asarray([0, 0, 6])}
    branch = """
        {0}a = Concat <axis = 0> ({0}, {1}) {0}u = MatMul ({0}a, up) {0}s = Shape <start = 0, end = 2> ({0}u)
        {0}t = Concat <axis = 0> ({0}s, end) {0}r = Reshape ({0}u, {0}t) {0}g = Relu ({0}r)
        {0}f = Reshape ({0}g, flat) {0}d = MatMul ({0}f, down) {0}z = ReduceSum <keepdims = 0> ({0}d)"""
    nodes = branch.format("x", "five") + branch.format("y", "seven")
    graph = f"g (float[b, s, 4] x, float[b, s, 4] y) => (float z) {{ {nodes} z = Add (xz, yz) }}"
    weights["five"], weights["seven"] = weights["five"][None], weights["seven"][None]
    onnx.save(build_model(graph, weights), tmp_path / "model.onnx")
    result = expand(tmp_path / "model.onnx", tmp_path / "big.onnx", 2, device="cpu")
    assert result.validation is not None and result.validation.equal
    big = onnx.load(tmp_path / "big.onnx").graph
    assert {tuple(tensor.dims) for tensor in big.initializer} >= {(8, 12)}
    assert len({value.type.tensor_type.shape.dim[1].dim_param for value in big.input}) == 2


def test_the_pixels_of_a_patch_are_no_hidden_width(tmp_path: Path) -> None:
    """A norm over the features of an input does not make them a width of the model."""
    weights = normal(0, {"gain": (48,), "up": (48, 20), "down": (20, 5)})
    weights |= {"patches": np.asarray([0, 3, 2, 4, 2, 4]), "flat": np.asarray([0, 4, 48])}
    graph = """g (float[batch, 3, 8, 8] image) => (float[batch, 4, 5] y) {
        r = Reshape (image, patches)
        t = Transpose <perm = [0, 2, 4, 3, 5, 1]> (r)
        p = Reshape (t, flat)
        n = LayerNormalization (p, gain)
        u = MatMul (n, up)
        a = Relu (u)
        y = MatMul (a, down)
    }"""
    onnx.save(build_model(graph, weights), tmp_path / "model.onnx")
    assert "hidden" not in {dimension.role for dimension in analyse(tmp_path / "model.onnx").named}
    expand(tmp_path / "model.onnx", tmp_path / "big.onnx", 2, device="cpu", precision="float64")
    grown = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer}
    assert grown["up"] == (48, 40)
