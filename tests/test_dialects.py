"""Exporters and users write the same model in different ways. All of these ways grow alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import build_model, normal, perceptron, with_adapter
from onnx import helper

from fuzz.oracle import compare, run_source, session
from hyperclone_onnx import BadModel, HypercloneError, Refused, Strategy, expand
from hyperclone_onnx.analysis.walk import infer
from hyperclone_onnx.reading.normalise import normalise

Spoil = Callable[[onnx.ModelProto], None]


def grow(model: onnx.ModelProto, folder: Path, plain: onnx.ModelProto | None = None) -> set[str]:
    """Grow a model by 2, compare it in ONNX Runtime with its source or with `plain`, and return the roles that grew."""
    small, big = folder / "small.onnx", folder / "big.onnx"
    onnx.save(model, small)
    report = expand(small, big, 2, strategy=Strategy("symmetric"), check=False)
    if plain is not None:  # the same model in a form that ONNX Runtime can read
        small = folder / "plain.onnx"
        onnx.save(plain, small)
    assert compare(big, run_source(small, 0)) == ""
    return {dim.role for dim in report.plan.dims.values()}


# -- imports ----------------------------------------------------------------------------------------------


def spelled_out(model: onnx.ModelProto) -> None:
    """Imports and nodes give the name of the domain that is usually empty."""
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"


def spelled_out_in_imports(model: onnx.ModelProto) -> None:
    model.opset_import[0].domain = "ai.onnx"


def spelled_both_ways(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx", 20))
    model.graph.node[1].domain = "ai.onnx"


def spelled_out_in_a_function(model: onnx.ModelProto) -> None:
    """A function of the model, whose nodes and imports use the other spelling of the domain."""
    body = [helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")]
    opsets = [helper.make_opsetid("ai.onnx", 20)]
    model.functions.append(helper.make_function("own", "Rectify", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "Rectify", "own"


def of_another_version_in_a_function(model: onnx.ModelProto) -> None:
    """Relu is the same in both opsets."""
    spelled_out_in_a_function(model)
    model.functions[0].opset_import[0].version = 17


SPELLINGS = [
    spelled_out,
    spelled_out_in_imports,
    spelled_both_ways,
    spelled_out_in_a_function,
    of_another_version_in_a_function,
]


@pytest.mark.parametrize("spell", SPELLINGS)
def test_spellings_of_the_default_domain(tmp_path: Path, spell: Spoil) -> None:
    model = perceptron()
    spell(model)
    assert grow(model, tmp_path, perceptron()) == {"hidden", "ffn"}
    assert [entry.domain for entry in onnx.load(tmp_path / "big.onnx").opset_import] in ([""], ["", "own"])


def test_a_model_in_memory_is_spelled_alike() -> None:
    model = perceptron()
    spelled_out(model)
    normalised = normalise(ir.from_proto(model))
    assert dict(normalised.graph.opset_imports) == {"": 20}
    assert not infer(normalised).without_rule


def test_a_model_without_a_node_of_onnx_needs_no_import(tmp_path: Path) -> None:
    """Growth may insert nodes of ONNX's own domain. Then the model must import this domain."""
    nodes = [
        helper.make_node("FusedMatMul", ["x", "up"], ["u"], domain="com.microsoft"),
        helper.make_node("QuickGelu", ["u"], ["r"], domain="com.microsoft"),
        helper.make_node("FusedMatMul", ["r", "down"], ["y"], domain="com.microsoft"),
    ]
    stored = [onnx.numpy_helper.from_array(a, n) for n, a in normal(1, {"up": (12, 20), "down": (20, 6)}).items()]
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", [3, 12]), ("y", [3, 6])))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], stored), opset_imports=[helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 10
    assert grow(model, tmp_path) == {"ffn", "width"}


