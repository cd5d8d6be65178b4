"""The grown optimizer state is right for the grown model: gradients, moments, and the steps that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import names_in, perceptron

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")

from training import SETTINGS, batches, train  # noqa: E402
from zoo_harness import make_feeds  # noqa: E402

from hyperclone_onnx import SourceMap, Strategy, analyse, expand  # noqa: E402
from hyperclone_onnx.frameworks.absorb import absorb  # noqa: E402
from hyperclone_onnx.frameworks.checkpoints.stored_arrays import StoredArray  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.groups import adamw_groups  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.growing import write_optimizer  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.moments import GrownMoment, Moments, grow_moments  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.resume import resume_torch  # noqa: E402
from hyperclone_onnx.frameworks.torch import load  # noqa: E402
from hyperclone_onnx.plan.maps import fills_of, presented  # noqa: E402
from hyperclone_onnx.plan.plans import Plan  # noqa: E402
from models import zoo_store  # noqa: E402

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Zoo = Callable[[str], Path]

TOLERANCE = 2e-5
"""The limit for float32 rounding errors, divided by a gradient's largest element."""

VANISHING = 1e-2
"""A gradient smaller than this, compared with the largest one, is a cancelling sum: its terms give the scale."""

FAMILIES = [
    family
    for family in (n.removesuffix(".distinct") for n in zoo_store.names() if n.endswith(".distinct"))
    if family != "resnet"
]


def stored(array: Array) -> StoredArray:
    return StoredArray(array.shape, array.dtype, lambda: array)


def outputs_of(model: Any, feeds: Mapping[str, Array]) -> dict[str, Any]:
    outputs = model(**{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()})
    return outputs if isinstance(outputs, dict) else {model.program.outputs[0]: outputs}


