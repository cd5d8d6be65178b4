"""Real pretrained models, grown from the command line: `make models-check`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a small village,",
    "Water boils at a temperature of",
    "The three most important things in life are",
)

# The kernel's own mark of this process: what a child inherits of its parent's is not counted.
MEASURED = """
import atexit, pathlib, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(status.read_text().partition("VmHWM:")[2].split()[0], file=sys.stderr))
from hyperclone_onnx.cli import main
main()
"""

pytestmark = pytest.mark.models


def build(name: str) -> Path:
    """The model's file, built when it is not there yet."""
    folder = ROOT / "out" / name
    if not (folder / "model.onnx").exists():
        subprocess.run([sys.executable, "models/build.py", name, "-o", str(folder)], cwd=ROOT, check=True)
    return folder / "model.onnx"


def grow(model: Path, output: Path, factor: int) -> None:
    """Run `expand`; print what it took."""
    command = [
        sys.executable,
        "-c",
        MEASURED,
        "expand",
        str(model),
        "--json",
        "--factor",
        str(factor),
        "-o",
        str(output),
    ]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    peak = int(done.stderr.split()[-1]) / 1e6
    error = max(each["max_relative"] for each in result["validation"]["outputs"])
    size = sum(file.stat().st_size for file in output.parent.glob(output.name + "*")) / 1e9
    print(
        f"\n{model.parent.name} x{factor}: {seconds:.1f} s {result['seconds']}, peak resident memory {peak:.2f} GB, "
        f"{size:.2f} GB written, relative error {error:.1e}"
    )
    assert error <= 1e-5


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(model: ort.InferenceSession, ids: list[int]) -> np.ndarray:
    tokens = np.array([ids], dtype=np.int64)
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    names = {each.name for each in model.get_inputs()}
    return np.asarray(model.run(None, {name: array for name, array in feeds.items() if name in names})[0])


def continuation(model: ort.InferenceSession, ids: list[int], steps: int) -> list[int]:
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(run(model, ids)[0, -1].argmax()))
    return ids


def relative_error(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.abs(want - got).max() / np.abs(want).max())


def test_smollm2_continues_five_prompts_alike(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model, big = build("smollm2-135m"), tmp_path / "big.onnx"
    grow(model, big, 2)
    tokenizer = Tokenizer.from_file(str(model.with_name("tokenizer.json")))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    source = session(model)
    expected = [continuation(source, ids, 32) for ids in prompts]
    logits = [run(source, ids) for ids in expected]
    del source
    grown = session(big)
    for ids, want, reference in zip(prompts, expected, logits, strict=True):
        print(repr(tokenizer.decode(want)))
        assert relative_error(reference, run(grown, want)) <= 1e-5
        assert continuation(grown, ids, 32) == want


@pytest.mark.parametrize("factor", [2, 3])
def test_minilm(tmp_path: Path, factor: int) -> None:
    model, big = build("all-minilm-l6-v2"), tmp_path / "big.onnx"
    grow(model, big, factor)
    rng = np.random.default_rng(0)
    source, grown = session(model), session(big)
    for length in (3, 17, 128):
        ids = rng.integers(1000, 20000, length).tolist()
        want = np.tile(run(source, ids), factor)
        assert relative_error(want, run(grown, ids)) <= 1e-5
