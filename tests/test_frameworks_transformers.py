"""A handed-over model agrees with the Hugging Face model it was exported from, also grown: outputs and gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hyperclone_onnx import Strategy, expand  # noqa: E402
from hyperclone_onnx.frameworks.torch import load  # noqa: E402
from hyperclone_onnx.plan.plans import Plan  # noqa: E402
from hyperclone_onnx.tensors.grown_tensor import GrownTensor  # noqa: E402
from models import zoo  # noqa: E402
from models.zoo_families import FAMILIES  # noqa: E402

Array = np.ndarray[Any, Any]
Gradients = dict[str, Array]

TABLE = (
    "albert bert bloom convnext falcon_new gemma2 gpt2 gpt_neox gptj llama mamba modernbert opt phi3 qwen3 smollm3 "
    "stablelm vit whisper"
).split()
"""Families of all kinds: learned, rotary, relative and no positions; several norms; images, sounds, two towers."""

ROUNDING = 1e-5
"""The limit for float32 rounding errors, divided by the largest element."""

VANISHING = 1e-2
"""A gradient smaller than this, compared with the largest one, is a cancelling sum: its terms give the scale."""


@pytest.mark.parametrize("family", TABLE)
def test_gradients_are_the_models_own(family: str, tmp_path: Path) -> None:
    zoo.quiet()
    source, _ = zoo.build(family, "distinct")
    graph = zoo.optimised(zoo.traced(family, source))
    ir.save(graph, tmp_path / "small.onnx")
    inputs = {name: zoo.example(name, source.config) for name in FAMILIES[family].inputs}
    output = source(**inputs)[FAMILIES[family].output]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (output * weights).sum().backward()
    expected = {
        name: parameter.grad.numpy() for name, parameter in source.named_parameters() if parameter.grad is not None
    }
    scale = VANISHING * max(float(np.abs(gradient).max()) for gradient in expected.values())

    model = load(tmp_path / "small.onnx")
    small = gradients(model, inputs, weights, output)
    matches = matched(source, model)
    assert set(expected) <= set(matches), "parameters of the model that the handoff lacks"
    assert set(small) <= {initializer for initializer, _ in matches.values()}, "parameters that the model lacks"
    for name, want in expected.items():
        initializer, back = matches[name]
        assert_close(name, back(small[initializer]), want, scale)

    big = tmp_path / "big.onnx"
    plan = expand(
        tmp_path / "small.onnx", big, 2, strategy=Strategy("symmetric"), keep_interface=True, check=False
    ).plan
    tensors = {name: value.const_value for name, value in graph.graph.initializers.items()}
    grown = pulled_back(gradients(load(big), inputs, weights, output), plan, tensors)
    assert set(grown) == set(small)
    for name, got in grown.items():
        assert_close(name, got, small[name], scale)


def gradients(model: Any, inputs: dict[str, Any], weights: Any, expected: Any) -> Gradients:
    """Gradients of the weighted sum of the first output, by initializer. The output is compared too."""
    output = model(**inputs)
    output = next(iter(output.values())) if isinstance(output, dict) else output
    assert float((output - expected).detach().abs().max() / expected.abs().max()) < ROUNDING
    (output * weights).sum().backward()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {model.initializers[name]: parameter.grad.numpy() for name, parameter in learning.items()}


def assert_close(name: str, got: Array, want: Array, scale: float) -> None:
    assert float(np.abs(got - want).max()) < ROUNDING * max(float(np.abs(want).max()), scale), name


def matched(source: Any, model: Any) -> dict[str, tuple[str, Callable[[Array], Array]]]:
    """For each parameter of the source, the handoff's parameter with the same content, and a function for its gradient.

    The function gives the gradient the layout of the source. The exporter may have transposed the parameter, given it
    axes of size 1, or added a number to it.
    """
    stored = {model.initializers[name]: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    by_size: dict[int, list[tuple[str, Array]]] = defaultdict(list)
    for name, array in stored.items():
        by_size[array.size].append((name, array))
    matches = {}
    for name, parameter in source.named_parameters():
        own = parameter.detach().numpy()
        for initializer, array in by_size[own.size]:
            for layout, back in layouts(own):
                if is_moved(array.ravel(), layout.ravel()):
                    matches[name] = (initializer, back)
    return matches


def layouts(array: Array) -> Iterator[tuple[Array, Callable[[Array], Array]]]:
    """An array and its transpose, each with the function that reverses the layout."""
    yield array, lambda other: other.reshape(array.shape)
    if array.ndim == 2:
        yield array.T, lambda other: other.reshape(array.T.shape).T


def is_moved(array: Array, by: Array) -> bool:
    """Whether the elements of two arrays all differ by the same number."""
    apart = array - by
    return bool(np.abs(apart - apart[0]).max() <= 1e-6)


def pulled_back(grown: Gradients, plan: Plan, tensors: dict[str, Any]) -> Gradients:
    """The source's gradients from the grown model's. Growth is linear, W' = G W, so that dL/dW = G^T dL/dW'."""
    gradients_of_source: Gradients = {}
    for name, gradient in grown.items():
        recipe = plan.tensors.get(name)
        if recipe is None:
            gradients_of_source[name] = gradients_of_source.get(name, 0) + gradient
            continue
        shape = tuple(tensors[recipe.source].shape)
        ones, places = (
            GrownTensor(ir.tensor(array), recipe, plan.maps, plan.strategy).numpy()
            for array in (np.ones(shape), 1.0 + np.arange(np.prod(shape)).reshape(shape))
        )
        index = np.rint(places / ones).astype(np.int64) - 1
        summed = np.bincount(index.ravel(), (ones * gradient).ravel(), int(np.prod(shape)))
        gradients_of_source[recipe.source] = gradients_of_source.get(recipe.source, 0) + summed.reshape(shape)
    return gradients_of_source


def test_a_wrong_gradient_is_seen() -> None:
    right = np.ones((3, 4))
    wrong = right.copy()
    wrong[1, 2] *= 1 + 1e-4
    with pytest.raises(AssertionError):
        assert_close("w", wrong, right, 0.0)
