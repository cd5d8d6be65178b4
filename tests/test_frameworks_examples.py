"""The examples run, resume, and learn the same in every framework; ONNX Runtime computes what they trained."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

for _needed in ("array_api_compat", "torch", "jax", "optax", "orbax.checkpoint"):
    pytest.importorskip(_needed)

Array = np.ndarray[Any, Any]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def test_a_model_grows_while_it_trains(tmp_path: Path) -> None:
    arguments = "--steps 8 --batch 2 --length 24 --wider 0.25 --deeper 0.75 --save-every 3 --output".split()
    command = [sys.executable, "examples/grow_while_training.py", *arguments, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    curves = []
    for resume, said in ([], "step 2: grown to 3,"), (["--resume"], "step 6: grown to"):
        done = subprocess.run(
            [*command, *resume], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert said in done.stdout and ("step 2:" in done.stdout) == (not resume)
        curves.append(losses(tmp_path / "grow_while_training_losses.csv"))
        assert [path.name for path in (tmp_path / "grow_while_training").iterdir()] == ["6"]
    assert (curves[0] == curves[1]).all()
    curve = losses(tmp_path / "grow_while_training_losses.csv")
    assert len(curve) == 8 and np.abs(np.diff(curve)).max() < 1.0
    assert np.isfinite(logits(tmp_path / "grow_while_training.onnx")).all()


def run(example: str, *arguments: str | Path | int) -> None:
    start = TORCHRUN if example == "fsdp" else [sys.executable]
    script = "distill_torch" if example == "distill" else f"train_{example}"
    command = [*start, f"examples/{script}.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "tensors replaced" in done.stdout


def losses(path: Path) -> Array:
    with path.open(newline="", encoding="utf-8") as file:
        return np.array([float(row["loss"]) for row in csv.DictReader(file)])


def logits(path: Path) -> Array:
    feeds = {"input_ids": np.arange(32)[None] + 64, "attention_mask": np.ones((1, 32), np.int64)}
    result: Array = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    return result


def apart(one: Array, other: Array) -> float:
    return float(np.abs(one - other).max() / np.abs(one).max())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of the first example, without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run("torch", "--output", folder, "--steps", 8, "--batch", 2, "--length", 24)
    return folder


def test_a_mixture_of_experts_is_made_trained_and_taken_back(tmp_path: Path) -> None:
    run("moe_torch", "--output", tmp_path, "--steps", 3, "--batch", 2, "--length", 24)
    assert len(losses(tmp_path / "moe_torch_losses.csv")) == 3
    assert apart(logits(tmp_path / "moe_torch_trained.onnx"), logits(tmp_path / "tiny_gpt_moe.onnx")) > 1e-3


@pytest.mark.parametrize("example", ["torch", "jax", "fsdp"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(example: str, whole: Path, tmp_path: Path) -> None:
    for steps in (5, 8):
        resume = ["--resume"] if steps == 8 else []
        run(example, "--output", tmp_path, "--steps", steps, "--batch", 2, "--length", 24, *resume)
    actual, expected = (
        losses(folder / f"{name}_losses.csv") for folder, name in ((tmp_path, example), (whole, "torch"))
    )
    assert len(actual) == 8 and np.abs(actual - expected).max() < 1e-4
    assert apart(logits(whole / "torch_trained.onnx"), logits(tmp_path / f"{example}_trained.onnx")) < 1e-3
    assert apart(logits(whole / "torch_trained.onnx"), logits(whole / "tiny_gpt_big.onnx")) > 1e-2
    if find_spec("matplotlib") is not None:
        assert (tmp_path / f"{example}_losses.png").stat().st_size > 5000


def test_a_small_model_learns_from_a_large_one(tmp_path: Path) -> None:
    size = ("--batch", 4, "--length", 32, "--rate", "3e-3")
    run("distill", "--output", tmp_path, "--steps", 20, *size)
    learned = losses(tmp_path / "distill_losses.csv")
    assert len(learned) == 20 and learned[-5:].mean() < 0.8 * learned[:5].mean()
    assert apart(logits(tmp_path / "distill_trained.onnx"), logits(tmp_path / "student.onnx")) > 1e-2
    run("distill", "--output", tmp_path, "--steps", 22, *size, "--resume")
    assert len(losses(tmp_path / "distill_losses.csv")) == 22


FIFTY = ("--steps", 50, "--batch", 4, "--length", 48, "--rate", "1e-3")


def test_fifty_steps_of_the_committed_model_agree(tmp_path: Path) -> None:
    import torch

    from hyperclone_onnx.frameworks.torch import load

    for framework in ("torch", "jax"):
        run(framework, "--output", tmp_path, *FIFTY)
    one, other = (losses(tmp_path / f"{framework}_losses.csv") for framework in ("torch", "jax"))
    assert len(one) == 50 and np.abs(one - other).max() < 1e-3
    model = load(tmp_path / "tiny_gpt_big.onnx")
    model.load_state_dict(torch.load(tmp_path / "torch.pt", weights_only=True)["model"])
    ids = torch.arange(32)[None] + 64
    with torch.no_grad():
        trained = model(ids, torch.ones_like(ids)).numpy()
    after = logits(tmp_path / "torch_trained.onnx")
    assert apart(trained, after) < 1e-5
    assert apart(after, logits(tmp_path / "jax_trained.onnx")) < 1e-2
    assert apart(after, logits(tmp_path / "tiny_gpt_big.onnx")) > 1e-2


def test_fifty_steps_of_a_llama_agree_with_hugging_face(tmp_path: Path) -> None:
    for needed in ("transformers", "accelerate", "safetensors"):
        pytest.importorskip(needed)
    import torch
    from transformers import AutoModelForCausalLM

    run("hf_trainer", "--output", tmp_path, *FIFTY)
    for framework in ("torch", "jax"):
        run(framework, tmp_path / "hf_big.onnx", "--output", tmp_path / framework, *FIFTY)
    curves = [losses(tmp_path / "hf_losses.csv")]
    curves += [losses(tmp_path / name / f"{name}_losses.csv") for name in ("torch", "jax")]
    assert [len(curve) for curve in curves] == [50, 50, 50]
    for other in curves[1:]:
        assert np.abs(curves[0] - other).max() < 1e-3
    ids = torch.arange(32)[None] + 64
    with torch.no_grad():
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "hf_trained")(ids).logits.numpy()
    after = logits(tmp_path / "hf_trained.onnx")
    assert apart(trained, after) < 1e-5
    assert apart(after, logits(tmp_path / "hf_big.onnx")) > 1e-2
    for name in ("torch", "jax"):
        assert apart(after, logits(tmp_path / name / f"{name}_trained.onnx")) < 1e-2


def test_the_trainer_takes_up_again(tmp_path: Path) -> None:
    for needed in ("transformers", "accelerate", "safetensors"):
        pytest.importorskip(needed)
    options = ("--batch", 2, "--length", 24, "--output", tmp_path)
    run("hf_trainer", "--steps", 5, *options)
    before = losses(tmp_path / "hf_losses.csv")
    run("hf_trainer", "--steps", 8, *options, "--resume")
    after = losses(tmp_path / "hf_losses.csv")
    assert len(after) == 8 and np.abs(after[:5] - before).max() == 0
