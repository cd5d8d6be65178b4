"""Requests for sizes: which dimensions grow so that a model has the sizes that people name, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import Command, build_model, names_in, normal, perceptron
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclone_onnx import Analysis, BadRequest, Refused, SourceMap, Strategy, analyse, expand, plan_expansion
from hyperclone_onnx.analysis.quantities import quantities
from hyperclone_onnx.expansion.expanding import plan_file
from hyperclone_onnx.expansion.report import Expansion
from hyperclone_onnx.planning.sizes import heads_and_group

Zoo = Callable[[str], Path]


@pytest.fixture(scope="module")
def llama(zoo: Zoo) -> Analysis:
    """Two layers of grouped attention: 6 query heads, 2 key/value heads, heads of 8 in rotary halves, ffn 56."""
    return analyse(zoo("llama.distinct"))


def sizes_of(analysis: Analysis, plan_sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes by role that a request leads to, of roles that have one size throughout."""
    plan = plan_expansion(analysis, sizes=plan_sizes)
    grown = {
        dimension.dim: plan.dims[dimension.name].map.grown
        for dimension in analysis.named
        if dimension.name in plan.dims
    }
    by_role: dict[str, set[int]] = {}
    for quantity in quantities(analysis.dimensions, analysis.named):
        by_role.setdefault(quantity.role, set()).add(quantity.size_with(grown))
    return {role: sizes.pop() for role, sizes in by_role.items() if len(sizes) == 1}


# -- the sizes that people name ---------------------------------------------------------------------------

