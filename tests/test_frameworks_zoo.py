"""Every family of the zoo in PyTorch and JAX: outputs equal ONNX Runtime's, and gradients agree, also after growth."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from zoo_harness import make_feeds, session  # noqa: E402

from hyperclone_onnx import expand  # noqa: E402
from hyperclone_onnx.frameworks import jax as in_jax  # noqa: E402
from hyperclone_onnx.frameworks import torch as in_torch  # noqa: E402
from hyperclone_onnx.validation.wide import double_runner, to_double  # noqa: E402
from models import zoo_store  # noqa: E402

Array = np.ndarray[Any, Any]
Zoo = Callable[[str], Path]

FAMILIES = [name.removesuffix(".distinct") for name in zoo_store.names() if name.endswith(".distinct")]

OUTPUTS = 2e-6
"""The limit for float32 rounding errors, divided by the largest output."""

GRADIENTS = 1e-5
"""The same limit for gradients, divided by each tensor's largest element."""

VANISHING = 1e-2
"""A gradient this much smaller than the largest is a sum that cancels (a key's bias moves no softmax): it is compared
on the scale of those it is made of."""

MORE: dict[str, str] = {
    "bart": "final_logits_bias",  # a buffer of zeros, which the graph cannot distinguish from a bias
    "resnet": "*.convolution.weight_bias",  # tensors that the exporter computed from batch statistics
}
"""Trained tensors besides those that the zoo draws."""

TOWERS = ("bart", "whisper")
"""Families with an encoder and a decoder."""

BORDER = {"deberta_v2": 8}
"""From this length on, a distance lies at the border of two buckets: log(3.5) / log(3.5) is rounded up. There the last
bit of a runtime's logarithm decides, and in ONNX Runtime it depends on the processor."""

ILL_CONDITIONED: dict[str, set[str]] = {}
"""Gradients with larger rounding errors in float32: they are compared in float64."""

GROWN = {"albert", "bart", "bert", "gemma", "gpt2", "llama", "resnet"}
"""Families that are grown here in `make frameworks-check` too: a layer that is used again, two towers, an encoder, tied
tables, gated layers with grouped heads, convolutions."""

NO_BLOCKS = {
    "albert": "one layer, used again and again",
    "deberta_v2": "the normalised embeddings of relative places pass by its layers, which all read them",
    "gemma": "no tensor has a layer's name: its norms' gains are stored with 1 added",
    "gemma2": "as gemma",
    "gemma3": "as gemma",
    "convnext": "its layers are nested in stages, each of its own widths",
    "modernbert": "its first layer has no norm, every third another mask and other angles",
    "olmo": "no tensor has a layer's name: its norms have no gains",
    "resnet": "as convnext",
    "smollm3": "every so many layers have no rotary angles",
}
"""Families whose layers remain in one graph."""


def relative(got: Array, want: Array, scale: float | None = None) -> float:
    return float(np.abs(got - want).max() / (np.abs(want).max() if scale is None else scale))


def nested(tree: dict[str, Any], prefix: str = "") -> dict[str, Array]:
    flat: dict[str, Array] = {}
    for name, value in tree.items():
        flat |= nested(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: np.asarray(value)}
    return flat


def cases() -> Iterator[Any]:
    """Every family as it is, and grown. Most of the grown ones wait for `make frameworks-long`: JAX compiles each for
    seconds, and in PyTorch test_frameworks_optimizer.py differentiates the grown graph of every family."""
    assert set(FAMILIES) >= GROWN
    for family in FAMILIES:
        yield pytest.param(family, False, id=f"{family}-source")
        yield pytest.param(
            family, True, id=f"{family}-grown", marks=[] if family in GROWN else [pytest.mark.slow_frameworks]
        )


@pytest.mark.parametrize(("family", "grown"), list(cases()))
def test_both_frameworks_compute_and_learn_alike(family: str, grown: bool, zoo: Zoo, tmp_path: Path) -> None:
    path = zoo(f"{family}.distinct")
    if grown:
        source, path = path, tmp_path / "big.onnx"
        expand(source, path, 2, check=False)
    model, (apply, params) = in_torch.load(path), in_jax.load(path)
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
    apart = [name for name in one if difference(one, other, name) >= GRADIENTS]
    if apart:
        # Where float32 is not precise enough, the same graphs are compared in float64.
        exact, exact_too = double_gradients(path, feeds, weights)
        for name in exact:
            assert difference(exact, exact_too, name) < GRADIENTS / 1e4, name
        for name in apart:
            assert max(difference(gradient, exact, name) for gradient in (one, other)) < 100 * GRADIENTS, name
    assert set(apart) <= ILL_CONDITIONED.get(family, set()), apart
    assert set(model.initializers.values()) == learned(family, path, grown)
    blocks = [module for module in model.modules() if isinstance(module, in_torch.Block)]
    assert len(blocks) == (0 if family in NO_BLOCKS else 4 if family in TOWERS else 2)


