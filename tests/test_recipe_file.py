"""Recipe files: what they say, what a command line writes, and the line of every error."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest import Command, names_in
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclone_onnx import BadModel, BadRequest, Plan, Strategy, analyse, expand, plan_expansion
from hyperclone_onnx.plan.strategies import STRATEGIES, StrategyRule
from hyperclone_onnx.planning.recipe_file import LINE, plain_recipe, read_recipe, written_recipe

Zoo = Callable[[str], Path]

RECIPE = """\
# what is grown
factor: 1
size: {ffn: 30}
set:
  hidden: 2
strategy: noisy-symmetric
snr_db: 20
strategies:
  - {dimension: ffn.1, strategy: symmetric}
  - tensor: "up.*"
    snr_db: 5
    seed: 3
"""


def recipe(folder: Path, text: str) -> Path:
    """A recipe file."""
    path = folder / "grow.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def plan_of(path: Path) -> Plan:
    """The plan that a grown file carries."""
    plan = Plan.carried_by({entry.key: entry.value for entry in onnx.load(path).metadata_props})
    assert plan is not None
    return plan


# -- strategies of single tensors -------------------------------------------------------------------------


def test_rules_give_tensors_other_strategies(small: Path, tmp_path: Path) -> None:
    rules = [StrategyRule(dimension="ffn.1", name="symmetric"), StrategyRule(tensor="up.*", snr_db=5.0, seed=3)]
    out = tmp_path / "big.onnx"
    report = expand(small, out, 2, strategies=rules, strategy=Strategy("noisy-symmetric"), device="cpu")
    assert report.validation is not None
    assert report.validation.equal
    other = Strategy("noisy-symmetric", 5.0, 3)
    assert report.plan.strategies == {
        "up.0": other,
        "up.1": other,
        "down.1": Strategy("symmetric"),
    }
    assert plan_of(out) == report.plan
    plain = expand(small, tmp_path / "plain.onnx", 2, strategy=Strategy("noisy-symmetric"), device="cpu")
    tensors = {tensor.name: tensor.raw_data for tensor in onnx.load(out).graph.initializer}
    others = {tensor.name: tensor.raw_data for tensor in onnx.load(tmp_path / "plain.onnx").graph.initializer}
    assert {name for name in tensors if tensors[name] != others[name]} == {"up.0", "up.1", "down.1"}
    assert "strategies" not in plain.plan.to_json()


def test_the_first_rule_that_fits_decides(small: Path) -> None:
    both = (StrategyRule(role="hidden", seed=1), StrategyRule(tensor="up.0", seed=2))
    plan = plan_expansion(analyse(small), 2, strategies=both)
    turned = plan_expansion(analyse(small), 2, strategies=both[::-1])
    assert (plan.strategies["up.0"].seed, turned.strategies["up.0"].seed) == (1, 2)
    assert plan.strategies["up.1"].seed == turned.strategies["up.1"].seed == 1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (StrategyRule(role="heads", seed=1), "the strategy for role 'heads' fits no tensor"),
        (
            StrategyRule(tensor="*.bias", seed=1, place="grow.yaml, line 3"),
            "grow.yaml, line 3: the strategy for tensor",
        ),
        (StrategyRule(role="ffn", name="symmetrical"), "no strategy 'symmetrical'"),
        (StrategyRule(role="ffn", snr_db=1e9), "an SNR of 1000000000.0 dB"),
    ],
)
def test_rules_that_fit_nothing(small: Path, rule: StrategyRule, text: str) -> None:
    with pytest.raises(BadRequest, match=re.escape(text)):
        plan_expansion(analyse(small), 2, strategies=[rule])


# -- files ------------------------------------------------------------------------------------------------


def test_a_recipe_says_what_options_say(small: Path, tmp_path: Path, cli: Command) -> None:
    file = recipe(tmp_path, RECIPE)
    outcome = cli("expand", small, "--recipe", file, "-o", tmp_path / "big.onnx", "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    plan = plan_of(tmp_path / "big.onnx")
    assert {name: dim.map.grown for name, dim in plan.dims.items()} == {"hidden": 24, "ffn.0": 30, "ffn.1": 30}
    assert plan.strategy == Strategy("noisy-symmetric", 20.0, 0)
    assert set(plan.strategies) == {"up.0", "up.1", "down.1"}
    assert plan.recipe["strategies"] == [
        {"dimension": "ffn.1", "strategy": "symmetric"},
        {"tensor": "up.*", "snr_db": 5, "seed": 3},
    ]


def test_options_replace_a_recipe_and_a_written_recipe_means_the_same(
    small: Path, tmp_path: Path, cli: Command
) -> None:
    file, written = recipe(tmp_path, RECIPE), tmp_path / "written.yaml"
    options = ["--size", "ffn=25", "--seed", "7", "--no-validate"]
    first, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    outcome = cli("expand", small, "--recipe", file, *options, "-o", first, "--write-recipe", written)
    assert outcome.code == 0, outcome.stderr
    assert plan_of(first).strategy.seed == 7
    assert plan_of(first).dims["ffn.0"].map.grown == 25
    assert cli("expand", small, "--recipe", written, "-o", again).code == 0
    assert first.read_bytes() == again.read_bytes()
    assert read_recipe(written)["validate"] == "none"


def test_a_plan_does_not_record_how_it_was_carried_out(small: Path, tmp_path: Path, cli: Command) -> None:
    texts = ["factor: 2\n", "factor: 2\nworkers: 2\nvalidate: none\ndevice: cpu\n"]
    results = []
    for number, text in enumerate(texts):
        out = tmp_path / f"{number}.onnx"
        assert cli("expand", small, "--recipe", recipe(tmp_path, text), "-o", out).code == 0
        results.append(out.read_bytes())
    assert results[0] == results[1]


def test_paths_start_at_the_recipe(zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path = recipe(tmp_path / "deep", "like: ../target\n")
    data = read_recipe(path)
    assert data["like"] == tmp_path / "deep" / "../target"
    assert plain_recipe(data, tmp_path / "deep")["like"] == "../target"


# (text, a part of the message)
WRONG: list[tuple[str, str]] = [
    ("factor: 2\nstratgy: symmetric\n", "line 2: a recipe has no key 'stratgy'; did you mean 'strategy'?"),
    ("xyzzy: 2\n", "line 1: a recipe has no key 'xyzzy'; it is one of factor, set, size"),
    ("factor: 2\nfactor: 3\n", "line 2: factor is there twice"),
    ("factor: two\n", "line 1: factor is a number from 1 on, such as 2 or 1.5, not 'two'"),
    ("factor: 0.5\n", "line 1: factor is a number from 1 on"),
    ("factor: .inf\n", "line 1: factor is a number from 1 on"),
    ("factor: true\n", "line 1: factor is a number from 1 on"),
    ("set: [ffn, 2]\n", "line 1: set is names with whole numbers"),
    ("set:\n  ffn: 2\n  hidden: 1.5\n", "line 3: set has names with whole numbers"),
    ("set: {ffn: 2, ffn: 3}\n", "line 1: set: ffn is there twice"),
    ("strategy: random\n", "line 1: strategy is one of symmetric, diagonal"),
    ("snr_db: 1000\n", "line 1: snr_db is a number from -10 to 200"),
    ("untie: 1\n", "line 1: untie is true or false, not 1"),
    ("interface: 2026-01-01\n", "line 1: interface is one of grow, keep"),
    ("strategies: {role: ffn}\n", "line 1: strategies: a list of rules"),
    ("strategies:\n  - seed: 1\n", "line 2: a strategy is for a role, a dimension or a tensor"),
    ("strategies:\n  - {role: ffn, tensor: x, seed: 1}\n", "line 2: a strategy is for a role, a dimension or a tensor"),
    ("strategies:\n  - role: ffn\n", "line 2: this strategy changes nothing"),
    ("strategies:\n  - role: ffn\n    sed: 1\n", "line 3: a strategy has no key 'sed'; did you mean 'seed'?"),
    ("- factor: 2\n", "line 1: a recipe has keys with values"),
    ("factor: [2\n", "line 2: not YAML"),
    ("factor: !!python/object:os.system 2\n", "line 1: not YAML"),
    ("a: 1\n---\nb: 2\n", "not YAML"),
    ("factor: \x00\n", "not YAML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[repr(text) for text, _ in WRONG])
def test_errors_name_the_line(small: Path, tmp_path: Path, cli: Command, text: str, message: str) -> None:
    file = recipe(tmp_path, text)
    outcome = cli("expand", small, "--recipe", file, "-o", tmp_path / "big.onnx")
    assert outcome.code == 2, outcome.stderr
    assert message in outcome.stderr
    assert str(file) in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert names_in(tmp_path) == {"grow.yaml"}


def test_a_recipe_that_cannot_be_read(small: Path, tmp_path: Path, cli: Command) -> None:
    with pytest.raises(BadModel, match=r"no\.yaml: cannot be read"):
        read_recipe(tmp_path / "no.yaml")
    assert cli("expand", small, "--recipe", tmp_path / "no.yaml", "-o", tmp_path / "big.onnx").code == 4
    assert cli("expand", small, "--factor", "2", "--plan-only", "--write-recipe", small).code == 2
    long = recipe(tmp_path, "# long\n" * 200_000)
    with pytest.raises(BadRequest, match="are too many for a recipe"):
        read_recipe(long)


RULES = st.fixed_dictionaries(
    {"strategy": st.sampled_from(STRATEGIES)}, optional={"snr_db": st.floats(-10, 200), "seed": st.integers(0, 2**40)}
).flatmap(lambda rule: st.sampled_from(["role", "dimension", "tensor"]).map(lambda kind: {kind: "ffn", **rule}))
RECIPES = st.fixed_dictionaries(
    {},
    optional={
        "factor": st.integers(1, 9) | st.floats(1, 9),
        "size": st.dictionaries(st.text("abc.0", min_size=1), st.integers(1, 10**9), max_size=3),
        "strategy": st.sampled_from(STRATEGIES),
        "seed": st.integers(0, 2**40),
        "untie": st.booleans(),
        "interface": st.sampled_from(["grow", "keep"]),
        "strategies": st.lists(RULES, max_size=3),
        "exclude": st.lists(st.text(max_size=5), max_size=2),
    },
)


@settings(max_examples=30, deadline=None)
@given(data=RECIPES)
def test_a_written_recipe_reads_as_it_was(tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    read = read_recipe(recipe(folder, written_recipe(data, folder)))
    for rule in read.get("strategies", ()):
        assert rule.pop(LINE) > 1
    assert read == data
