"""A model from ONNX as a torch.nn.Module, in typical uses of PyTorch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import build_model, normal, perceptron

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")

from hyperclone_onnx.errors import BadRequest, Refused  # noqa: E402
from hyperclone_onnx.frameworks.torch import Block, OnnxModule, load  # noqa: E402

Zoo = Callable[[str], Path]


@pytest.fixture
def llama(zoo: Zoo) -> OnnxModule:
    return load(zoo("llama.distinct"))


def tokens(batch: int = 2, length: int = 7) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 95, (batch, length), generator=generator)
    return ids, torch.ones_like(ids)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_parameters_have_the_names_of_their_initializers(llama: OnnxModule) -> None:
    names = dict(llama.named_parameters())
    assert "model.layers.0.input_layernorm.weight" in names and "model.embed_tokens.weight" in names
    assert llama.model.layers[1].input_layernorm.weight is names["model.layers.1.input_layernorm.weight"]
    assert llama.initializers["model.norm.weight"] == "model.norm.weight"
    assert set(llama.initializers) == set(names)
    assert {name for name, _ in llama.named_buffers()} == {"model.rotary_emb.inv_freq", "val_223", "val_224"}


def test_inputs_are_given_by_position_or_by_name(llama: OnnxModule) -> None:
    ids, mask = tokens()
    assert torch.equal(llama(ids, mask), llama(attention_mask=mask, input_ids=ids))


@pytest.mark.parametrize(
    ("positional", "named", "message"),
    [
        (3, {}, "3 inputs given, the model has 2: input_ids, attention_mask"),
        (1, {"mask": 0}, "no input 'mask'; it has input_ids, attention_mask"),
        (1, {"input_ids": 0}, "'input_ids' is given twice"),
        (1, {}, "inputs attention_mask are missing"),
    ],
)
def test_wrong_inputs_are_named(llama: OnnxModule, positional: int, named: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        llama(*[tokens()[0]] * positional, **named)


def test_a_tied_tensor_is_one_parameter(zoo: Zoo) -> None:
    model = load(zoo("gpt2.distinct"))
    tied = [name for name in model.initializers if name.endswith("wte.weight") or name.startswith("lm_head")]
    assert len(tied) == 1
    ids, mask = tokens()
    model(ids, mask).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_blocks_are_one_class_and_equal_but_for_their_tensors(llama: OnnxModule) -> None:
    first, second = llama.model.layers
    assert isinstance(first, Block) and isinstance(second, Block)
    assert first.code == second.code and first._function is second._function
    shapes = [
        {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} for layer in (first, second)
    ]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 9


def test_copies_and_pickles_are_their_own(llama: OnnxModule) -> None:
    inputs = tokens()
    expected = llama(*inputs)
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert torch.equal(other(*inputs), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(other(*inputs), expected)
    assert torch.equal(llama(*inputs), expected)


def test_a_state_dict_comes_back(llama: OnnxModule, tmp_path: Path) -> None:
    inputs = tokens()
    expected = llama(*inputs)
    torch.save(llama.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.zero_()
    llama.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(llama(*inputs), expected)


def test_autocast(llama: OnnxModule) -> None:
    inputs = tokens()
    expected = llama(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = llama(*inputs)
    got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    assert ((got - expected).abs().max() / expected.abs().max()) < 0.05


@pytest.mark.parametrize("family", ["llama", "bert", "gptj", "bloom", "vit"])
def test_compile_sees_one_graph(family: str, zoo: Zoo) -> None:
    """With fullgraph, a value that the tracer cannot follow is an error. A second length makes no new graph."""
    model = load(zoo(f"{family}.distinct"))
    from torch._dynamo import testing

    counter = testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=family != "vit")
    for batch, length in ((2, 7), (3, 9), (4, 12)):
        inputs = tokens(batch, length) if family != "vit" else (torch.randn(batch, 3, 16, 16),)
        if family == "vit":
            sizes = [dim.dim_value for dim in onnx.load(zoo("vit.distinct")).graph.input[0].type.tensor_type.shape.dim]
            inputs = (torch.randn(2, *sizes[1:]),)
        named = {declared.name: value for declared, value in zip(model.program.inputs, inputs, strict=False)}
        if family == "bert":
            named["token_type_ids"] = torch.zeros_like(inputs[0])
        got = compiled(**named)
        expected = model(**named)
        assert (got - expected).abs().max() <= 2e-6 * expected.abs().max()
        got.sum().backward()
        assert counter.frame_count == 1  # nor does it start a new trace


def test_export_with_symbolic_sizes(llama: OnnxModule) -> None:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.export.export(llama, tokens(), dynamic_shapes={"inputs": (sizes, sizes)})
    other = tokens(3, 11)
    assert torch.allclose(program.module()(*other), llama(*other), atol=1e-5)


def test_checkpointing_of_blocks(llama: OnnxModule) -> None:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping

    inputs = tokens()
    llama(*inputs).logsumexp(-1).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}
    llama.zero_grad()
    wrapping.apply_activation_checkpointing(llama, check_fn=lambda module: isinstance(module, Block))
    llama(*inputs).logsumexp(-1).sum().backward()
    for name, parameter in llama.named_parameters():
        assert torch.allclose(parameter.grad, expected[name.replace("_checkpoint_wrapped_module.", "")], atol=1e-6)


def test_fully_sharded_blocks(llama: OnnxModule, tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inputs = tokens()
    expected = llama(*inputs).detach()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in llama.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(llama, mesh=mesh)
        got = llama(*inputs)
        got.sum().backward()
        assert torch.allclose(got, expected, atol=1e-6)
        assert all(parameter.grad is not None for parameter in llama.parameters())
    finally:
        dist.destroy_process_group()


def test_freeze_and_train(zoo: Zoo) -> None:
    model = load(zoo("llama.distinct"), freeze=["model.*"], train=["model.norm.*"])
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "model.norm.weight" in learning and "model.embed_tokens.weight" not in learning and "val_451" in learning
    with pytest.raises(BadRequest, match="'decoder\\.\\*' matches no floating tensor"):
        load(zoo("llama.distinct"), freeze=["decoder.*"])


def test_names_do_not_depend_on_the_choice_of_trained_tensors(zoo: Zoo) -> None:
    path = zoo("llama.distinct")
    names = set(load(path).initializers)
    assert set(load(path, freeze=["*"]).initializers) == names
    assert set(load(path, train=["*"]).initializers) == names | {"model.rotary_emb.inv_freq"}
    assert set(load(path, train=["val_223"]).initializers) == names | {"val_223"}  # a number, requested by its name


def test_names_that_python_cannot_have(tmp_path: Path) -> None:
    text = "g (float[n, 4] x) => (float[n, 4] y) {\nh = Add (x, type)\ny = Mul (h, other)\n}"
    proto = build_model(text, normal(0, {"type": (4,), "other": (4,)}))
    for tensor, node, name in ((0, 0, "onnx::Add_1/for"), (1, 1, "a.type.0w")):
        proto.graph.initializer[tensor].name = name
        proto.graph.node[node].input[1] = name
    model = load(saved(proto, tmp_path))
    assert set(model.initializers.values()) == {"onnx::Add_1/for", "a.type.0w"}
    x = torch.randn(3, 4)
    first, second = (torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in proto.graph.initializer)
    assert torch.allclose(model(x), (x + first) * second)


REFUSED = {
    "an operator that is not in the table": (
        "g (float[n] x) => (float[n] y) {\nh = Relu (x)\ny = HannLike (h)\n}",
        r"no handoff for HannLike \(node 'HannLike_1'\)",
    ),
    "an attribute that is not described": (
        "g (float[n] x) => (float[n] y) {\ny = Relu <steepness = 2> (x)\n}",
        r"Relu \(node 'Relu_0'\) has no handoff with its attribute 'steepness'",
    ),
    "a size that depends on data": (
        "g (float[n] x) => (float[m] y) {\n"
        "k = Constant <value = int64[1] {0}> ()\nt = ReduceMean <keepdims = 1> (x, k)\nc = Cast <to = 7> (t)\n"
        "y = Expand (x, c)\n}",
        r"takes a size that ReduceMean \(node .*\) computes from data",
    ),
    "a type that is not covered": (
        "g (float[n] x) => (float8e5m2[n] y) {\ny = Cast <to = 19> (x)\n}",
        r"'y'.* is of the type float8e5m2, which has no handoff",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    text, message = REFUSED[case]
    with pytest.raises(Refused, match=message):
        load(saved(build_model(text, {}), tmp_path))


def test_a_branch_by_an_input_and_by_a_size(tmp_path: Path) -> None:
    text = """g (float[n, 4] x, bool flag) => (float[n, 4] y) {
        yes = Constant <value = float {2.0}> ()
        h = If (flag) <then_branch = t () => (float[n, 4] a) { a = Mul (x, yes) },
                       else_branch = e () => (float[n, 4] b) { b = Neg (x) }>
        s = Shape (x)
        zero = Constant <value = int64 {0}> ()
        n = Gather (s, zero)
        two = Constant <value = int64 {2}> ()
        long = Greater (n, two)
        y = If (long) <then_branch = t2 () => (float[n, 4] c) { c = Identity (h) },
                       else_branch = e2 () => (float[n, 4] d) { d = Mul (h, h) }>
    }"""
    model = load(saved(build_model(text, {}), tmp_path))
    for rows in (2, 3):
        x = torch.randn(rows, 4)
        for flag in (True, False):
            h = 2 * x if flag else -x
            assert torch.equal(model(x, torch.tensor(flag)), h if rows > 2 else h * h)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    model = load(saved(perceptron(), tmp_path))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.from_numpy(np.arange(24).reshape(2, 12) % 31)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


LOOPS = {
    "a counted loop": (
        """g (float[n, 3] x, float[n] s) => (float[n] last, float[k, n] made) {
        axes = Constant <value = int64 {1}> ()
        z = Shape (x)
        trips = Gather (z, axes)
        last, made = Loop (trips, , s) <body = b (int64 i, bool on, float[n] now) =>
            (bool still, float[n] next, float[n] out) {
                still = Identity (on)
                column = Gather <axis = 1> (x, i)
                scaled = Mul (column, weight)
                next = Add (now, scaled)
                out = Mul (next, next)
            }>
    }""",
        (4, 3),
    ),
    "slices by the number of the turn": (
        """g (float[n, 3] x, float[n] s) => (float[n] last, float[k, n] made) {
        axes = Constant <value = int64 {1}> ()
        one = Constant <value = int64[1] {1}> ()
        z = Shape (x)
        trips = Gather (z, axes)
        last, made = Loop (trips, , s) <body = b (int64 i, bool on, float[n] now) =>
            (bool still, float[n] next, float[n] out) {
                still = Identity (on)
                zero = Constant <value = int64[1] {0}> ()
                start = Unsqueeze (i, zero)
                stop = Add (start, one)
                column = Slice (x, start, stop, one)
                flat = Squeeze (column, one)
                scaled = Mul (flat, weight)
                next = Add (now, scaled)
                out = Mul (next, next)
            }>
    }""",
        (4, 3),
    ),
    "a scan": (
        """g (float[n, 3] x, float[n] s) => (float[n] last, float[k, n] made) {
        last, made = Scan (s, x) <num_scan_inputs = 1, scan_input_axes = [1],
            body = b (float[n] now, float[n] column) => (float[n] next, float[n] out) {
                scaled = Mul (column, weight)
                next = Add (now, scaled)
                out = Mul (next, next)
            }>
    }""",
        (4, 3),
    ),
}


@pytest.mark.parametrize("case", LOOPS)
def test_loops_are_differentiated(case: str, tmp_path: Path) -> None:
    text, shape = LOOPS[case]
    path = saved(build_model(text, normal(0, {"weight": shape[:1]})), tmp_path)
    model = load(path)
    assert list(model.initializers.values()) == ["weight"]
    x, s = torch.randn(shape), torch.randn(shape[0])
    sums = s[:, None] + (x * model.weight[:, None]).cumsum(1)
    expected = torch.autograd.grad(sums[:, -1].sum() + (sums**2).sum(), model.weight)[0]
    outputs = model(x, s)
    assert torch.allclose(outputs["last"], sums[:, -1], atol=1e-5)
    assert torch.allclose(outputs["made"], (sums**2).T, atol=1e-5)
    (outputs["last"].sum() + outputs["made"].sum()).backward()
    assert torch.allclose(model.weight.grad, expected, atol=1e-4)

    jax = pytest.importorskip("jax")
    from hyperclone_onnx.frameworks.jax import load as load_function

    apply, params = load_function(path)

    def loss_of(params: Any) -> Any:
        outputs = apply(params, x.numpy(), s.numpy())
        return outputs["last"].sum() + outputs["made"].sum()

    for gradient in (jax.grad(loss_of), jax.jit(jax.grad(loss_of))):
        assert np.allclose(gradient(params)["weight"], expected, atol=1e-4)


def test_a_loop_until_a_condition_fails(tmp_path: Path) -> None:
    text = """g (float x) => (float last) {
        limit = Constant <value = float {100.0}> ()
        two = Constant <value = float {2.0}> ()
        start = Less (x, limit)
        last = Loop ("", start, x) <body = b (int64 i, bool on, float now) => (bool still, float next) {
            next = Mul (now, two)
            still = Less (next, limit)
        }>
    }"""
    proto = build_model(text.replace('Loop ("", start', "Loop (, start"), {})
    path = saved(proto, tmp_path)
    model = load(path)
    for number, expected in ((3.0, 192.0), (200.0, 200.0)):
        assert model(torch.tensor(number)).item() == expected
    jax = pytest.importorskip("jax")
    from hyperclone_onnx.frameworks.jax import load as load_function

    apply, params = load_function(path)
    for call in (apply, jax.jit(apply)):
        assert float(call(params, np.float32(3.0))) == 192.0


@pytest.mark.parametrize("lowest", [-np.inf, float(np.finfo(np.float32).min)], ids=["infinite", "finite"])
def test_no_gradient_goes_through_scores_that_a_mask_leaves_nothing_of(lowest: float) -> None:
    """Such a row is 0 if the mask is infinite. Otherwise it is the mean of all values, as in ONNX Runtime."""
    from hyperclone_onnx.frameworks.compiling.namespaces import torch as namespace

    operands = [torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3)]
    bias = torch.zeros(2, 1, 5, 5)
    bias[0, :, 1] = lowest
    bias[1, :, :, 0] = lowest
    out = namespace.attend(*operands, bias, scale=0.3)
    mean = operands[2][0].mean(1) if np.isfinite(lowest) else torch.zeros(4, 8)
    assert torch.allclose(out[0, :, 1], mean, atol=1e-6)
    out.square().sum().backward()
    assert not operands[0].grad[0, :, 1].any()
    expected = [operand.grad.clone() for operand in operands]

    jax = pytest.importorskip("jax")
    from hyperclone_onnx.frameworks.compiling.namespaces import jax as other

    def loss_of(*arrays: Any) -> Any:
        return (other.attend(*arrays, bias.numpy(), scale=0.3) ** 2).sum()

    actual = jax.grad(loss_of, (0, 1, 2))(*(jax.numpy.asarray(operand.detach().numpy()) for operand in operands))
    for got, want in zip(actual, expected, strict=True):
        assert np.allclose(got, want, atol=1e-5)


def test_types_are_inferred_quietly(zoo: Zoo, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    load(zoo("bert.fused"))
    assert capfd.readouterr().err == "" and not caplog.records


def products(proto: onnx.ModelProto, folder: Path) -> list[str]:
    """Our operators that the source text of a model calls."""
    return [name for name in ("Linear", "GroupedAttention") if f"hyperclone_{name}(" in load(saved(proto, folder)).code]


@pytest.mark.parametrize(("length", "fused"), [(6, ["Linear"]), (1, [])])
def test_a_linear_layer_has_a_bias_of_its_own_width(length: int, fused: list[str], tmp_path: Path) -> None:
    text = "g (float[n, 4] x) => (float[n, 6] y) {\nh = MatMul (x, weight)\ny = Add (bias, h)\n}"
    proto = build_model(text, normal(0, {"weight": (4, 6), "bias": (length,)}))
    assert products(proto, tmp_path) == fused
    x = torch.randn(3, 4)
    weight, bias = (torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in proto.graph.initializer)
    assert torch.allclose(load(tmp_path / "model.onnx")(x), x @ weight + bias, atol=1e-6)


GROUPED = """g (float[2, 4, s, 8] q, float[2, 2, t, 8] k, float[2, 2, t, 8] v) => (float[2, 4, s, 8] y) {{
    two = Constant <value = int64[1] {{2}}> ()
    ke = Unsqueeze (k, two)
    ve = Unsqueeze (v, two)
    kw = Expand (ke, spread)
    vw = Expand (ve, spread)
    kj = Reshape (kw, joined)
    vj = Reshape (vw, joined)
    kt = Transpose <perm = [0, 1, 3, 2]> (kj)
    scores = MatMul (q, kt)
    weights = Softmax <axis = -1> (scores)
    y = MatMul (weights, vj)
}}"""


@pytest.mark.parametrize(
    ("spread", "joined", "same"),
    [
        ((1, 1, 2, 1, 1), (0, 4, -1, 8), True),
        ((2, 2, 2, 5, 8), (2, 4, 5, 8), True),
        ((1, 1, 2, 1, 1), (2, 2, 10, 8), False),
    ],
)
def test_groups_of_queries_share_repeated_keys_and_values(
    spread: tuple[int, ...], joined: tuple[int, ...], same: bool, tmp_path: Path
) -> None:
    """In the last case the joined axes are not heads: all keys occur twice, for as many query heads as keys."""
    text = GROUPED.format() if same else GROUPED.format().replace("[2, 4, s, 8]", "[2, 2, s, 8]")
    proto = build_model(text, {"spread": np.array(spread), "joined": np.array(joined)})
    assert products(proto, tmp_path) == ["GroupedAttention"]
    q = torch.randn(2, 4 if same else 2, 5, 8)
    k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    shape = (2, 4, 5, 8) if same else (2, 2, 10, 8)
    keys, values = (operand.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(shape) for operand in (k, v))
    expected = torch.softmax(q @ keys.mT, -1) @ values
    assert torch.allclose(load(tmp_path / "model.onnx")(q, k, v), expected, atol=1e-5)
