"""The examples run, learn alike in both frameworks, and ONNX Runtime computes what they trained."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("array_api_compat", "torch", "jax", "optax"):
    pytest.importorskip(_needed)


def losses(path: Path) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    with path.open(newline="", encoding="utf-8") as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


def test_fifty_steps_agree(tmp_path: Path) -> None:
    for framework in ("torch", "jax"):
        command = [sys.executable, f"examples/train_{framework}.py", "--output", str(tmp_path)]
        done = subprocess.run(
            [*command, "--batch", "4", "--length", "48", "--rate", "1e-3"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    one, other = (losses(tmp_path / f"{framework}_losses.csv") for framework in ("torch", "jax"))
    assert len(one) == 50 and np.abs(one - other).max() < 1e-3
    feeds = {"input_ids": np.arange(32)[None] + 64, "attention_mask": np.ones((1, 32), np.int64)}
    before, *after = (
        ort.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for name in ("tiny_gpt_big.onnx", "torch_trained.onnx", "jax_trained.onnx")
    )
    assert np.abs(after[0] - after[1]).max() < 1e-2 * np.abs(after[0]).max()
    assert np.abs(after[0] - before).max() > 1e-2 * np.abs(before).max()
