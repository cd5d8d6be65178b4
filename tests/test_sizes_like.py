"""`--like TARGET`: sizes from a configuration or from another ONNX file, and what is said of the rest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, names_in

from hyperclone_onnx import BadModel, BadRequest, HypercloneError, Refused, expand, plan_expansion
from hyperclone_onnx.analysis.analysing import Analysis, analyse
from hyperclone_onnx.expansion.expanding import plan_file

Zoo = Callable[[str], Path]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 84,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "vocab_size": 101,
    "hidden_act": "silu",
}
GPT2 = {"model_type": "gpt2", "n_embd": 96, "n_inner": 84, "n_head": 12, "n_layer": 2, "vocab_size": 101}


@pytest.fixture(scope="module")
def llama(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    """A grouped Llama in a folder without a configuration."""
    folder = tmp_path_factory.mktemp("alone") / "inner"
    folder.mkdir()
    return analyse(shutil.copy(zoo("llama.distinct"), folder / "model.onnx"))


def write(folder: Path, config: object) -> Path:
    """A folder with a configuration."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_folder_and_its_configuration_are_the_same_target(llama: Analysis, tmp_path: Path) -> None:
    folder = write(tmp_path / "target", LLAMA)
    plan = plan_expansion(llama, like=folder)
    assert plan.dims == plan_expansion(llama, like=folder / "config.json").dims
    assert plan.dims == plan_expansion(llama, sizes={"hidden": 96, "ffn": 84, "heads": 9, "kv_heads": 3}).dims


def test_synonyms_of_other_families(zoo: Zoo, tmp_path: Path) -> None:
    plan = plan_expansion(analyse(zoo("gpt2.distinct")), like=write(tmp_path / "t", GPT2))
    grown = {(dim.role, dim.map.size, dim.map.grown) for dim in plan.dims.values()}
    assert grown == {("hidden", 48, 96), ("ffn", 56, 84), ("heads", 6, 12)}


def test_an_onnx_file_is_a_target(llama: Analysis, zoo: Zoo) -> None:
    plan = plan_expansion(llama, like=zoo("llama.collide"))
    assert {(dim.role, dim.map.grown) for dim in plan.dims.values()} == {
        ("hidden", 96),
        ("ffn", 96),
        ("group", 4),
        ("head_dim", 6),
        ("head_dim", 12),
    }


def test_a_size_of_the_request_replaces_that_of_the_target(llama: Analysis, tmp_path: Path) -> None:
    plan = plan_expansion(llama, like=write(tmp_path / "t", LLAMA), sizes={"ffn": 60})
    assert plan.dims["ffn.0"].map.grown == 60


def test_source_target_and_result_stand_side_by_side(llama: Analysis, tmp_path: Path, cli: Command) -> None:
    target = write(tmp_path / "t", {**LLAMA, "vocab_size": 200, "tie_word_embeddings": True})
    outcome = cli("expand", llama.path, "--like", target, "--plan-only")
    assert outcome.code == 0, outcome.stderr
    rows = [line.split() for line in outcome.stdout.splitlines()]
    for row in (
        "hidden 48 96 96",
        "ffn 56 84 84",
        "heads 6 9 9",
        "kv_heads 2 3 3",
        "layers 2 4 4",
        "head_dim 8 8 8",
        "vocab 101 200 101",
    ):
        assert row.split() in rows
    said = [line for line in outcome.stdout.splitlines() if line.startswith("not like ")]
    assert any("vocabulary: 200 in the target; it keeps its size (101)" in line for line in said)
    assert any("hidden_act" in line and "tie_word_embeddings true" in line for line in said)
    data = json.loads(cli("expand", llama.path, "--like", target, "--plan-only", "--json").stdout)
    assert {"role": "heads", "source": 6, "target": 9, "result": 9} in data["compared"]


def test_settings_that_differ_are_listed(zoo: Zoo, tmp_path: Path) -> None:
    source = write(tmp_path / "source", {**LLAMA, "hidden_size": 48, "hidden_act": "gelu", "use_cache": True})
    model = shutil.copy(zoo("llama.distinct"), source / "model.onnx")
    report = plan_file(model, like=write(tmp_path / "t", LLAMA))
    assert report.likeness is not None
    assert report.likeness.layers == (2, 4)
    texts = [text for text in report.likeness.differences if not text.startswith("layers")]
    assert texts == ['hidden_act: "silu" in the target, "gelu" in the source, which stays']


