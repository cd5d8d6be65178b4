"""Every family of the zoo, in both sizings, is grown in every way, and compared without the package's own code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import build_model, normal
from zoo_harness import (
    TOLERANCE,
    Expected,
    Zoo,
    assert_computes_the_same,
    assert_validation_says_so,
    parameters,
    session,
    tiled,
    weights,
)

from hyperclone_onnx import Strategy, analyse, expand
from hyperclone_onnx.plan.strategies import STRATEGIES, StrategyName
from hyperclone_onnx.reports.inspection import inspection
from models import zoo_store

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Growth:
    """One way to grow, and the roles that should grow if the model has them."""

    label: str
    factor: int = 1
    requests: Mapping[str, int] = field(default_factory=dict)
    strategy: StrategyName = "noisy-symmetric"
    roles: frozenset[str] = frozenset(["hidden", "ffn", "heads"])

    def __str__(self) -> str:
        return self.label


def whole(factor: int, strategy: StrategyName) -> Growth:
    return Growth(f"x{factor}-{strategy}", factor, {}, strategy)


HEAD_DIM_TOO = Growth("x2-head_dim-too", 2, {"head_dim": 2}, roles=frozenset(["hidden", "ffn", "heads", "head_dim"]))
HEAD_DIM_ALONE = Growth(
    "head_dim-alone", 2, {"head_dim": 2, "heads": 1, "hidden": 1, "ffn": 1}, roles=frozenset(["head_dim"])
)
HEAD_DIM_BY_NAME = Growth(
    "head_dim-by-name", 1, {"head_dim": 2, "heads": 1, "hidden": 1}, roles=frozenset(["head_dim"])
)
FFN_ALONE = Growth("ffn-alone", 1, {"ffn": 3}, roles=frozenset(["ffn"]))

# Each family is tested in every way once. Only the running time decides which sizing is tested in which way, and which
# ways wait for `make test-long`.
GROWTHS: dict[str, tuple[Growth, ...]] = {
    "distinct": (
        whole(2, "noisy-symmetric"),
        whole(2, "symmetric"),
        whole(3, "noisy-diagonal"),
        HEAD_DIM_TOO,
        FFN_ALONE,
    ),
    "collide": (
        whole(2, "noisy-diagonal"),
        whole(3, "noisy-symmetric"),
        whole(3, "diagonal"),
        HEAD_DIM_ALONE,
        HEAD_DIM_BY_NAME,
    ),
}

IN_TURN = (
    ("x2-noisy-symmetric",),
    ("head_dim-by-name",),
    ("x2-noisy-diagonal",),
    ("ffn-alone",),
    ("x3-noisy-diagonal",),
    ("x2-head_dim-too",),
)
"""The growths that `make test` tries with one family, with the next one, and so on. `make test-long` tries all."""

# The graphs in both sizings. test_zoo_variants.py has all other graphs.
FAMILIES = [name.removesuffix(".collide") for name in zoo_store.names() if name.endswith(".collide")]


def is_quick(family: str, growth: Growth) -> bool:
    return growth.label in IN_TURN[FAMILIES.index(family) % len(IN_TURN)]


CASES = [
    pytest.param(
        name, growth, id=f"{name}-{growth}", marks=[] if is_quick(name.split(".")[0], growth) else pytest.mark.slow
    )
    for name in zoo_store.names()
    for growth in GROWTHS.get(name.split(".")[1], ())
    if name.split(".")[0] in FAMILIES
]


EVERY_FOURTH = [
    pytest.param(family, marks=pytest.mark.slow if index % 4 else []) for index, family in enumerate(FAMILIES)
]
"""All families, of which `make test` tries every fourth one."""


# -- growth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "growth"), CASES)
def test_grown_models_compute_the_same(name: str, growth: Growth, zoo: Zoo, expected: Expected, tmp_path: Path) -> None:
    source, out = zoo(name), tmp_path / "big.onnx"
    result = expand(
        source,
        out,
        growth.factor,
        growth.requests,
        strategy=Strategy(growth.strategy, seed=3),
        device="cpu",
        precision="float64",
    )
    assert_computes_the_same(out, expected(name))
    assert_validation_says_so(result)
    assert {dim.role for dim in result.plan.dims.values()} == growth.roles
    behind = {dim.reason for dim in result.kept if dim.role in growth.roles}
    assert behind <= {"another factor of the same width grows"}
    before, after = parameters(source), parameters(out)
    if not growth.requests:
        assert after > 0.72 * growth.factor**2 * before
    else:
        assert after > before
    assert (result.parameters_before, result.parameters_after) == (before, after)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_noise_comes_from_the_seed_alone(strategy: StrategyName, zoo: Zoo, tmp_path: Path) -> None:
    def grow(seed: int, name: str) -> bytes:
        expand(zoo("gpt2.distinct"), tmp_path / name, 2, strategy=Strategy(strategy, seed=seed), check=False)
        model = onnx.load(tmp_path / name)
        return b"".join(tensor.raw_data for tensor in model.graph.initializer)

    first, again, other = grow(1, "a.onnx"), grow(1, "b.onnx"), grow(2, "c.onnx")
    assert first == again
    assert (first != other) == strategy.startswith("noisy")


# -- roles ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roles:
    """The sizes of a family's distinct sizing in each role."""

    hidden: frozenset[int] = frozenset([48])
    ffn: frozenset[int] = frozenset([56])
    heads: frozenset[int] = frozenset([6])
    group: frozenset[int] = frozenset()
    head_dim: frozenset[int] = frozenset([8])
    vocab: frozenset[int] = frozenset([101])


