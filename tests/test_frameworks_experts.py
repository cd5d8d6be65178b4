"""A mixture of experts in trainers: ONNX Runtime, PyTorch and JAX agree on outputs and on every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from test_experts import FORMS, WITHOUT_BLOCKS, block, stored

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from test_frameworks_zoo import (  # noqa: E402
    FAMILIES,
    GRADIENTS,
    as_torch,
    assert_same_outputs,
    difference,
    double_gradients,
    gradients,
    outputs,
)
from zoo_harness import make_feeds, session  # noqa: E402

from hyperclone_onnx import BadRequest, Experts, expand  # noqa: E402
from hyperclone_onnx.frameworks.absorb import absorb  # noqa: E402
from hyperclone_onnx.frameworks.jax import load as load_jax  # noqa: E402
from hyperclone_onnx.frameworks.torch import load  # noqa: E402

Array = np.ndarray[Any, Any]
IDS = np.random.default_rng(3).integers(0, 11, (2, 5))


def parted(path: Path, out: Path) -> Path:
    """A mixture whose experts have parted, in float64: equal experts give the router no gradient."""
    model = onnx.load(path)
    rng = np.random.default_rng(7)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if tensor.name.endswith((".experts", ".router")):
            array = array + 0.3 * rng.standard_normal(array.shape).astype(array.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, out)
    return out


@pytest.fixture(scope="module", params=["gated", "biases", "fused, sliced", "flattened, Gemm"])
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    form = FORMS[request.param]
    form = replace(form, body=form.body.replace("Gelu", "Tanh"))  # ONNX Runtime has no Gelu in float64
    onnx.save(block(form, 2, np.float64), folder / "dense.onnx")
    how: dict[str, Any] = {"granularity": 2, "shared": True} if request.param == "gated" else {}
    expand(folder / "dense.onnx", folder / "moe.onnx", experts=Experts(4, 2, **how))
    return parted(folder / "moe.onnx", folder / "parted.onnx")


def run(path: Path) -> Array:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": IDS})[0])


def gradients_of_torch(path: Path) -> dict[str, Array]:
    model = load(path)
    (model(torch.as_tensor(IDS)) ** 2).sum().backward()
    named = dict(model.named_parameters())
    return {model.initializers[name]: parameter.grad.numpy() for name, parameter in named.items()}


def test_outputs_and_gradients_agree(mixture: Path) -> None:
    wanted = run(mixture)
    model = load(mixture)
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.as_tensor(IDS)).numpy(), wanted, rtol=1e-11, atol=1e-11)
    ours = gradients_of_torch(mixture)
    with jax.enable_x64(True):
        apply, params = load_jax(mixture)
        function = jax.jit(jax.value_and_grad(lambda params: (apply(params, IDS) ** 2).sum()))
        value, gradients = function(params)
        np.testing.assert_allclose(value, (wanted**2).sum(), rtol=1e-11)
        flat, _ = jax.tree_util.tree_flatten_with_path(gradients)
        others = {".".join(entry.key for entry in path): np.asarray(array) for path, array in flat}
    assert len(others) == len(ours) and any(name.endswith(".router") for name in ours)
    for path, name in model.initializers.items():
        assert np.abs(ours[name]).max() > 1e-4, name
        np.testing.assert_allclose(others[path], ours[name], rtol=1e-9, atol=1e-10, err_msg=name)


def test_only_the_chosen_experts_are_computed(mixture: Path) -> None:
    """A product of the rows of each expert, and none with all tokens of all experts."""
    model = load(mixture)
    code = "\n".join(part.code for part in model.modules() if hasattr(part, "code"))
    assert "GroupedMatMul" in code and "Combine" in code and "ScatterElements" not in code


def test_a_compiled_module_computes_the_same(mixture: Path) -> None:
    """torch.compile has no sizes that depend on the router."""
    model = load(mixture)
    wanted = gradients_of_torch(mixture)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    result = compiled(torch.as_tensor(IDS))
    np.testing.assert_allclose(result.detach().numpy(), run(mixture), rtol=1e-10, atol=1e-11)
    (result**2).sum().backward()
    for name, parameter in model.named_parameters():
        got = parameter.grad.numpy()
        np.testing.assert_allclose(got, wanted[model.initializers[name]], rtol=1e-8, atol=1e-9, err_msg=name)


def test_the_gradients_are_those_of_onnx_runtime(mixture: Path, tmp_path: Path) -> None:
    """A small step along a tensor's gradient changes what ONNX Runtime computes as the gradient says."""
    proto = onnx.load(mixture)
    gradients = gradients_of_torch(mixture)
    for tensor in proto.graph.initializer:
        if not tensor.name.endswith((".experts", ".router")):
            continue
        array, gradient = onnx.numpy_helper.to_array(tensor), gradients[tensor.name]
        step = 1e-5 / np.linalg.norm(gradient)
        values = []
        for sign in (1, -1):
            changed = onnx.numpy_helper.from_array(array + sign * step * gradient, tensor.name)
            model = onnx.ModelProto()
            model.CopyFrom(proto)
            place = [other.name for other in model.graph.initializer].index(tensor.name)
            model.graph.initializer[place].CopyFrom(changed)
            onnx.save(model, tmp_path / "moved.onnx")
            values.append((run(tmp_path / "moved.onnx") ** 2).sum())
        measured = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(measured, np.sum(gradient**2), rtol=1e-5, err_msg=tensor.name)


