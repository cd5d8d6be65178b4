"""Forms that people train: recurrent layers, resized images, fake quantisation, optional inputs.

Values are compared with ONNX Runtime, gradients with PyTorch's own layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import build_model
from onnx import TensorProto, helper

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")

from hyperclone_onnx.analysis import trainable  # noqa: E402
from hyperclone_onnx.errors import BadRequest, Refused  # noqa: E402
from hyperclone_onnx.frameworks.compiling.preparation import prepare_model  # noqa: E402
from tests import node_cases  # noqa: E402

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def floats(*shape: int, scale: float = 1.0) -> Array:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def model_of(nodes: list[onnx.NodeProto], stored: dict[str, Array], fed: dict[str, Array], outputs: list[str]) -> Any:
    """A model whose outputs have whatever type and shape inference finds."""
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in fed.items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        infos,
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def check(model: onnx.ModelProto, fed: dict[str, Array], framework: str) -> None:
    options = ort.SessionOptions()
    # With optimisation ONNX Runtime computes a product of fake quantised weights in integers.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, fed)
    actual = node_cases.run(ir.from_proto(model), framework, list(fed.values()))
    for want, got in zip(expected, actual, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def loaded(model: onnx.ModelProto, folder: Path) -> Any:
    """The model as a PyTorch module."""
    pytest.importorskip("torch")
    from hyperclone_onnx.frameworks.torch import load

    onnx.save(model, folder / "model.onnx")
    return load(folder / "model.onnx")


# -- recurrent layers -------------------------------------------------------------------------------------

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
LENGTH, BATCH, WIDTH, HIDDEN = 6, 3, 5, 4

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "rnn-relu-both-ways": ("RNN", {"direction": "bidirectional", "activations": ["Relu", "Tanh"]}),
    "gru": ("GRU", {}),
    "gru-linear-reverse": ("GRU", {"linear_before_reset": 1, "direction": "reverse"}),
    "gru-both-ways-clipped": ("GRU", {"direction": "bidirectional", "clip": 0.5}),
    "lstm": ("LSTM", {}),
    "lstm-both-ways": ("LSTM", {"direction": "bidirectional"}),
    "lstm-reverse-coupled": ("LSTM", {"direction": "reverse", "input_forget": 1}),
    "lstm-activations": ("LSTM", {"activations": ["HardSigmoid", "Elu", "Softsign"], "activation_alpha": [0.3, 0.7]}),
}


def recurrent(op_type: str, attributes: dict[str, Any], full: bool) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """One layer, with all of its inputs or only those that it must have."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    gates = GATES[op_type] * HIDDEN
    stored = {"w": floats(directions, gates, WIDTH), "r": floats(directions, gates, HIDDEN, scale=0.5)}
    fed = {"x": floats(LENGTH, BATCH, WIDTH)}
    inputs, states = ["x", "w", "r"], 2 if op_type == "LSTM" else 1
    if full:
        stored["b"] = floats(directions, 2 * gates)
        fed |= {"lengths": np.array([6, 2, 4], np.int32), "h": floats(directions, BATCH, HIDDEN)}
        inputs += ["b", "lengths", "h"]
    if full and op_type == "LSTM":
        fed["c"] = floats(directions, BATCH, HIDDEN)
        stored["p"] = floats(directions, 3 * HIDDEN)
        inputs += ["c", "p"]
    outputs = ["y", "last", "cell"][: 1 + states]
    node = helper.make_node(op_type, inputs, outputs, "layer", hidden_size=HIDDEN, **attributes)
    return model_of([node], stored, fed, outputs), fed


@pytest.mark.parametrize("framework", node_cases.FRAMEWORKS)
@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
@pytest.mark.parametrize("form", FORMS)
def test_recurrent_layers(form: str, full: bool, framework: str) -> None:
    if framework != "numpy":
        pytest.importorskip(framework)
    model, fed = recurrent(*FORMS[form], full)
    check(model, fed, framework)


