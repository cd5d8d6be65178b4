"""Grown folders in the runtimes that people use them with: optimum's ORTModel classes, and ONNX Runtime GenAI.

`make models-check` makes both environments and runs these tests. Two scripts in models/ write the folders and run the
models in them, each in the environment that it needs. The weights are random.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import ROOT, command_line

pytestmark = pytest.mark.models

OPTIMUM = Path(f"{sys.prefix}-optimum") / "bin" / "python"
"""The interpreter of the environment of optimum, beside the environment of the tests: see the Makefile."""

WIDER = ("--factor", "2")
DEEPER = ("--factor", "2", "--layers", "3")
BOTH_DEEPER = ("--factor", "2", "--layers", "encoder=3,decoder=3", "--exclude", "decoder_model_merged.onnx")

OPTIMUM_GROWTHS: dict[str, tuple[str, Sequence[str]]] = {
    "llama": ("llama", WIDER),
    "llama-deeper": ("llama", DEEPER),
    "gpt2": ("gpt2", WIDER),
    "t5": ("t5", WIDER),
    "t5-deeper": ("t5", BOTH_DEEPER),
    "bart": ("bart", WIDER),
    "bert": ("bert", WIDER),
}
"""For each grown folder the family of its source, and how it is grown. BERT's output are hidden states."""

GENAI_GROWTHS: dict[str, tuple[str, Sequence[str]]] = {"llama": ("llama", WIDER), "llama-deeper": ("llama", DEEPER)}

Results = dict[str, Any]
"""What the model of each folder computes, by the name of the folder."""


def run_script(python: Path | str, *arguments: str | Path) -> str:
    """What a script of models/ prints."""
    done = subprocess.run([str(python), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def grow_all(folder: Path, growths: dict[str, tuple[str, Sequence[str]]]) -> None:
    """Grow the folders `FAMILY.0` into `NAME.big`. In a copy, `NAME.spoiled`, one weight is wrong."""
    for name, (family, words) in growths.items():
        big, spoiled = folder / f"{name}.big", folder / f"{name}.spoiled"
        command = command_line("expand", folder / f"{family}.0", *words, "-o", big, "--device", "cpu")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        shutil.copytree(big, spoiled)
        for file in spoiled.glob("*.onnx"):
            spoil(file)


def spoil(file: Path) -> None:
    """Double the first half of the largest matrix, as if its clones did not share it."""
    model = onnx.load(file)
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data) if len(tensor.dims) == 2 else 0)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[: len(values) // 2] *= 2
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, file)


def results(python: Path | str, script: str, folder: Path) -> Results:
    """Run the model of every folder in a folder."""
    text = run_script(python, script, "run", *sorted(folder.iterdir()))
    return {Path(name).name: result for name, result in json.loads(text.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What optimum computes with its own folders and with grown ones."""
    assert OPTIMUM.exists(), f"{OPTIMUM}: no environment of optimum there; run make models-check, which makes it"
    folder = tmp_path_factory.mktemp("optimum")
    families = ",".join(dict.fromkeys(family for family, _ in OPTIMUM_GROWTHS.values()))
    run_script(OPTIMUM, "models/optimum_runs.py", "export", folder, families)
    grow_all(folder, OPTIMUM_GROWTHS)
    return results(OPTIMUM, "models/optimum_runs.py", folder)


@pytest.fixture(scope="module")
def genai(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What ONNX Runtime GenAI generates with the folders of its own builder and with grown ones."""
    folder = tmp_path_factory.mktemp("genai")
    run_script(sys.executable, "models/genai_runs.py", "export", folder)
    grow_all(folder, GENAI_GROWTHS)
    return results(sys.executable, "models/genai_runs.py", folder)


@pytest.mark.parametrize("name", [name for name in OPTIMUM_GROWTHS if name != "bert"])
def test_optimum_generates_the_same_tokens(name: str, optimum: Results) -> None:
    source = f"{OPTIMUM_GROWTHS[name][0]}.0"
    print(f"\n{name}: {optimum[source][0]}")
    assert optimum[f"{name}.big"] == optimum[source]


@pytest.mark.parametrize("name", [name for name in OPTIMUM_GROWTHS if name != "bert"])
def test_other_weights_give_other_tokens(name: str, optimum: Results) -> None:
    family = OPTIMUM_GROWTHS[name][0]
    assert optimum[f"{family}.1"] != optimum[f"{family}.0"]
    assert optimum[f"{name}.spoiled"] != optimum[f"{family}.0"]


def relative_error(want: Any, got: Any) -> float:
    return float(np.abs(np.subtract(want, got)).max() / np.abs(want).max())


def test_the_hidden_states_of_an_encoder_are_repeated(optimum: Results) -> None:
    want = np.tile(optimum["bert.0"], 2)
    print(
        f"\nbert: hidden states of the shape {want.shape}, relative error {relative_error(want, optimum['bert.big'])}"
    )
    assert relative_error(want, optimum["bert.big"]) <= 1e-5
    assert relative_error(want, optimum["bert.spoiled"]) > 1e-3
    assert relative_error(want, np.tile(optimum["bert.1"], 2)) > 1e-3


@pytest.mark.parametrize("name", GENAI_GROWTHS)
def test_onnx_runtime_genai_generates_the_same_tokens(name: str, genai: Results) -> None:
    print(f"\n{name}: {genai['llama.0']}")
    assert genai[f"{name}.big"] == genai["llama.0"]
    assert genai["llama.1"] != genai["llama.0"]
    assert genai[f"{name}.spoiled"] != genai["llama.0"]
