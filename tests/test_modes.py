"""The modes of validation: each mode notices the errors that it promises to notice, and says what it does not check."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Command, names_in, perceptron
from onnx import numpy_helper
from test_validation import CHANGES, edit, set_plan

from hyperclone_onnx import BadRequest, ModelsDiffer, Plan, Strategy, expand, validate_files
from hyperclone_onnx.expansion import request
from hyperclone_onnx.expansion.expanding import plan_file
from hyperclone_onnx.plan.strategies import STRATEGIES
from hyperclone_onnx.planning import completeness
from hyperclone_onnx.planning.making import make_plan
from hyperclone_onnx.system import memory
from hyperclone_onnx.validation import validating as validation
from hyperclone_onnx.validation.tensor_check import TensorReport, check_tensors

Array = np.ndarray[Any, Any]
Zoo = Callable[[str], Path]


@pytest.fixture
def pair(small: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A small model, and the model grown from it."""
    expand(small, tmp_path / "big.onnx", 2, check=False)
    return small, tmp_path / "big.onnx"


@pytest.fixture(params=["full", "algebraic", "first layers"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The mode to request. Without free memory, "auto" becomes the mode of the first layers."""
    if request.param == "first layers":
        monkeypatch.setattr(validation, "free_memory", lambda: 0)
        yield "auto"
    else:
        yield request.param


def test_an_unchanged_pair_is_equal_in_each_mode(mode: Any, pair: tuple[Path, Path]) -> None:
    assert validate_files(*pair, "cpu", mode=mode).equal


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_tensor_is_found_in_each_mode(case: str, mode: Any, pair: tuple[Path, Path], cli: Command) -> None:
    name, change = CHANGES[case]
    edit(pair[1], name, change)
    options = () if mode == "auto" else ("--validate", mode)
    done = cli("validate", *pair, "--device", "cpu", *options)
    assert done.code == 1 or (case.startswith("another ") and mode == "full" and done.code == 3)
    assert done.code == 3 or f"DIFFERS: tensor {name}: " in done.stdout


def test_a_model_that_is_run_next_stays_in_the_page_cache(
    mode: Any, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten = []

    def check(*arguments: Any, forget: bool) -> TensorReport:
        forgotten.append(forget)
        return check_tensors(*arguments, forget=forget)

    monkeypatch.setattr(validation, "check_tensors", check)
    assert validate_files(*pair, "cpu", mode=mode).equal
    monkeypatch.setattr(validation, "free_memory", lambda: 0)
    assert validate_files(*pair, "cpu", mode="full").equal
    assert forgotten == [mode != "full", True]


def changed_node(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Sigmoid"


def changed_attribute(model: onnx.ModelProto) -> None:
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    norm.attribute.append(onnx.helper.make_attribute("epsilon", 0.1))


def skipped_layers(model: onnx.ModelProto) -> None:
    """A wrong graph: the last norm reads the embedding."""
    norm = [node for node in model.graph.node if node.op_type == "LayerNormalization"][-1]
    norm.input[0] = next(node for node in model.graph.node if node.op_type == "Gather").output[0]


def lost_node(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    for reader in model.graph.node:
        reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
    model.graph.node.remove(node)


def changed_scale(model: onnx.ModelProto) -> None:
    """The scalar divisor that the plan inserted."""
    (scale,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".scale")]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.01), scale.name))


GRAPHS = {
    "another operator": changed_node,
    "another attribute": changed_attribute,
    "another input": skipped_layers,
    "a node less": lost_node,
    "another scale": changed_scale,
}


@pytest.mark.parametrize("case", GRAPHS)
def test_a_changed_graph_is_found_in_each_mode(case: str, mode: Any, tmp_path: Path) -> None:
    """All tensors are right. Only a run shows the error, or a comparison with the graph that the plan makes."""
    source, big = tmp_path / "small.onnx", tmp_path / "big.onnx"
    onnx.save(perceptron(tied=True), source)
    expand(source, big, 2, strategy=Strategy("symmetric"), check=False)
    model = onnx.load(big)
    GRAPHS[case](model)
    onnx.save(model, big)
    result = validate_files(source, big, "cpu", mode=mode)
    assert not result.equal
    assert result.tensors is not None and not result.tensors.wrong
    if result.mode != "full":
        assert any(text.startswith("graph: ") for text in result.problems)


@pytest.fixture(params=[0, -1])
def forgetful(request: pytest.FixtureRequest) -> Callable[..., Plan]:
    """Makes a plan that lacks its first or its last edit."""
    dropped: int = request.param

    def make(*arguments: Any, **options: Any) -> Plan:
        plan = make_plan(*arguments, **options)
        return replace(plan, edits=tuple(edit for edit in plan.edits if edit != plan.edits[dropped]))

    return make


@pytest.mark.parametrize("check", ["full", "algebraic", "first layers"])
def test_every_mode_notices_an_edit_that_a_plan_lacks(
    check: str, forgetful: Callable[..., Plan], zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "make_plan", forgetful)
    if check == "first layers":
        monkeypatch.setattr(validation, "free_memory", lambda: 0)
    mode: Any = "auto" if check == "first layers" else check
    with pytest.raises(ModelsDiffer, match=None if check == "full" else "graph: the plan lacks "):
        expand(zoo("llama.distinct"), tmp_path / "big.onnx", 2, check=mode)
    assert names_in(tmp_path) == set()


def test_only_a_run_notices_that_planning_forgets_an_edit(
    forgetful: Callable[..., Plan], zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The algebraic mode says that nothing was run."""
    monkeypatch.setattr(request, "make_plan", forgetful)
    monkeypatch.setattr(completeness, "make_plan", forgetful)
    source = zoo("llama.distinct")
    report = expand(source, tmp_path / "a.onnx", 2, check="algebraic").validation
    assert report is not None and report.equal and "nothing was run" in report.scope and not report.cases
    with pytest.raises(ModelsDiffer):
        expand(source, tmp_path / "b.onnx", 2)
    assert names_in(tmp_path) == {"a.onnx"}


FAMILIES = ("llama", "gpt2", "gemma2", "bert", "bloom")


@pytest.mark.parametrize(
    ("budget", "strategy"),
    [
        pytest.param(budget, strategy, marks=[] if (row + column) % 3 == 0 else pytest.mark.slow)
        for row, budget in enumerate([0, 20_000, 1 << 30])
        for column, strategy in enumerate(STRATEGIES)
    ],
)
def test_the_first_layers_of_right_models_are_equal(
    budget: int, strategy: Any, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for any number of first layers."""
    monkeypatch.setattr(validation, "free_memory", lambda: 0)
    monkeypatch.setattr(validation, "FEWEST", budget)
    seen = []
    for name in FAMILIES:
        out = tmp_path / f"{name}.onnx"
        report = expand(zoo(f"{name}.distinct"), out, 2, strategy=Strategy(strategy), device="cpu").validation
        assert report is not None and report.equal, (name, report and report.problems)
        assert report.mode == ("first layers" if report.cases else "algebraic")
        assert report.cases or "no layer was run" in report.notes[0]
        seen.append(bool(report.cases))
    assert not any(seen) if budget == 0 else all(seen) or budget < 1 << 30
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]


def test_the_report_says_what_was_checked(
    small: Path, tmp_path: Path, cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("expand", small, "--factor", "2", "--device", "cpu", "-o")
    assert "validation: full (both models fit in free memory: " in cli(*arguments, tmp_path / "a.onnx").stdout
    done = cli(*arguments, tmp_path / "b.onnx", "--validate", "algebraic")
    assert "nothing was run" in done.stdout and "equal in what was compared" in done.stdout
    assert "not validated" in cli(*arguments, tmp_path / "c.onnx", "--validate", "none").stdout
    data = json.loads(cli(*arguments, tmp_path / "d.onnx", "--validate", "algebraic", "--json").stdout)["validation"]
    assert (data["mode"], data["cases"], data["outputs"]) == ("algebraic", [], [])
    monkeypatch.setattr(validation, "free_memory", lambda: 0)
    done = cli(*arguments, tmp_path / "e.onnx")
    assert "validation: first layers (both models do not fit in free memory: " in done.stdout
    assert "were not run" in done.stdout and "equal in what was compared" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--no-validate", "--validate", "full"),
        ("--validate", "algebraic", "--precision", "float64"),
        ("--plan-only",),
    ],
)
def test_contradictory_options_are_refused(
    arguments: tuple[str, ...], small: Path, tmp_path: Path, cli: Command
) -> None:
    done = cli("expand", small, "--factor", "2", "-o", tmp_path / "big.onnx", *arguments)
    assert done.code == 2 and names_in(tmp_path) == set()


def test_without_a_plan_nothing_is_algebraic(pair: tuple[Path, Path]) -> None:
    set_plan(pair[1], None)
    with pytest.raises(BadRequest, match="carries no plan"):
        validate_files(*pair, "cpu", mode="algebraic")


def test_a_plan_alone(small: Path, tmp_path: Path, cli: Command) -> None:
    """`--plan-only` writes the plan that the grown model would carry, and nothing else."""
    done = cli("expand", small, "--factor", "2", "--plan-only", "--plan-out", tmp_path / "plan.json")
    assert done.code == 0 and "planned, nothing written" in done.stdout
    assert names_in(tmp_path) == {"plan.json"}
    plan = Plan.loads((tmp_path / "plan.json").read_text())
    assert plan == expand(small, tmp_path / "big.onnx", 2).plan
    assert plan.source.keys() == {"graph", "weights", "bytes", "options"}


def test_a_plan_tells_sources_and_options_apart(small: Path, tmp_path: Path) -> None:
    def source_of(path: Path, **options: Any) -> Any:
        return plan_file(path, 2, **options).plan.source

    first = source_of(small)
    assert first == source_of(small)
    assert source_of(small, untie=True) == {**first, "options": source_of(small, untie=True)["options"]} != first
    other = tmp_path / "other.onnx"
    onnx.save(onnx.load(small), other)
    edit(other, "down.1", lambda array: array * np.float32(1.01))
    assert source_of(other) == {**first, "weights": source_of(other)["weights"]} != first
    expand(small, tmp_path / "big.onnx", 2)
    notes = validate_files(other, tmp_path / "big.onnx", "cpu").notes
    assert any("made from another source: its weights" in note for note in notes)


def test_free_memory_is_that_of_the_tightest_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In version 2 of control groups, the limit of a parent counts, and memory that is only cache is free."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder, limit, used, cache in ((inner, "max", "5", 0), (tmp_path / "a", "1000", "700", 100)):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(used)
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    assert memory._parents(tmp_path, "/a/b") == [inner, tmp_path / "a", tmp_path]
    names = ("memory.max", "memory.current", "inactive_file")
    assert [memory._room(folder, *names) for folder in memory._parents(tmp_path, "/a/b")] == [None, 400, None]
    free = memory.free_memory()
    assert free is None or free > 0
