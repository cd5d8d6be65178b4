"""Every family of the zoo in PyTorch and JAX: outputs as ONNX Runtime's, gradients alike, before and after growth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from zoo_harness import make_feeds, session  # noqa: E402

from hyperclone_onnx import expand  # noqa: E402
from hyperclone_onnx.frameworks import jax as in_jax  # noqa: E402
from hyperclone_onnx.frameworks import torch as in_torch  # noqa: E402
from models import zoo_store  # noqa: E402

Array = np.ndarray[Any, Any]
Zoo = Callable[[str], Path]

NOT_YET = frozenset(
    "bart clip_text clip_vision convnext deberta deberta_v2 mamba modernbert resnet smollm3 whisper".split()
)
"""Families of several outputs, convolutions or pooling, or whose tensors are told apart less exactly."""

FAMILIES = [
    family
    for family in (name.removesuffix(".distinct") for name in zoo_store.names() if name.endswith(".distinct"))
    if family not in NOT_YET
]

OUTPUTS = 2e-6
"""What float32 rounding stays under, as a part of the largest output."""

GRADIENTS = 1e-5
"""The same for gradients, of each tensor's largest."""

VANISHING = 1e-2
"""A gradient this much smaller than the largest is a sum that cancels (a key's bias moves no softmax): it is compared
on the scale of those it is made of."""

NO_BLOCKS = {
    "albert": "one layer, used again and again",
    "gemma": "no tensor has a layer's name: its norms' gains are stored with 1 added",
    "gemma2": "as gemma",
    "gemma3": "as gemma",
    "olmo": "no tensor has a layer's name: its norms have no gains",
}
"""Families whose layers stay in the one graph."""


def relative(got: Array, want: Array, scale: float | None = None) -> float:
    return float(np.abs(got - want).max() / (np.abs(want).max() if scale is None else scale))


def nested(tree: dict[str, Any], prefix: str = "") -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, value in tree.items():
        found |= nested(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: np.asarray(value)}
    return found


@pytest.mark.parametrize("grown", [False, True], ids=["source", "grown"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_frameworks_compute_and_learn_alike(family: str, grown: bool, zoo: Zoo, tmp_path: Path) -> None:
    path = zoo(f"{family}.distinct")
    if grown:
        source, path = path, tmp_path / "big.onnx"
        expand(source, path, 2, check=False)
    model = in_torch.load(path)
    apply, params = in_jax.load(path)
    runner = session(path)
    for feeds in make_feeds(path):
        want = runner.run(None, feeds)[0]
        with torch.no_grad():
            assert relative(model(**as_torch(feeds)).numpy(), want) < OUTPUTS
        assert relative(np.asarray(apply(params, **feeds)), want) < OUTPUTS
    weights = np.random.default_rng(0).standard_normal(want.shape).astype(np.float32)
    if "attention_mask" in feeds:  # a row to which nothing is visible has no gradient that means anything
        mask = feeds["attention_mask"]
        weights *= mask.reshape(*mask.shape, *[1] * (weights.ndim - mask.ndim)).astype(np.float32)
    (model(**as_torch(feeds)) * torch.from_numpy(weights)).sum().backward()
    gradient = jax.jit(jax.grad(lambda params: (apply(params, **feeds) * weights).sum()))(params)
    one = {name: each.grad.numpy() for name, each in model.named_parameters()}
    other = nested(gradient)
    assert set(one) == set(other)
    largest = max(float(np.abs(each).max()) for each in one.values())
    for name, each in one.items():
        scale = max(float(np.abs(each).max()), VANISHING * largest)
        assert relative(other[name], each, scale) < GRADIENTS, name
    assert set(model.initializers.values()) == learned(family, path, grown)
    blocks = [each for each in model.modules() if isinstance(each, in_torch.Block)]
    assert len(blocks) == (0 if family in NO_BLOCKS else 2)


def as_torch(feeds: dict[str, Array]) -> dict[str, Any]:
    return {name: torch.from_numpy(np.asarray(array)) for name, array in feeds.items()}


def learned(family: str, path: Path, grown: bool) -> set[str]:
    """The tensors that the zoo draws at random: a model's parameters."""
    names = set(zoo_store.distributions(zoo_store.load(f"{family}.distinct")))
    stored = {tensor.name for tensor in onnx.load(path).graph.initializer}
    if grown:  # a tensor used in several ways may have become several
        return {name for name in stored if name in names or name.rsplit(".", 1)[0] in names}
    return names