def test_the_scores_of_the_routers_are_given_on_request(mixture: Path) -> None:
    model = load(mixture, router_logits=True)
    assert model.program.outputs[0] == "y" and len(model.program.outputs) == 3
    result = model(torch.as_tensor(IDS))
    np.testing.assert_allclose(result["y"].detach().numpy(), run(mixture), rtol=1e-11, atol=1e-11)
    experts = {name: array.shape[1] for name, array in stored(mixture).items() if name.endswith(".router")}
    for scores, count in zip(list(result.values())[1:], experts.values(), strict=True):
        assert scores.shape == (IDS.size, count)
        scores.logsumexp(dim=-1).sum().backward(retain_graph=True)
    routers = [parameter for name, parameter in model.named_parameters() if model.initializers[name] in experts]
    assert all(router.grad is not None and router.grad.abs().max() > 0 for router in routers)
    with jax.enable_x64(True):
        apply, params = load_jax(mixture, router_logits=True)
        others = jax.jit(apply)(params, IDS)
    for name, scores in result.items():
        np.testing.assert_allclose(np.asarray(others[name]), scores.detach().numpy(), rtol=1e-10, atol=1e-11)


def test_a_model_without_routers_has_no_scores(tmp_path: Path) -> None:
    onnx.save(block(FORMS["plain"]), tmp_path / "dense.onnx")
    with pytest.raises(BadRequest, match="this model has no router"):
        load(tmp_path / "dense.onnx", router_logits=True)


def test_trained_experts_come_back(mixture: Path, tmp_path: Path) -> None:
    model = load(mixture)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(torch.as_tensor(IDS)) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    absorb(mixture, model.state_dict(), tmp_path / "trained.onnx")
    with torch.no_grad():
        wanted = model(torch.as_tensor(IDS)).numpy()
    np.testing.assert_allclose(run(tmp_path / "trained.onnx"), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.slow_frameworks
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITHOUT_BLOCKS])
def test_mixtures_of_the_zoo_compute_and_learn_alike(family: str, zoo: Callable[[str], Path], tmp_path: Path) -> None:
    """Experts that have parted, in each family: outputs equal ONNX Runtime's, and all gradients agree."""
    path = tmp_path / "moe.onnx"
    expand(zoo(f"{family}.distinct"), path, experts=Experts(8, 2, noise=1.0), allow_change=True, check=False)
    model, (apply, params) = load(path), load_jax(path)
    runner = session(path)
    for feeds in make_feeds(path):
        expected = runner.run(None, feeds)
        with torch.no_grad():
            actual = (outputs(model(**as_torch(feeds))), outputs(apply(params, **feeds)))
        for name, *arrays in zip(runner.get_outputs(), expected, *actual, strict=True):
            assert_same_outputs(path, feeds, name.name, *arrays)
    weights = [np.random.default_rng(0).standard_normal(want.shape).astype(np.float32) for want in expected]
    one, other = gradients(model, apply, params, feeds, weights)
    assert set(one) == set(other)
    if any(difference(one, other, name) >= GRADIENTS for name in one):
        one, other = double_gradients(path, feeds, weights)
        assert all(difference(one, other, name) < GRADIENTS / 1e4 for name in one)
    routers = [name for name in one if model.initializers[name].endswith(".router")]
    assert routers and all(np.abs(one[name]).max() > 0 for name in routers)