def outputs(result: Any) -> list[Array]:
    """A model's outputs, in the order of the graph."""
    return [np.asarray(array) for array in (result.values() if isinstance(result, dict) else [result])]


def assert_same_outputs(path: Path, feeds: dict[str, Array], name: str, want: Array, *actual: Array) -> None:
    """Outputs equal ONNX Runtime's up to float32 rounding, or differ from float64 at most twice as much as those."""
    if all(relative(got, want) < OUTPUTS for got in actual):
        return
    with tempfile.TemporaryDirectory() as folder:
        run, _ = double_runner(wide(path), Path(folder) / "wide.onnx")
        exact = run({key: widened(array) for key, array in feeds.items()})[name]
    assert relative(want, exact) > OUTPUTS, "ONNX Runtime is right"
    for got in actual:
        assert relative(got, exact) < max(OUTPUTS, 2 * relative(want, exact))


def widened(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype == np.float32 else array


def gradients(
    model: Any, apply: Any, params: Any, feeds: dict[str, Array], weights: list[Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Gradients of the weighted sum of all outputs, for every parameter, in both frameworks."""
    results = model(**as_torch(feeds))
    results = list(results.values()) if isinstance(results, dict) else [results]
    sum((output * torch.from_numpy(w)).sum() for output, w in zip(results, weights, strict=True)).backward()

    def loss_of(params: Any) -> Any:
        results = apply(params, **feeds)
        results = list(results.values()) if isinstance(results, dict) else [results]
        return sum((output * w).sum() for output, w in zip(results, weights, strict=True))

    one = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return one, nested(jax.jit(jax.grad(loss_of))(params))


def double_gradients(
    path: Path, feeds: dict[str, Array], weights: list[Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The same gradients, of the same graph in float64."""
    with jax.enable_x64(True):
        model, (apply, params) = in_torch.load(wide(path)), in_jax.load(wide(path))
        feeds = {name: widened(array) for name, array in feeds.items()}
        return gradients(model, apply, params, feeds, [widened(weight) for weight in weights])


def wide(path: Path) -> ir.Model:
    return to_double(ir.load(path))


def difference(got: dict[str, Array], want: dict[str, Array], name: str) -> float:
    """The error of a gradient, divided by its largest element, or by the scale of the terms of a cancelling sum."""
    largest = max(float(np.abs(array).max()) for array in want.values())
    return relative(got[name], want[name], max(float(np.abs(want[name]).max()), VANISHING * largest))


@pytest.mark.parametrize("name", [name for name in zoo_store.names() if not name.endswith((".distinct", ".collide"))])
def test_every_dialect_computes_the_same_as_onnx_runtime(name: str, zoo: Zoo) -> None:
    path = zoo(name)
    model, runner = in_torch.load(path), session(path)
    border = BORDER.get(name.split(".")[0])
    sets = [feeds for feeds in make_feeds(path) if border is None or feeds["input_ids"].shape[1] < border]
    assert sets
    for feeds in sets:
        with torch.no_grad():
            actual = outputs(model(**as_torch(feeds)))
        for output, want, got in zip(runner.get_outputs(), runner.run(None, feeds), actual, strict=True):
            assert got.shape == want.shape
            if want.size:
                assert_same_outputs(path, feeds, output.name, want, got)


def as_torch(feeds: dict[str, Array]) -> dict[str, Any]:
    return {name: torch.from_numpy(np.asarray(array)) for name, array in feeds.items()}


def learned(family: str, path: Path, grown: bool) -> set[str]:
    """The tensors that the zoo draws at random: the parameters of a model."""
    names = set(zoo_store.distributions(zoo_store.load(f"{family}.distinct")))
    stored = {tensor.name for tensor in onnx.load(path).graph.initializer}
    names |= {name for name in stored if fnmatchcase(name, MORE.get(family, ""))}
    if grown:  # several uses may have made several tensors of one
        return {name for name in stored if name in names or name.rsplit(".", 1)[0] in names}
    return names
