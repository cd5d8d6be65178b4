"""Sub-models, the first stage of bert2BERT: they share the whole model's parameters, and a step changes a few."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import perceptron

from hyperclone_onnx import BadRequest, Strategy, expand

pytestmark = pytest.mark.frameworks
torch = pytest.importorskip("torch")
IDS = np.arange(12, dtype=np.int64).reshape(2, 6)
HEAD = {"gain", "head"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("deep") / "deep.onnx"
    onnx.save(perceptron(layers=4), path)
    return path


@pytest.fixture(scope="module")
def big(deep: Path) -> Path:
    out = deep.with_name("big.onnx")
    expand(deep, out, 2, strategy=Strategy("aki"), allow_change=True, device="cpu")
    return out


def own(*layers: int) -> set[str]:
    return {f"{kind}.{layer}" for kind in ("up", "bias", "down") for layer in layers}


def shallow(deep: Path, layers: int) -> Any:
    """The output of the model with the first layers alone, built by hand."""
    model = onnx.load(deep)
    (last,) = [node for node in model.graph.node if node.output[0] == "last"]
    last.input[0] = f"h{layers}"
    return ort.InferenceSession(model.SerializeToString()).run(None, {"ids": IDS})[0]


def test_a_sub_model_is_the_bottom_layers_with_the_head(deep: Path) -> None:
    from hyperclone_onnx.frameworks.torch import load, sub_models

    whole = load(deep)
    parts = sub_models(whole, deep, [1, 3, 4])
    assert [part.layers for part in parts] == [1, 3, 4]
    for part, updated in zip(parts, (own(0), own(1, 2), own(3)), strict=True):
        np.testing.assert_allclose(
            part(torch.from_numpy(IDS)).detach(), shallow(deep, part.layers), rtol=1e-4, atol=1e-5
        )
        names = {whole.initializers[path] for path, _ in whole.named_parameters()}
        assert {part.module.initializers[path] for path in part.updated} == updated | HEAD
        assert names > updated


def test_a_step_changes_only_the_top_layers_and_the_head(big: Path) -> None:
    from hyperclone_onnx.frameworks.torch import load, sub_models

    whole = load(big)
    parts = sub_models(whole, big, every=2)
    assert [part.layers for part in parts] == [2, 4]
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    ids = torch.from_numpy(IDS)

    def step(part: Any) -> set[str]:
        before = {name: tensor.detach().clone() for name, tensor in whole.named_parameters()}
        logits = part(ids)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        part.backward(loss)
        optimizer.step()
        after = dict(whole.named_parameters())
        return {whole.initializers[name] for name in before if not torch.equal(before[name], after[name])}

    assert step(parts[0]) == own(0, 1) | HEAD
    assert step(parts[1]) == own(2, 3) | HEAD
    assert step(parts[0]) == own(0, 1) | HEAD, "moments of the other layers move nothing"
    loss = torch.nn.functional.cross_entropy(whole(ids).flatten(0, 1), ids.flatten())
    optimizer.zero_grad()
    loss.backward()
    assert all(tensor.grad is not None for tensor in whole.parameters()), "the second stage trains all"


def test_the_first_stage_lowers_the_loss(big: Path) -> None:
    from hyperclone_onnx.frameworks.torch import load, sub_models

    whole, choose, ids = load(big), random.Random(0), torch.from_numpy(IDS)
    parts = sub_models(whole, big, every=1)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)

    def loss_of(model: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    before = loss_of(whole).item()
    for _ in range(20):
        part = choose.choice(parts)
        optimizer.zero_grad()
        part.backward(loss_of(part))
        optimizer.step()
    assert loss_of(whole).item() < before


def test_the_plan_of_a_small_model(deep: Path) -> None:
    from hyperclone_onnx.frameworks.torch import load, sub_models

    plan = expand(deep, deep.with_name("planned.onnx"), sizes={"hidden": 29}, device="cpu").plan
    whole = load(deep, plan=plan)
    (part, *_) = sub_models(whole, deep, [2, 4], plan=plan)
    np.testing.assert_allclose(part(torch.from_numpy(IDS)).detach(), shallow(deep, 2), rtol=1e-3, atol=1e-4)


def test_jax(deep: Path, big: Path) -> None:
    jax = pytest.importorskip("jax")
    from hyperclone_onnx.frameworks.jax import load, sub_models

    apply, params = load(deep)
    first, last = sub_models(deep, [2, 4])
    np.testing.assert_allclose(first.apply(params, IDS), shallow(deep, 2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last.apply(params, IDS), apply(params, IDS), rtol=1e-4, atol=1e-5)
    mask = first.mask(params)
    assert jax.tree_util.tree_structure(mask) == jax.tree_util.tree_structure(params)
    trained = {".".join(key.key for key in path) for path, on in jax.tree_util.tree_leaves_with_path(mask) if on}
    assert {name.replace("_", ".", 1) for name in trained} >= {"gain"}
    assert len(trained) == len(own(0, 1) | HEAD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [5]}, "a sub-model of 5 layers: this model has 4"),
        ({"layers": [3, 2]}, "not in order from the smallest to the largest"),
        ({"every": 0}, "the number is at least 1"),
        ({}, r"either layers=\[3, 6, ...\] or every=3"),
        ({"layers": [2], "stack": "decoder"}, "no stack of layers 'decoder'"),
    ],
)
def test_wrong_requests(deep: Path, options: dict[str, Any], message: str) -> None:
    from hyperclone_onnx.frameworks.torch import load, sub_models

    with pytest.raises(BadRequest, match=message):
        sub_models(load(deep), deep, **options)


def test_another_model_is_noticed(deep: Path, big: Path) -> None:
    from hyperclone_onnx.frameworks.torch import load, sub_models

    with pytest.raises(BadRequest, match="load the module from the same file"):
        sub_models(load(deep), big, every=2)