def roles(**sizes: int | tuple[int, ...]) -> Roles:
    return Roles(**{role: frozenset([size] if isinstance(size, int) else size) for role, size in sizes.items()})


# A rotated head is cut in halves (4 of 8), or its rotated part is, and the rest is whole (2 + 2 + 12 of 16).
ROTARY = (4, 8)
QUARTER_ROTARY = (2, 12, 16)
ROLES: dict[str, Roles] = {
    "albert": roles(hidden=(32, 48)),
    "bart": roles(),
    "bert": roles(vocab=(2, 101)),
    "bloom": roles(ffn=192),
    # Four shards have two heads each. 4 of the 6 elements of a head are rotated, in pairs.
    "codegen": roles(heads=(2, 4), head_dim=(2, 6)),
    "cohere": roles(heads=2, group=3, head_dim=ROTARY),
    "distilbert": roles(),
    "electra": roles(hidden=(32, 48)),
    "falcon_mq": roles(head_dim=4),
    "falcon_new": roles(heads=2, group=3, head_dim=4),
    "gemma": roles(heads=2, group=3, head_dim=(5, 10)),
    "gemma2": roles(heads=2, group=3, head_dim=(5, 10)),
    "gemma3": roles(heads=2, group=3, head_dim=(5, 10)),
    "gpt2": roles(),
    "gpt_neo": roles(),
    "gpt_neox": roles(heads=3, head_dim=QUARTER_ROTARY),
    "gptj": roles(head_dim=(2, 4, 8)),
    "granite": roles(heads=2, group=3, head_dim=ROTARY),
    "llama": roles(heads=2, group=3, head_dim=ROTARY),
    "llama_mha": roles(head_dim=ROTARY),
    "modernbert": roles(head_dim=4),
    "mpt": roles(ffn=192),
    "nemotron": roles(heads=2, group=3, head_dim=(3, 6, 12)),
    "olmo": roles(head_dim=ROTARY),
    "olmo2": roles(heads=2, group=3, head_dim=ROTARY),
    "opt": roles(),
    # The output of the last projection for the head is no hidden state, because no norm and no residual uses it.
    "opt_350m": roles(hidden=(32, 48), ffn=(32, 56)),
    "phi": roles(head_dim=(2, 4, 8)),
    "phi3": roles(heads=2, group=3, head_dim=ROTARY),
    "qwen2": roles(heads=2, group=3, head_dim=ROTARY),
    "qwen3": roles(heads=2, group=3, head_dim=(5, 10)),
    "roberta": roles(),
    "smollm3": roles(heads=2, group=3, head_dim=ROTARY),
    "stablelm": roles(heads=3, head_dim=QUARTER_ROTARY),
    "starcoder2": roles(heads=2, group=3, head_dim=ROTARY),
    "vit": roles(heads=4, head_dim=12, vocab=()),
}


def test_every_family_has_its_roles_written_down() -> None:
    assert sorted(ROLES) == FAMILIES


def sizes_by_role(data: Mapping[str, Any], growable: bool | None = None) -> dict[str, set[int]]:
    sizes: dict[str, set[int]] = defaultdict(set)
    for dimension in data["dimensions"]:
        if growable is None or dimension["growable"] == growable:
            sizes[dimension["role"]].add(dimension["size"])
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_the_distinct_sizing(family: str, zoo: Zoo) -> None:
    data = inspection(analyse(zoo(f"{family}.distinct")))
    every, grows = sizes_by_role(data), sizes_by_role(data, growable=True)
    for role, sizes in vars(ROLES[family]).items():
        assert every[role] == sizes, role
        assert grows[role] == (set() if role == "vocab" else sizes), role
    assert data["operators_without_rule"] == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_collide_have_the_roles_of_sizes_that_do_not(family: str, zoo: Zoo) -> None:
    """With other sizes, the same graph has the same dimensions, and as many of them in each role."""

    def counts(sizing: str) -> dict[tuple[str, bool], int]:
        counts: dict[tuple[str, bool], int] = defaultdict(int)
        for dimension in inspection(analyse(zoo(f"{family}.{sizing}")))["dimensions"]:
            counts[dimension["role"], dimension["growable"]] += 1
        return counts

    assert counts("collide") == counts("distinct")