@pytest.mark.parametrize("op_type", GATES)
def test_gradients_of_recurrent_layers(op_type: str, tmp_path: Path) -> None:
    """Two directions, with PyTorch's order of gates put into ONNX's."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = getattr(torch.nn, op_type)(WIDTH, HIDDEN, bidirectional=True)
    order = {"RNN": [0], "GRU": [1, 0, 2], "LSTM": [0, 3, 1, 2]}[op_type]

    def in_onnx(of: Callable[[Any], Any]) -> dict[str, Any]:
        """W, R and B, from what `of` gives for each of PyTorch's parameters."""
        stacks = {}
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            ends = []
            for end in ("", "_reverse"):
                parts = of(getattr(layer, f"{name}_l0{end}")).chunk(GATES[op_type])
                ends.append(torch.cat([parts[i] for i in order]))
            stacks[name] = torch.stack(ends)
        bias = torch.cat([stacks["bias_ih"], stacks["bias_hh"]], dim=1)
        return {"w": stacks["weight_ih"], "r": stacks["weight_hh"], "b": bias}

    stored = {name: tensor.numpy() for name, tensor in in_onnx(lambda parameter: parameter.detach()).items()}
    fed = {"x": floats(LENGTH, BATCH, WIDTH)}
    attributes = {"linear_before_reset": 1} if op_type == "GRU" else {}
    node = helper.make_node(
        op_type, ["x", *stored], ["y"], "layer", hidden_size=HIDDEN, direction="bidirectional", **attributes
    )
    module = loaded(model_of([node], stored, fed, ["y"]), tmp_path)
    assert {module.initializers[path] for path, tensor in module.named_parameters() if tensor.requires_grad} == set(
        stored
    )
    x = torch.tensor(fed["x"])
    expected = layer(x)[0].reshape(LENGTH, BATCH, 2, HIDDEN).transpose(1, 2)
    actual = module(x)
    torch.testing.assert_close(actual, expected)
    weight = torch.tensor(floats(*expected.shape))
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    wanted = in_onnx(lambda parameter: parameter.grad)
    for path, tensor in module.named_parameters():
        torch.testing.assert_close(tensor.grad, wanted[module.initializers[path]], rtol=1e-4, atol=1e-5)


def test_zeros_before_the_first_step_are_no_parameter() -> None:
    """A first state that was learnt is one."""
    stored = {"w": floats(1, 16, WIDTH), "r": floats(1, 16, HIDDEN), "h": np.zeros((1, BATCH, HIDDEN), np.float32)}
    stored["c"] = floats(1, BATCH, HIDDEN)
    node = helper.make_node("LSTM", ["x", "w", "r", "", "", "h", "c"], ["y"], "layer", hidden_size=HIDDEN)
    model = model_of([node], stored, {"x": floats(LENGTH, BATCH, WIDTH)}, ["y"])
    assert trainable.trainable(prepare_model(ir.from_proto(model))) == ["w", "r", "c"]


def test_an_activation_that_nothing_describes_is_refused() -> None:
    model, fed = recurrent("RNN", {"activations": ["Sine"]}, full=False)
    with pytest.raises(Refused, match="activation 'Sine' has no handoff"):
        node_cases.run(ir.from_proto(model), "numpy", list(fed.values()))


# -- resized images ---------------------------------------------------------------------------------------

RESIZES = {
    "nearest": (
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        "nearest",
    ),
    "bilinear": ({"mode": "linear"}, "bilinear"),
    "bicubic": ({"mode": "cubic"}, "bicubic"),
}


@pytest.mark.parametrize("mode", RESIZES)
@pytest.mark.parametrize("size", [(9, 14), (3, 4)])
def test_gradients_of_resized_images(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    attributes, name = RESIZES[mode]
    fed = {"x": floats(2, 3, 6, 7)}
    stored = {"size": np.array([2, 3, *size])}
    model = model_of([helper.make_node("Resize", ["x", "", "", "size"], ["y"], **attributes)], stored, fed, ["y"])
    module = loaded(model, tmp_path)
    images = [torch.tensor(fed["x"], requires_grad=True) for _ in range(2)]
    more = {} if mode == "nearest" else {"align_corners": False}
    expected = torch.nn.functional.interpolate(images[0], size=size, mode=name, **more)
    actual = module(images[1])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    weight = torch.tensor(floats(*expected.shape))
    (expected * weight).sum().backward()
    (actual * weight).sum().backward()
    torch.testing.assert_close(images[1].grad, images[0].grad, rtol=1e-4, atol=1e-5)


def test_a_compiled_program_resizes(tmp_path: Path) -> None:
    """PyTorch traces no NumPy: the places are constants of the program."""
    torch = pytest.importorskip("torch")
    fed = {"x": floats(2, 3, 6, 7)}
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="cubic")
    module = loaded(model_of([node], {"scales": np.array([1, 1, 1.5, 2], np.float32)}, fed, ["y"]), tmp_path)
    x = torch.tensor(fed["x"])
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


