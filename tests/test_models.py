"""Real pretrained models are grown with the command: `make models-check`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from hyperclone_onnx.validation.unrounded import unrounded
from hyperclone_onnx.validation.wide import save_wide
from models import dialects
from models.build import PROMPTS, SOURCES

ROOT = Path(__file__).resolve().parent.parent

# The kernel's own peak of this process. It does not contain the memory that a child inherits from its parent.
MEASURED = """
import atexit, pathlib, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(status.read_text().partition("VmHWM:")[2].split()[0], file=sys.stderr))
from hyperclone_onnx.commands.main import main
main()
"""

pytestmark = pytest.mark.models


def build(name: str) -> Path:
    """The file of the model. It is built if it does not exist."""
    folder = ROOT / "out" / name
    if not (folder / "model.onnx").exists():
        subprocess.run([sys.executable, "models/build.py", name, "-o", str(folder)], cwd=ROOT, check=True)
    return folder / "model.onnx"


@dataclass
class Grown:
    """The time and memory that growth took, and the report of `expand`."""

    result: dict[str, Any]
    seconds: float
    peak: float  # gigabytes

    @property
    def error(self) -> float:
        """The largest relative error in the validation."""
        validation = self.result["validation"]
        return 0.0 if validation is None else max(output["max_relative"] for output in validation["outputs"])


def grow(model: Path, output: Path, factor: int, *options: str) -> Grown:
    """Run `expand`, and print its time and memory."""
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
        *options,
    ]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    grown = Grown(json.loads(done.stdout), seconds, int(done.stderr.split()[-1]) / 1e6)
    print(
        f"\n{model.parent.name} x{factor}: {seconds:.1f} s {grown.result['seconds']}, "
        f"peak resident memory {grown.peak:.2f} GB, {size(output):.2f} GB written, relative error {grown.error:.1e}"
    )
    return grown


def size(model: Path) -> float:
    """The size of a model on disk, in gigabytes."""
    return sum(file.stat().st_size for file in model.parent.glob(model.name + "*")) / 1e9


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(model: ort.InferenceSession, ids: list[int]) -> np.ndarray:
    """The first output for one row of tokens, without a past."""
    tokens = np.array([ids], dtype=np.int64)
    feeds = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "token_type_ids": np.zeros_like(tokens),
        "position_ids": np.arange(len(ids))[None],
    }
    inputs = {
        declared.name: feeds[declared.name] if declared.name in feeds else empty_cache(declared)
        for declared in model.get_inputs()
    }
    return np.asarray(model.run([model.get_outputs()[0].name], inputs)[0])


def empty_cache(cache: ort.NodeArg) -> np.ndarray:
    """Keys or values of no tokens: (batch, heads, tokens, head_dim), where unknown sizes are 1 and 0."""
    _, heads, _, head_dim = cache.shape
    assert isinstance(heads, int), cache.name
    head_dim = head_dim if isinstance(head_dim, int) else 64  # SmolLM2's value; onnxruntime-genai does not give it
    return np.zeros((1, heads, 0, head_dim), np.float16 if cache.type == "tensor(float16)" else np.float32)


def continuation(model: ort.InferenceSession, ids: list[int], steps: int) -> list[int]:
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(run(model, ids)[0, -1].argmax()))
    return ids


def relative_error(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.abs(want.astype(np.float64) - got).max() / np.abs(want).max())


def test_smollm2_continues_five_prompts_alike(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    model, big = build("smollm2-135m"), tmp_path / "big.onnx"
    assert grow(model, big, 2).error <= 1e-5
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
    assert grow(model, big, factor).error <= 1e-5
    rng = np.random.default_rng(0)
    source, grown = session(model), session(big)
    for length in (3, 17, 128):
        ids = rng.integers(1000, 20000, length).tolist()
        want = np.tile(run(source, ids), factor)
        assert relative_error(want, run(grown, ids)) <= 1e-5


# -- dialects ---------------------------------------------------------------------------------------------

STEPS = 16
ROUNDS = {"int8", "int8-fused", "genai-int4"}
"""Activations are rounded to 8 bits. A change of the last bit may move an output by whole steps of this rounding."""

HALVES = {"float16", "bfloat16"}

COSTS = {"float16": 1e-2, "bfloat16": 8e-2}
"""The allowed difference between half precision and the float32 graph: some units in the last place, 2^-11 and 2^-8."""

QUANTISED = 1.0
"""Beyond this, a quantised file gives other answers than its source. The quality of quantisation is not our concern."""

FLOAT = 2e-5
"""Both sides are float32, with other operators or other widths: several times the measured error of SmolLM2."""

HALF = 1e-2
WIDE = 1e-4
"""Without rounding only float32 errors remain, and the measured error of SmolLM2."""


@dataclass(frozen=True)
class Measured:
    """Outputs of one file for the prompts. Each is followed by its greedy continuation, if the model continues text."""

    ids: list[list[int]]
    outputs: list[np.ndarray]


@cache
def prompts(name: str) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(build(name).with_name("tokenizer.json")))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS[:3]]


def measure(name: str, path: Path) -> Measured:
    model = session(path)
    ids = prompts(name)
    if SOURCES[name].output == "logits":
        ids = [continuation(model, prompt, STEPS) for prompt in ids]
    return Measured(ids, [run(model, prompt) for prompt in ids])


def without_rounding(path: Path, ids: list[list[int]], folder: Path) -> list[np.ndarray]:
    """Outputs of the same graph in float32, with activations that are not rounded to 8 bits."""
    save_wide(unrounded(ir.load(path)), folder / "wide.onnx", ir.DataType.FLOAT)
    model = session(folder / "wide.onnx")
    return [run(model, prompt) for prompt in ids]


@cache
def reference(name: str) -> Measured:
    return measure(name, build(name))


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Rows for docs/dialects.md. They are written to out/dialects.md after all measurements."""
    rows: list[str] = []
    yield rows
    (ROOT / "out").mkdir(exist_ok=True)
    head = "| file | size | its error | growing's error | without rounding | continues | time | memory |"
    (ROOT / "out" / "dialects.md").write_text("\n".join([head, "|" + "---|" * 8, *rows]) + "\n")


