"""A model that was grown symmetrically trains on exactly as its source does, with each optimizer's own settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import perceptron

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")
torch = pytest.importorskip("torch")

from training import SETTINGS, batches  # noqa: E402

from hyperclone_onnx import Strategy, expand  # noqa: E402
from hyperclone_onnx.errors import BadModel, BadRequest  # noqa: E402
from hyperclone_onnx.frameworks.absorb import absorb  # noqa: E402
from hyperclone_onnx.frameworks.continuation import Continuation  # noqa: E402
from hyperclone_onnx.frameworks.exports import hand_over  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.groups import (  # noqa: E402
    adafactor_groups,
    adamw_groups,
    clip_grad_norm,
    continuations_of,
    muon_groups,
    not_exact,
    sgd_groups,
)
from hyperclone_onnx.frameworks.optimizer.growing import write_optimizer  # noqa: E402
from hyperclone_onnx.frameworks.optimizer.resume import resume_torch  # noqa: E402
from hyperclone_onnx.frameworks.torch import load  # noqa: E402
from hyperclone_onnx.validation.wide import to_double  # noqa: E402

Zoo = Callable[[str], Path]
TINY_GPT = Path(__file__).parent.parent / "models" / "tiny_gpt" / "tiny_gpt.onnx"
SYMMETRIC = Strategy("symmetric")
WIDE, NARROW = 1e-9, 1e-3
"""The largest difference of logits: in float64, and in float32."""


@dataclass(frozen=True)
class Case:
    """A small model, the number of its tokens, and whether it computes in float64."""

    path: Path
    vocab: int
    wide: bool


@pytest.fixture
def case(request: pytest.FixtureRequest, zoo: Zoo, tmp_path: Path) -> Case:
    name, wide = request.param
    path, vocab = tmp_path / "small.onnx", 95
    if name == "perceptron":
        onnx.save(perceptron(tied=True), path)
        vocab = 31
    else:
        ir.save(ir.load(TINY_GPT if name == "tiny_gpt" else zoo(name)), path)
    if wide:
        ir.save(to_double(ir.load(path)), path)
    return Case(path, 256 if name == "tiny_gpt" else vocab, wide)


def step(model: Any, optimizer: Any, ids: Any, clip: Callable[[Any], Any] = lambda _: None) -> Any:
    """Take one step. Return the logits before it."""
    inputs = [ids[:, :-1], torch.ones_like(ids[:, :-1])][: len(model.program.inputs)]
    logits = model(*inputs)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    clip(model)
    optimizer.step()
    optimizer.zero_grad()
    return logits.detach()


def clip_small(model: Any) -> Any:
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip_grown(model: Any) -> Any:
    return clip_grad_norm(model, 1.0)


def parted(small: Any, big: Any, optimizers: tuple[Any, Any], data: list[Any], clips: tuple[Any, Any]) -> float:
    """Train both models on the same batches. Return the largest difference of their logits at any step."""
    worst = 0.0
    for ids in data:
        one, other = (
            step(model, optimizer, ids, clip)
            for model, optimizer, clip in zip((small, big), optimizers, clips, strict=True)
        )
        worst = max(worst, float((one - other).abs().max()))
    return worst


@pytest.mark.parametrize(
    ("case", "factor", "steps", "limit"),
    [
        (("tiny_gpt", True), 2, 20, WIDE),
        (("llama.distinct", True), 3, 100, WIDE),
        (("llama.distinct", False), 2, 30, NARROW),
    ],
    indirect=["case"],
)
def test_training_goes_on_with_the_grown_state(
    case: Case, factor: int, steps: int, limit: float, tmp_path: Path
) -> None:
    data = list(batches(case.vocab, 20 + steps))
    small = load(case.path)
    optimizer = torch.optim.AdamW(small.named_parameters(), **SETTINGS)
    for ids in data[:20]:
        step(small, optimizer, ids, clip_small)
    absorb(case.path, small.state_dict(), tmp_path / "trained.onnx", check=False)
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expand(tmp_path / "trained.onnx", tmp_path / "big.onnx", factor, strategy=SYMMETRIC, check=False)
    out = tmp_path / "out"
    out.mkdir()
    write_optimizer(tmp_path / "big.onnx", tmp_path / "state.pt", out, "pytorch")
    losses = {}
    for kind in ("followed", "one rate for all"):
        big = load(tmp_path / "big.onnx")
        assert not_exact(big) == {}
        copy = load(tmp_path / "trained.onnx")
        again = torch.optim.AdamW(copy.named_parameters(), **SETTINGS)
        again.load_state_dict(optimizer.state_dict())
        groups = adamw_groups(big, **SETTINGS) if kind == "followed" else big.named_parameters()
        following = torch.optim.AdamW(groups, **SETTINGS)
        resume_torch(following, out / "optimizer.pt")
        clips = (clip_small, clip_grown)
        losses[kind] = parted(copy, big, (again, following), data[20 : 20 + steps], clips)
    assert losses["followed"] < limit < losses["one rate for all"]


OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "SGD": (
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda model: torch.optim.SGD(sgd_groups(model, lr=0.1, weight_decay=0.1), momentum=0.9),
    ),
    "SGD with Nesterov's momentum": (
        lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True),
        lambda model: torch.optim.SGD(sgd_groups(model, lr=0.05), momentum=0.9, nesterov=True),
    ),
    "AdamW, norms without decay": (
        lambda model: torch.optim.AdamW(
            [
                {"params": [p for n, p in model.named_parameters() if "gain" not in n], "weight_decay": 0.3},
                {"params": [p for n, p in model.named_parameters() if "gain" in n], "weight_decay": 0.0},
            ],
            lr=1e-2,
        ),
        lambda model: torch.optim.AdamW(adamw_groups(model, lr=1e-2, weight_decay=0.3, no_decay=["*gain*"])),
    ),
    "Adafactor": (
        lambda model: torch.optim.Adafactor(model.parameters(), lr=0.05, weight_decay=0.1, eps=(1e-30, 0.5)),
        lambda model: torch.optim.Adafactor(adafactor_groups(model, lr=0.05, weight_decay=0.1, eps=(1e-30, 0.5))),
    ),
}


@pytest.mark.parametrize("case", [("perceptron", True)], indirect=True)
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer(case: Case, factor: int, name: str, tmp_path: Path) -> None:
    expand(case.path, tmp_path / "big.onnx", factor, strategy=SYMMETRIC, check=False)
    data = list(batches(case.vocab, 20))
    no_clip = (lambda _: None, lambda _: None)
    models = load(case.path), load(tmp_path / "big.onnx")
    of_source, of_grown = OPTIMIZERS[name]
    assert parted(*models, (of_source(models[0]), of_grown(models[1])), data, no_clip) < WIDE
    models = load(case.path), load(tmp_path / "big.onnx")
    assert parted(*models, (of_source(models[0]), of_source(models[1])), data, no_clip) > 1e-6


@pytest.mark.parametrize("case", [("perceptron", False)], indirect=True)
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_muon(case: Case, adjust: str | None, tmp_path: Path) -> None:
    """torch's Muon computes in bfloat16. So the matrices agree to its rounding, and are far apart without the rule."""
    expand(case.path, tmp_path / "big.onnx", 3, strategy=SYMMETRIC, check=False)
    small, big = load(case.path), load(tmp_path / "big.onnx")
    settings = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    matrices = [parameter for parameter in small.parameters() if parameter.ndim == 2]
    one = torch.optim.Muon(matrices, **settings)
    other = torch.optim.Muon(muon_groups(big, **settings), adjust_lr_fn=adjust)
    plain = torch.optim.Muon([parameter for parameter in big.parameters() if parameter.ndim == 2], **settings)
    data = list(batches(case.vocab, 5))
    no_clip = (lambda _: None, lambda _: None)
    followed = parted(small, big, (one, other), data, no_clip)
    small, big = load(case.path), load(tmp_path / "big.onnx")
    one = torch.optim.Muon([parameter for parameter in small.parameters() if parameter.ndim == 2], **settings)
    plain = torch.optim.Muon([parameter for parameter in big.parameters() if parameter.ndim == 2], **settings)
    assert followed < 0.1 * parted(small, big, (one, plain), data, no_clip)