# The sizes by role of each family: a role with several sizes is left out.
FAMILIES = {
    "llama.distinct": {"hidden": 48, "ffn": 56, "heads": 6, "kv_heads": 2, "group": 3, "head_dim": 8},
    "llama.fused": {"hidden": 48, "ffn": 56, "heads": 6, "kv_heads": 2, "group": 3, "head_dim": 8},
    "gpt2.distinct": {"hidden": 48, "ffn": 56, "heads": 6, "head_dim": 8},
    "gpt_neox.fused": {"hidden": 48, "ffn": 56, "heads": 3, "head_dim": 16},
    "falcon_mq.distinct": {"hidden": 48, "ffn": 56, "heads": 6, "head_dim": 8},
    "codegen.distinct": {"hidden": 48, "ffn": 56, "heads": 8, "head_dim": 6},
    "deepseek_v3.built": {"heads": 6},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_that_people_name(zoo: Zoo, family: str) -> None:
    analysis = analyse(zoo(family))
    by_role: dict[str, set[int]] = {}
    for quantity in quantities(analysis.dimensions, analysis.named):
        by_role.setdefault(quantity.role, set()).add(quantity.size)
    assert {role: sizes.pop() for role, sizes in by_role.items() if len(sizes) == 1} == FAMILIES[family]


# -- which dimensions take a size -------------------------------------------------------------------------

# (sizes, what comes out of 6 query heads, 2 key/value heads and groups of 3)
HEADS: list[tuple[dict[str, int], tuple[int, int, int]]] = [
    ({"heads": 9}, (9, 3, 3)),
    ({"heads": 12}, (12, 4, 3)),
    ({"heads": 8}, (8, 2, 4)),
    ({"heads": 6}, (6, 2, 3)),
    ({"heads": 12, "kv_heads": 3}, (12, 3, 4)),
    ({"heads": 12, "group": 6}, (12, 2, 6)),
    ({"heads": 12, "kv_heads": 4, "group": 3}, (12, 4, 3)),
    ({"kv_heads": 5}, (15, 5, 3)),
    ({"group": 4}, (8, 2, 4)),
    ({"kv_heads": 3, "group": 4}, (12, 3, 4)),
]


@pytest.mark.parametrize(
    ("sizes", "outcome"), HEADS, ids=[" ".join(f"{k}={v}" for k, v in s.items()) for s, _ in HEADS]
)
def test_query_heads_are_key_value_heads_times_the_group(
    llama: Analysis, sizes: dict[str, int], outcome: tuple[int, int, int]
) -> None:
    grown = sizes_of(llama, {**sizes, "ffn": 57})
    assert (grown["heads"], grown["kv_heads"], grown["group"]) == outcome


@settings(max_examples=200, deadline=None)
@given(kv_heads=st.integers(1, 12), group=st.integers(1, 8), queries=st.integers(1, 200))
def test_any_number_of_query_heads_is_solved_or_refused_with_numbers_that_fit(
    kv_heads: int, group: int, queries: int
) -> None:
    queries = max(queries, kv_heads * group)
    try:
        new_kv, new_group = heads_and_group({"heads": queries}, kv_heads, group)
    except BadRequest as problem:
        assert queries % kv_heads and queries % group
        fits = re.search(r": ([\d or]+) would fit", str(problem))
        assert fits is not None
        for number in map(int, fits[1].split(" or ")):
            kv, other = heads_and_group({"heads": number}, kv_heads, group)
            assert kv * other == number
        return
    assert new_kv * new_group == queries
    assert new_kv >= kv_heads and new_group >= group
    assert new_group == group or (new_kv == kv_heads and queries % group)


# (graph, sizes, a part of the message)
REFUSED: list[tuple[str, dict[str, int], str]] = [
    ("llama.distinct", {"heads": 7}, "heads=7 is a multiple neither of the 3 queries for each key/value head nor of"),
    ("llama.distinct", {"heads": 7}, "6 or 8 or 9 would fit"),
    ("llama.distinct", {"heads": 5}, "heads=5 is below the source's 6: sizes only grow"),
    ("llama.distinct", {"heads": 10, "kv_heads": 4}, "heads=10 is not a multiple of kv_heads=4: 8 or 12 would fit"),
    ("llama.distinct", {"heads": 12, "kv_heads": 4, "group": 4}, "which is 16: leave one of the three out"),
    ("llama.distinct", {"heads": 12, "kv_heads": 6}, "group would be 2, below the source's 3"),
    (
        "llama.distinct",
        {"head_dim": 9},
        "head_dim=9 does not fit head_dim.0 + head_dim.0, which is 8 now: 8 or 10 would",
    ),
    ("llama.distinct", {"head_dim": 7}, "head_dim=7 is below the source's 8"),
    ("llama.distinct", {"heads": 9, "kv_heads.0": 4}, "heads=9 and kv_heads.0=4 contradict each other"),
    ("llama.distinct", {"kv_heads.0": 1}, "kv_heads.0=1 is below the source's 2"),
    ("llama.distinct", {"kvheads": 4}, "did you mean 'kv_heads'?"),
    ("llama.distinct", {"ffn": 0}, "the size of ffn is 0: give a whole number above 0"),
    ("gpt2.distinct", {"kv_heads": 12}, "kv_heads"),
    ("falcon_mq.distinct", {"kv_heads": 2}, "kv_heads"),
    ("codegen.distinct", {"heads": 9}, "heads=9 does not fit heads.0 heads.1, which is 8 now"),
    ("deepseek_v3.built", {"hidden": 96}, "hidden has several sizes in this model (48: hidden.0; 22: hidden.1"),
]


@pytest.mark.parametrize(("family", "sizes", "message"), REFUSED)
def test_sizes_that_do_not_fit(zoo: Zoo, family: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(message)):
        plan_expansion(analyse(zoo(family)), sizes=sizes)


def test_a_partly_rotated_head_grows_in_proportion_or_in_what_is_not_rotated(zoo: Zoo) -> None:
    analysis = analyse(zoo("gpt_neox.fused"))
    for size, parts in ((24, {2: 3, 12: 18, 16: 24}), (20, {12: 16, 16: 20})):
        plan = plan_expansion(analysis, sizes={"head_dim": size})
        assert {dim.map.size: dim.map.grown for dim in plan.dims.values()} == parts


def test_a_width_of_several_factors_takes_a_size_in_one_of_them(tmp_path: Path) -> None:
    weights = normal(0, {"table": (31, 36), "gain": (36,), "up": (36, 20), "down": (20, 36), "head": (36, 31)})
    shapes = {"six": np.asarray([0, 0, 6, 6]), "flat": np.asarray([0, 0, 36])}
    graph = """g (int64[batch, 8] ids) => (float[batch, 8, 31] logits) {
        h = Gather (table, ids)  s = Reshape (h, six)  a = Relu (s)  x = Reshape (a, flat)
        u = MatMul (x, up)  r = Relu (u)  d = MatMul (r, down)  logits = MatMul (d, head)
    }"""
    onnx.save(build_model(graph, {**weights, **shapes}), tmp_path / "model.onnx")
    analysis = analyse(tmp_path / "model.onnx")
    (stream,) = [q for q in quantities(analysis.dimensions, analysis.named) if q.role == "hidden" and q.size == 36]
    assert len(stream.dims) == 2
    report = expand(tmp_path / "model.onnx", tmp_path / "big.onnx", sizes={"hidden": 54}, device="cpu")
    grown = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "big.onnx").graph.initializer}
    assert grown["table"] == (31, 54)
    assert report.validation is not None
    assert report.validation.equal
    with pytest.raises(BadRequest, match=r"hidden=40 does not fit .* 36 now: 36 or 42 would fit"):
        plan_expansion(analysis, sizes={"hidden": 40})