@pytest.mark.parametrize(
    ("family", "tensor", "axes"),
    [
        (
            "gpt2",
            "transformer.h.0.attn.c_attn.weight",
            "hidden (heads.0 head_dim.0 + heads.0 head_dim.0 + heads.0 head_dim.1)",
        ),
        ("gpt2", "transformer.wpe.weight", "positions hidden"),
        ("bloom", "transformer.h.0.self_attention.query_key_value.bias", "(heads (1 + 1 + 1) head_dim.0)"),
        ("albert", "predictions.decoder.weight", "vocab hidden.0"),
        ("opt_350m", "lm_head.weight", "vocab hidden.0"),
    ],
)
def test_axes_of_telling_tensors(family: str, tensor: str, axes: str, zoo: Zoo) -> None:
    assert axes in inspection(analyse(zoo(f"{family}.distinct")))["tensors"][tensor]


# -- interface --------------------------------------------------------------------------------------------


def declared(path: Path) -> dict[str, list[int | str]]:
    graph = onnx.load(path, load_external_data=False).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


# Outputs that grow: hidden states. Logits keep their size.
@pytest.mark.parametrize(
    ("family", "changed"),
    [("bert", {"last_hidden_state": 96}), ("electra", {"last_hidden_state": 96}), ("gpt2", {}), ("vit", {})],
)
def test_the_interface_grows_where_hidden_states_leave(
    family: str, changed: dict[str, int], zoo: Zoo, tmp_path: Path
) -> None:
    expand(zoo(f"{family}.distinct"), tmp_path / "big.onnx", 2, check=False)
    before, after = declared(zoo(f"{family}.distinct")), declared(tmp_path / "big.onnx")
    assert {name: shape[-1] for name, shape in after.items() if shape != before[name]} == changed
    assert before.keys() == after.keys()


@pytest.mark.parametrize("family", EVERY_FOURTH)
def test_a_kept_interface_is_the_source_s(family: str, zoo: Zoo, expected: Expected, tmp_path: Path) -> None:
    name, out = f"{family}.distinct", tmp_path / "big.onnx"
    expand(zoo(name), out, 2, keep_interface=True, device="cpu", precision="float64")
    assert declared(zoo(name)) == declared(out)
    assert_computes_the_same(out, expected(name))
    grown = session(out)
    for feeds, expected_outputs in expected(name):
        assert [output.shape for output in grown.run(None, feeds)] == [output.shape for output in expected_outputs]


# -- shared storage ---------------------------------------------------------------------------------------


TIED = {
    "albert": "predictions.decoder.weight",
    "distilbert": "vocab_projector.weight",
    "modernbert": "decoder.weight",
    "roberta": "lm_head.decoder.weight",
    **dict.fromkeys(
        "bart bloom cohere falcon_mq falcon_new gemma gemma2 gemma3 gpt2 gpt_neo".split()
        + "mpt opt opt_350m smollm3 starcoder2".split(),
        "lm_head.weight",
    ),
}


def vocabularies(path: Path) -> set[str]:
    """The matrices with a row or a column for each word."""
    return {name for name, shape in weights(path).items() if len(shape) == 2 and 101 in shape and 1 not in shape}


def test_tied_families_are_all_listed(zoo: Zoo) -> None:
    once = {name for name in FAMILIES if len(vocabularies(zoo(f"{name}.distinct"))) == 1}
    no_head = {"bert", "electra"}
    assert once - no_head == set(TIED)


@pytest.mark.parametrize("family", sorted(TIED))
def test_a_tied_embedding_stays_one_tensor_unless_untied(
    family: str, zoo: Zoo, expected: Expected, tmp_path: Path
) -> None:
    name, tied = f"{family}.distinct", TIED[family]
    source, out = zoo(name), tmp_path / "big.onnx"
    rows, width = weights(source)[tied]

    def stored() -> list[str]:
        return [name for name, shape in weights(out).items() if name.startswith(tied) and shape == (rows, 2 * width)]

    assert expand(source, out, 2, device="cpu").separated == {}
    assert stored() == [tied]
    split = expand(source, out, 2, untie=True, device="cpu", precision="float64")
    assert split.separated == {tied: [f"{tied}.1"]}
    assert sorted(stored()) == [tied, f"{tied}.1"]
    assert_computes_the_same(out, expected(name))