# (what is wrong, the configuration of the target, the error, a part of its text)
WRONG: list[tuple[str, Any, type[HypercloneError], str]] = [
    ("not so deep", {**LLAMA, "num_hidden_layers": 1}, BadRequest, "layers=1 is below the source's 2"),
    ("smaller", {**LLAMA, "intermediate_size": 40}, BadRequest, "ffn=40 is below the source's 56: sizes only grow"),
    ("no groups", {**LLAMA, "num_key_value_heads": 9}, BadRequest, "group would be 1, below the source's 3"),
    ("heads", {**LLAMA, "num_attention_heads": 10}, BadRequest, "heads=10 is not a multiple of kv_heads=3"),
    ("a text", {**LLAMA, "hidden_size": "96"}, BadModel, 'hidden_size is "96", and no size'),
    ("a list", {**LLAMA, "intermediate_size": [84, 90]}, BadRequest, "intermediate_size is a list"),
    ("two sizes", {**LLAMA, "encoder_ffn_dim": 90}, BadRequest, "intermediate_size=84, encoder_ffn_dim=90 differ"),
    ("no sizes", {"model_type": "llama"}, BadModel, "no size of a model: none of the fields hidden_size, n_embd"),
    ("an array", [], BadModel, "it is not an object of JSON"),
]


@pytest.mark.parametrize(("config", "error", "text"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_targets_that_are_refused(
    llama: Analysis, tmp_path: Path, config: object, error: type[HypercloneError], text: str
) -> None:
    with pytest.raises(error, match=re.escape(text)):
        plan_file(llama.path, like=write(tmp_path / "t", config))


def test_targets_that_cannot_be_read(llama: Analysis, tmp_path: Path, cli: Command) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("{")
    for name, text in (
        ("empty", "no config.json in this folder"),
        ("text.json", "not a JSON file"),
        ("no.json", "cannot"),
    ):
        outcome = cli("expand", llama.path, "--like", tmp_path / name, "-o", tmp_path / "big.onnx")
        assert outcome.code == 4
        assert text in outcome.stderr
    assert names_in(tmp_path) == {"empty", "text.json"}
    assert cli("expand", llama.path, "--like", tmp_path, "--factor", "2", "-o", tmp_path / "b.onnx").code == 2


def test_targets_of_another_family(llama: Analysis, zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"is a model of another family: it has no group, which the source has"):
        plan_expansion(llama, like=zoo("gpt2.distinct"))
    with pytest.raises(Refused, match=r"9 query heads and 3 key/value heads, and the heads of the source are not in"):
        plan_expansion(analyse(zoo("llama_mha.distinct")), like=write(tmp_path / "t", LLAMA))
    source = write(tmp_path / "source", GPT2)
    model = analyse(shutil.copy(zoo("gpt2.distinct"), source / "model.onnx"))
    with pytest.raises(Refused, match=r"is a model of the type 'llama', and .* says that the source is 'gpt2'"):
        plan_expansion(model, like=write(tmp_path / "t", LLAMA))


def test_a_model_becomes_its_target(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    """Wider and deeper at once, and equal to its source."""
    target = write(tmp_path / "t", {**LLAMA, "vocab_size": 101})
    out = tmp_path / "big.onnx"
    report = expand(zoo("llama.distinct"), out, like=target, device="cpu")
    assert report.validation is not None
    assert report.validation.equal
    rows = {row.role: (row.target, row.result) for row in report.compared}
    assert len(rows) == 7
    assert all(wanted == result for wanted, result in rows.values())


def test_layers_of_a_recipe(zoo: Zoo, tmp_path: Path, cli: Command) -> None:
    file = tmp_path / "grow.yaml"
    file.write_text("layers: 3\nlayers_at: end\nsize: {ffn: 60}\n", encoding="utf-8")
    written = tmp_path / "written.yaml"
    outcome = cli("expand", zoo("llama.distinct"), "--recipe", file, "--plan-only", "--write-recipe", written)
    assert outcome.code == 0, outcome.stderr
    assert "layers 2 -> 3" in outcome.stdout
    assert written.read_text(encoding="utf-8").splitlines()[1:] == ["size:", "  ffn: 60", "layers: 3", "layers_at: end"]
    file.write_text("layers: none\n", encoding="utf-8")
    assert "line 1: layers is a number of layers" in cli("expand", "m.onnx", "--recipe", file, "--plan-only").stderr