CASES = [
    (name, dialect, factor)
    for name, factors in (("all-minilm-l6-v2", (2, 3)), ("smollm2-135m", (2,)))
    for dialect in dialects.dialects_of(SOURCES[name])
    for factor in factors
]


@pytest.mark.parametrize(("name", "dialect", "factor"), CASES)
def test_dialects_grow(name: str, dialect: str, factor: int, tmp_path: Path, table: list[str]) -> None:
    folder = ROOT / "out" / f"{name}.{dialect}"
    path, big = folder / "model.onnx", tmp_path / "big.onnx"
    if not folder.exists():
        dialects.write(name, dialect, build(name), folder)
    grown = grow(path, big, factor)
    plain, own = reference(name), measure(name, path)
    decodes = SOURCES[name].output == "logits"
    tiles = 1 if decodes else factor  # hidden states grow, but logits do not
    model = session(path)
    cost = max(relative_error(want, run(model, ids)) for ids, want in zip(plain.ids, plain.outputs, strict=True))
    model = session(big)
    got = [run(model, ids) for ids in own.ids]
    del model
    error = largest_error(own.outputs, got, tiles)
    wide = None
    if dialect in ROUNDS | HALVES:
        wide = largest_error(*(without_rounding(file, own.ids, tmp_path) for file in (path, big)), tiles)
    cells = [
        f"{name} {dialect} x{factor}",
        f"{size(path) * 1e3:.0f} -> {size(big) * 1e3:.0f} MB",
        f"{cost:.1e}",
        f"{error:.1e}",
        "" if wide is None else f"{wide:.1e}",
        compare_continuations(name, plain, own, got) if decodes else "",
        f"{grown.seconds:.0f} s",
        f"{grown.peak:.1f} GB",
    ]
    table.append(f"| {' | '.join(cells)} |")
    print(table[-1])
    assert grown.peak < 8
    quantised = dialect in ROUNDS or dialect.startswith("int4")
    assert cost <= COSTS.get(dialect, QUANTISED if quantised else FLOAT)
    assert error <= (cost if dialect in ROUNDS else HALF if dialect in HALVES else FLOAT)
    assert wide is None or wide <= WIDE
    if decodes and dialect not in ROUNDS:
        assert cells[5].startswith("all")
    shutil.rmtree(tmp_path)  # gigabytes


def largest_error(expected: list[np.ndarray], got: list[np.ndarray], tiles: int) -> float:
    return max(relative_error(np.tile(a, tiles), b) for a, b in zip(expected, got, strict=True))


def compare_continuations(name: str, plain: Measured, own: Measured, got: list[np.ndarray]) -> str:
    """How many words the grown model chooses like its source, after each prefix of the source's continuations."""
    alike = total = 0
    for start, a, b in zip(prompts(name), own.outputs, got, strict=True):
        chosen = a[0, len(start) - 1 : -1].argmax(-1) == b[0, len(start) - 1 : -1].argmax(-1)
        alike, total = alike + int(chosen.sum()), total + chosen.size
    kept = sum(a == b for a, b in zip(own.ids, plain.ids, strict=True))
    return f"{'all' if alike == total else alike} of {total}; {kept} of {len(plain.ids)}"