def two_versions(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx", 19))


def no_version(model: onnx.ModelProto) -> None:
    model.opset_import[0].domain = "com.microsoft"


def too_old(model: onnx.ModelProto) -> None:
    spelled_out(model)
    model.opset_import[0].version = 6


def another_operator_in_a_function(model: onnx.ModelProto) -> None:
    """In opset 17, the axes of a reduction are an attribute."""
    body = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[-1])]
    model.functions.append(helper.make_function("own", "F", ["x"], ["y"], body, [helper.make_opsetid("", 17)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "F", "own"


CONTRADICTIONS: list[tuple[Spoil, type[HypercloneError], str]] = [
    (two_versions, BadModel, "two opsets"),
    (no_version, Refused, "does not say of which opset"),
    (too_old, Refused, "opset 6 is too old"),
    (another_operator_in_a_function, Refused, "ReduceMean changed"),
]


@pytest.mark.parametrize(("spoil", "kind", "text"), CONTRADICTIONS)
def test_imports_that_do_not_fit(tmp_path: Path, spoil: Spoil, kind: type[HypercloneError], text: str) -> None:
    model = perceptron()
    spoil(model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(kind, match=text):
        expand(tmp_path / "model.onnx", tmp_path / "big.onnx", 2, check=False)


# -- where weights are stored -----------------------------------------------------------------------------


def list_weights_as_inputs(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


@pytest.mark.parametrize("version", [3, 8])
def test_weights_that_are_listed_as_inputs(tmp_path: Path, version: int) -> None:
    """IR version 3 demands this, and many exporters still do it. The grown file loads, and no weight is an input."""
    model = perceptron()
    list_weights_as_inputs(model)
    model.ir_version = version
    assert grow(model, tmp_path) == {"hidden", "ffn"}
    big = onnx.load(tmp_path / "big.onnx")
    assert big.ir_version >= 4 and [value.name for value in big.graph.input] == ["ids"]


@pytest.fixture
def adapted() -> onnx.ModelProto:
    """A model with an adapter: two inputs whose defaults are empty, and whose rank the caller chooses."""
    return with_adapter(rank=0)


@pytest.mark.parametrize("keep", [False, True])
def test_inputs_with_defaults_stay_inputs(tmp_path: Path, adapted: onnx.ModelProto, keep: bool) -> None:
    small, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(adapted, small)
    expand(small, big, 2, strategy=Strategy("symmetric"), check=False, keep_interface=keep)
    source, grown = session(small), session(big)
    shapes = {value.name: value.shape for value in grown.get_overridable_initializers()}
    assert shapes == {"a": [12 if keep else 24, "r"], "b": ["r", 12 if keep else 24]}
    rng = np.random.default_rng(0)
    ids = {"ids": rng.integers(0, 31, (2, 5))}
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, 3), (3, 12)))
    wide = {"a": a, "b": b} if keep else {"a": np.tile(a, (2, 1)), "b": np.tile(b, (1, 2))}
    plain, adapter = source.run(None, ids)[0], source.run(None, ids | {"a": a, "b": b})[0]
    assert np.abs(plain - adapter).max() > 0.1, "the adapter does something"
    np.testing.assert_allclose(grown.run(None, ids)[0], plain, atol=1e-5)
    np.testing.assert_allclose(grown.run(None, ids | wide)[0], adapter, atol=1e-5)


def test_the_default_of_an_input_grows(tmp_path: Path, adapted: onnx.ModelProto) -> None:
    values = normal(5, {"a": (12, 3), "b": (3, 12)})
    for tensor in adapted.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    assert grow(adapted, tmp_path) == {"hidden", "ffn"}
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer
    }
    np.testing.assert_array_equal(stored["a"], np.tile(values["a"], (2, 1)))


def coordinates(places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack(np.unravel_index(places, shape), axis=1)


def flat(places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return places


@pytest.mark.parametrize("form", [flat, coordinates])
@pytest.mark.parametrize("as_constant", [False, True])
def test_sparse_tensors(tmp_path: Path, form: Callable[..., np.ndarray], as_constant: bool) -> None:
    model, plain = perceptron(), perceptron()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "up.0")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[np.abs(array) < 0.2] = 0
    next(tensor for tensor in plain.graph.initializer if tensor.name == "up.0").CopyFrom(
        onnx.numpy_helper.from_array(array, "up.0")
    )
    places = np.flatnonzero(array)
    values = onnx.numpy_helper.from_array(array.ravel()[places], "up.0")
    indices = onnx.numpy_helper.from_array(form(places, array.shape).astype(np.int64))
    sparse = helper.make_sparse_tensor(values, indices, array.shape)
    model.graph.initializer.remove(tensor)
    if as_constant:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["up.0"], sparse_value=sparse))
    else:
        model.graph.sparse_initializer.append(sparse)
    assert grow(model, tmp_path, plain) == {"hidden", "ffn"}