# -- sizes beside factors ---------------------------------------------------------------------------------


def test_a_size_that_is_a_multiple_is_the_plan_of_the_factor(llama: Analysis) -> None:
    by_factor = plan_expansion(llama, 2).to_json()
    by_size = plan_expansion(llama, sizes={"hidden": 96, "ffn": 112, "heads": 12}).to_json()
    assert by_factor.pop("source")["options"] != by_size.pop("source")["options"]
    assert by_factor == by_size


def test_whole_factors_are_the_same_whatever_their_type(llama: Analysis) -> None:
    plans = {plan_expansion(llama, factor).dumps() for factor in (2, 2.0, np.int64(2), np.float32(2))}
    assert len(plans) == 1


def test_a_size_replaces_a_factor(llama: Analysis) -> None:
    plan = plan_expansion(llama, 2, {"head_dim": 3}, sizes={"ffn.1": 60, "group": 4})
    grown = {name: dim.map.grown for name, dim in plan.dims.items()}
    assert (grown["ffn.0"], grown["ffn.1"], grown["heads.0"], grown["group.0"]) == (112, 60, 4, 4)


def test_key_value_heads_are_asked_for_by_either_name(llama: Analysis) -> None:
    assert plan_expansion(llama, 1, {"heads": 2}).dims == plan_expansion(llama, 1, {"kv_heads": 2}).dims
    with pytest.raises(BadRequest, match="are one factor in grouped attention"):
        plan_expansion(llama, 1, {"heads": 2, "kv_heads": 3})


def test_the_query_heads_of_one_layer(llama: Analysis) -> None:
    plan = plan_expansion(llama, sizes={"heads.1": 9})
    assert {name: dim.map.grown for name, dim in plan.dims.items()} == {"heads.1": 3}


@pytest.mark.parametrize("factor", [0, 0.5, -1, float("nan"), float("inf"), "2", 2j])
def test_factors_that_are_none(llama: Analysis, factor: object) -> None:
    with pytest.raises(BadRequest, match="the factor is"):
        plan_expansion(llama, factor)  # type: ignore[arg-type]


# -- fractions --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 200), hundredths=st.integers(101, 400))
def test_a_fraction_gives_the_nearest_size(size: int, hundredths: int) -> None:
    from fractions import Fraction

    from hyperclone_onnx.planning.request import map_to, nearest_size

    exact = Fraction(size * hundredths, 100)
    grown = nearest_size(size, Fraction(hundredths, 100))
    assert grown >= size
    assert abs(grown - exact) <= Fraction(1, 2)
    indices = map_to(size, grown).indices
    assert indices.tolist() == [index % size for index in range(grown)]


def test_a_fraction_says_which_sizes_it_gave(zoo: Zoo, cli: Command) -> None:
    report = plan_file(zoo("llama.distinct"), 1.3, {"hidden": 1})
    changed = {(size.role, size.after, size.wanted) for size in report.sizes if size.after != size.before}
    assert changed == {("heads", 9, 7.8), ("kv_heads", 3, 2.6), ("ffn", 73, 72.8)}
    outcome = cli("expand", zoo("llama.distinct"), "--factor", "1.3", "--set", "hidden=1", "--plan-only")
    lines = [line.split() for line in outcome.stdout.splitlines()]
    assert ["grew", "from", "to", "nearest", "to"] in lines
    assert ["heads", "x2", "6", "9", "7.8"] in lines


# -- whole models -----------------------------------------------------------------------------------------

