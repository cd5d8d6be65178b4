"""The command line's contract: exit codes, one clear line for each error, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import hyperclone_onnx
from hyperclone_onnx import Plan, storage
from tests.conftest import ROOT, build_model, command_line, names_in, normal, perceptron

PUBLIC = """
Analysis BadModel
BadRequest CannotWrite Expansion GrownTensor HypercloneError ModelsDiffer Plan Recipe Refused SourceMap
Strategy Validation analyse expand plan_expansion rewrite validate_files
""".split()


def test_public_names() -> None:
    assert sorted(hyperclone_onnx.__all__) == sorted(PUBLIC)


def test_importing_is_light() -> None:
    code = "import sys, hyperclone_onnx; print([m for m in ('torch', 'jax', 'onnxruntime') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_expand_then_validate(cli: Any, small: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "big.onnx", tmp_path / "plan.json"
    done = cli("expand", small, "--factor", "2", "-o", out, "--plan-out", plan, "--json")
    assert done.code == 0 and "validating" in done.stderr
    result = json.loads(done.stdout)
    assert result["validation"]["equal"] and result["grown"]["hidden"]["to"] == 24
    assert {"source", "output", "strategy", "interface", "kept", "parameters", "seconds"} <= result.keys()
    assert Plan.loads(plan.read_text()).dims["hidden"].map.tile == 2
    assert names_in(tmp_path) == {"big.onnx", "plan.json"}
    checked = cli("validate", small, out)
    assert checked.code == 0 and "tolerance" in checked.stdout and checked.stdout.endswith("equal\n")
    again = tmp_path / "again.onnx"
    assert cli("expand", small, "--factor", "2", "-o", again).code == 0
    assert again.read_bytes() == out.read_bytes()


def test_inspect_writes_axes_as_einops_does(cli: Any, zoo: Callable[[str], Path]) -> None:
    text = cli("inspect", zoo("gpt_neox.distinct")).stdout
    assert "attention.query_key_value.bias x2: (heads (" in text
    data = json.loads(cli("inspect", zoo("gpt_neox.distinct"), "--json").stdout)
    assert {
        "model",
        "parameters",
        "dimensions",
        "inputs",
        "outputs",
        "tensors",
        "operators_without_rule",
    } <= data.keys()


USAGE: dict[str, tuple[list[str], int, str]] = {
    "nothing asked": ([], 2, "say how much to grow"),
    "factor 0": (["--factor", "0"], 2, "--factor"),
    "no number": (["--set", "ffn=two"], 2, "write ROLE=N"),
    "misspelt role": (["--set", "hiden=2"], 2, "did you mean 'hidden'"),
    "unknown strategy": (["--factor", "2", "--strategy", "best"], 2, "--strategy"),
    "a vocabulary": (["--set", "vocab=2"], 3, "indexed by values (at Gather"),
    "cuda without a gpu": (["--factor", "2", "--device", "cuda"], 2, "hyperclone-onnx[cuda]"),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_requests(case: str, cli: Any, small: Path, tmp_path: Path) -> None:
    arguments, code, text = USAGE[case]
    done = cli("expand", small, "-o", tmp_path / "big.onnx", *arguments)
    assert (done.code, done.stdout, names_in(tmp_path)) == (code, "", set())
    assert text in done.stderr and "Traceback" not in done.stderr


def test_outputs_that_cannot_be(cli: Any, small: Path, tmp_path: Path) -> None:
    before = small.read_bytes()
    for out, text in (
        (small, "overwrite the source"),
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "big.onnx", "does not exist"),
    ):
        done = cli("expand", small, "--factor", "2", "-o", out)
        assert done.code == 2 and text in done.error
    assert small.read_bytes() == before and names_in(tmp_path) == set()


def external(folder: Path) -> Path:
    """A model whose weights lie in a file of their own."""
    path = folder / "source.onnx"
    onnx.save(perceptron(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def relocated(folder: Path, location: str) -> Path:
    path = external(folder)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    return path


def written(folder: Path, data: bytes) -> Path:
    path = folder / "source.onnx"
    path.write_bytes(data)
    return path


def short_data(folder: Path) -> Path:
    path = external(folder)
    os.truncate(folder / "weights.bin", 100)
    return path


def too_few_bytes(folder: Path) -> Path:
    model = perceptron()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    return written(folder, model.SerializeToString())


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.onnx", "no such file"),
    "a folder": (lambda folder: folder, "a folder"),
    "text": (lambda folder: written(folder, b"not a model, but a sentence\n" * 9), "not a readable ONNX model"),
    "empty": (lambda folder: written(folder, b""), "no graph"),
    "noise": (lambda folder: written(folder, np.random.default_rng(0).bytes(5000)), "source.onnx"),
    "truncated": (lambda folder: written(folder, perceptron().SerializeToString()[:-700]), "truncated"),
    "no data file": (lambda folder: relocated(folder, "gone.bin"), "gone.bin"),
    "data climbs out": (lambda folder: relocated(folder, "../weights.bin"), "source.onnx"),
    "data is absolute": (lambda folder: relocated(folder, "/etc/hostname"), "source.onnx"),
    "short data": (short_data, "too short"),
    "too few bytes": (too_few_bytes, "fewer bytes"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case: str, cli: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    make, text = BAD_FILES[case]
    done = cli("expand", make(tmp_path / "in"), "--factor", "2", "-o", tmp_path / "out" / "big.onnx")
    assert done.code == 4 and text in done.error and "Traceback" not in done.stderr
    assert names_in(tmp_path / "out") == set()


def test_external_data_comes_and_goes(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    source, out = external(tmp_path / "in"), tmp_path / "out" / "big.onnx"
    assert cli("expand", source, "--factor", "2", "-o", out).code == 0
    assert names_in(tmp_path / "out") == {"big.onnx", "big.onnx.data"}
    locations = {
        entry.value
        for tensor in onnx.load(out, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert locations == {"big.onnx.data"}
    assert cli("validate", source, out).code == 0


def test_many_weights_get_a_data_file(cli: Any, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "INLINE_LIMIT", 1000)
    assert cli("expand", small, "--factor", "2", "-o", tmp_path / "big.onnx").code == 0
    assert names_in(tmp_path) == {"big.onnx", "big.onnx.data"}


def test_a_failing_run_leaves_an_old_output_alone(cli: Any, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "big.onnx"
    out.write_text("old")
    assert cli("expand", small, "--set", "vocab=2", "-o", out).code == 3
    assert out.read_text() == "old"
    assert cli("expand", small, "--factor", "2", "-o", out).code == 0
    assert onnx.load(out).graph.node and names_in(tmp_path) == {"big.onnx"}


# -- refusals ---------------------------------------------------------------------------------------------

REFUSED = {
    "an operator without a rule": ("tiles = Reshape (h, square)\nd = Det (tiles)\nm = Unsqueeze (d, last)", "Det"),
    "softmax over hidden": ("m = Softmax (h)", "Softmax"),
    "a running sum": ("m = CumSum (h, last)", "CumSum"),
    "factors that do not fit": (
        "one = Reshape (h, four)\ntwo = Reshape (h, square)\n"
        "a = Reshape (one, whole)\nb = Reshape (two, whole)\nm = Add (a, b)",
        "Reshape",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_pins_hidden_is_named(case: str, cli: Any, tmp_path: Path) -> None:
    lines, op_type = REFUSED[case]
    weights: dict[str, Any] = normal(0, {"embedding": (31, 36), "gain": (36,), "up": (36, 20), "down": (20, 36)})
    weights |= {"last": np.array(2), "square": np.array([0, 0, 6, 6]), "four": np.array([0, 0, 4, 9])}
    weights |= {"whole": np.array([0, 0, 36])}
    body = f"""g (int64[batch, sequence] ids) => (float[batch, sequence, 36] y) {{
        h = Gather (embedding, ids)
        {lines}
        n = LayerNormalization (h, gain)
        u = MatMul (n, up)
        w = MatMul (u, down)
        y = Add (w, m)
    }}"""
    path = tmp_path / "model.onnx"
    onnx.save(build_model(body, {name: np.asarray(array) for name, array in weights.items()}), path)
    done = cli("expand", path, "--factor", "2", "-o", tmp_path / "big.onnx")
    assert done.code == 3 and op_type in done.error and "hidden" in done.error and "--set" in done.error
    assert names_in(tmp_path) == {"model.onnx"}


# -- processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = tmp_path / "source.onnx"
    onnx.save(perceptron(hidden=768, ffn=3072, layers=4), source)
    arguments = command_line("expand", source, "--factor", "3", "-o", tmp_path / "out" / "big.onnx")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("writing"):
                break
        time.sleep(0.2)
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == 130 and "interrupted" in rest and "Traceback" not in rest
    assert names_in(tmp_path / "out") == set()


@pytest.mark.parametrize("start", [["cli.py"], ["-m", "hyperclone_onnx"]])
def test_the_other_ways_to_start_it(start: list[str]) -> None:
    done = subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in ("inspect", "expand", "validate"))


def test_a_closed_pipe_is_no_error(zoo: Callable[[str], Path]) -> None:
    command = " ".join(command_line("inspect", zoo("gpt2.distinct")))
    done = subprocess.run(["bash", "-c", f"{command} | head -n 1"], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