def gradients(path: Path, feeds: Mapping[str, Array], weights: Mapping[str, Array]) -> Arrays:
    """The gradient of a weighted sum of all outputs, by initializer."""
    model = load(path)
    outputs = outputs_of(model, feeds)
    sum((value.double() * torch.from_numpy(weights[name])).sum() for name, value in outputs.items()).backward()
    return {
        model.initializers[name]: parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def weights_for(path: Path, feeds: Mapping[str, Array]) -> Arrays:
    """The weights of each output in the loss. Rows that can see nothing have none."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        shapes = {name: tuple(value.shape) for name, value in outputs_of(load(path), feeds).items()}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    mask = feeds.get("attention_mask")
    for name, array in arrays.items():
        if mask is not None and array.shape[: mask.ndim] == mask.shape:
            arrays[name] = array * mask.reshape(*mask.shape, *[1] * (array.ndim - mask.ndim))
    return arrays


def on_interface(plan: Plan, arrays: Mapping[str, Array], divide: bool) -> Arrays:
    """Arrays of the small model's interface in the form of the grown one: repeated, or shared among the repeats."""
    tiled = dict(arrays)
    for value in (*plan.inputs, *plan.outputs):
        for axis, factors in enumerate(value.axes):
            if factors is None or value.name not in tiled:
                continue
            source = presented(factors, plan.maps)
            array = np.take(tiled[value.name], source, axis=axis)
            if divide:
                counts = np.bincount(source)[source].astype(np.float64)
                array = array / counts.reshape([-1 if axis == other else 1 for other in range(array.ndim)])
            tiled[value.name] = array
    return tiled


def both_gradients(path: Path, big: Path, plan: Plan) -> tuple[Arrays, Arrays]:
    feeds = list(make_feeds(path))[-1]
    weights = weights_for(path, feeds)
    small = gradients(path, feeds, weights)
    return small, gradients(big, on_interface(plan, feeds, False), on_interface(plan, weights, True))


def assert_grows_to(small: Arrays, grown: Arrays, plan: Plan, several: frozenset[str] = frozenset()) -> None:
    largest = max(float(np.abs(array).max()) for array in small.values())
    moments = grow_moments(plan, {name: Moments(stored(g), stored(g**2), 1) for name, g in small.items()})
    assert moments.keys() == grown.keys()
    for name in grown.keys() - several:
        got, want = moments[name].first.numpy(), grown[name]
        assert got.shape == want.shape
        scale = max(float(np.abs(want).max()), VANISHING * largest)
        assert np.abs(got - want).max() < TOLERANCE * scale, name
        assert np.abs(moments[name].second.numpy() - want**2).max() < 2 * TOLERANCE * scale**2, name


CASES = [
    *((family, 3, False) for family in FAMILIES),
    *((family, 2, True) for family in ("llama", "gpt2", "gemma", "bert", "opt")),
]


@pytest.mark.parametrize(("family", "factor", "untie"), CASES, ids=[f"{f}-x{n}{'-untied' * u}" for f, n, u in CASES])
def test_gradients_of_the_grown_model_are_the_grown_gradients(
    family: str, factor: int, untie: bool, zoo: Zoo, tmp_path: Path
) -> None:
    path, big = zoo(f"{family}.distinct"), tmp_path / "big.onnx"
    plan = expand(path, big, factor, untie=untie, strategy=Strategy("symmetric"), check=False).plan
    small, grown = both_gradients(path, big, plan)
    names = [name for name, recipe in plan.tensors.items() if recipe.source != name and name in grown]
    several = frozenset([*names, *(plan.tensors[name].source for name in names)])
    assert_grows_to(small, grown, plan, several)
    assert bool(several) == (untie and family in ("gpt2", "gemma", "opt"))


def test_the_parts_of_a_tensor_that_became_several_add_up(zoo: Zoo, tmp_path: Path) -> None:
    """If each repeat gets an equal part, their sum, taken back to the source, is the source's gradient."""
    path, big = zoo("gpt2.distinct"), tmp_path / "big.onnx"
    plan = expand(path, big, 2, untie=True, strategy=Strategy("symmetric"), check=False).plan
    small, grown = both_gradients(path, big, plan)
    moments = grow_moments(plan, {name: Moments(stored(g), stored(g**2), 1) for name, g in small.items()})
    parts = ["lm_head.weight", "lm_head.weight.1"]

    def sources(arrays: Arrays) -> Array:
        # The repeats share the width of one part: its gradient is a copy of the source's. That of the other is half.
        halves = [arrays[name].reshape(-1, 2, small["lm_head.weight"].shape[1]) for name in parts]
        shares = [0.5 if plan.tensors[name].shared else 1.0 for name in parts]
        return sum(share * half.sum(1) for share, half in zip(shares, halves, strict=True))  # type: ignore[return-value]

    first = {name: moments[name].first.numpy() for name in parts}
    want = small["lm_head.weight"]
    for arrays in (first, grown):
        assert np.abs(sources(arrays) - want).max() < TOLERANCE * np.abs(want).max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_unequal_repeats(family: str, zoo: Zoo, tmp_path: Path) -> None:
    path, big = zoo(f"{family}.distinct"), tmp_path / "big.onnx"
    maps = {
        dimension.name: SourceMap(dimension.size, index=(*range(dimension.size), *range(1 + dimension.size // 3)))
        for dimension in analyse(path).named
        if dimension.role in ("ffn", "heads") and dimension.dim.growable
    }
    plan = expand(path, big, 2, maps=maps, strategy=Strategy("symmetric"), check=False).plan
    assert len(maps) == 4 and all(plan.maps[name] == source_map for name, source_map in maps.items())
    small, grown = both_gradients(path, big, plan)
    assert_grows_to(small, grown, plan)


def test_channels_that_hold_a_mean_begin_without_a_direction(zoo: Zoo, tmp_path: Path) -> None:
    """What reads such channels reads zeros, so that its gradient is zero there, and elsewhere that of the source."""
    path, big = zoo("gpt2.distinct"), tmp_path / "big.onnx"
    plan = expand(path, big, sizes={"hidden": 72}, strategy=Strategy("symmetric"), check=False).plan
    small, grown = both_gradients(path, big, plan)
    largest = max(float(np.abs(array).max()) for array in small.values())
    moments = grow_moments(plan, {name: Moments(stored(g), stored(g**2), 1) for name, g in small.items()})
    readers = 0
    for name, recipe in plan.tensors.items():
        axes = [number for number, axis in enumerate(recipe.axes) if any(fills_of(factor) for factor in axis)]
        if not axes or name not in grown:
            continue
        first, second = moments[name].first.numpy(), moments[name].second.numpy()
        assert first.shape == second.shape == grown[name].shape
        for axis in axes:
            assert not np.take(first, range(48, 72), axis=axis).any()
            assert np.take(second, range(48, 72), axis=axis).any()
        if all((axis, 0) in recipe.shared for axis in axes):
            readers += 1
            scale = max(float(np.abs(grown[name]).max()), VANISHING * largest)
            assert np.abs(first - grown[name]).max() < TOLERANCE * scale, name
    assert readers >= 4, "queries, keys and values, and the first products of the feed-forward layers"


@pytest.mark.parametrize("strategy", ["noisy-symmetric", "diagonal", "noisy-diagonal"])
def test_with_other_strategies_it_is_the_mean_over_the_repeats(strategy: Any, zoo: Zoo, tmp_path: Path) -> None:
    path, big = zoo("llama.distinct"), tmp_path / "big.onnx"
    plan = expand(path, big, 2, strategy=Strategy(strategy), check=False).plan
    small, grown = both_gradients(path, big, plan)
    moments = grow_moments(plan, {name: Moments(stored(g), stored(g**2), 1) for name, g in small.items()})
    largest, apart = max(float(np.abs(array).max()) for array in small.values()), 0.0
    for name, want in grown.items():
        first, second = moments[name].first.numpy(), moments[name].second.numpy()
        scale = max(float(np.abs(want).max()), VANISHING * largest)
        source = small[plan.tensors[name].source if name in plan.tensors else name]
        groups = repeats_of(plan, name, source.shape)
        mean = np.bincount(groups.ravel(), want.ravel()) / np.bincount(groups.ravel())
        assert np.abs(mean[groups] - first).max() < TOLERANCE * scale, name
        # A mean of squares is at least the square of the mean.
        squares = np.bincount(groups.ravel(), want.ravel() ** 2) / np.bincount(groups.ravel())
        assert (squares[groups] - second).min() > -4 * TOLERANCE * scale**2, name
        apart = max(apart, float(np.abs(want - first).max() / scale))
    assert apart > 0.05, "a strategy under which repeats have equal gradients shows nothing"


def repeats_of(plan: Plan, name: str, shape: tuple[int, ...]) -> Array:
    """The number of the source element that each element of a grown tensor repeats."""
    numbers = stored(np.arange(np.prod(shape, dtype=np.int64)).reshape(shape).astype(np.float64))
    moment = GrownMoment(numbers, plan.tensors.get(name), plan.maps, 1)
    moment.scale, moment.counts = 1.0, [np.ones_like(count) for count in moment.counts]
    return moment.numpy().astype(np.int64)


def test_any_slice_is_that_of_the_whole(zoo: Zoo, tmp_path: Path) -> None:
    path = zoo("llama.distinct")
    plan = expand(path, tmp_path / "big.onnx", 2, check=False).plan
    rng = np.random.default_rng(0)
    name = "model.layers.0.self_attn.q_proj.weight"
    name = next(tensor for tensor in plan.tensors if len(plan.tensors[tensor].axes) == 2)
    shape = GrownMoment(stored(np.zeros(())), None, {}, 1).shape
    assert shape == ()

    array = rng.standard_normal(plan.tensors[name].source_shape(plan.maps)).astype(np.float32)
    moments = grow_moments(plan, {plan.tensors[name].source: Moments(stored(array), stored(array**2), 3)})[name]
    for moment in (moments.first, moments.second):
        whole = moment.numpy()
        assert whole.shape == moment.shape
        for windows in ((slice(3, 17),), (slice(0, 5), slice(7, 30)), (slice(4, 4),)):
            assert np.array_equal(moment[windows], whole[windows])


# -- further steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["llama", "gpt2", "gpt2 with heads of twice the size", "perceptron"])
def test_a_grown_model_goes_on_as_the_small_one_would(case: str, zoo: Zoo, tmp_path: Path) -> None:
    path = zoo(f"{case.split()[0]}.distinct") if case != "perceptron" else tmp_path / "small.onnx"
    if case == "perceptron":
        onnx.save(perceptron(tied=True), path)
    vocab = 31 if case == "perceptron" else 95
    small = load(path)
    optimizer = torch.optim.AdamW(small.named_parameters(), **SETTINGS)
    data = list(batches(vocab, 16))
    for ids in data[:6]:
        train(small, optimizer, ids)
    absorb(path, small.state_dict(), tmp_path / "trained.onnx", check=False)
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "optimizer.ckpt")
    requests = {"head_dim": 2, "heads": 1} if "heads" in case else None
    expand(tmp_path / "trained.onnx", tmp_path / "big.onnx", 2, requests, strategy=Strategy("symmetric"), check=False)
    out = tmp_path / "out"
    out.mkdir()
    result = write_optimizer(tmp_path / "big.onnx", tmp_path / "optimizer.ckpt", out, "pytorch")
    assert result.exact and result.steps == 6 and result.tensors == len(list(small.parameters()))
    assert names_in(out) == {"optimizer.pt"}
    losses: dict[str, list[float]] = {}
    for kind in ("with its moments", "without"):
        big = load(tmp_path / "big.onnx")
        following = torch.optim.AdamW(adamw_groups(big, **SETTINGS))
        if kind == "with its moments":
            resume_torch(following, out / "optimizer.pt")
        losses[kind] = [train(big, following, ids) for ids in data[6:]]
    expected = np.array([train(small, optimizer, ids) for ids in data[6:]])
    assert np.abs(np.array(losses["with its moments"]) - expected).max() < 1e-4
    assert np.abs(np.array(losses["without"]) - expected).max() > 1e-2