# (graph, sizes): everything but widths under norms, to sizes that are no multiples
GROWN: list[tuple[str, dict[str, int]]] = [
    ("llama.cached", {"heads": 9, "ffn": 85, "head_dim": 12}),
    ("llama.collide", {"heads": 10, "kv_heads": 2, "ffn": 101}),
    ("gpt2.fused", {"heads": 7, "ffn": 57, "head_dim": 11}),
    ("qwen3.distinct", {"heads": 9, "head_dim.0": 7, "head_dim.2": 11}),  # norms on queries and keys; values apart
    ("falcon_mq.distinct", {"heads": 11, "ffn": 85}),
    ("t5_merged.cached", {"heads": 7, "ffn": 60}),
    ("bert.torchscript", {"heads": 8, "ffn": 99, "head_dim": 9}),
]


@pytest.mark.parametrize(
    ("family", "sizes", "strategy"),
    [
        pytest.param(
            family, sizes, strategy, id=f"{strategy}-{family}", marks=pytest.mark.slow if (row + column) % 2 else []
        )
        for row, (family, sizes) in enumerate(GROWN)
        for column, strategy in enumerate(["noisy-diagonal", "noisy-symmetric"])
    ],
)
def test_models_grow_to_sizes(zoo: Zoo, tmp_path: Path, family: str, sizes: dict[str, int], strategy: str) -> None:
    wide = "stored" if family.endswith(".fused") else "float64"  # nothing runs fused operators in float64
    law, out = Strategy(strategy), tmp_path / "big.onnx"
    report = expand(zoo(family), out, sizes=sizes, strategy=law, device="cpu", precision=wide)  # type: ignore[arg-type]
    assert report.validation is not None
    assert report.validation.equal
    assert max((output.max_relative for output in report.validation.double or []), default=0.0) < 1e-12
    assert (report.validation.double is None) == family.endswith(".fused")
    after = {size.role: size.after for size in report.sizes}
    assert {role: after[role] for role in sizes if "." not in role} == {r: n for r, n in sizes.items() if "." not in r}
    assert any(size.after % size.before for size in report.sizes)


def test_a_wrong_map_is_noticed(tmp_path: Path) -> None:
    """The comparison of these tests fails where a map repeats indices in an order that a tensor does not have."""
    onnx.save(perceptron(), tmp_path / "small.onnx")
    report = expand(tmp_path / "small.onnx", tmp_path / "big.onnx", sizes={"ffn": 30}, device="cpu")
    assert report.plan.dims["ffn.0"].map == SourceMap(20, cycle=30)
    model = onnx.load(tmp_path / "big.onnx")
    down = next(tensor for tensor in model.graph.initializer if tuple(tensor.dims) == (30, 12))
    rolled = np.roll(onnx.numpy_helper.to_array(down), 1, axis=0)
    down.CopyFrom(onnx.numpy_helper.from_array(rolled, down.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    from hyperclone_onnx import validate_files

    assert not validate_files(tmp_path / "small.onnx", tmp_path / "wrong.onnx", "cpu").equal


def test_inspect_names_query_heads_and_key_value_heads(zoo: Zoo, cli: Command) -> None:
    lines = cli("inspect", zoo("llama.distinct")).stdout.splitlines()
    rows = {tuple(line.split()[:3]) for line in lines}
    assert ("heads", "x2", "(heads.0") in rows
    assert ("kv_heads", "x2", "(kv_heads.0") in rows
    assert any("kv_heads group (head_dim + head_dim)" in line for line in lines)


def test_a_folder_grows_to_sizes(zoo: Zoo, tmp_path: Path) -> None:
    from hyperclone_onnx import expand_folder

    (tmp_path / "in").mkdir()
    for name in ("t5_encoder.torchscript", "t5_decoder.torchscript"):
        onnx.save(onnx.load(zoo(name)), tmp_path / "in" / f"{name}.onnx")
    result = expand_folder(tmp_path / "in", tmp_path / "out", sizes={"heads": 7, "ffn": 60}, device="cpu")
    for report in result.models.values():
        assert isinstance(report, Expansion)
        assert {size.after for size in report.sizes if size.role == "heads"} == {7}
    with pytest.raises(BadRequest, match=r"no model in .* has a dimension 'group'"):
        expand_folder(tmp_path / "in", tmp_path / "out2", sizes={"group": 7})


def test_a_pinned_dimension_refuses_a_size(zoo: Zoo) -> None:
    with pytest.raises(Refused, match=r"head_dim\.\d \(size 4\) cannot grow"):
        plan_expansion(analyse(zoo("cohere.cached")), sizes={"head_dim": 12})


# -- results that are too large, or no larger ------------------------------------------------------------------


def test_a_result_beyond_the_disk_stops_before_writing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5_000))
    outcome = cli("expand", small, "--factor", "2", "-o", tmp_path / "big.onnx")
    assert outcome.code == 2
    assert re.search(r"big\.onnx would have \d+\.\d KB, and its disk has 5\.0 KB free$", outcome.stderr.strip())
    assert not list(tmp_path.iterdir())


