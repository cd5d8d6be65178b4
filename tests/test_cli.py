"""The command line is a contract: tests of exit codes, streams, error messages, and that nothing is half done."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import ROOT, Command, command_line, names_in, perceptron, with_signals
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hyperclone_onnx
from hyperclone_onnx import Plan, Refused
from hyperclone_onnx.commands.main import COMMANDS as LISTED
from hyperclone_onnx.commands.main import main
from hyperclone_onnx.commands.sections import Sectioned
from hyperclone_onnx.planning.training_recipe import RECIPE
from hyperclone_onnx.reading import checker
from hyperclone_onnx.rules import registry
from hyperclone_onnx.rules.op import CannotTell
from hyperclone_onnx.transforms import source

COMMANDS = main.commands if isinstance(main, click.Group) else {}
STAGES = [
    f"{stage} ..." for stage in ("reading", "planning", "running the source", "writing", "validating", "publishing")
]


@pytest.fixture(scope="session")
def corrupt(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grown model in which one weight is wrong."""
    path = tmp_path_factory.mktemp("corrupt") / "corrupt.onnx"
    hyperclone_onnx.expand(small, path, 2, device="cpu")
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "up.0")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[3, 4] += 0.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    return path


@pytest.fixture
def place(small: Path, corrupt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, made the current one, with the files that the cases below name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.onnx").write_bytes(small.read_bytes())
    (tmp_path / "corrupt.onnx").write_bytes(corrupt.read_bytes())
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "folder").mkdir()
    return tmp_path


# -- exit codes and streams -------------------------------------------------------------------------------

GROW = "expand small.onnx -o big.onnx"