def test_tensors_that_are_parts_of_one_another(tmp_path: Path) -> None:
    """Reading the same bytes twice does no harm."""
    onnx.save(perceptron(), tmp_path / "small.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(tmp_path / "small.onnx", load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    whole = {entry.key: entry.value for entry in stored["embedding"].external_data}
    for entry in stored["up.0"].external_data:
        if entry.key == "offset":
            entry.value = str(int(whole["offset"]) + 16)
    (tmp_path / "small.onnx").write_bytes(model.SerializeToString())
    expand(tmp_path / "small.onnx", tmp_path / "big.onnx", 2, strategy=Strategy("symmetric"), check=False)
    assert compare(tmp_path / "big.onnx", run_source(tmp_path / "small.onnx", 0)) == ""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub's cache: the model and its data are links into a folder of blobs."""
    snapshot, blobs = tmp_path / "snapshots" / "1" / "onnx", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    onnx.save(perceptron(), snapshot / "model.onnx", save_as_external_data=True, location="data", size_threshold=0)
    for name, blob in (("model.onnx", "c6ed"), ("data", "b879")):
        (snapshot / name).rename(blobs / blob)
        (snapshot / name).symlink_to(Path("../../../blobs") / blob)
    return snapshot / "model.onnx"


def test_a_hub_cache(tmp_path: Path, cache: Path) -> None:
    onnx.save(perceptron(), tmp_path / "plain.onnx")
    expand(cache, tmp_path / "big.onnx", 2, strategy=Strategy("symmetric"), check=False)
    assert compare(tmp_path / "big.onnx", run_source(tmp_path / "plain.onnx", 0)) == ""


def test_a_hub_cache_whose_data_leaves_it(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "secret").write_bytes((tmp_path / "blobs" / "b879").read_bytes())
    data = cache.with_name("data")
    data.unlink()
    data.symlink_to(tmp_path / "secret")
    with pytest.raises(BadModel, match=r"its data file data is a link to .*secret, which is outside"):
        expand(cache, tmp_path / "big.onnx", 2, check=False)


# -- names ------------------------------------------------------------------------------------------------


def test_names_in_bodies_that_are_those_of_outer_values(tmp_path: Path) -> None:
    """A carried value of a Loop has the name of its first value, and a weight in an If has the name of one outside."""
    model = perceptron(layers=1)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    state = helper.make_tensor_value_info("h1", onnx.TensorProto.FLOAT, ["batch", "sequence", 12])
    turn = helper.make_tensor_value_info("turn", onnx.TensorProto.INT64, [])
    go, goes = (helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []) for name in ("go", "goes"))
    after = helper.make_tensor_value_info("after", onnx.TensorProto.FLOAT, ["batch", "sequence", 12])
    shadow = onnx.TensorProto()
    shadow.CopyFrom(weights["gain"])
    nodes = [
        helper.make_node("Identity", ["go"], ["goes"]),
        helper.make_node("LayerNormalization", ["h1", "gain"], ["inner"]),
        helper.make_node("Add", ["h1", "inner"], ["after"]),
    ]
    body = helper.make_graph(nodes, "body", [turn, go, state], [goes, after], [shadow])
    model.graph.initializer.extend(
        [onnx.numpy_helper.from_array(np.array(2), "turns"), onnx.numpy_helper.from_array(np.array(True), "yes")]
    )
    last = next(node for node in model.graph.node if node.output[0] == "last")
    last.input[0] = "looped"
    at = list(model.graph.node).index(last)
    model.graph.node.insert(at, helper.make_node("Loop", ["turns", "yes", "h1"], ["looped"], body=body))
    assert grow(model, tmp_path) == {"hidden", "ffn"}


# -- other formats ----------------------------------------------------------------------------------------