def test_a_result_of_a_hundred_times_its_source_stops_before_writing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Command
) -> None:
    monkeypatch.setattr("hyperclone_onnx.expansion.making.FREE_OF_LIMIT", 0)
    assert cli("expand", small, "--factor", "8", "-o", tmp_path / "fits.onnx", "--no-validate").code == 0
    outcome = cli("expand", small, "--size", "ffn=20000", "-o", tmp_path / "big.onnx")
    assert outcome.code == 2
    assert "times its source" in outcome.stderr
    assert "grow in several steps" in outcome.stderr
    assert names_in(tmp_path) == {"fits.onnx"}


def test_factor_one_says_that_nothing_grows(small: Path, tmp_path: Path, cli: Command) -> None:
    outcome = cli("expand", small, "--factor", "1", "-o", tmp_path / "same.onnx")
    assert outcome.code == 0
    assert outcome.stdout.startswith("nothing grows: every size stays")
    assert not cli("expand", small, "--factor", "2", "--plan-only").stdout.startswith("nothing")


def test_the_report_has_the_files(small: Path, tmp_path: Path, cli: Command) -> None:
    report = expand(small, tmp_path / "big.onnx", 2, check=False, max_shard_size=4_000)
    assert len(report.files) > 2
    assert report.files == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert next(iter(report.files)) == "big.onnx"
    outcome = cli("expand", small, "--factor", "2", "-o", tmp_path / "one.onnx", "--no-validate")
    assert f"one.onnx: {(tmp_path / 'one.onnx').stat().st_size / 1000:.1f} KB (" in outcome.stdout


# -- bad input ------------------------------------------------------------------------------------------------

# (options, exit code, what the one line says)
BAD = [
    ("--size hidden=6", 2, "hidden=6 is below the source's 12: sizes only grow"),
    ("--size hiden=24", 2, "no dimension 'hiden'; did you mean 'hidden'?"),
    ("--size hidden=24 --set hidden=2", 2, "hidden has a factor (2) and a size (24)"),
    ("--size vocab=64", 3, "vocab (size 31) cannot grow"),
    ("--size heads=4", 2, "no dimension 'heads'"),
    ("--layers 1", 2, "no layers were found in this graph"),
    ("--like config.json", 2, "hidden=6 is below the source's 12"),
    ("--like elsewhere", 4, "elsewhere: no such file"),
    ("--recipe key.yaml", 2, "key.yaml, line 2: a recipe has no key 'sizes'; did you mean 'size'?"),
    ("--recipe type.yaml", 2, "type.yaml, line 1: seed is a whole number from 0 on, not 'soon'"),
    ("--recipe syntax.yaml", 2, "syntax.yaml, line 2: not YAML"),
]
FILES = {
    "config.json": '{"hidden_size": 6, "intermediate_size": 20}',
    "key.yaml": "size: {hidden: 24}\nsizes: {ffn: 40}\n",
    "type.yaml": "seed: soon\n",
    "syntax.yaml": "size: [hidden\n",
}


@pytest.mark.parametrize(("options", "code", "message"), BAD, ids=[options for options, _, _ in BAD])
def test_bad_input_gets_one_line_and_writes_nothing(
    tmp_path: Path, cli: Command, options: str, code: int, message: str
) -> None:
    onnx.save(perceptron(layers=1), tmp_path / "small.onnx")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    words = [tmp_path / word if word in FILES or word == "elsewhere" else word for word in options.split()]
    outcome = cli("expand", tmp_path / "small.onnx", *words, "-o", tmp_path / "big.onnx")
    (line,) = [line for line in outcome.stderr.splitlines() if not line.endswith(" ...")]
    assert message in line
    assert outcome.code == code
    assert names_in(tmp_path) == {"small.onnx", *FILES}