@pytest.mark.parametrize("sizing", ["distinct", "collide"])
@pytest.mark.parametrize("untie", [False, True])
def test_layers_that_share_their_weights_still_do(sizing: str, untie: bool, zoo: Zoo, tmp_path: Path) -> None:
    """ALBERT's two layers are one: each of their tensors is read twice and stored once."""
    source, out = zoo(f"albert.{sizing}"), tmp_path / "big.onnx"
    expand(source, out, 3, untie=untie, device="cpu")

    def layers(path: Path) -> set[str]:
        return {name for name in weights(path) if "albert_layers" in name}

    assert layers(out) == layers(source) != set()


@pytest.mark.parametrize("family", EVERY_FOURTH)
def test_growing_by_one_changes_nothing(family: str, zoo: Zoo, expected: Expected, tmp_path: Path) -> None:
    name = f"{family}.distinct"
    result = expand(zoo(name), tmp_path / "same.onnx", 1, device="cpu")
    assert result.plan.dims == {} and result.parameters_before == result.parameters_after
    assert_computes_the_same(tmp_path / "same.onnx", expected(name))


def test_growing_twice_is_growing_by_the_product(zoo: Zoo, expected: Expected, tmp_path: Path) -> None:
    expand(zoo("llama.distinct"), tmp_path / "x2.onnx", 2, device="cpu")
    twice = expand(tmp_path / "x2.onnx", tmp_path / "x4.onnx", 2, device="cpu", precision="float64")
    assert twice.parameters_after > 0.72 * 16 * parameters(zoo("llama.distinct"))
    assert_computes_the_same(tmp_path / "x4.onnx", expected("llama.distinct"))


# -- caches -----------------------------------------------------------------------------------------------


def decoder_with_cache() -> onnx.ModelProto:
    """One layer of attention over the tokens in a cache and new tokens. No graph of the zoo has a cache."""
    heads = {
        name: f"""{name}0 = MatMul (n, w{name})
            {name}1 = Reshape ({name}0, split)
            {name} = Transpose <perm = [0, 2, 1, 3]> ({name}1)"""
        for name in "qkv"
    }
    return build_model(
        f"""g (int64[batch, sequence] ids, float[batch, 3, past, 4] past_key, float[batch, 3, past, 4] past_value)
            => (float[batch, sequence, 31] logits, float[batch, 3, total, 4] key, float[batch, 3, total, 4] value) {{
            split = Constant <value_ints = [0, 0, 3, 4]> ()
            join = Constant <value_ints = [0, 0, 12]> ()
            half = Constant <value_float = 0.5> ()
            h = Gather (table, ids)
            n = LayerNormalization (h, gain)
            {heads["q"]}
            {heads["k"]}
            {heads["v"]}
            key = Concat <axis = 2> (past_key, k)
            value = Concat <axis = 2> (past_value, v)
            t = Transpose <perm = [0, 1, 3, 2]> (key)
            a = MatMul (q, t)
            s = Mul (a, half)
            p = Softmax (s)
            c = MatMul (p, value)
            c1 = Transpose <perm = [0, 2, 1, 3]> (c)
            c2 = Reshape (c1, join)
            o = MatMul (c2, wo)
            r = Add (h, o)
            m = LayerNormalization (r, gain)
            logits = MatMul (m, head)
        }}""",
        normal(
            2,
            {
                "table": (31, 12),
                "gain": (12,),
                "head": (12, 31),
                **dict.fromkeys(("wq", "wk", "wv", "wo"), (12, 12)),
            },
        ),
    )


@pytest.mark.parametrize("keep", [False, True], ids=["grow", "keep"])
@pytest.mark.parametrize(
    ("requests", "cache"),
    [({}, (6, 4)), ({"head_dim": 2}, (6, 8)), ({"head_dim": 2, "heads": 1}, (3, 8)), ({"heads": 1}, (3, 4))],
    ids=["heads", "both", "head_dim", "neither"],
)
def test_caches(requests: dict[str, int], cache: tuple[int, int], keep: bool, tmp_path: Path) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "big.onnx"
    onnx.save(decoder_with_cache(), source)
    expand(source, out, 2, requests, keep_interface=keep, device="cpu", precision="float64")
    heads, head_dim = (3, 4) if keep else cache
    shapes = declared(out)
    for name in ("past_key", "past_value", "key", "value"):
        assert shapes[name][1] == heads and shapes[name][3] == head_dim
    rng = np.random.default_rng(3)
    small, big = session(source), session(out)
    for past in (0, 5):
        feeds: dict[str, Array] = {"ids": rng.integers(0, 31, (2, 3))}
        for name in ("past_key", "past_value"):
            feeds[name] = rng.standard_normal((2, 3, past, 4)).astype(np.float32)
        wide = {
            name: tiled(array, (2, heads, past, head_dim)) if array.ndim == 4 else array
            for name, array in feeds.items()
        }
        for want, got in zip(small.run(None, feeds), big.run(None, wide), strict=True):
            assert float(np.abs(tiled(want, got.shape) - got).max() / np.abs(want).max()) <= TOLERANCE