@pytest.mark.parametrize("case", [("perceptron", True)], indirect=True)
def test_optax(case: Case, tmp_path: Path) -> None:
    jax, optax = (pytest.importorskip(name) for name in ("jax", "optax"))
    from hyperclone_onnx.frameworks.jax import load as load_function
    from hyperclone_onnx.frameworks.optimizer.optax_transforms import adamw, clip_by_source_norm, sgd
    from hyperclone_onnx.frameworks.optimizer.resume import resume_optax

    jax.config.update("jax_enable_x64", True)
    try:
        settings = {"b1": 0.9, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1}
        rate = optax.linear_schedule(3e-3, 1e-3, 20)
        data = [ids.numpy() for ids in batches(case.vocab, 30)]

        def trainer(apply: Any, optimizer: Any) -> Callable[[Any, Any, Any], Any]:
            def loss_of(params: Any, ids: Any) -> Any:
                logits = apply(params, ids[:, :-1])
                return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

            @jax.jit
            def step(params: Any, state: Any, ids: Any) -> Any:
                loss, gradient = jax.value_and_grad(loss_of)(params, ids)
                updates, state = optimizer.update(gradient, state, params)
                return optax.apply_updates(params, updates), state, loss

            return step

        apply, params = load_function(case.path)
        optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(rate, **settings))
        state, run = optimizer.init(params), trainer(apply, optimizer)
        for ids in data[:10]:
            params, state, _ = run(params, state, ids)
        absorb(case.path, params, tmp_path / "trained.onnx", check=False)
        adam = state[1][0]
        moments = {f"mu.{name}": array for name, array in flat(adam.mu).items()}
        moments |= {f"nu.{name}": array for name, array in flat(adam.nu).items()}
        np.savez(tmp_path / "state.npz", step=np.array(10), **moments)
        expand(tmp_path / "trained.onnx", tmp_path / "big.onnx", 2, strategy=SYMMETRIC, check=False)
        write_optimizer(tmp_path / "big.onnx", tmp_path / "state.npz", tmp_path, "jax")
        grown, wide = load_function(tmp_path / "big.onnx")
        differences = []

        def later(count: Any) -> Any:
            return rate(count + 10)  # the schedule goes on where the source's stopped

        for following in (adamw(grown, wide, later, **settings), optax.adamw(later, **settings)):
            clip = clip_by_source_norm(grown, 0.5)
            chain = optax.chain(clip, following)
            start = resume_optax(chain.init(wide), wide, tmp_path / "optimizer.safetensors")
            advance = trainer(grown, chain)
            small, big, difference = (params, state), (wide, start), 0.0
            for ids in data[10:20]:
                *small, one = run(*small, ids)
                *big, other = advance(*big, ids)
                difference = max(difference, abs(float(one) - float(other)))
            differences.append(difference)
        assert differences[0] < WIDE and differences[1] > 1e-5

        apply, params = load_function(case.path)
        plain, following = optax.sgd(0.1, momentum=0.9), sgd(grown, wide, 0.1, momentum=0.9)
        expand(case.path, tmp_path / "fresh.onnx", 2, strategy=SYMMETRIC, check=False)
        grown, wide = load_function(tmp_path / "fresh.onnx")
        one_run, other_run = trainer(apply, plain), trainer(grown, following)
        small, big = (params, plain.init(params)), (wide, following.init(wide))
        for ids in data[:10]:
            *small, one = one_run(*small, ids)
            *big, other = other_run(*big, ids)
            assert abs(float(one) - float(other)) < WIDE
        with pytest.raises(BadRequest, match="does not say how the parameter"):
            adamw(lambda params: params, wide, 1e-3)
    finally:
        jax.config.update("jax_enable_x64", False)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: np.asarray(tree)}
    return {name: leaf for key, inner in tree.items() for name, leaf in flat(inner, f"{prefix}{key}.").items()}