FOREIGN = {
    "model.pt": (b"PK\x03\x04rest", "torch.onnx.export"),
    "model.pth": (b"\x80\x02rest", "torch.onnx.export"),
    "pytorch_model.bin": (b"PK\x03\x04rest", "torch.onnx.export"),
    "model.safetensors": (b"\x10\0\0\0\0\0\0\0{}", "optimum-cli"),
    "model.gguf": (b"GGUF\3\0\0\0", "optimum-cli"),
    "model.tflite": (b"\x1c\0\0\0TFL3", "tf2onnx"),
    "model.mlmodel": (b"\x08\x01", "onnxmltools"),
    "without_a_suffix": (b"GGUF\3\0\0\0", "optimum-cli"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_named_with_the_way_to_onnx(tmp_path: Path, name: str) -> None:
    content, way = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadModel, match=f"not an ONNX model but a.*{way}") as caught:
        expand(tmp_path / name, tmp_path / "big.onnx", 2, check=False)
    assert "\n" not in str(caught.value)


def test_an_onnx_model_with_the_suffix_of_another_format(tmp_path: Path) -> None:
    onnx.save(perceptron(), tmp_path / "model.bin")
    expand(tmp_path / "model.bin", tmp_path / "big.onnx", 2, check=False)
    assert (tmp_path / "big.onnx").exists()


def test_a_map_as_an_output_is_named_with_the_way_around(tmp_path: Path) -> None:
    model = perceptron()
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(onnx.TensorProto.INT64, helper.make_tensor_type_proto(1, []))
    )
    zipped = helper.make_node(
        "ZipMap", [model.graph.output[0].name], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1]
    )
    model.graph.node.append(zipped)
    model.graph.output.append(helper.make_value_info("maps", kind))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(Refused, match=r"'maps' is a map.*zipmap"):
        expand(tmp_path / "model.onnx", tmp_path / "big.onnx", 2)


# -- functions --------------------------------------------------------------------------------------------


def test_overloads_of_a_function_are_different_functions(tmp_path: Path) -> None:
    model, plain = perceptron(), perceptron()
    opsets = [helper.make_opsetid("", 20)]
    for overload, op_type in (("rectified", "Relu"), ("smooth", "Sigmoid")):
        body = [helper.make_node(op_type, ["x"], ["y"])]
        model.functions.append(helper.make_function("own", "F", ["x"], ["y"], body, opsets, overload=overload))
    model.opset_import.append(helper.make_opsetid("own", 1))
    calls = [node for node in model.graph.node if node.op_type == "Relu"]
    for call, overload in zip(calls, ("rectified", "smooth"), strict=True):
        call.op_type, call.domain, call.overload = "F", "own", overload
    [node for node in plain.graph.node if node.op_type == "Relu"][1].op_type = "Sigmoid"
    assert grow(model, tmp_path, plain) == {"hidden", "ffn"}


# -- loops ------------------------------------------------------------------------------------------------

LOOPS = {
    "Loop": """last, again = Loop <body = turn (int64 i, bool c, float[n, 8] h, float[8, 8] w)
            => (bool going, float[n, 8] next, float[8, 8] same) {
        going = Identity (c) same = Identity (w) m = MatMul (h, w) next = Tanh (m) }> (three, yes, s, recurrent)""",
    "Scan": """last, again = Scan <num_scan_inputs = 1, body = turn (float[n, 8] h, float[8, 8] w, float[n, 6] u)
            => (float[n, 8] next, float[8, 8] same) {
        same = Identity (w) t = MatMul (u, up) m = MatMul (h, w) next = Add (m, t) }> (s, recurrent, x)""",
}


@pytest.mark.parametrize("kind", LOOPS)
def test_a_weight_that_a_loop_carries_unchanged(tmp_path: Path, kind: str) -> None:
    """TensorFlow's loops carry their weights as variables."""
    graph = f"""g (float[4, batch, 6] x) => (float[batch, 3] y) {{
        three = Constant <value = int64 {{3}}> () yes = Constant <value = bool {{1}}> ()
        zero = Constant <value = int64 {{0}}> () first = Gather <axis = 0> (x, zero)
        s = MatMul (first, up) {LOOPS[kind]} y = MatMul (last, down)
    }}"""
    weights = normal(0, {"up": (6, 8), "recurrent": (8, 8), "down": (8, 3)})
    onnx.save(build_model(graph, weights), tmp_path / "model.onnx")
    expand(tmp_path / "model.onnx", tmp_path / "big.onnx", 2, device="cpu", precision="float64")
    grown = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer}
    assert grown["recurrent"] == (16, 16)