# (arguments, exit code, a part of the error message)
ENDINGS: list[tuple[str, int, str]] = [
    ("validate small.onnx corrupt.onnx", 1, ""),
    # wrong usage that click notices
    ("", 2, ""),
    ("grow small.onnx", 2, "No such command 'grow'"),
    ("inspect", 2, "Missing argument 'MODEL'"),
    ("inspect small.onnx --yaml", 2, "No such option"),
    ("validate small.onnx", 2, "Missing argument 'BIG'"),
    ("expand small.onnx --factor 2", 2, "Missing option '-o' / '--output'"),
    (GROW, 2, "say how much to grow: --factor 2, or --set ffn=2"),
    (f"{GROW} --factor 0", 2, "0 is not in the range x>=1"),
    (f"{GROW} --factor -1", 2, "-1 is not in the range x>=1"),
    (f"{GROW} --factor 0.5", 2, "0.5 is not in the range x>=1"),
    (f"{GROW} --factor inf", 2, "inf is not in the range x>=1"),
    (f"{GROW} --factor two", 2, "'two' is not a valid number"),
    (f"{GROW} --size ffn", 2, "'ffn': write ROLE=SIZE"),
    (f"{GROW} --size ffn=2.5", 2, "'ffn=2.5': write ROLE=SIZE"),
    (f"{GROW} --size ffn=24 --size ffn=30", 2, "ffn has the size 24 already"),
    (f"{GROW} --set ffn", 2, "'ffn': write ROLE=N"),
    (f"{GROW} --set =2", 2, "'=2': write ROLE=N"),
    (f"{GROW} --set ffn=0", 2, "'ffn=0': write ROLE=N"),
    (f"{GROW} --set ffn=-1", 2, "'ffn=-1': write ROLE=N"),
    (f"{GROW} --set ffn=1.5", 2, "'ffn=1.5': write ROLE=N"),
    (f"{GROW} --factor 2 --strategy random", 2, "'random' is not one of"),
    (f"{GROW} --factor 2 --device tpu", 2, "'tpu' is not one of"),
    (f"{GROW} --factor 2 --interface widen", 2, "'widen' is not one of"),
    (f"{GROW} --factor 2 --precision float16", 2, "'float16' is not one of"),
    (f"{GROW} --factor 2 --seed -1", 2, "-1 is not in the range"),
    (f"{GROW} --factor 2 --snr-db loud", 2, "'loud' is not a valid float"),
    # wrong usage that only the model shows
    (f"{GROW} --set hiden=2", 2, "no dimension 'hiden'; did you mean 'hidden'?"),
    (f"{GROW} --set ff=2", 2, "did you mean 'ffn'?"),
    (
        f"{GROW} --set hidden=960",
        2,
        "hidden=960 asks for 12 times 960, which is 11,520: you may mean --size hidden=960",
    ),
    (f"{GROW} --size layers=4", 2, "layers are no dimension of a tensor: --layers N gives the number of layers"),
    (f"{GROW} --size hiden=24", 2, "no dimension 'hiden'; did you mean 'hidden'?"),
    (f"{GROW} --size hidden=10", 2, "hidden=10 is below the source's 12: sizes only grow"),
    (f"{GROW} --size ffn=24 --set ffn=2", 2, "ffn has a factor (2) and a size (24)"),
    (f"{GROW} --size vocab=31 --factor 1.01", 2, "nothing grows: the factor is so small"),
    (f"{GROW} --set ffn.7=2", 2, "no dimension 'ffn.7'; did you mean 'ffn."),
    (f"{GROW} --set xyzzy=2", 2, "no dimension 'xyzzy'; it has ffn, hidden, vocab (`inspect` lists them)"),
    ("expand small.onnx --factor 2 -o small.onnx", 2, "would overwrite the source"),
    ("expand small.onnx --factor 2 -o folder/../small.onnx", 2, "would overwrite the source"),
    ("expand small.onnx --factor 2 -o no/such/big.onnx", 2, "no/such/big.onnx: its folder no/such does not exist"),
    ("expand small.onnx --factor 2 -o folder", 2, "folder: a folder; name the file to write"),
    (f"{GROW} --factor 2 --plan-out no/such/plan.json", 2, "its folder no/such does not exist"),
    (f"{GROW} --factor 2 --plan-out folder", 2, "folder: a folder"),
    # refused
    (f"{GROW} --set vocab=2", 3, "vocab (size 31) cannot grow: indexed by values (at Gather 'Gather_0')"),
    (f"{GROW} --size vocab=40", 3, "vocab (size 31) cannot grow: indexed by values (at Gather 'Gather_0')"),
    (f"{GROW} --factor 2 --set vocab=3", 3, "To keep its size and grow the rest: --set vocab=1"),
    # bad input
    ("inspect no.onnx", 4, "no.onnx: no such file"),
    ("inspect text.onnx", 4, "text.onnx: not a readable ONNX model"),
    ("inspect folder", 4, "folder: a folder, not a model file"),
    ("inspect .", 4, "a folder, not a model file: name a file in it, such as "),
    ("expand text.onnx --factor 2 -o big.onnx", 4, "text.onnx: not a readable ONNX model"),
    ("validate text.onnx small.onnx", 4, "text.onnx: not a readable ONNX model"),
    ("validate small.onnx text.onnx", 4, "text.onnx: not a readable ONNX model"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), ENDINGS, ids=[case[0] or "none" for case in ENDINGS])
def test_exit_codes_and_errors(cli: Command, place: Path, arguments: str, code: int, text: str) -> None:
    before = {name: (place / name).read_bytes() for name in names_in(place) - {"folder"}}
    outcome = cli(*arguments.split())
    assert outcome.code == code, outcome.stderr
    assert {name: (place / name).read_bytes() for name in names_in(place) - {"folder"}} == before
    assert names_in(place / "folder") == set()
    assert "Traceback" not in outcome.stderr
    if text:
        assert outcome.stdout == ""
        assert outcome.error.lower().startswith("error: ") and text in outcome.error
        # The lines before the error are progress, or the usage text of click.
        for line in outcome.stderr.splitlines()[:-1]:
            assert line in STAGES or line == "" or line.startswith(("Usage: ", "Try "))