@pytest.mark.parametrize("case", [("perceptron", False)], indirect=True)
def test_what_does_not_follow_exactly_is_named(case: Case, tmp_path: Path) -> None:
    reasons = {}
    for kind, options in {
        "noise": {"factor": 2},
        "unequal": {"sizes": {"ffn": 30}, "strategy": SYMMETRIC},
    }.items():
        path = tmp_path / f"{kind}.onnx"
        expand(case.path, path, **options, check=False)
        reasons[kind] = not_exact(load(path))
    assert set(reasons["noise"].values()) == {"its repeats have different numbers"}
    assert set(reasons["unequal"].values()) == {"its elements are repeated unequally"}
    assert all("up" in name or "down" in name or "bias" in name for name in reasons["unequal"])
    # 30 of 20 units: each unit has 1.5 copies on average. A row of "down" is shared among them.
    known = continuations_of(load(tmp_path / "unequal.onnx"))
    assert known["down.0"].weight == pytest.approx(20 / 30)


@pytest.mark.parametrize("case", [("perceptron", False)], indirect=True)
def test_the_manifest_says_it_too(case: Case, tmp_path: Path) -> None:
    expand(case.path, tmp_path / "big.onnx", 2, strategy=SYMMETRIC, check=False)
    hand_over(tmp_path / "big.onnx", "safetensors", tmp_path / "out", check=False)
    model = load(tmp_path / "big.onnx")
    assert continuations_of(model, tmp_path / "out") == continuations_of(model)
    assert adamw_groups(model, lr=1.0, folder=tmp_path / "out") == adamw_groups(model, lr=1.0)
    with pytest.raises(BadModel):
        adamw_groups(model, lr=1.0, folder=tmp_path)
    with pytest.raises(BadRequest, match="does not say how it grew"):
        adamw_groups(torch.nn.Linear(2, 2), lr=1.0)
    with pytest.raises(BadRequest, match="does not say how the parameter 'weight' grew"):
        adamw_groups(torch.nn.Linear(2, 2), lr=1.0, folder=tmp_path / "out")


def test_mup_divides_the_rate_of_matrices_by_their_fan_in(zoo: Zoo, tmp_path: Path) -> None:
    expand(zoo("llama.distinct"), tmp_path / "big.onnx", 4, check=False)
    model = load(tmp_path / "big.onnx")
    groups = adamw_groups(model, lr=1.0, weight_decay=1.0, eps=1.0, parametrisation="mup")
    settings = {
        parameter.ndim: (group["lr"], group["weight_decay"], group["eps"])
        for group in groups
        for name, parameter in group["params"]
        if "embed" not in name
    }
    assert settings == {1: (1.0, 1.0, 1.0), 2: (0.25, 4.0, 1.0)}


def test_a_model_that_was_not_grown_has_one_group(zoo: Zoo) -> None:
    model = load(zoo("llama.distinct"))
    (group,) = adamw_groups(model, lr=1e-3, weight_decay=0.1, eps=1e-6)
    assert (group["lr"], group["weight_decay"], group["eps"]) == (1e-3, 0.1, 1e-6)
    assert set(continuations_of(model).values()) == {Continuation()}
