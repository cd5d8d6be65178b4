"""A model from ONNX as a pure function with parameters, in typical uses of JAX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import build_model, normal, perceptron

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
jax = pytest.importorskip("jax")

from hyperclone_onnx.errors import BadRequest, Refused  # noqa: E402
from hyperclone_onnx.frameworks.jax import load  # noqa: E402

Zoo = Callable[[str], Path]


def tokens(batch: int = 2, length: int = 7) -> tuple[Any, Any]:
    ids = np.random.default_rng(0).integers(0, 95, (batch, length))
    return ids, np.ones_like(ids)


def test_params_are_nested_by_the_dots(zoo: Zoo) -> None:
    apply, params = load(zoo("llama.distinct"))
    assert params["model"]["layers"]["0"]["input_layernorm"]["weight"].shape == (48,)
    assert "rotary_emb" not in params["model"]
    ids, mask = tokens()
    assert np.array_equal(apply(params, ids, mask), apply(params, attention_mask=mask, input_ids=ids))
    with pytest.raises(BadRequest, match="attention_mask are missing"):
        apply(params, ids)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_jit_and_vmap(family: str, zoo: Zoo) -> None:
    apply, params = load(zoo(f"{family}.distinct"))
    ids, mask = tokens(4)
    want = apply(params, ids, mask)
    assert np.allclose(jax.jit(apply)(params, ids, mask), want, atol=1e-5)
    rows = jax.vmap(lambda one, two: apply(params, one[None], two[None])[0])(ids, mask)
    assert np.allclose(rows, want, atol=1e-5)


def test_frozen_tensors_are_no_params(zoo: Zoo) -> None:
    apply, params = load(zoo("llama.distinct"), freeze=["model.layers.0.*"])
    assert "input_layernorm" not in params["model"]["layers"]["0"]
    whole, everything = load(zoo("llama.distinct"))
    assert np.allclose(apply(params, *tokens()), whole(everything, *tokens()), atol=1e-6)


def test_training_with_optax_lowers_the_loss(tmp_path: Path) -> None:
    optax = pytest.importorskip("optax")
    onnx.save(perceptron(), tmp_path / "model.onnx")
    apply, params = load(tmp_path / "model.onnx")
    optimizer = optax.adamw(1e-2)
    ids = np.arange(24).reshape(2, 12) % 31

    def loss_of(params: Any) -> Any:
        logits = apply(params, ids)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(20):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_a_branch_is_traced(tmp_path: Path) -> None:
    text = """g (float[n, 4] x, bool flag) => (float[n, 4] y) {
        two = Constant <value = float {2.0}> ()
        y = If (flag) <then_branch = t () => (float[n, 4] a) { a = Mul (x, two) },
                       else_branch = e () => (float[n, 4] b) { b = Neg (x) }>
    }"""
    onnx.save(build_model(text, {}), tmp_path / "model.onnx")
    apply, params = load(tmp_path / "model.onnx")
    x = np.ones((2, 4), np.float32)
    for flag, want in ((True, 2 * x), (False, -x)):
        assert np.array_equal(apply(params, x, np.asarray(flag)), want)
        assert np.array_equal(jax.jit(apply)(params, x, np.asarray(flag)), want)


EXPERTS = """g (float[n, 4] x) => (float[n, 4] y) {
    scores = MatMul (x, router)
    zero = Constant <value = float {0.0}> ()
    chosen = Greater (scores, zero)
    places = NonZero (chosen)
    first = Constant <value = int64 {0}> ()
    rows = Gather (places, first)
    some = Gather (x, rows)
    made = MatMul (some, weight)
    one = Constant <value = int64[1] {1}> ()
    at = Unsqueeze (rows, one)
    none = Mul (x, zero)
    y = ScatterND <reduction = "add"> (none, at, made)
}"""


def test_sizes_of_data_are_computed_without_jit_and_refused_with_it(tmp_path: Path) -> None:
    onnx.save(build_model(EXPERTS, normal(0, {"router": (4, 1), "weight": (4, 4)})), tmp_path / "model.onnx")
    apply, params = load(tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    expected = (x @ params["weight"]) * (x @ params["router"] > 0)
    assert np.allclose(apply(params, x), expected, atol=1e-6)
    gradient = jax.grad(lambda params: (apply(params, x) ** 2).sum())(params)
    assert float(np.abs(gradient["weight"]).max()) > 0
    with pytest.raises(Refused, match="NonZero makes a size of data, which"):
        jax.jit(apply)(params, x)


def test_branches_of_two_shapes_are_refused_under_jit(tmp_path: Path) -> None:
    text = """g (float[n, 4] x, bool flag) => (float[m, 4] y) {
        y = If (flag) <then_branch = t () => (float[a, 4] a) { a = Concat <axis = 0> (x, x) },
                       else_branch = e () => (float[b, 4] b) { b = Neg (x) }>
    }"""
    onnx.save(build_model(text, {}), tmp_path / "model.onnx")
    apply, params = load(tmp_path / "model.onnx")
    x = np.ones((2, 4), np.float32)
    assert jax.jit(lambda x: apply(params, x, True))(x).shape == (4, 4)
    with pytest.raises(Refused, match="the branches of an If make different shapes"):
        jax.jit(apply)(params, x, np.asarray(True))


# -- half precision ---------------------------------------------------------------------------------------


def product_types(function: Callable[..., Any], *arguments: Any) -> list[tuple[str, ...]]:
    """The types of the operands of all products that JAX traces, also within inner functions."""
    types: list[tuple[str, ...]] = []
    waiting = [jax.make_jaxpr(function)(*arguments).jaxpr]
    while waiting:
        for equation in waiting.pop().eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                types.append(tuple(operand.aval.dtype.name for operand in equation.invars))
            for value in equation.params.values():
                waiting.extend(inner for inner in (getattr(value, "jaxpr", value),) if hasattr(inner, "eqns"))
    return types


@pytest.mark.parametrize("name", ["llama.distinct", "gpt2.fused", "convnext.distinct"])
def test_products_run_in_the_type_that_load_is_given(name: str, zoo: Zoo, expected: Any) -> None:
    apply, params = load(zoo(name))
    half, same = load(zoo(name), dtype="bfloat16")
    feeds, (want, *_) = expected(name)[0]

    def loss_of(apply: Any) -> Any:
        def loss(params: Any) -> Any:
            output = apply(params, **feeds)
            output = next(iter(output.values())) if isinstance(output, dict) else output
            return (output.astype(np.float32) ** 2).mean()

        return loss

    types = product_types(jax.grad(loss_of(half)), same)
    floating = [kinds for kinds in types if not any("int" in kind for kind in kinds)]
    assert floating and set(floating) == {("bfloat16", "bfloat16")}
    assert ("float32", "float32") in product_types(jax.grad(loss_of(apply)), params)
    cast = jax.tree.map(lambda array: array.astype("bfloat16"), params)
    assert any("float32" in kinds for kinds in product_types(loss_of(apply), cast))

    output = half(same, **feeds)
    output = next(iter(output.values())) if isinstance(output, dict) else output
    assert output.dtype == np.float32
    error = np.abs(np.asarray(output) - want).max() / np.abs(want).max()
    assert 0 < error < 0.1


@pytest.mark.parametrize("dtype", ["int32", "no type", 7])
def test_a_type_that_is_not_floating_is_refused(dtype: Any, zoo: Zoo) -> None:
    with pytest.raises(BadRequest, match="give a floating type"):
        load(zoo("gpt2.distinct"), dtype=dtype)