def test_expand_ends_with_0(cli: Command, place: Path) -> None:
    outcome = cli(*GROW.split(), "--factor", "2")
    assert outcome.code == 0
    assert outcome.stderr.splitlines() == STAGES
    assert "equal" in outcome.stdout.splitlines()
    assert "parameters: 1,756 -> 5,432 (x3.09)" in outcome.stdout
    advice = list(RECIPE.lines())
    assert outcome.stdout.splitlines()[-len(advice) :] == advice
    assert cli("validate", "small.onnx", "big.onnx").code == 0


def test_a_model_that_differs_is_not_published(cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperclone_onnx.validation.validating.tolerance_of", lambda *_: (0.0, "none at all"))
    monkeypatch.setattr("hyperclone_onnx.validation.noise.MULTIPLE", 0.0)
    outcome = cli(*GROW.split(), "--factor", "2", "--json")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert "big.onnx was not written: the grown model differs from its source: output logits" in outcome.error
    assert "big.onnx" not in names_in(place)
    assert cli(*GROW.split(), "--factor", "2", "--no-validate").code == 0


def a_mistake(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("first line\nsecond line")


def in_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperclone_onnx.expansion.request.make_plan", a_mistake)


def in_a_rule_s_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._edits, ("", "Gather"), a_mistake)


def in_publishing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hyperclone_onnx.publishing.publication._data_of", a_mistake)


@pytest.mark.parametrize("spoil", [in_planning, in_a_rule_s_edit, in_publishing])
def test_a_defect_is_one_line_and_says_how_to_report_it(
    cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None]
) -> None:
    spoil(monkeypatch)
    before = names_in(place)
    outcome = cli(*GROW.split(), "--factor", "2")
    assert (outcome.code, outcome.stdout) == (3, "")
    assert "a defect of hyperclone-onnx (ZeroDivisionError: first line); nothing was written" in outcome.error
    assert "HYPERCLONE_DEBUG=1" in outcome.error and "second line" not in outcome.stderr
    assert names_in(place) == before
    monkeypatch.setenv("HYPERCLONE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli(*GROW.split(), "--factor", "2")
    assert names_in(place) == before


@pytest.mark.parametrize("kind", [AttributeError, AssertionError, IndexError, KeyError, TypeError, ValueError])
def test_a_mistake_in_a_rule_is_our_defect_and_not_the_model_s_fault(
    cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def rule(_op: Any) -> None:
        raise kind("a mistake")

    monkeypatch.setitem(registry._relations, ("", "Gather"), rule)
    for arguments in (["inspect", "small.onnx"], [*GROW.split(), "--factor", "2"]):
        outcome = cli(*arguments)
        assert (outcome.code, outcome.stdout) == (3, "")
        assert f"a defect of hyperclone-onnx ({kind.__name__}: " in outcome.error and "a mistake" in outcome.error
    assert "big.onnx" not in names_in(place)
    monkeypatch.setenv("HYPERCLONE_DEBUG", "1")
    with pytest.raises(kind, match="a mistake"):
        cli("inspect", "small.onnx")


def test_a_rule_may_refuse_and_may_be_unable_to_tell(
    cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(problem: Exception) -> Callable[[Any], None]:
        def rule(_op: Any) -> None:
            raise problem

        return rule

    monkeypatch.setitem(registry._relations, ("", "Relu"), raising(Refused("this form cannot grow")))
    outcome = cli("inspect", "small.onnx")
    assert outcome.code == 3 and "this form cannot grow" in outcome.error and "defect" not in outcome.error
    monkeypatch.setitem(registry._relations, ("", "Relu"), raising(CannotTell("this form is not described")))
    outcome = cli("inspect", "small.onnx")
    assert outcome.code == 0 and "this form is not described" in outcome.stdout


@pytest.fixture
def broken_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the normalising passes raise an error."""

    def broken(model: ir.Model) -> ir.Model:
        raise KeyError("a mistake")

    monkeypatch.setattr(source, "normalise", broken)


@pytest.mark.usefixtures("broken_pass")
def test_a_mistake_in_a_pass_is_our_defect_and_not_the_model_s_fault(
    cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX's own checker accepts the model, wherever its data is."""
    onnx.save(perceptron(), "model.onnx", save_as_external_data=True, location="data", size_threshold=0)
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    outcome = cli("inspect", place / "model.onnx")
    assert outcome.code == 3 and "a defect of hyperclone-onnx (KeyError: 'a mistake')" in outcome.error
    with pytest.raises(KeyError, match="a mistake"):
        source.source_of(place / "model.onnx")


@pytest.mark.usefixtures("broken_pass")
def test_a_pass_that_fails_on_a_malformed_graph_is_the_model_s_fault(
    cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perceptron()
    model.graph.node[1].op_type = "Twist"
    onnx.save(model, "model.onnx")
    outcome = cli("inspect", "model.onnx")
    assert outcome.code == 4 and "model.onnx: a malformed graph (No Op registered for Twist" in outcome.error
    monkeypatch.setattr(checker, "_check", lambda text: os.abort())
    outcome = cli("inspect", "model.onnx")
    assert outcome.code == 4 and "ONNX's own checker breaks down on it: it ended by SIGABRT" in outcome.error


def test_a_defect_after_the_model_is_written_says_that_it_is_there(
    cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperclone_onnx.reports.expansion.print_validation", a_mistake)
    outcome = cli(*GROW.split(), "--factor", "2")
    assert outcome.code == 3 and outcome.error.startswith("error: big.onnx is written and complete, but this model met")
    assert "nothing was written" not in outcome.stderr
    assert cli("inspect", "big.onnx").code == 0


def test_an_error_of_the_system_is_no_defect(cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "some/file")

    monkeypatch.setattr("hyperclone_onnx.expansion.request.make_plan", refuse)
    outcome = cli(*GROW.split(), "--factor", "2")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.error == "error: some/file: the system reports an error (Too many open files)"
    monkeypatch.setenv("HYPERCLONE_DEBUG", "1")
    with pytest.raises(OSError, match="Too many"):
        cli(*GROW.split(), "--factor", "2")


# -- JSON -------------------------------------------------------------------------------------------------

INSPECTION_KEYS = (
    "model parameters nodes opset layers dimensions inputs outputs tensors operators_without_rule sizes "
    "feed_forward_blocks".split()
)
EXPANSION_KEYS = (
    "source output strategy interface grown kept parameters separated quantised validation seconds sizes files".split()
)
VALIDATION_KEYS = (
    "equal problems provider cases outputs tensors tolerance tolerance_reason wide wide_tolerance rounds double "
    "double_by notes mode scope graph".split()
)
OUTPUT_KEYS = "name max_absolute max_relative top1_agreement kl_divergence problem".split()
TENSORS_KEYS = "checked residue worst worst_error wrong".split()


def parse(text: str) -> dict[str, Any]:
    """Strict JSON: NaN and Infinity are errors, although Python reads them."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return data


def assert_validation(data: dict[str, Any]) -> None:
    assert list(data) == VALIDATION_KEYS
    assert [list(output) for output in data["outputs"]] == [OUTPUT_KEYS] * len(data["outputs"])
    assert list(data["tensors"]) == TENSORS_KEYS


def test_inspect_json(cli: Command, place: Path) -> None:
    outcome = cli("inspect", "small.onnx", "--json")
    data = parse(outcome.stdout)
    assert (outcome.code, outcome.stderr) == (0, "")
    assert list(data) == INSPECTION_KEYS
    assert data["inputs"] == {"ids": "batch sequence"} and data["outputs"] == {"logits": "batch sequence 31"}
    assert data["tensors"]["up.0"] == ["hidden ffn.0"]
    dimensions = {entry["name"]: entry for entry in data["dimensions"]}
    assert dimensions["hidden"] == {"name": "hidden", "role": "hidden", "size": 12, "growable": True, "reason": None}
    assert not dimensions["vocab"]["growable"] and "Gather" in dimensions["vocab"]["reason"]


def test_expand_json(cli: Command, place: Path) -> None:
    outcome = cli(*GROW.split(), "--factor", "2", "--set", "ffn.1=3", "--seed", "9", "--json")
    data = parse(outcome.stdout)
    assert outcome.code == 0 and outcome.stderr.splitlines() == STAGES
    assert list(data) == EXPANSION_KEYS
    assert (data["source"], data["output"], data["interface"]) == ("small.onnx", "big.onnx", "grow")
    assert data["strategy"] == {"name": "noisy-diagonal", "snr_db": 10.0, "seed": 9}
    assert data["grown"] == {
        "hidden": {"role": "hidden", "from": 12, "to": 24},
        "ffn.0": {"role": "ffn", "from": 20, "to": 40},
        "ffn.1": {"role": "ffn", "from": 20, "to": 60},
    }
    assert [entry["name"] for entry in data["kept"]] == ["vocab"]
    assert set(data["seconds"]) == {"plan", "write", "validate"}
    assert_validation(data["validation"])
    assert data["validation"]["equal"] is True and data["validation"]["double"] is None
    without = parse(cli(*GROW.split(), "--factor", "2", "--no-validate", "--json").stdout)
    assert without["validation"] is None and set(without["seconds"]) == {"plan", "write"}


@pytest.mark.parametrize(("big", "equal"), [("big.onnx", True), ("corrupt.onnx", False)])
def test_validate_json(cli: Command, place: Path, big: str, equal: bool) -> None:
    cli(*GROW.split(), "--factor", "2")
    outcome = cli("validate", "small.onnx", big, "--json")
    data = parse(outcome.stdout)
    assert (outcome.code, outcome.stderr) == (0 if equal else 1, "")
    assert_validation(data)
    assert data["equal"] is equal and bool(data["problems"]) is not equal


@pytest.mark.parametrize("value", ["inf", "nan"])
def test_json_holds_nothing_but_numbers(cli: Command, place: Path, value: str) -> None:
    outcome = cli(*GROW.split(), "--factor", "2", "--snr-db", value, "--json", "--plan-out", "plan.json")
    if outcome.code == 0:
        parse(outcome.stdout)
        parse((place / "plan.json").read_text())
    else:
        assert outcome.code == 2


# -- the plan ---------------------------------------------------------------------------------------------


def test_the_plan_that_is_written_is_the_plan_of_the_model(cli: Command, place: Path) -> None:
    assert cli(*GROW.split(), "--factor", "2", "--plan-out", "plan.json").code == 0
    plan = Plan.loads((place / "plan.json").read_text())
    stored = [entry.value for entry in onnx.load("big.onnx").metadata_props if '"dims"' in entry.value]
    assert [Plan.loads(text) for text in stored] == [plan]
    assert {name: (dim.map.size, dim.map.grown) for name, dim in plan.dims.items()} == {
        "hidden": (12, 24),
        "ffn.0": (20, 40),
        "ffn.1": (20, 40),
    }
    assert parse((place / "plan.json").read_text()) == parse(plan.dumps())
    assert names_in(place) == {"small.onnx", "corrupt.onnx", "text.onnx", "folder", "big.onnx", "plan.json"}


# -- help -------------------------------------------------------------------------------------------------


def test_the_commands() -> None:
    """Each file of the package defines a command, except those that several commands share."""
    shared = {"__init__", "guard", "main", "options", "pages", "printing", "recipe_options", "sections"}
    files = {path.stem for path in (ROOT / "hyperclone_onnx" / "commands").glob("*.py")}
    assert {name.replace("-", "_") for name in COMMANDS} == files - shared == set(LISTED)


@pytest.mark.parametrize("name", sorted(COMMANDS))
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_mentions_every_option(cli: Command, name: str, flag: str) -> None:
    outcome = cli(name, flag)
    assert (outcome.code, outcome.stderr) == (0, "")
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} says nothing of itself"
            assert all(re.search(rf"(?<![\w-]){re.escape(name)}\b", outcome.stdout) for name in parameter.opts)
        else:
            assert parameter.name is not None and parameter.name.upper() in outcome.stdout


def test_each_option_of_expand_has_a_section(cli: Command) -> None:
    _, *others = cli("expand", "--help").stdout.split("\nOther options:\n")
    assert [line.split()[:2] for line in others] == [["-h,", "--help"]]
    with pytest.raises(ValueError, match="no option --colour"):
        Sectioned("paint", params=[click.Option(["--color"])], sections={"Looks": ["--colour"]})


def test_the_group_s_help_mentions_every_command(cli: Command) -> None:
    outcome = cli("--help")
    assert outcome.code == 0
    assert all(f"\n  {name}" in outcome.stdout for name in COMMANDS)
    assert hyperclone_onnx.__version__ in cli("--version").stdout


# -- arguments of every kind ------------------------------------------------------------------------------

WORDS = st.one_of(
    st.sampled_from(
        "small.onnx text.onnx folder big.onnx inspect expand validate --factor --set --json -o --strategy --snr-db "
        "--validate --plan-only --max-shard-size --workers "
        "--seed --untie --interface --device --no-validate --plan-out --precision 2 3 hidden=2 ffn=1 vocab=2 cpu keep "
        "diagonal float64 -5 1e3 -- = , ffn= =ffn ffn=2=3 ffn=2,hidden=2 hidden= heads=2".split()
    ),
    st.text(st.characters(exclude_categories=["Cs", "Nd", "No"], exclude_characters="\0"), max_size=6),
)


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(command=st.sampled_from(["inspect", "expand", "validate"]), words=st.lists(WORDS, max_size=7))
def test_no_arguments_cause_a_traceback(cli: Command, place: Path, command: str, words: list[str]) -> None:
    source = (place / "small.onnx").read_bytes()
    outcome = cli(command, *words)
    assert outcome.code in (0, 1, 2, 3, 4)
    assert "Traceback" not in outcome.stderr and "defect" not in outcome.stderr
    assert outcome.code in (0, 1) or outcome.stdout == ""
    if "--plan-out" not in words:
        assert (place / "small.onnx").read_bytes() == source
    assert not [name for name in names_in(place) if name.endswith(".partial")]


def test_a_digit_that_is_no_number(cli: Command, place: Path) -> None:
    assert cli(*GROW.split(), "--set", "ffn=²").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        f"{GROW} --factor 1000000000000",
        f"{GROW} --set ffn=99999999999999999999",
    ],
)
def test_a_factor_beyond_all_memory(cli: Command, place: Path, arguments: str) -> None:
    outcome = cli(*arguments.split())
    assert outcome.code in (2, 3) and "defect" not in outcome.error
    assert "big.onnx" not in names_in(place)


def test_noise_beyond_all_numbers(cli: Command, place: Path) -> None:
    outcome = cli(*GROW.split(), "--factor", "2", "--snr-db", "-1000")
    assert outcome.code in (1, 2)
    assert "RuntimeWarning" not in outcome.stderr and "--snr-db" in outcome.error


@pytest.mark.parametrize("name", ["model[final].onnx", "a[/b].onnx"])
def test_names_with_brackets(cli: Command, place: Path, name: str) -> None:
    path = place / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((place / "small.onnx").read_bytes())
    outcome = cli("inspect", name)
    assert outcome.code == 0, outcome.error
    assert outcome.stdout.startswith(f"{name}: ")


# -- processes --------------------------------------------------------------------------------------------


def test_the_shim_and_the_module_are_the_command(cli_process: Command, place: Path) -> None:
    by_module = cli_process("inspect", "small.onnx", "--json")
    shim = [sys.executable, str(ROOT / "cli.py"), "inspect", "small.onnx", "--json"]
    by_shim = subprocess.run(shim, capture_output=True, text=True, timeout=60, check=False)
    assert (by_module.code, by_module.stderr) == (by_shim.returncode, by_shim.stderr) == (0, "")
    assert parse(by_module.stdout) == parse(by_shim.stdout)


def test_a_process_ends_with_the_same_codes(cli_process: Command, place: Path) -> None:
    for arguments, code in (
        ("inspect small.onnx", 0),
        ("validate small.onnx corrupt.onnx", 1),
        (GROW, 2),
        (f"{GROW} --set vocab=2", 3),
        ("inspect text.onnx", 4),
    ):
        outcome = cli_process(*arguments.split())
        assert outcome.code == code
        assert "Traceback" not in outcome.stderr


def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "jax", "onnxruntime", "tensorflow", "transformers")
    code = (
        f"import sys, hyperclone_onnx, hyperclone_onnx.commands.main; print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_public_names() -> None:
    """To add or remove a name is a decision: this list changes with it."""
    assert (
        sorted(hyperclone_onnx.__all__)
        == (
            "Absorption Analysis BadModel BadRequest CannotWrite Expansion Experts FolderExpansion GrownTensor "
            "HandedOver HypercloneError ModelsDiffer Plan Recipe Refused Shrinkage SourceMap Strategy Validation "
            "absorb analyse expand expand_folder hand_over plan_expansion rewrite shrink validate validate_files"
        ).split()
    )
    assert all(hasattr(hyperclone_onnx, name) for name in hyperclone_onnx.__all__)


posix = pytest.mark.skipif(os.name == "nt", reason="pipes and signals are POSIX's")


@posix
@pytest.mark.parametrize(
    "arguments",
    [
        "inspect small.onnx --json",
        "inspect small.onnx",
        "validate small.onnx small.onnx",
        f"{GROW} --factor 2",
    ],
)
def test_a_reader_that_leaves(place: Path, arguments: str) -> None:
    """The reader of a pipe ends early: `| head -1`, and a reader that ends before the first line."""
    with subprocess.Popen(
        command_line(*arguments.split()), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 0
    assert set(errors.splitlines()) <= set(STAGES)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout(place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command_line(*GROW.split(), "--factor", "2"),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode != 0
    assert "defect" not in done.stderr
    assert "nothing was written" not in done.stderr or "big.onnx" not in names_in(place)


# -- signals ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `inline.onnx` and `split.onnx`, large enough that growth by 4 takes seconds."""
    folder = tmp_path_factory.mktemp("large")
    model = perceptron(hidden=512, ffn=1024, vocab=40, layers=3)
    onnx.save(model, folder / "inline.onnx")
    onnx.save(model, folder / "split.onnx", save_as_external_data=True, location="split.onnx.data")
    yield folder
    for name in names_in(folder):
        (folder / name).unlink()


ATTEMPTS = 3
"""How often a signal may come too late."""


def stop(
    folder: Path, arguments: list[str], stage: str, number: signal.Signals, wait: Callable[[], bool], **actions: str
) -> str | None:
    """Send a signal once the stage has begun and `wait` is over; returns stderr's last line.

    The command starts with the default actions of signals, or with other `actions`. On a busy machine it may end before
    the signal reaches it; then the result is None.
    """
    command = with_signals(command_line(*arguments), **actions)
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stderr:
            if line.startswith(stage):
                break
        deadline = time.monotonic() + 20
        while not wait() and time.monotonic() < deadline:
            time.sleep(0.005)
        for name, action in actions.items():
            if action == "SIG_IGN":
                process.send_signal(signal.Signals[name])
        process.send_signal(number)
        rest, output = process.stderr.read(), process.stdout.read()
        process.wait(timeout=60)
    if process.returncode == 0:
        return None
    assert process.returncode == 130, rest
    assert "Traceback" not in rest and output == ""
    return rest.strip().splitlines()[-1]


def written_in(folder: Path, source: str, stage: str) -> Callable[[], bool]:
    """Whether anything is written so far, in the stage of writing."""

    def written() -> bool:
        parts = [file for part in folder.glob(".big.onnx.*") for file in part.iterdir() if file.stat().st_size]
        return stage != "writing" or source != "split.onnx" or bool(parts)

    return written


def assert_stops(folder: Path, source: str, stage: str, number: signal.Signals, **actions: str) -> None:
    """The command ends with one line, and leaves everything as it was before."""
    (folder / "big.onnx").write_text("what was there before")
    before = names_in(folder)
    arguments = ["expand", source, "--factor", "4", "-o", "big.onnx"]
    for _ in range(ATTEMPTS):
        last = stop(folder, arguments, stage, number, written_in(folder, source, stage), **actions)
        if last is not None:
            break
        for name in names_in(folder) - before:
            (folder / name).unlink()
        (folder / "big.onnx").write_text("what was there before")
    assert last == "error: interrupted; nothing was written"
    assert names_in(folder) == before
    assert (folder / "big.onnx").read_text() == "what was there before"
    (folder / "big.onnx").unlink()


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("source", ["inline.onnx", "split.onnx"])
@pytest.mark.parametrize("stage", ["reading", "writing", "validating"])
def test_a_signal_leaves_nothing(large: Path, source: str, stage: str, number: signal.Signals) -> None:
    assert_stops(large, source, stage, number)


@posix
@pytest.mark.parametrize("stage", ["reading", "writing", "validating"])
def test_a_command_in_the_background_still_ends_on_sigterm(large: Path, stage: str) -> None:
    """A command that starts with SIGINT or SIGHUP ignored (background jobs, `nohup`) ignores these signals."""
    assert_stops(large, "split.onnx", stage, signal.SIGTERM, SIGINT="SIG_IGN", SIGHUP="SIG_IGN")


@pytest.mark.parametrize("moment", ["model", "temporary folder"])
def test_an_interruption_while_publishing(
    cli: Command, place: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A signal either comes too late, and OUT stays, or in time, and nothing is written. The error says which."""
    from hyperclone_onnx.publishing import locked_folder

    def then_interrupt(function: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if after:
                function(*arguments, **options)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            return None if after else function(*arguments, **options)

        return run

    if moment == "model":
        monkeypatch.setattr(os, "replace", then_interrupt(os.replace, after=True))
    else:
        monkeypatch.setattr(locked_folder, "clear", then_interrupt(locked_folder.clear, after=False))
    before = names_in(place)
    outcome = cli(*GROW.split(), "--factor", "2")
    left = names_in(place) - before
    assert left == ({"big.onnx"} if outcome.code == 0 else set()), left


@pytest.mark.parametrize("suffix", ["onnx", "ONNX", "pb", "model"])
def test_names_do_not_matter(cli: Command, place: Path, suffix: str) -> None:
    (place / f"in put.{suffix}").write_bytes((place / "small.onnx").read_bytes())
    assert cli("expand", f"in put.{suffix}", "--factor", "2", "-o", f"out püt.{suffix}").code == 0
    assert cli("validate", "small.onnx", f"out püt.{suffix}").code == 0


def test_untie_and_keep_are_passed_on(cli: Command, place: Path) -> None:
    """Options that the table of errors does not cover have their documented effect."""
    hidden = onnx.load("small.onnx")
    hidden.graph.output.append(onnx.helper.make_tensor_value_info("last", onnx.TensorProto.FLOAT, ["b", "s", 12]))
    onnx.save(hidden, "hidden.onnx")
    for interface, width in (("grow", 24), ("keep", 12)):
        arguments = ("expand", "hidden.onnx", "--factor", "2", "-o", "big.onnx", "--interface", interface, "--json")
        data = parse(cli(*arguments).stdout)
        assert data["interface"] == interface
        output = next(value for value in onnx.load("big.onnx").graph.output if value.name == "last")
        assert output.type.tensor_type.shape.dim[2].dim_value == width
    outcome = cli("expand", "small.onnx", "--factor", "2", "-o", "a.onnx", "--strategy", "symmetric", "--json")
    assert parse(outcome.stdout)["strategy"]["name"] == "symmetric"
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load("a.onnx").graph.initializer}
    assert np.array_equal(weights["up.0"][:12], weights["up.0"][12:])