# -- fake quantisation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_gradients_of_fake_quantisation(per: str, tmp_path: Path) -> None:
    """Straight through within the range of the codes, and none outside it."""
    torch = pytest.importorskip("torch")
    w = floats(5, 6)
    scale = np.float32(0.013) if per == "tensor" else np.linspace(0.005, 0.03, 6, dtype=np.float32)
    zero = np.int8(3) if per == "tensor" else np.zeros(6, np.int8)
    codes = ["codes", "scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"], axis=1),
        helper.make_node("Reshape", ["q", "shape"], ["codes"]),
        helper.make_node("DequantizeLinear", codes, ["fake"], axis=1),
        helper.make_node("MatMul", ["x", "fake"], ["y"]),
    ]
    fed = {"x": floats(4, 5)}
    stored = {"w": w, "scale": np.asarray(scale), "zero": np.asarray(zero), "shape": np.array([5, 6])}
    model = model_of(nodes, stored, fed, ["y"])
    check(model, fed, "torch")
    module = loaded(model, tmp_path)
    trained = [tensor for tensor in module.parameters() if tensor.requires_grad]
    assert [module.initializers[path] for path, _ in module.named_parameters()][:1] == ["w"]
    assert len(trained) == 1
    x, ours = torch.tensor(fed["x"]), torch.tensor(w, requires_grad=True)
    if per == "tensor":
        fake = torch.fake_quantize_per_tensor_affine(ours, float(scale), int(zero), -128, 127)
    else:
        fake = torch.fake_quantize_per_channel_affine(ours, torch.tensor(scale), torch.zeros(6), 1, -128, 127)
    weight = torch.tensor(floats(4, 6))
    ((x @ fake) * weight).sum().backward()
    (module(x) * weight).sum().backward()
    assert 0 < (ours.grad == 0).sum() < ours.grad.numel(), "some weights lie outside the range of the codes"
    torch.testing.assert_close(trained[0].grad, ours.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("framework", node_cases.FRAMEWORKS)
def test_fake_quantisation_of_activations(framework: str) -> None:
    if framework != "numpy":
        pytest.importorskip(framework)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    stored = {"scale": np.float32(0.02), "zero": np.uint8(120)}
    fed = {"x": floats(4, 5)}
    check(model_of(nodes, {k: np.asarray(v) for k, v in stored.items()}, fed, ["y"]), fed, framework)


def test_codes_that_another_operator_reads_are_refused() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], "rounding"),
        helper.make_node("Concat", ["q", "q"], ["twice"], "joined", axis=0),
        helper.make_node("DequantizeLinear", ["twice", "scale"], ["y"]),
    ]
    model = model_of(nodes, {"scale": np.asarray(np.float32(0.02))}, {"x": floats(4, 5)}, ["y"])
    with pytest.raises(Refused, match=r"QuantizeLinear \(node 'rounding'\): Concat \(node 'joined'\) reads its codes"):
        prepare_model(ir.from_proto(model))


DYNAMIC = {
    "DynamicQuantizeLinear, MatMulInteger": (
        "g (float[4, 5] x) => (float[4, 6] y) { q, s, z = DynamicQuantizeLinear (x) i = MatMulInteger (q, codes, z) "
        "y = Cast <to = 1> (i) }"
    ),
    "com.microsoft.DynamicQuantizeMatMul": (
        "g (float[4, 5] x) => (float[4, 6] y) { y = com.microsoft.DynamicQuantizeMatMul (x, codes, scale) }"
    ),
    "com.microsoft.MatMulIntegerToFloat": (
        "g (uint8[4, 5] x) => (float[4, 6] y) { y = com.microsoft.MatMulIntegerToFloat (x, codes, scale, scale) }"
    ),
}


@pytest.mark.parametrize("case", DYNAMIC)
def test_dynamic_quantisation_is_refused_by_operator_and_node(case: str) -> None:
    stored = {"codes": np.ones((5, 6), np.int8), "scale": np.asarray(np.float32(0.1))}
    model = build_model(DYNAMIC[case], stored, opset=21)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    for number, node in enumerate(model.graph.node):
        node.name = f"node{number}"
    with pytest.raises(Refused, match="no handoff for") as problem:
        prepare_model(ir.from_proto(model))
    for name in case.split(", "):
        assert f"{name} (node 'node" in str(problem.value)


# -- optional inputs --------------------------------------------------------------------------------------


def test_an_optional_input_may_be_left_out(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    yes = helper.make_graph(
        [helper.make_node("OptionalGetElement", ["bias"], ["some"])],
        "yes",
        [],
        [helper.make_tensor_value_info("some", TensorProto.FLOAT, None)],
    )
    no = helper.make_graph(
        [helper.make_node("Identity", ["none"], ["other"])],
        "no",
        [],
        [helper.make_tensor_value_info("other", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("OptionalHasElement", ["bias"], ["given"]),
        helper.make_node("If", ["given"], ["added"], then_branch=yes, else_branch=no),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "added"], ["y"]),
    ]
    fed, stored = {"x": floats(4, 5)}, {"w": floats(5, 6), "none": np.zeros((1, 6), np.float32)}
    model = model_of(nodes, stored, fed, ["y"])
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [4, 6]))
    model.graph.input.append(helper.make_value_info("bias", kind))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 6]))
    module = loaded(model, tmp_path)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    bias, x = floats(4, 6), torch.tensor(fed["x"])
    for given in (None, bias):
        expected = session.run(None, fed | {"bias": given})[0]
        actual = module(x, None if given is None else torch.tensor(given))
        np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module(x), module(x, None))
    with pytest.raises(BadRequest, match="inputs x are missing"):
        module(bias=torch.tensor(bias))
